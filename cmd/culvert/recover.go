package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/wire/intercept"
)

func (a *app) recoverCommand() *cobra.Command {
	var force bool
	var drain time.Duration
	cmd := &cobra.Command{
		Use:   "recover SERVICE",
		Short: "Give a Service back to its own pods, whoever intercepted it",
		Long: `Recover undoes an exchange, a mesh, a preview or a replaced workload with nothing but what
the cluster knows of it. It needs no daemon and no session, and anybody who may change the
Service can do it. The Service is led back first, then everything that culvert made for it is
deleted. An intercept whose owner is alive, or one of a mesh's members, is left alone without --force.`,
		Example: examples(a.name, `
culvert recover tomcat
culvert recover tomcat -n shop --force
culvert recover deployment/tomcat`),
		Args: exactlyOne("a Service", "tomcat"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			return a.completeIntercepted(cmd, func(intercept.Entry) bool { return len(args) == 0 })
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer stop()
			return a.recover(ctx, args[0], force, drain)
		},
	}
	cmd.Flags().BoolVar(&force, "force", false, "also when its owner is alive")
	cmd.Flags().DurationVar(&drain, "drain", 0, "how long open connections have to end (default: 3s)")
	return cmd
}

func (a *app) recover(ctx context.Context, target string, force bool, drain time.Duration) error {
	c, err := a.openCluster(ctx)
	if err != nil {
		return err
	}
	p := newProgress(a.err, terminal(a.err) && !a.json())
	say := func(step string) {
		if !a.json() {
			p.Step(step)
		}
	}
	say("looking at " + target)
	r, err := c.Recover(ctx, cluster.RecoverSpec{Namespace: c.Namespace(), Target: target, Force: force, Drain: drain, Say: say})
	p.Close(err == nil)
	if err != nil {
		return err
	}
	if a.json() {
		return a.printIndented(r)
	}
	if !r.Found {
		fmt.Fprintf(a.out, "%s in namespace %q is not intercepted; there is nothing to undo.\n", r.Service, c.Namespace())
		return nil
	}
	fmt.Fprintf(a.out, "%s in namespace %q is its own again (it was intercepted by %s).\n", r.Service, c.Namespace(), or(r.User, "nobody known"))
	return nil
}

func (a *app) cleanCommand() *cobra.Command {
	var spec cluster.CleanSpec
	var everywhere bool
	cmd := &cobra.Command{
		Use:   "clean",
		Short: "Remove what sessions that are gone left in the cluster",
		Long: `Clean finds everything of culvert's whose session has not been heard of for
--older-than, gives Services and workloads back to their own pods, and deletes the rest. What a
living session owns is never touched. It needs no daemon; --dry-run only shows.`,
		Example: examples(a.name, `
culvert clean --dry-run
culvert clean --older-than 1h
culvert clean -A --dry-run`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer stop()
			if spec.OlderThan < time.Minute {
				return usageErrorf("--older-than 10m", "--older-than %v is shorter than a minute: living sessions would look dead", spec.OlderThan)
			}
			if everywhere && a.namespace != "" {
				return usageErrorf("leave one of them out", "--all-namespaces and --namespace exclude each other")
			}
			return a.clean(ctx, spec, everywhere)
		},
	}
	cmd.Flags().BoolVar(&spec.DryRun, "dry-run", false, "show what would be done")
	cmd.Flags().DurationVar(&spec.OlderThan, "older-than", 24*time.Hour, "how long a session has to be unheard of")
	cmd.Flags().BoolVarP(&everywhere, "all-namespaces", "A", false, "in all namespaces that you may see")
	return cmd
}

func (a *app) clean(ctx context.Context, spec cluster.CleanSpec, everywhere bool) error {
	c, err := a.openCluster(ctx)
	if err != nil {
		return err
	}
	if spec.Namespaces = []string{c.Namespace()}; everywhere {
		if spec.Namespaces, err = c.NamespaceNames(ctx); err != nil {
			return err
		}
	}
	done, notes, err := c.Clean(ctx, spec)
	for _, n := range notes {
		a.notice(n)
	}
	if a.json() {
		if e := a.printIndented(append([]cluster.Leftover{}, done...)); e != nil {
			return e
		}
		return err
	}
	if len(done) > 0 {
		t := newTable(a.out)
		t.row("NAMESPACE", "KIND", "NAME", "OF", "SEEN", "ACTION")
		for _, l := range done {
			seen := "never"
			if !l.LastSeen.IsZero() {
				seen = l.LastSeen.Local().Format("2006-01-02 15:04:05")
			}
			t.row(l.Namespace, l.Kind, l.Name, or(l.User, l.Session), seen, l.Action)
		}
		t.flush()
	} else if err == nil {
		fmt.Fprintln(a.out, "Nothing is left over.")
	}
	return err
}
