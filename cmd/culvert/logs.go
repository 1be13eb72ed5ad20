package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

func (a *app) logsCommand() *cobra.Command {
	var follow bool
	var router routerLog
	cmd := &cobra.Command{
		Use:   "logs [CONTEXT]",
		Short: "Show what a session has logged",
		Long: `Logs shows the log of your session, or of the last one that ended. Connect with
--debug for more in it. The daemon's own log is in the journal (journalctl -u culvertd).

With --router it is the requests of a meshed Service that its gates remember: the last
few hundred with a mark; with --all also those that the pods have, from when somebody
looks on (-f). Of a request they know method and path, who asked, who answered, and
how long it took; not its query, headers or body.`,
		Example: examples(a.name, `
culvert logs
culvert logs -f staging
culvert logs --router shop -f
# does the mark arrive?
culvert logs --router shop -f --all`),
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completeSessions,
		RunE: func(cmd *cobra.Command, args []string) error {
			name := a.context
			if len(args) == 1 {
				name = args[0]
			}
			if router.all && router.service == "" {
				return usageErrorf(a.name+" logs --router SERVICE --all", "--all goes with --router")
			}
			if router.service != "" {
				if len(args) == 1 {
					return usageErrorf("--context names the cluster", "--router and %q exclude each other", args[0])
				}
				router.follow = follow
				return a.followRouter(cmd.Context(), router)
			}
			return a.logs(cmd.Context(), name, follow)
		},
	}
	cmd.Flags().BoolVarP(&follow, "follow", "f", false, "go on with what comes")
	cmd.Flags().StringVar(&router.service, "router", "", "show the requests of this meshed `SERVICE` instead")
	cmd.Flags().BoolVar(&router.all, "all", false, "with --router: also requests without a mark, which the pods have")
	complete(cmd, "router", a.completeMeshed)
	return cmd
}

func (a *app) logs(ctx context.Context, name string, follow bool) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt)
	defer stop()
	client := api.New(a.socket)
	id := ""
	if name != "" {
		sessions, err := a.sessions(ctx, client)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(sessions, func(s api.Session) bool { return s.Context == name || s.ID == name })
		if i < 0 {
			hint := a.name + " status lists what is connected"
			if len(sessions) > 0 {
				hint = "connected: " + strings.Join(contextsOf(sessions), ", ")
			}
			return &api.Error{Code: api.CodeNotFound, Message: "context \"" + name + "\" is not connected", Hint: hint}
		}
		id = sessions[i].ID
	}
	var w io.Writer = a.out
	if a.json() {
		lines := &jsonLines{app: a}
		defer lines.flush()
		w = lines
	}
	if err := client.Logs(ctx, id, follow, w); err != nil && !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// jsonLines makes an object of each line of text.
type jsonLines struct {
	app  *app
	rest []byte
}

func (l *jsonLines) Write(p []byte) (int, error) {
	l.rest = append(l.rest, p...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		l.app.printJSONLine(l.app.out, map[string]string{"line": string(line)})
		l.rest = rest
	}
}

func (l *jsonLines) flush() {
	if len(l.rest) > 0 {
		l.app.printJSONLine(l.app.out, map[string]string{"line": string(l.rest)})
	}
}
