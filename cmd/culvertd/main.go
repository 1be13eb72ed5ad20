// Command culvertd is Culvert's daemon: flags and wiring of package daemon.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
)

func main() {
	// Somebody who stops reading must not end the daemon. Catching SIGPIPE does
	// that and, unlike ignoring it, is not inherited by exec plugins.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "culvertd:", err)
		var e *api.Error
		if errors.As(err, &e) && e.Code == api.CodeUsage {
			os.Exit(2)
		}
		os.Exit(1)
	}
}

// flags are the daemon's; they override root's configuration file.
type flags struct {
	socket, group, session, state, file string
	debug                               bool
}

func command() *cobra.Command {
	var f flags
	root := &cobra.Command{
		Use:           "culvertd",
		Short:         "Culvert's daemon: owns the devices, routes and DNS settings of `culvert connect`",
		Args:          cobra.NoArgs,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			file, err := daemon.ReadFile(f.file)
			if err != nil {
				return err
			}
			d, err := f.daemon(file)
			if err != nil {
				return err
			}
			return d.Run(cmd.Context())
		},
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return &api.Error{Code: api.CodeUsage, Message: err.Error(), Hint: "culvertd --help"}
	})
	p := root.PersistentFlags()
	p.StringVar(&f.socket, "socket", api.DefaultSocket, "Unix socket to listen on")
	p.StringVar(&f.group, "group", "", "group whose members may connect (default "+api.Group+")")
	p.StringVar(&f.session, "session-binary", "", "the culvert program, owned by root (default: beside culvertd)")
	p.StringVar(&f.state, "state-dir", daemon.DefaultStateDir, "where sessions to connect at boot are remembered")
	p.StringVar(&f.file, "config", daemon.DefaultFile, "root's configuration file; may be missing")
	p.BoolVar(&f.debug, "debug", false, "log more, and what session processes print")

	root.AddCommand(
		&cobra.Command{
			Use:   "cleanup",
			Short: "Remove what a dead daemon left on this machine: DNS settings, devices, routes, rules",
			Args:  cobra.NoArgs,
			RunE: func(cmd *cobra.Command, _ []string) error {
				d, err := f.daemon(daemon.File{}) // undoing must not depend on a file that may be wrong
				if err != nil {
					return err
				}
				removed, err := d.Cleanup(cmd.Context())
				for _, what := range removed {
					fmt.Println("removed", what)
				}
				return err
			},
		},
		&cobra.Command{
			Use:    "guard",
			Short:  "Give the machine its names back when the daemon dies; the daemon starts it",
			Args:   cobra.NoArgs,
			Hidden: true,
			RunE: func(cmd *cobra.Command, _ []string) error {
				// It must outlive the signals that end the daemon and its terminal.
				signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
				d, err := f.daemon(daemon.File{}) // undoing must not depend on a file that may be wrong
				if err != nil {
					return err
				}
				return d.Guard(context.Background(), os.Stdin)
			},
		},
		&cobra.Command{
			Use:   "version",
			Short: "Print the version",
			Args:  cobra.NoArgs,
			Run:   func(*cobra.Command, []string) { fmt.Println("culvertd", version.Version) },
		},
	)
	return root
}

// daemon makes the daemon of flags and configuration file.
func (f *flags) daemon(file daemon.File) (*daemon.Daemon, error) {
	level := slog.LevelInfo
	if f.debug {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
	slog.SetDefault(log)
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding culvertd's own path: %w", err)
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	cfg := daemon.Config{
		Socket:        f.socket,
		Group:         f.group,
		SessionBinary: f.session,
		StateDir:      f.state,
		File:          f.file,
		Debug:         f.debug,
		MaxSessions:   file.MaxSessions,
		Guard:         []string{self, "guard", "--socket", f.socket, "--config", f.file, "--state-dir", f.state},
		Log:           log,
	}
	if cfg.Group == "" {
		cfg.Group = file.Group
	}
	if cfg.SessionBinary == "" {
		cfg.SessionBinary = filepath.Join(filepath.Dir(self), "culvert")
	}
	cfg.Policy.AllowPrefixes, cfg.Policy.AllowDomains = file.AllowPrefixes, file.AllowDomains
	return daemon.New(cfg), nil
}
