package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/culvert-dev/culvert/agent"
	"github.com/culvert-dev/culvert/agent/gate"
	"github.com/culvert-dev/culvert/internal/cores"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// serveGate is the role gate.
func serveGate(args []string, stderr io.Writer) int {
	var c gate.Config
	flags := flag.NewFlagSet("culvert-agent gate", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.Name, "name", env("CULVERT_GATE", intercept.GateName), "name of the gates' Deployment, whose entries are served [CULVERT_GATE]")
	flags.StringVar(&c.StateDir, "state-dir", env("CULVERT_STATE_DIR", ""), "mounted ConfigMap [CULVERT_STATE_DIR] (default /etc/culvert-gate)")
	flags.StringVar(&c.KeepFile, "keep-file", env("CULVERT_KEEP_FILE", ""), "where a pushed state is kept [CULVERT_KEEP_FILE] (default /var/run/culvert-gate/state.json)")
	flags.StringVar(&c.ControlAddr, "control", env("CULVERT_CONTROL", ""), fmt.Sprintf("address for states, on loopback [CULVERT_CONTROL] (default 127.0.0.1:%d)", intercept.GatePort))
	flags.StringVar(&c.MetricsAddr, "metrics", env("CULVERT_METRICS", metricsAddr()), "address for metrics and health [CULVERT_METRICS]")
	flags.DurationVar(&c.Drain, "drain", 0, "how long open connections have to end (default 30s)")
	verbose := flags.Bool("debug", env("CULVERT_DEBUG", "") != "", "log more [CULVERT_DEBUG]")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(stderr, "culvert-agent: gate takes no argument %q\n", flags.Arg(0))
		return 2
	}
	level := slog.LevelInfo
	if *verbose {
		level = slog.LevelDebug
	}
	c.Log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))

	// See serve: the tenth is for what Go does not count.
	if limit, ok := agent.MemoryLimit(); ok {
		c.MemoryLimit = limit * 9 / 10
		if os.Getenv("GOMEMLIMIT") == "" {
			debug.SetMemoryLimit(c.MemoryLimit)
		}
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the drain, and the process
	go cores.Adapt(ctx)
	if err := gate.New(c).Run(ctx); err != nil {
		fmt.Fprintln(stderr, "culvert-agent:", err)
		return 1
	}
	return 0
}
