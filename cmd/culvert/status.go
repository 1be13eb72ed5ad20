package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

func (a *app) statusCommand() *cobra.Command {
	var watch, routes bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show what is connected",
		Long: `Status lists your sessions. With --output wide (or --routes) every route and
exclusion is listed with where it came from; with --output json the list is as
the daemon's API has it. The exit code is 0 as long as the daemon answers.`,
		Example: examples(a.name, `
culvert status
culvert status -o wide
culvert status --watch
culvert status -o json`),
		Args:        cobra.NoArgs,
		Annotations: map[string]string{wideOutput: "yes"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			client := api.New(a.socket)
			wide := routes || a.output == "wide"
			if watch {
				return a.watch(cmd.Context(), client, wide)
			}
			sessions, err := a.sessions(cmd.Context(), client)
			if err != nil {
				return err
			}
			if err := a.printSessions(a.out, sessions, wide, time.Now()); err != nil || a.json() {
				return err
			}
			a.printIntercepts(cmd.Context(), client)
			return nil
		},
	}
	cmd.Flags().BoolVarP(&watch, "watch", "w", false, "show every change until Ctrl-C")
	cmd.Flags().BoolVar(&routes, "routes", false, "list all routes and exclusions with their sources")
	return cmd
}

// printSessions writes the list of sessions in the chosen form.
func (a *app) printSessions(w io.Writer, sessions []api.Session, wide bool, now time.Time) error {
	if a.json() {
		if sessions == nil {
			sessions = []api.Session{}
		}
		enc := json.NewEncoder(w)
		enc.SetEscapeHTML(false)
		enc.SetIndent("", "  ")
		return enc.Encode(sessions)
	}
	if len(sessions) == 0 {
		fmt.Fprintf(w, "Nothing is connected. `%s connect` joins the cluster of the current context.\n", a.name)
		return nil
	}
	users := slices.ContainsFunc(sessions, func(s api.Session) bool { return s.UID != sessions[0].UID })
	t := newTable(w)
	head := []string{"CONTEXT", "STATE", "FOR", "DEVICE", "ROUTES", "AGENT", "CARRIER", "RTT", "DETAIL"}
	if users {
		head = append([]string{"USER"}, head...)
	}
	t.row(head...)
	for _, s := range sessions {
		row := []string{
			s.Context, string(s.State), took(now.Sub(s.Since)), or(s.Device, "-"), strconv.Itoa(len(s.Routes)),
			or(strings.TrimPrefix(s.Agent.Namespace+"/"+s.Agent.Pod, "/"), "-"), or(s.Carrier.Name, "-"), "-", detail(s),
		}
		if s.Carrier.RTT > 0 {
			row[7] = took(s.Carrier.RTT)
		}
		if users {
			row = append([]string{or(s.User, strconv.Itoa(s.UID))}, row...)
		}
		t.row(row...)
	}
	t.flush()
	for _, s := range sessions {
		if s.Error != nil && s.Error.Hint != "" {
			fmt.Fprintf(w, "hint: %s: %s\n", s.Context, printable(s.Error.Hint))
		}
		for _, n := range s.Notes {
			fmt.Fprintf(w, "note: %s: %s\n", s.Context, printable(n))
		}
	}
	if wide {
		for _, s := range sessions {
			printSession(w, s)
		}
	}
	return nil
}

// printIntercepts adds what traffic comes here, and why some does not any more. A
// daemon that is older than this program knows of none.
func (a *app) printIntercepts(ctx context.Context, client *api.Client) {
	all, err := client.Intercepts(ctx)
	if err != nil || len(all) == 0 {
		return
	}
	a.interceptTable(all, time.Now())
}

func (a *app) interceptTable(all []api.Intercept, now time.Time) {
	t := newTable(a.out)
	t.row("INTERCEPT", "STATE", "FOR", "PORTS", "DETAIL")
	for _, i := range all {
		var ports []string
		for _, p := range i.Ports {
			text := fmt.Sprintf("%d/%s -> localhost:%d", p.Port, p.Protocol, p.Local)
			if !p.Listening {
				text += " (nothing listens)"
			}
			ports = append(ports, text)
		}
		name := i.Kind + " " + i.Service
		if i.Service == "" {
			name = i.Kind + " " + strings.Join(i.Addresses, " ")
		}
		detail := i.Cause
		if len(i.Match) > 0 {
			detail = strings.TrimSuffix(strings.Join(i.Match, " and ")+"; "+i.Cause, "; ")
		}
		t.row(name, i.State, took(now.Sub(i.Since)), strings.Join(ports, ", "), detail)
	}
	t.flush()
	for _, i := range all {
		for _, n := range i.Notes {
			fmt.Fprintf(a.out, "note: %s: %s\n", printable(or(i.Service, i.Kind)), printable(n))
		}
	}
}

