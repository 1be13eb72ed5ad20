// Package gate stands behind an intercepted Service: it takes the Service's
// connections and datagrams and leads each to the developer's machine, by way of
// its agent, or to the origin, the pods that served the Service before. The
// machine may vanish at any time; then the origin serves what comes new. What a
// gate knows is an intercept.State. It talks to no API server.
//
// Of a mesh it leads each request by what its head says: to the machine of the member
// whose conditions hold, or to the origin. See http1 for what it changes on the way.
//
// # Memory
//
// Everything is bounded; with a limit L (Config.MemoryLimit), and the sums for a
// pod of 128 MiB, where L is 115 MiB:
//
//   - a TCP connection: reckoned with 16 KB (two goroutines, two sockets of Go)
//     and no buffer, neither when it is idle nor when it is stuck: bytes stay in
//     the kernel's queue of the one side until the other side's takes them. All of
//     them: at most two thirds of L, so 4,900 connections. The kernel's queues are
//     bounded by its own settings (net.ipv4.tcp_mem).
//   - an HTTP/1 connection of a mesh: reckoned as any, with one goroutine and two to
//     six sockets, and no buffer while it is idle or waits for a body. While a head is
//     under way: 8 KiB for each side, and 64 KiB for a larger one, of 256
//     connections at most (16 MiB). A WebSocket
//     is a TCP connection as above, so 1,000 have no buffer at all. A body that goes
//     on while its response comes takes a goroutine more.
//   - an HTTP/2 connection of a mesh: 0.1 MB and what its windows allow, 256 KiB each
//     way; so many that all of these are two thirds of L (153). More pass as bytes.
//   - the access log of meshes: 0.6 MB.
//   - buffers of 64 KiB, while bytes are moved: one for each of Go's processors,
//     and 64 for datagrams (4 MiB).
//   - a connection's last HTTP response when it is drained: 4 KiB, and 64 KiB at
//     most for its head.
//   - a UDP flow: 10 KB, and 32 datagrams on their way; at most 4096 flows, or
//     what a tenth of L allows, the idlest gives way. All datagrams that wait: 4 MiB.
//   - the state: 1 MiB, and twice that while a new one is read.
package gate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// Config of a Gate. A field's zero value is its default.
type Config struct {
	// Name is that of the gates' Deployment: entries of the state whose Gate equals
	// it are served here. Default: intercept.GateName.
	Name string
	// StateDir is where the ConfigMap is mounted: /etc/culvert-gate.
	StateDir string
	// KeepFile outlives a restart of the container: /var/run/culvert-gate/state.json.
	KeepFile string
	// ControlAddr is where states are pushed to: 127.0.0.1:7541. Never other than
	// loopback in a pod: who reaches it decides where connections go.
	ControlAddr string
	// MetricsAddr serves /metrics, /healthz and /readyz: 127.0.0.1:7532.
	MetricsAddr string
	// MemoryLimit in bytes, for the whole process: 128 MiB.
	MemoryLimit int64
	// Drain is how long open connections have to end when the gate or their entry
	// does: 30 s.
	Drain time.Duration
	Log   *slog.Logger
}

// What a connection and a flow are reckoned with, in bytes.
const (
	connectionCost = 16 << 10
	flowCost       = 10 << 10
	maxFlows       = 4096
)

// metricsAddr is the agent's too (carrier.MetricsPort), for the same exec probes.
const metricsAddr = "127.0.0.1:7532"

