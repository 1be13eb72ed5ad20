package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

func (a *app) disconnectCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "disconnect [CONTEXT]",
		Short: "Leave a cluster's network, or all of them",
		Long: `Disconnect takes down the routes, the DNS settings and the device, and removes
the agent from the cluster. Without CONTEXT it ends all of your sessions.`,
		Example: examples(a.name, `
culvert disconnect
culvert disconnect staging`),
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeSessions,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := a.context
			if len(args) == 1 {
				if name != "" && name != args[0] {
					return usageErrorf("give it once", "two contexts: %s and --context %s", args[0], name)
				}
				name = args[0]
			}
			return a.disconnect(cmd.Context(), name)
		},
	}
}

func (a *app) disconnect(ctx context.Context, name string) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	client := api.New(a.socket)
	sessions, err := a.sessions(ctx, client)
	if err != nil {
		return err
	}
	sessions = slices.DeleteFunc(sessions, func(s api.Session) bool { return s.State == api.Disconnected })
	chosen := sessions
	if name != "" {
		chosen = slices.DeleteFunc(slices.Clone(sessions), func(s api.Session) bool { return s.Context != name && s.ID != name })
	}
	if len(chosen) == 0 {
		err := a.forget(ctx, client, name)
		var e *api.Error
		if err != nil && !(errors.As(err, &e) && e.Code == api.CodeNotFound) {
			return err
		}
		if err != nil && name != "" && len(sessions) > 0 {
			return &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("context %q is not connected", name), Hint: "connected: " + strings.Join(contextsOf(sessions), ", ")}
		}
		if !a.json() {
			fmt.Fprintln(a.out, "Nothing is connected.")
		}
		return nil
	}
	var trouble []error
	for _, s := range chosen {
		show, end := a.watcher()
		err := client.Disconnect(ctx, api.DisconnectRequest{ID: s.ID}, show)
		var e *api.Error
		if errors.As(err, &e) && e.Code == api.CodeNotFound {
			err = nil // it has ended by itself meanwhile, as one does that only undoes
		}
		end(err == nil)
		if err != nil { // the others end all the same
			trouble = append(trouble, fmt.Errorf("disconnecting %s: %w", s.Context, err))
			if ctx.Err() != nil {
				break
			}
			continue
		}
		if !a.json() {
			fmt.Fprintf(a.out, "Disconnected from %s.\n", s.Context)
		}
	}
	if len(trouble) == 1 {
		return trouble[0]
	}
	return errors.Join(trouble...)
}

// forget asks the daemon to forget a session that is at rest now but would come
// back at the next boot. Root does not ask: its request would mean everybody's.
func (a *app) forget(ctx context.Context, client *api.Client, name string) error {
	if os.Getuid() == 0 {
		return &api.Error{Code: api.CodeNotFound, Message: "nothing is connected"}
	}
	return client.Disconnect(ctx, api.DisconnectRequest{Context: name}, nil)
}

// sessions are those of the caller, also behind sudo, where the daemon shows
// root everybody's.
func (a *app) sessions(ctx context.Context, client *api.Client) ([]api.Session, error) {
	all, err := client.Sessions(ctx)
	if err != nil || os.Getuid() != 0 {
		return all, err
	}
	c, err := currentCaller(a.name)
	if err != nil {
		return all, nil // root itself manages everybody's
	}
	return slices.DeleteFunc(all, func(s api.Session) bool { return s.UID != c.uid }), nil
}

func contextsOf(sessions []api.Session) []string {
	var names []string
	for _, s := range sessions {
		names = append(names, s.Context)
	}
	return names
}
