package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
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
	service = serviceName(service)
	m, err := c.MeshStatus(ctx, c.Namespace(), service)
	if err != nil {
		return err
	}
	if a.json() {
		return a.printIndented(m)
	}
	a.meshTable(m)
	return nil
}

// serviceName takes what exchange takes: service/NAME, too.
func serviceName(target string) string {
	return strings.TrimPrefix(strings.TrimPrefix(target, "service/"), "svc/")
}

// meshTable has a line for each member and port.
func (a *app) meshTable(m *cluster.MeshStatus) {
	t := newTable(a.out)
	t.row("BY", "MODE", "REQUESTS WITH", "PORT", "SINCE", "SEEN", "MACHINE", "SERVED", "OPEN", "TO ORIGIN", "FAILED")
	for _, one := range m.Members {
		who := []string{cmp.Or(one.User, one.Session), one.Mode, strings.Join(one.Match, " and "), one.Since.Local().Format("2006-01-02 15:04:05"), seenText(one.Alive, one.LastSeen)}
		for _, text := range one.Ports {
			port, _, _ := strings.Cut(text, " ")
			row := []string{who[0], who[1], who[2], text, who[3], who[4], "", "-", "-", "-", "-"}
			for _, route := range m.Routes {
				for _, s := range route.Members {
					if s.Session == one.Session && portOf(route) == port {
						row = append(row[:6], s.Machine, fmt.Sprint(s.Requests), fmt.Sprint(s.Open), fmt.Sprint(s.ToOrigin), fmt.Sprint(s.Failed))
					}
				}
			}
			t.row(row...)
			who = make([]string, len(who)) // said once
		}
	}
	t.flush()
	var sum intercept.RouteStatus
	for _, r := range m.Routes {
		sum.RequestsToOrigin, sum.OpenToOrigin, sum.Refused = sum.RequestsToOrigin+r.RequestsToOrigin, sum.OpenToOrigin+r.OpenToOrigin, sum.Refused+r.Refused
	}
	if !slices.ContainsFunc(m.Routes, func(r cluster.MeshRoute) bool { return r.Mode == api.ModeRouter }) {
		fmt.Fprintf(a.out, "All others go to the pods of %s without coming by gates.\n", printable(m.Service))
		return
	}
	fmt.Fprintf(a.out, "All others: %d requests to the pods of %s by %d gates; %d connections of clients are open.\n", sum.RequestsToOrigin, printable(m.Service), m.Gates, sum.OpenToOrigin)
	for _, r := range m.Routes {
		if r.Mode == api.ModeRouter && len(m.Routes) > 1 {
			fmt.Fprintf(a.out, "  %s: %d requests, %d connections open\n", portOf(r), r.RequestsToOrigin, r.OpenToOrigin)
		}
	}
	if sum.Refused > 0 {
		fmt.Fprintf(a.out, "%d times neither a machine nor the pods answered.\n", sum.Refused)
	}
}

// portOf is a port of the Service as MemberState.Ports begin.
func portOf(r cluster.MeshRoute) string { return fmt.Sprintf("%d/%s", r.Port, r.Protocol) }

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

// routerLog is what `culvert logs --router` shows.
type routerLog struct {
	service string
	follow  bool // until it is interrupted
	all     bool // also what the pods have, without a mark
}

// followRouter prints the access log of a meshed Service.
func (a *app) followRouter(ctx context.Context, l routerLog) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	c, err := a.openCluster(ctx)
	if err != nil {
		return err
	}
	l.service = serviceName(l.service)
	after := map[string]int64{}
	return a.printRequests(ctx, l, time.Second, func() ([]intercept.Request, error) {
		return c.MeshRequests(ctx, c.Namespace(), l.service, after)
	})
}

// printRequests prints what ask returns, once, or after each pause until ctx ends. One
// that fails after others did not is tried again, unless nothing can come of it.
func (a *app) printRequests(ctx context.Context, l routerLog, pause time.Duration, ask func() ([]intercept.Request, error)) error {
	asked, away, shown := false, false, 0
	for {
		some, err := ask()
		switch {
		case err != nil && ctx.Err() != nil:
			return nil
		case err != nil && (!asked || final(err)):
			return err
		case err != nil && !away:
			away = true
			a.notice(asError(err).Message + "; trying again")
		case err == nil:
			asked, away = true, false
		}
		for _, r := range some {
			if r.Session == "" && !l.all {
				continue
			}
			shown++
			if a.json() {
				a.printJSONLine(a.out, r)
				continue
			}
			fmt.Fprintln(a.out, requestLine(r))
		}
		if !l.follow {
			if shown == 0 && !a.json() {
				fmt.Fprintln(a.err, "No marked request yet; `"+a.name+" logs --router "+l.service+" -f --all` shows what comes, also to the pods.")
			}
			return nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
}

// final tells whether asking again is of no use.
func final(err error) bool {
	switch asError(err).Code {
	case api.CodeNotFound, api.CodeForbidden, api.CodeCredentials, api.CodeDenied:
		return true
	}
	return false
}

// requestLine is one request for people. Path and method are what somebody sent.
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
	return printable(line)
}