// detail is why a session is in its state.
func detail(s api.Session) string {
	switch {
	case s.State == api.Disconnected && s.Error != nil:
		return s.Error.Message
	case s.Cause != "":
		return s.Cause
	case s.Step != "":
		return s.Step
	}
	return ""
}

// printSession writes all there is to know of a session.
func printSession(w io.Writer, s api.Session) {
	fmt.Fprintf(w, "\n%s\n", printable(s.Context))
	t := newTable(w)
	t.row("  server", s.Server)
	t.row("  namespace", s.Namespace)
	t.row("  device", deviceText(s))
	t.row("  names", dnsText(s.DNS))
	if len(s.DNS.Domains) > 0 {
		t.row("  domains", strings.Join(s.DNS.Domains, " "))
	}
	t.row("  agent", agentText(s.Agent))
	t.row("  image", strings.TrimSpace(s.Agent.Image+" "+s.Agent.Version))
	t.row("  carrier", carrierText(s.Carrier))
	for _, o := range s.Carrier.Others {
		t.row("  not used", fmt.Sprintf("%s: %s", o.Name, o.Reason))
	}
	t.row("  session", fmt.Sprintf("%s, pid %d, restarted %d times", s.ID, s.PID, s.Restarts))
	if s.AtBoot {
		t.row("  at boot", "connects again")
	}
	t.flush()
	t = newTable(w)
	for _, r := range s.Routes {
		t.row("  route", r.Prefix.String(), r.Source)
	}
	for _, r := range s.Excluded {
		t.row("  exclude", r.Prefix.String(), r.Source)
	}
	t.flush()
}

// watch shows every change until Ctrl-C: the table drawn anew on a terminal, a
// line per change elsewhere.
func (a *app) watch(ctx context.Context, client *api.Client, wide bool) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	var sessions []api.Session
	redraw := terminal(a.out)
	if redraw {
		fmt.Fprint(a.out, "\x1b[H\x1b[2J")
		_ = a.printSessions(a.out, nil, false, time.Now())
	}
	return client.Watch(ctx, func(e api.Event) {
		s := e.Session
		switch {
		case a.json():
			a.printJSONLine(a.out, e)
			return
		case !redraw:
			fmt.Fprintln(a.out, strings.TrimRight(fmt.Sprintf("%s  %s  %s  %s", time.Now().Format(time.TimeOnly), printable(s.Context), s.State, printable(detail(s))), " "))
			return
		}
		i := slices.IndexFunc(sessions, func(o api.Session) bool { return o.ID == s.ID })
		switch {
		case i < 0 && s.State != api.Disconnected:
			sessions = append(sessions, s)
		case i >= 0 && s.State == api.Disconnected && s.Error == nil:
			sessions = slices.Delete(sessions, i, i+1)
		case i >= 0:
			sessions[i] = s
		}
		fmt.Fprint(a.out, "\x1b[H\x1b[2J")
		_ = a.printSessions(a.out, sessions, wide, time.Now())
	})
}

func or(s, otherwise string) string {
	if s == "" {
		return otherwise
	}
	return s
}

// carrierText is the carrier in use, its round trip and what it moves.
func carrierText(c api.CarrierStatus) string {
	text := or(c.Name, "none")
	if c.RTT > 0 {
		text += ", round trip " + took(c.RTT)
	}
	return text + fmt.Sprintf(", redialled %d times, %s sent (%s/s), %s received (%s/s)",
		c.Redials, bytesText(c.Sent), bytesText(c.SentRate), bytesText(c.Received), bytesText(c.ReceivedRate))
}

// bytesText is a number of bytes as people read it.
func bytesText(n uint64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n)/1000, 0
	for f >= 999.95 && i < len(units)-1 {
		f, i = f/1000, i+1
	}
	return fmt.Sprintf("%.1f %cB", f, units[i])
}
