// Command culvert-agent is the far end of a session, in a pod of the cluster.
//
//	culvert-agent [agent]      serve a session
//	culvert-agent gate         stand behind intercepted Services
//	culvert-agent health       ask a running agent whether it is well (exec probes)
//	culvert-agent version
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/signal"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/agent"
	"github.com/culvert-dev/culvert/internal/cores"
	"github.com/culvert-dev/culvert/internal/version"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/netstack"
)

func main() { os.Exit(run(os.Args[1:], os.Stderr)) }

func run(args []string, stderr io.Writer) int {
	role := "agent"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		role, args = args[0], args[1:]
	}
	switch role {
	case "agent":
		return serve(args, stderr)
	case "gate":
		return serveGate(args, stderr)
	case "health":
		return health(args, stderr)
	case "metrics":
		return metrics(args, os.Stdout, stderr)
	case "version":
		fmt.Println(version.Version)
		return 0
	}
	fmt.Fprintf(stderr, "culvert-agent: unknown role %q: agent, gate, health, metrics or version\n", role)
	return 2
}

func serve(args []string, stderr io.Writer) int {
	var c agent.Config
	flags := flag.NewFlagSet("culvert-agent", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.ControlAddr, "control", env("CULVERT_CONTROL", ""), "address for sessions, on loopback [CULVERT_CONTROL] (default 127.0.0.1:7531)")
	flags.StringVar(&c.MetricsAddr, "metrics", env("CULVERT_METRICS", metricsAddr()), "address for metrics and health [CULVERT_METRICS]")
	flags.IntVar(&c.ProxyPort, "proxy-port", envInt("CULVERT_PROXY_PORT"), "port on the pod's addresses for sessions by way of pods/proxy, 0 for 7533, -1 for none [CULVERT_PROXY_PORT]")
	flags.IntVar(&c.InterceptPort, "intercept-port", envInt("CULVERT_INTERCEPT_PORT"), "port on the pod's addresses for gates, 0 for 7535, -1 for none [CULVERT_INTERCEPT_PORT]")
	flags.StringVar(&c.ResolvConf, "resolv-conf", env("CULVERT_RESOLV_CONF", "/etc/resolv.conf"), "resolver settings to relay to [CULVERT_RESOLV_CONF]")
	flags.IntVar(&c.MaxTCP, "max-tcp", envInt("CULVERT_MAX_TCP"), "TCP connections at one time, 0 for what the memory allows [CULVERT_MAX_TCP]")
	flags.IntVar(&c.MaxUDP, "max-udp", envInt("CULVERT_MAX_UDP"), "UDP flows at one time, 0 for what the memory allows [CULVERT_MAX_UDP]")
	podIPs := flags.String("pod-ips", env("POD_IPS", ""), "the pod's addresses, comma-separated [POD_IPS] (default: the interfaces')")
	verbose := flags.Bool("debug", env("CULVERT_DEBUG", "") != "", "log more [CULVERT_DEBUG]")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 {
		return 2
	}
	for _, s := range strings.FieldsFunc(*podIPs, func(r rune) bool { return r == ',' || r == ' ' }) {
		addr, err := netip.ParseAddr(s)
		if err != nil {
			fmt.Fprintf(stderr, "culvert-agent: pod address %q: %v\n", s, err)
			return 2
		}
		c.PodIPs = append(c.PodIPs, addr)
	}
	level := slog.LevelInfo
	if *verbose {
		level = slog.LevelDebug
	}
	c.Log = slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: level}))

	netstack.LogTo(c.Log)

	// Go collects garbage harder near its limit; the kernel kills at the cgroup's.
	// The tenth between them is for stacks of the kernel and sockets.
	if limit, ok := agent.MemoryLimit(); ok {
		c.MemoryLimit = limit * 9 / 10
		if os.Getenv("GOMEMLIMIT") == "" {
			debug.SetMemoryLimit(c.MemoryLimit)
		}
	}

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	go cores.Adapt(ctx)
	if err := agent.New(c).Run(ctx); err != nil {
		fmt.Fprintln(stderr, "culvert-agent:", err)
		return 1
	}
	return 0
}

func health(args []string, stderr io.Writer) int {
	flags := flag.NewFlagSet("culvert-agent health", flag.ContinueOnError)
	flags.SetOutput(stderr)
	ready := flags.Bool("ready", false, "ask whether it takes sessions, not only whether it lives")
	addr := flags.String("metrics", env("CULVERT_METRICS", metricsAddr()), "the agent's address for metrics and health [CULVERT_METRICS]")
	timeout := flags.Duration("timeout", 5*time.Second, "how long to wait")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 {
		return 2
	}
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	err := agent.CheckHealth(ctx, *addr, *ready)
	if *ready {
		// An agent that has just been started listens in a moment, and the kubelet
		// asks again only after a whole period.
		for end := time.Now().Add(readyWait); err != nil && time.Now().Before(end) && ctx.Err() == nil; {
			time.Sleep(readyEvery)
			err = agent.CheckHealth(ctx, *addr, true)
		}
	}
	if err != nil {
		fmt.Fprintln(stderr, "culvert-agent:", err)
		return 1
	}
	return 0
}

// How long a readiness probe waits for an agent that does not listen yet: less
// than the probe's period (2 s), and often enough that nobody feels it.
const readyWait, readyEvery = 1500 * time.Millisecond, 20 * time.Millisecond

func metricsAddr() string { return fmt.Sprintf("127.0.0.1:%d", carrier.MetricsPort) }

func env(name, fallback string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return fallback
}

// envInt is 0, the default, for what is no number.
func envInt(name string) int {
	n, _ := strconv.Atoi(os.Getenv(name))
	return n
}

// metrics prints what Prometheus would scrape: the pod has no other program that
// could ask on loopback.
func metrics(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("culvert-agent metrics", flag.ContinueOnError)
	flags.SetOutput(stderr)
	addr := flags.String("metrics", env("CULVERT_METRICS", metricsAddr()), "the agent's address for metrics and health [CULVERT_METRICS]")
	if err := flags.Parse(args); err != nil || flags.NArg() > 0 {
		return 2
	}
	client := http.Client{Timeout: 5 * time.Second}
	r, err := client.Get("http://" + *addr + "/metrics")
	if err == nil {
		defer r.Body.Close()
		_, err = io.Copy(stdout, r.Body)
	}
	if err != nil {
		fmt.Fprintln(stderr, "culvert-agent: asking for the metrics:", err)
		return 1
	}
	return 0
}
