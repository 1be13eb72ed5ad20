package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

func (a *app) leaveCommand() *cobra.Command {
	var req api.LeaveRequest
	cmd := &cobra.Command{
		Use:   "leave [SERVICE | PORT]",
		Short: "End intercepts: a Service's traffic goes back to its pods",
		Long: `Leave ends an exchange, a mesh or a preview by the Service's name, and an expose by
its port. The Service is led back first; connections that are open then have --drain to
end. Of a mesh it ends only what comes to this machine. Without a name it ends the only one there is.`,
		Example: examples(a.name, `
culvert leave tomcat
culvert leave --all
culvert leave tomcat --drain 2m`),
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if req.All {
					return usageErrorf("leave one of them out", "--all and %q exclude each other", args[0])
				}
				req.Service = args[0]
			}
			req.Context, req.Namespace = a.context, a.namespace
			return a.leave(cmd.Context(), req)
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			var names []string
			all, _ := api.New(a.socket).Intercepts(cmd.Context()) // without a daemon there is nothing to complete
			for _, i := range all {
				names = append(names, interceptName(i))
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().BoolVar(&req.All, "all", false, "end all intercepts")
	cmd.Flags().DurationVar(&req.Drain, "drain", 0, "how long open connections have to end (default: as at its start, else 30s)")
	return cmd
}

func (a *app) leave(ctx context.Context, req api.LeaveRequest) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	client := api.New(a.socket)
	if req.Service == "" && !req.All {
		all, err := client.Intercepts(ctx)
		if err != nil {
			return err
		}
		switch len(all) {
		case 0:
			return &api.Error{Code: api.CodeNotFound, Message: "nothing is intercepted by your sessions", Hint: a.name + " list shows what others intercept; `" + a.name + " recover SERVICE` ends what a dead session left"}
		case 1:
			req.Service, req.Namespace = interceptName(all[0]), all[0].Namespace
		default:
			var names []string
			for _, i := range all {
				names = append(names, interceptName(i))
			}
			return usageErrorf("name one, or use --all", "there are %d intercepts: %v", len(all), names)
		}
	}
	p := newProgress(a.err, terminal(a.err) && !a.json())
	ended, err := client.Leave(ctx, req, func(step string) {
		if !a.json() {
			p.Step(step)
		}
	})
	p.Close(err == nil)
	var e *api.Error
	if req.All && errors.As(err, &e) && e.Code == api.CodeNotFound {
		err = nil // no session, so nothing to end
	}
	if err != nil {
		return err
	}
	if err := a.endUnused(ctx, client, ended); err != nil {
		return err
	}
	if a.json() {
		return a.printIndented(append([]api.Intercept{}, ended...))
	}
	for _, i := range ended {
		name := interceptName(i)
		if i.Kind == api.KindExpose {
			name = "port " + name
		}
		fmt.Fprintf(a.out, "Left %s (%s, since %s).\n", name, i.Kind, took(time.Since(i.Since)))
	}
	if len(ended) == 0 {
		fmt.Fprintln(a.out, "Nothing was intercepted.")
	}
	return nil
}

// endUnused disconnects sessions that were for intercepts only and have none any
// more.
func (a *app) endUnused(ctx context.Context, client *api.Client, ended []api.Intercept) error {
	if len(ended) == 0 {
		return nil
	}
	sessions, err := client.Sessions(ctx)
	if err != nil {
		return err
	}
	left, err := client.Intercepts(ctx)
	if err != nil {
		return err
	}
	for _, s := range sessions {
		used := !s.InterceptOnly
		for _, i := range left {
			used = used || i.Session == s.ID
		}
		ours := false
		for _, i := range ended {
			ours = ours || i.Session == s.ID
		}
		if used || !ours {
			continue
		}
		if err := client.Disconnect(ctx, api.DisconnectRequest{ID: s.ID}, nil); err != nil {
			return err
		}
	}
	return nil
}

// interceptName is what leave takes.
func interceptName(i api.Intercept) string {
	if i.Service == "" && len(i.Ports) > 0 {
		return fmt.Sprint(i.Ports[0].Port)
	}
	return i.Service
}
