package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

// undoWait is how long a cancelled connect waits for the daemon to undo what it
// did; a session gives its own cleanup 15 s.
const undoWait = 20 * time.Second

func (a *app) connectCommand() *cobra.Command {
	var o optionFlags
	var atBoot bool
	cmd := &cobra.Command{
		Use:   "connect",
		Short: "Put this machine on a cluster's network",
		Long: `Connect starts an agent pod in the cluster and routes the cluster's pod and
Service ranges, and its names, through it. It returns when a packet has been to
the cluster and back; the connection stays until ` + "`" + a.name + " disconnect`" + `.`,
		Example: examples(a.name, `
culvert connect
culvert connect --context staging -n shop
culvert connect --exclude-ips 10.96.7.0/24,db.example.com --include-ips 192.168.40.0/24
culvert connect --image registry.example.com/team/culvert-agent:v1 --image-pull-secret registry
# the agent must fit a quota and a certain kind of node
culvert connect --pod-quota 0.5c,512m --node-selector pool=tools
# packets straight to the agent's node by UDP, where it is reachable
culvert connect --udp nodeport
# connect again whenever this machine starts
culvert connect --at-boot`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.connect(cmd.Context(), &o, atBoot)
		},
	}
	o.add(cmd)
	cmd.Flags().BoolVar(&atBoot, "at-boot", false, "let the daemon connect again when the machine starts")
	return cmd
}

func (a *app) connect(ctx context.Context, o *optionFlags, atBoot bool) error {
	opts, err := a.options(o)
	if err != nil {
		return err
	}
	c, err := currentCaller(a.name)
	if err != nil {
		return err
	}
	paths, err := kubeconfigPaths(a.kubeconfig, c.env, c.home)
	if err != nil {
		return err
	}
	opts.Kubeconfig = strings.Join(paths, string(filepath.ListSeparator))

	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	// The kubeconfig first: what is wrong there is wrong without a daemon too.
	// Then the daemon, before a credentials plugin asks anything of the user.
	if !c.sudo {
		if _, err := newTarget(opts, c.env, c.home); err != nil {
			return err
		}
	}
	client := api.New(a.socket)
	if _, err := client.Version(ctx); err != nil {
		return cancelled(err)
	}
	t, err := a.login(ctx, c, opts)
	if err != nil {
		return cancelled(err)
	}
	opts.Kubeconfig, opts.Context, opts.Namespace = t.Kubeconfig, t.Context, t.Namespace
	if !a.json() {
		a.announce(t, opts)
	}

	req := api.ConnectRequest{Options: opts, Env: c.env, AtBoot: atBoot}
	if c.sudo {
		req.AsUID = c.uid
	}
	started := time.Now()
	s, err := a.follow(ctx, client, req)
	switch {
	case err == nil && a.json():
	case err == nil:
		a.summary(a.out, s, time.Since(started))
	case ctx.Err() != nil:
		stop() // a second Ctrl-C ends the program at once
		return a.undo(client, s)
	}
	return err
}

// follow connects and shows the steps.
func (a *app) follow(ctx context.Context, client *api.Client, req api.ConnectRequest) (api.Session, error) {
	show, end := a.watcher()
	s, err := client.Connect(ctx, req, show)
	end(err == nil)
	return s, err
}

// watcher returns what shows the events of one session, as lines of JSON or as
// steps, and what ends the display.
func (a *app) watcher() (show func(api.Event), end func(ok bool)) {
	if a.json() {
		return func(e api.Event) { a.printJSONLine(a.out, e) }, func(bool) {}
	}
	p := newProgress(a.err, terminal(a.err))
	show = func(e api.Event) {
		if a.debug {
			a.printJSONLine(a.err, e)
		}
		switch s := e.Session; s.State {
		case api.Connecting:
			p.Step(s.Step)
		case api.Reconnecting, api.NeedsLogin:
			p.Step(string(s.State) + ": " + s.Cause)
		case api.Disconnecting:
			if s.Step != "" {
				p.Step(s.Step)
			} else {
				p.Step("disconnecting")
			}
		}
	}
	return show, p.Close
}

// undo waits until nothing is left of a connect that the user cancelled.
func (a *app) undo(client *api.Client, s api.Session) error {
	if s.ID != "" {
		if !a.json() {
			fmt.Fprintln(a.err, "cancelling; Ctrl-C again leaves it to the daemon")
		}
		ctx, cancel := context.WithTimeout(context.Background(), undoWait)
		defer cancel()
		show, end := a.watcher()
		err := client.Disconnect(ctx, api.DisconnectRequest{ID: s.ID}, show)
		end(err == nil)
		var e *api.Error
		if err != nil && !(errors.As(err, &e) && e.Code == api.CodeNotFound) {
			return &api.Error{Code: api.CodeCanceled, Message: fmt.Sprintf("cancelled, but undoing it did not end well: %v", err), Hint: a.name + " status"}
		}
	}
	return &api.Error{Code: api.CodeCanceled, Message: "cancelled; nothing is left of this connect"}
}

// cancelled turns the error of a context that Ctrl-C ended into one for people.
func cancelled(err error) error {
	if errors.Is(err, context.Canceled) {
		return &api.Error{Code: api.CodeCanceled, Message: "cancelled; nothing was changed"}
	}
	return err
}

// announce says what is about to change, before it does.
func (a *app) announce(t *target, o api.Options) {
	as := ""
	if t.User != "" {
		as = " as " + t.User
	}
	fmt.Fprintf(a.err, "Connecting this machine to context %q (%s)%s.\n", t.Context, t.Server, as)
	names := "cluster names will be resolved by it"
	if o.DNS == "none" {
		names = "names stay as they are (--dns none)"
	}
	fmt.Fprintf(a.err, "In the cluster: an agent pod in namespace %q. Here: a TUN device, routes to the cluster's ranges; %s.\n", t.Namespace, names)
}

// summaryRoutes is how many routes a summary lists; status lists all.
const summaryRoutes = 8

// summary says what is connected now and how to leave.
func (a *app) summary(w io.Writer, s api.Session, d time.Duration) {
	fmt.Fprintf(w, "Connected to %s in %s", s.Context, took(d))
	if s.Carrier.RTT > 0 {
		fmt.Fprintf(w, "; a packet to the cluster and back took %s", took(s.Carrier.RTT))
	}
	fmt.Fprintln(w, ".")
	t := newTable(w)
	for i, r := range s.Routes {
		label := ""
		if i == 0 {
			label = "routes"
		}
		if i == summaryRoutes && len(s.Routes) > summaryRoutes+1 {
			t.row("", fmt.Sprintf("and %d more: %s status -o wide", len(s.Routes)-i, a.name))
			break
		}
		t.row(fmt.Sprintf("  %-7s", label), r.Prefix.String(), r.Source)
	}
	t.flush()
	t = newTable(w)
	t.row("  names", dnsText(s.DNS))
	t.row("  agent", agentText(s.Agent))
	t.row("  carrier", s.Carrier.Name)
	t.row("  device", deviceText(s))
	t.flush()
	for _, n := range s.Notes {
		fmt.Fprintf(w, "note: %s\n", n)
	}
	fmt.Fprintf(w, "Leave with `%s disconnect`; `%s status` shows how it is.\n", a.name, a.name)
}
