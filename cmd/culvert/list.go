package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

func (a *app) listCommand() *cobra.Command {
	var only bool
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"birdseye"},
		Short:   "Show every Service of the namespace and who has its traffic",
		Long: `List shows the namespace's Services: which are intercepted, by whom, in which way,
since when, and whether their owner is still there. It asks the cluster and needs no session;
what this machine exposes on its agent's pod comes from the daemon, where one runs.`,
		Example: examples(a.name, `
culvert list
culvert list -n shop --intercepted
culvert list -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer stop()
			return a.list(ctx, only)
		},
	}
	cmd.Flags().BoolVar(&only, "intercepted", false, "leave out the Services that nobody intercepts")
	return cmd
}

func (a *app) list(ctx context.Context, only bool) error {
	c, err := a.openCluster(ctx)
	if err != nil {
		return err
	}
	all, err := c.List(ctx, c.Namespace())
	if err != nil {
		return err
	}
	if only {
		kept := all[:0]
		for _, s := range all {
			if s.Kind != "" {
				kept = append(kept, s)
			}
		}
		all = kept
	}
	if a.json() {
		return a.printIndented(append([]cluster.ServiceState{}, all...))
	}
	if len(all) == 0 {
		fmt.Fprintf(a.out, "No Services in namespace %q.\n", c.Namespace())
	} else {
		a.listTable(all)
	}
	a.listExposed(ctx)
	return nil
}

func (a *app) listTable(all []cluster.ServiceState) {
	t := newTable(a.out)
	t.row("SERVICE", "STATE", "BY", "SINCE", "SEEN", "PORTS")
	for _, s := range all {
		state, since, seen := "normal", "", ""
		if s.Kind != "" {
			state = s.Kind
			if s.Mode == api.ModeScale || s.Kind == intercept.Mesh && s.Mode != api.ModeRouter {
				state += " (" + s.Mode + ")"
			}
			if s.State != "active" {
				state += " (" + s.State + ")"
			}
			if !s.Since.IsZero() { // a mesh by rules has members only
				since = s.Since.Local().Format("2006-01-02 15:04:05")
			}
			seen = seenText(s.Alive, s.LastSeen)
		}
		t.row(s.Name, state, s.User, since, seen, strings.Join(s.Ports, ", "))
		for _, m := range s.Members {
			t.row("", "  "+strings.Join(m.Match, " and "), cmp.Or(m.User, m.Session), m.Since.Local().Format("2006-01-02 15:04:05"), seenText(m.Alive, m.LastSeen), strings.Join(m.Ports, ", "))
		}
	}
	t.flush()
}

// listExposed adds what a session of this machine has on its agent's pod.
func (a *app) listExposed(ctx context.Context) {
	all, err := api.New(a.socket).Intercepts(ctx)
	if err != nil {
		return // without a daemon nothing is exposed
	}
	for _, i := range all {
		if i.Kind == api.KindExpose {
			for k, p := range i.Ports {
				at := fmt.Sprint("port ", p.Port)
				if k < len(i.Addresses) {
					at = i.Addresses[k]
				}
				fmt.Fprintf(a.out, "exposed: %s/%s -> localhost:%d\n", at, p.Protocol, p.Local)
			}
		}
		if i.State == api.InterceptLost {
			fmt.Fprintf(a.out, "lost: %s in namespace %s: %s\n", i.Service, i.Namespace, i.Cause)
		}
	}
}
