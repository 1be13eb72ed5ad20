package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// interceptFlags are those of exchange, preview and expose: what comes here, and
// how to reach the cluster where nothing is connected yet.
type interceptFlags struct {
	req     api.InterceptRequest
	connect optionFlags
	wait    string
}

// The command adds its own before.
func (f *interceptFlags) add(cmd *cobra.Command, expose bool) {
	flags := cmd.Flags()
	flags.SortFlags = false
	if expose {
		flags.StringSliceVar(&f.req.Expose, "expose", nil, "`LOCAL[:REMOTE]`: what comes for REMOTE goes to the local port LOCAL; comma-separated or repeated")
	}
	flags.BoolVar(&f.req.ProxyProtocol, "proxy-protocol", false, "tell the local program who calls: PROXY protocol version 2 before each connection's first byte")
	flags.BoolVar(&f.req.Force, "force", false, "go on where this is refused for safety")
	f.connect.addAgent(cmd)
	f.connect.kt = addKt(flags) // after all others, whose names win
}

// run starts one intercept, with a session of its own if there is none.
func (f *interceptFlags) run(ctx context.Context, a *app) error {
	if _, err := cluster.ParseExpose(f.req.Expose); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	started := time.Now()
	s, made, err := a.sessionFor(ctx, &f.connect, f.check)
	if err != nil {
		return err
	}
	f.req.ID = s.ID
	if f.req.Namespace == "" {
		f.req.Namespace = a.namespace
	}
	p := newProgress(a.err, terminal(a.err) && !a.json())
	client := api.New(a.socket)
	i, err := client.Intercept(ctx, f.req, func(step string) {
		if !a.json() {
			p.Step(step)
		}
	})
	p.Close(err == nil)
	if err != nil {
		// Nothing else wants the session. One whose daemon went away ends by itself; to
		// the next daemon this would be to give up what is to be undone.
		var e *api.Error
		if gone := errors.As(err, &e) && e.Code == api.CodeDaemon; made && !gone {
			ctx, cancel := context.WithTimeout(context.Background(), undoWait)
			defer cancel()
			if e := client.Disconnect(ctx, api.DisconnectRequest{ID: s.ID}, nil); e != nil {
				err = errors.Join(err, e)
			}
		}
		if errors.Is(err, context.Canceled) {
			return &api.Error{Code: api.CodeCanceled, Message: "cancelled; what had been begun is undone", Hint: a.name + " list"}
		}
		return err
	}
	if a.json() {
		return a.printIndented(i)
	}
	a.showIntercept(i, f.req, s.InterceptOnly, time.Since(started))
	return nil
}

// check looks at what shall be intercepted before a session is made for it: what is
// wrong there is known before anything changes.
func (f *interceptFlags) check(ctx context.Context, o api.Options) error {
	if f.req.Kind == api.KindExpose {
		return nil // it is the agent's alone
	}
	expose, err := cluster.ParseExpose(f.req.Expose)
	if err != nil {
		return err
	}
	c, err := cluster.Open(o)
	if err != nil {
		return err
	}
	spec := cluster.InterceptSpec{Kind: f.req.Kind, Namespace: f.req.Namespace, Target: f.req.Target, Expose: expose, Force: f.req.Force, External: f.req.External, Host: f.req.Host}
	if f.req.Mode == api.ModeScale {
		spec.Kind = intercept.Scale
	}
	if f.req.Kind == api.KindMesh {
		if spec.Match, err = cluster.ParseMatch(f.req.Match); err != nil {
			return err
		}
	}
	_, err = c.PlanIntercept(ctx, spec)
	var held *cluster.Held
	if !errors.As(err, &held) {
		return err
	}
	last, ok, seenErr := c.SeenSession(ctx, held.Namespace, held.Holder.Session)
	if seenErr != nil || f.req.Wait > 0 || !ok || c.Now().Sub(last) > cluster.GoneAfter {
		return nil // the session waits, or takes over
	}
	return held.Err
}

