package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// showMesh shows the members of a mesh, and what its gates counted.
func (a *app) showMesh(ctx context.Context, service string) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	c, err := a.openCluster(ctx)
	if err != nil {
		return err
	}
	m, err := c.MeshStatus(ctx, c.Namespace(), strings.TrimPrefix(strings.TrimPrefix(service, "service/"), "svc/"))
	if err != nil {
		return err
	}
	if a.json() {
		return a.printIndented(m)
	}
	a.meshTable(m)
	return nil
}

func (a *app) meshTable(m *cluster.MeshStatus) {
	t := newTable(a.out)
	t.row("BY", "REQUESTS WITH", "PORT", "SINCE", "SEEN", "MACHINE", "SERVED", "OPEN", "TO ORIGIN", "FAILED")
	var origin, open int64
	for _, one := range m.Members {
		var sum intercept.MemberStatus
		for _, r := range m.Routes {
			for _, s := range r.Members {
				if s.Session == one.Session {
					sum.Machine = s.Machine
					sum.Requests, sum.Open = sum.Requests+s.Requests, sum.Open+s.Open
					sum.ToOrigin, sum.Failed = sum.ToOrigin+s.ToOrigin, sum.Failed+s.Failed
				}
			}
		}
		t.row(cmp.Or(one.User, one.Session), strings.Join(one.Match, " and "), strings.Join(one.Ports, ", "), one.Since.Local().Format("2006-01-02 15:04:05"),
			seenText(one.Alive, one.LastSeen), sum.Machine, fmt.Sprint(sum.Requests), fmt.Sprint(sum.Open), fmt.Sprint(sum.ToOrigin), fmt.Sprint(sum.Failed))
	}
	for _, r := range m.Routes {
		origin, open = origin+r.RequestsToOrigin, open+int64(r.OpenToOrigin)
	}
	t.flush()
	fmt.Fprintf(a.out, "All others: %d requests to the pods of %s by %d gates; %d connections of clients are open.\n", origin, m.Service, m.Gates, open)
}

// seenText is when a session was seen last.
func seenText(alive bool, last time.Time) string {
	switch {
	case alive:
		return "alive"
	case last.IsZero():
		return "never"
	}
	return took(time.Since(last)) + " ago"
}

// followRouter prints the access log of a meshed Service; with follow until it is
// interrupted.
func (a *app) followRouter(ctx context.Context, service string, follow bool) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	c, err := a.openCluster(ctx)
	if err != nil {
		return err
	}
	after := map[string]int64{}
	for {
		some, err := c.MeshRequests(ctx, c.Namespace(), service, after)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		for _, r := range some {
			if a.json() {
				a.printJSONLine(a.out, r)
				continue
			}
			fmt.Fprintln(a.out, requestLine(r))
		}
		if !follow {
			if len(some) == 0 && !a.json() {
				fmt.Fprintln(a.err, "No marked request yet; `"+a.name+" logs --router "+service+" -f` shows what comes, also to the pods.")
			}
			return nil
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return nil
		}
	}
}

// requestLine is one request for people.
func requestLine(r intercept.Request) string {
	by := cmp.Or(r.User, r.Session)
	switch {
	case by == "":
		by = "origin"
	case r.Origin:
		by = "origin, for " + by
	}
	status := "-"
	if r.Status > 0 {
		status = fmt.Sprint(r.Status)
	}
	line := fmt.Sprintf("%s %s port %d %s %s %s %s %s -> %s", r.Time.Local().Format("15:04:05.000"), r.Client.Addr(), r.Port, r.Method, r.Path, r.Protocol, status, r.Duration.Round(100*time.Microsecond), by)
	if r.Error != "" {
		line += " (" + r.Error + ")"
	}
	return line
}