func (c Config) withDefaults() Config {
	if c.Name == "" {
		c.Name = intercept.GateName
	}
	if c.StateDir == "" {
		c.StateDir = "/etc/culvert-gate"
	}
	if c.KeepFile == "" {
		c.KeepFile = "/var/run/culvert-gate/state.json"
	}
	if c.ControlAddr == "" {
		c.ControlAddr = fmt.Sprintf("127.0.0.1:%d", intercept.GatePort)
	}
	if c.MetricsAddr == "" {
		c.MetricsAddr = metricsAddr
	}
	if c.MemoryLimit <= 0 {
		c.MemoryLimit = 128 << 20
	}
	if c.Drain <= 0 {
		c.Drain = 30 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// maxConns is how many TCP connections there may be at one time.
func (c Config) maxConns() int {
	return int(min(16384, max(256, c.MemoryLimit*2/3/connectionCost)))
}

// maxFlows is how many UDP flows there may be at one time.
func (c Config) maxFlows() int {
	return int(min(maxFlows, max(128, c.MemoryLimit/10/flowCost)))
}

// timing holds the durations that tests shorten.
type timing struct {
	dialAgent  time.Duration // of its pod
	status     time.Duration // for the machine's answer
	detour     time.Duration // for both: then the origin has the rest of the 3 s
	dialOrigin time.Duration
	reach      time.Duration // a dial that only asks
	reload     time.Duration // between two looks at the mounted files
	redial     time.Duration // of a watch that broke
	silent     time.Duration // a watch that says nothing for so long means Away
	lost       time.Duration // an agent that cannot be reached for so long takes its connections along
	linger     time.Duration // accepting after SIGTERM: until every node has heard of it
	sweep      time.Duration // between two looks at connections that are drained
	lull       time.Duration // without bytes, before a drained connection is closed
	keepAlive  time.Duration // the same for one of HTTP/1 that waits for a request
	udpIdle    time.Duration
}

func defaultTiming() timing {
	return timing{
		dialAgent:  time.Second,
		status:     2 * time.Second,
		detour:     2500 * time.Millisecond,
		dialOrigin: 5 * time.Second,
		reach:      2 * time.Second,
		reload:     2 * time.Second,
		redial:     500 * time.Millisecond,
		silent:     intercept.SilentAfter,
		lost:       intercept.LostAfter,
		linger:     4 * time.Second,
		sweep:      100 * time.Millisecond,
		lull:       time.Second,
		keepAlive:  3 * time.Second,
		udpIdle:    time.Minute,
	}
}

// Gate serves the entries of a state. Make one with New.
type Gate struct {
	cfg   Config
	times timing
	log   *slog.Logger
	web   *metrics
	flows *flows
	// requests is the access log of meshes.
	requests accessLog

	endMu  sync.Mutex
	closed bool
	end    context.CancelFunc // of life, once Run began
	done   chan struct{}      // closed when Run has returned

	life context.Context // of Run and its drain; set by Run
	wg   sync.WaitGroup  // connections, flows, listeners, watchers

	http2s atomic.Int64 // connections of HTTP/2 clients that are routed
	// tlsConns are those whose TLS is ended here.
	tlsConns atomic.Int64

	pushMu sync.Mutex // one push after the other, so that the kept state is the newest

	mu          sync.Mutex
	state       intercept.State
	loaded      bool
	routes      map[place]*route
	failed      map[place]string // why a place of the state is not served
	keys        map[string]*tlsKey
	skipped     []string // members that are not served, and why
	watchers    map[string]*watcher
	conns       map[*conn]struct{}
	wasReady    bool
	terminating bool // SIGTERM came
	shut        bool // nothing is accepted any more
}

// New makes a Gate. It opens nothing before Run.
func New(cfg Config) *Gate {
	cfg = cfg.withDefaults()
	g := &Gate{
		cfg:      cfg,
		times:    defaultTiming(),
		log:      cfg.Log,
		routes:   map[place]*route{},
		failed:   map[place]string{},
		keys:     map[string]*tlsKey{},
		watchers: map[string]*watcher{},
		conns:    map[*conn]struct{}{},
	}
	g.flows = newFlows(g)
	g.web = newMetrics(g)
	return g
}

// Run serves until ctx ends, and drains then: for 4 s it goes on accepting, since
// other nodes hear late that this pod ends, unless its state says that nobody comes
// any more. It returns nil when no connection is left, at most Config.Drain after that. Any other error is of the listeners
// for control and metrics. It may be called once.
func (g *Gate) Run(ctx context.Context) error {
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	g.endMu.Lock()
	if g.closed || g.done != nil {
		g.endMu.Unlock()
		return errors.New("running the gate: it ran before")
	}
	g.end, g.done = end, make(chan struct{})
	g.endMu.Unlock()
	defer close(g.done)

	control, err := net.Listen("tcp", g.cfg.ControlAddr)
	if err != nil {
		return fmt.Errorf("listening for states: %w", err)
	}
	defer control.Close()
	web, err := net.Listen("tcp", g.cfg.MetricsAddr)
	if err != nil {
		return fmt.Errorf("listening for metrics: %w", err)
	}
	defer web.Close()
	g.log.Info("gate listens", "name", g.cfg.Name, "control", control.Addr().String(), "metrics", web.Addr().String(),
		"maxTCP", g.cfg.maxConns(), "maxUDP", g.cfg.maxFlows())

	group, life := errgroup.WithContext(life)
	g.life = life
	g.loadKept()
	g.loadMounted()
	group.Go(func() error { return serveHTTP(life, control, g.controlAPI()) })
	group.Go(func() error { return serveHTTP(life, web, g.web.handler(g)) })
	group.Go(func() error { g.follow(life); return nil })
	group.Go(func() error { g.sweep(life); return nil })
	group.Go(func() error {
		select {
		case <-life.Done():
		case <-ctx.Done():
			g.leave(life)
			end()
		}
		return nil
	})
	err = group.Wait()
	g.shutdown()
	g.wg.Wait()
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// Close ends Run without a drain and waits for it. It may be called repeatedly.
func (g *Gate) Close() error {
	g.endMu.Lock()
	g.closed = true
	end, done := g.end, g.done
	g.endMu.Unlock()
	if end != nil {
		end()
		<-done
	}
	return nil
}

// leave drains the gate: see Run.
func (g *Gate) leave(life context.Context) {
	g.log.Info("gate drains", "limit", g.cfg.Drain)
	g.mu.Lock()
	g.terminating = true
	g.drainLocked()
	end := time.Now().Add(g.lingerLocked())
	g.mu.Unlock()
	for time.Now().Before(end) {
		if g.unknown() {
			sleep(life, g.times.sweep) // whoever told it is being answered
			return
		}
		if !sleep(life, g.times.sweep/4) {
			return
		}
	}
	g.mu.Lock()
	g.shut = true
	for _, r := range g.routes {
		r.stopAccepting()
	}
	g.mu.Unlock()
	for end := time.Now().Add(g.cfg.Drain); time.Now().Before(end); {
		g.mu.Lock()
		left := len(g.conns)
		g.mu.Unlock()
		if left == 0 || !sleep(life, g.times.sweep/4) {
			return
		}
	}
}

// unknown: nobody knows the way here any more. Whoever took the last entry out has
// waited for that, and tells the gate of it about when it gets its SIGTERM.
func (g *Gate) unknown() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.routes) == 0 && len(g.conns) == 0
}

// lingerLocked is how long somebody may still come: until every node has heard that
// this gate ends, or that a route's Service leads elsewhere. g.mu is held.
func (g *Gate) lingerLocked() (longest time.Duration) {
	for _, r := range g.routes {
		left := g.times.linger
		if s := r.spec.Load(); s.draining {
			left -= time.Since(s.since)
		}
		longest = max(longest, left)
	}
	return longest
}

// shutdown ends all that is open. Run waits for it.
func (g *Gate) shutdown() {
	g.mu.Lock()
	g.shut = true
	for at, r := range g.routes {
		r.close()
		delete(g.routes, at)
	}
	for key, w := range g.watchers {
		w.stop()
		delete(g.watchers, key)
	}
	for c := range g.conns {
		c.reset()
	}
	g.mu.Unlock()
	g.flows.close()
}

// ready tells why the gate is not to be given connections, if it is not. A gate
// that was ready stays it though a new state has a port which cannot be had: who
// pushed that is told, and the other Services need their gates.
func (g *Gate) ready() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.terminating:
		return errors.New("about to end")
	case !g.loaded:
		return errors.New("no state was loaded")
	case len(g.failed) > 0 && !g.wasReady:
		return fmt.Errorf("not listening: %s", g.failuresLocked()[0])
	}
	g.wasReady = true
	return nil
}

// sleep waits for d, or less when ctx ends; then it is false.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