// sessionFor finds the session that the flags mean, or makes one that leaves the
// machine's network alone; check is asked before.
func (a *app) sessionFor(ctx context.Context, o *optionFlags, check func(context.Context, api.Options) error) (s api.Session, made bool, err error) {
	opts, err := a.options(o)
	if err != nil {
		return s, false, err
	}
	c, err := currentCaller(a.name)
	if err != nil {
		return s, false, err
	}
	paths, err := kubeconfigPaths(a.kubeconfig, c.env, c.home)
	if err != nil {
		return s, false, err
	}
	opts.Kubeconfig = strings.Join(paths, string(filepath.ListSeparator))
	client := api.New(a.socket)
	all, err := client.Sessions(ctx)
	if err != nil {
		return s, false, cancelled(err)
	}
	var t *target
	if c.sudo { // neither kubeconfig nor plugin is root's to touch
		t, err = a.login(ctx, c, opts)
	} else {
		t, err = newTarget(opts, c.env, c.home)
	}
	if err != nil && len(all) == 0 {
		return s, false, cancelled(err)
	}
	// Without --context and --kubeconfig the only session is meant, whatever the
	// kubeconfig's current context is by now.
	named := a.context != "" || a.kubeconfig != ""
	var fitting []api.Session
	for _, one := range all {
		if one.State == api.Disconnecting || one.State == api.Disconnected || one.Reverting || one.UID != c.uid {
			continue
		}
		if named && (t == nil || one.Context != t.Context || one.Server != t.Server) {
			continue
		}
		fitting = append(fitting, one)
	}
	for _, one := range fitting {
		if !one.InterceptOnly {
			return one, false, nil
		}
	}
	if len(fitting) > 0 {
		return fitting[0], false, nil
	}
	if err != nil {
		return s, false, err
	}
	if t, err = a.login(ctx, c, opts); err != nil {
		return s, false, cancelled(err)
	}
	opts.Kubeconfig, opts.Context, opts.Namespace = t.Kubeconfig, t.Context, t.Namespace
	opts.InterceptOnly = true
	if !c.sudo { // the kubeconfig is not root's to read
		if err := check(ctx, opts); err != nil {
			return s, false, cancelled(err)
		}
	}
	if !a.json() {
		fmt.Fprintf(a.err, "No session to context %q: starting one for intercepts only (an agent pod in namespace %q; this machine's routes and names stay as they are).\n", t.Context, t.Namespace)
	}
	req := api.ConnectRequest{Options: opts, Env: c.env}
	if c.sudo {
		req.AsUID = c.uid
	}
	show, end := a.quietWatcher()
	s, err = client.Connect(ctx, req, show)
	end(err == nil)
	if err != nil && ctx.Err() != nil {
		return s, false, a.undo(client, s)
	}
	return s, err == nil, err
}

// quietWatcher shows the steps of connecting, but nothing as JSON: the result of
// the command is another one.
func (a *app) quietWatcher() (show func(api.Event), end func(bool)) {
	if a.json() {
		return nil, func(bool) {}
	}
	return a.watcher()
}

// showIntercept tells what comes here now, and how it ends. With only, names of the
// cluster do not resolve on this machine.
func (a *app) showIntercept(i api.Intercept, req api.InterceptRequest, only bool, d time.Duration) {
	what := map[string]string{api.KindExchange: "Exchanged", api.KindMesh: "Meshed", api.KindPreview: "Previewing", api.KindExpose: "Exposed"}[i.Kind]
	name := i.Service
	if name == "" {
		name = "ports of the agent's pod"
	}
	fmt.Fprintf(a.out, "%s %s in namespace %q after %s.\n", what, name, i.Namespace, took(d))
	t := newTable(a.out)
	for _, p := range i.Ports {
		from := fmt.Sprintf("port %d/%s", p.Port, p.Protocol)
		if p.Name != "" {
			from += " (" + p.Name + ")"
		}
		t.row("  "+from, "->", fmt.Sprintf("localhost:%d", p.Local))
	}
	t.flush()
	for _, at := range i.Addresses {
		fmt.Fprintf(a.out, "  %s\n", at)
	}
	if i.Kind == api.KindMesh {
		a.showMeshed(i, req.OnGone, only)
	}
	if i.Kind == api.KindExchange {
		if i.Mode == api.ModeScale {
			fmt.Fprintln(a.out, "New and open connections come here; without this machine nobody serves them.")
		} else {
			fmt.Fprintln(a.out, "New connections come here once each node knows, within a second or so; open ones stay where they are until they close.\nWithout this machine its own pods serve them.")
		}
	}
	for _, p := range i.Ports {
		if !p.Listening {
			fmt.Fprintf(a.out, "warning: nothing listens at localhost:%d now; until something does, %s\n", p.Local, meanwhile(i, req))
		}
	}
	for _, n := range i.Notes {
		fmt.Fprintf(a.out, "note: %s\n", n)
	}
	end := i.Service
	if end == "" && len(i.Ports) > 0 {
		end = fmt.Sprint(i.Ports[0].Port)
	}
	fmt.Fprintf(a.out, "End it with `%s leave %s`; `%s list` shows how it is.\n", a.name, end, a.name)
}

// meanwhile is what becomes of what would come here, while nothing listens.
func meanwhile(i api.Intercept, req api.InterceptRequest) string {
	refuse := req.OnLocalRefused == api.OnRefusedRefuse
	switch {
	case i.Kind == api.KindMesh && refuse:
		return "those requests are answered with 502"
	case i.Kind == api.KindMesh && req.OnGone == api.OnGoneFail:
		return "those requests are answered with 503"
	case i.Kind == api.KindMesh:
		return "those requests go to its own pods"
	case i.Kind == api.KindExchange && i.Mode != api.ModeScale && !refuse:
		return "connections go to its own pods"
	}
	return "connections are refused"
}
