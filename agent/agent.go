// Package agent is the far end of a session, inside the cluster: it takes the
// session's WireGuard packets from the carrier, ends TCP, UDP and ICMP echo in a
// network stack of its own, and gives each flow a real socket of its pod, so
// that the cluster sees ordinary pod traffic. It needs no privilege.
//
// # Memory
//
// Everything is bounded; with a limit L (Config.MemoryLimit), and the sums for a
// pod of 512 MiB, where L is 460 MiB:
//
//   - an idle TCP connection: about 20 KB (two goroutines, a gVisor endpoint, a
//     socket), and no copy buffer: bytes go from one side's queue to the other's
//     without a stop between. MaxTCP of them, and at least 4 KiB of queue each
//     way: two thirds of L, so 11,200 connections.
//   - the queues of TCP connections: together at most L/5 (92 MiB), whatever
//     their number; and no new connection while 3/4 of L are in use. See governor
//     for why that is a bound and no estimate.
//   - a UDP flow: 10 KB and at most 128 KiB queued each way; MaxUDP of them, the
//     idlest gives way, and their number follows L. At most 64 datagram buffers of
//     64 KiB are in use (4 MiB).
//   - echo requests: 256 at once, 64 KiB each at most (16 MiB). DNS: 512 queries
//     at once, 64 KiB each at most, and 64 TCP connections.
//   - the queue to WireGuard: 8 MiB (netstack.DefaultQueueBytes). What is inside
//     WireGuard is bounded by carrier.Bind, and so is what the bulk lane's stream
//     has not written yet.
//   - standard peers (peer.Max, 8): 24 MiB of WireGuard's own buffers while there is
//     one, the queue to it as above, inside it 16 MiB inwards from all of them and
//     8 MiB outwards for each that takes them slowly: see wire.Hub.
//   - streams that have not introduced themselves: 16, and as many at the port for
//     pods/proxy that have not proved themselves.
//   - connections from the cluster: they are TCP connections as above, of which
//     they may be half. 512 that have not shown a good token, and 256 watches,
//     10 KB each. UDP flows at exposed ports are among them, and queue 8 MiB
//     together.
package agent

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/intercept"
	"github.com/culvert-dev/culvert/wire/peer"
)

// Config of an Agent. A field's zero value is its default.
type Config struct {
	// ControlAddr is where streams are accepted: 127.0.0.1:7531. Never other than
	// loopback in a pod: who reaches it may introduce himself.
	ControlAddr string
	// MetricsAddr serves /metrics, /healthz and /readyz: 127.0.0.1:7532.
	MetricsAddr string
	// ProxyPort is where the API server's pods/proxy arrives, on PodIPs, once a
	// session was introduced: 7533. Negative: nowhere.
	ProxyPort int
	// UDPPort is where the session's UDP arrives, on PodIPs, once one was introduced
	// that wants it: 7534. Negative: nowhere.
	UDPPort int
	// InterceptPort is where gates connect, on PodIPs, once a session was introduced:
	// 7535. Negative: nowhere.
	InterceptPort int
	// PeerPort is the UDP port for standard WireGuard peers, on all addresses of
	// the pod, open while there is one: 51820. Negative: there can be none.
	PeerPort int
	// ResolvConf is the path of the pod's resolver settings: /etc/resolv.conf.
	ResolvConf string
	// PodIPs are the pod's own addresses; those of the interfaces if empty.
	PodIPs []netip.Addr
	// MaxTCP and MaxUDP bound the flows at one time: 16384 and 4096, or fewer
	// where MemoryLimit is small.
	MaxTCP, MaxUDP int
	// MaxInbound bounds the connections from the cluster to the session at one
	// time, which count as TCP too: half of MaxTCP.
	MaxInbound int
	// Drain is how long the end of Run's context waits for connections from the
	// cluster: 20 s, which with what follows is within the pod's grace period.
	Drain time.Duration
	// MemoryLimit in bytes, for the whole process: 512 MiB, which is what the
	// pod's limit should be; see MemoryLimit, the function.
	MemoryLimit int64
	Log         *slog.Logger
}

// connectionCost is the memory that an idle TCP connection is reckoned with.
const connectionCost = 20 << 10

func (c Config) withDefaults() Config {
	if c.ControlAddr == "" {
		c.ControlAddr = fmt.Sprintf("127.0.0.1:%d", carrier.ControlPort)
	}
	if c.MetricsAddr == "" {
		c.MetricsAddr = fmt.Sprintf("127.0.0.1:%d", carrier.MetricsPort)
	}
	if c.ProxyPort == 0 {
		c.ProxyPort = carrier.ProxyPort
	}
	if c.UDPPort == 0 {
		c.UDPPort = carrier.UDPPort
	}
	if c.InterceptPort == 0 {
		c.InterceptPort = intercept.Port
	}
	if c.PeerPort == 0 {
		c.PeerPort = peer.Port
	}
	if c.ResolvConf == "" {
		c.ResolvConf = "/etc/resolv.conf"
	}
	if c.MemoryLimit <= 0 {
		c.MemoryLimit = 512 << 20
	}
	if c.MaxTCP <= 0 {
		// Idle connections may take two thirds of the memory.
		c.MaxTCP = int(min(16384, max(256, c.MemoryLimit*2/3/(connectionCost+2*minQueue))))
	}
	if c.MaxUDP <= 0 {
		c.MaxUDP = int(min(4096, max(128, c.MemoryLimit/10/connectionCost)))
	}
	if c.MaxInbound <= 0 {
		c.MaxInbound = max(1, c.MaxTCP/2)
	}
	if c.Drain == 0 {
		c.Drain = 20 * time.Second
	}
	if c.Log == nil {
		c.Log = slog.Default()
	}
	return c
}

// timing holds the durations that tests shorten.
type timing struct {
	dial     time.Duration // of a TCP connection: a client's SYN comes again after it
	udpIdle  time.Duration // as conntrack's udp_timeout_stream
	dnsIdle  time.Duration // of a UDP flow to port 53
	echo     time.Duration // wait for a reply to one echo request
	dnsTry   time.Duration // wait for one nameserver
	hello    time.Duration // for a new stream to introduce itself
	proof    time.Duration // for a stream of pods/proxy to prove itself
	sweep    time.Duration // between two looks for idle UDP flows
	governor time.Duration // between two looks at the heap
	lull     time.Duration // without bytes, once or twice, before a TCP connection gives its stacks back

	header      time.Duration // for a gate's connection to introduce itself
	proven      time.Duration // that a token is good once the session said so, and an address a gate's
	watchDial   time.Duration // of the watch of the session
	sessionDial time.Duration // of a connection from the cluster
	answer      time.Duration // the same, with the session's status: its dial takes 1.5 s at most, and a gate waits 2
	silent      time.Duration // without a beat, and the machine is away
	lost        time.Duration // that it is away before connections are reset
	unused      time.Duration // without need before the session is watched no longer
	flowIdle    time.Duration // of a UDP flow at an exposed port
}

func defaultTiming() timing {
	return timing{
		dial:     20 * time.Second,
		udpIdle:  2 * time.Minute,
		dnsIdle:  30 * time.Second,
		echo:     10 * time.Second,
		dnsTry:   2 * time.Second,
		hello:    10 * time.Second,
		proof:    5 * time.Second,
		sweep:    2 * time.Second,
		governor: 100 * time.Millisecond,
		lull:     100 * time.Millisecond,

		header:      5 * time.Second,
		proven:      time.Minute,
		watchDial:   time.Second,
		sessionDial: intercept.SilentAfter,
		answer:      1800 * time.Millisecond,
		silent:      intercept.SilentAfter,
		lost:        intercept.LostAfter,
		unused:      5 * time.Minute,
		flowIdle:    60 * time.Second,
	}
}

// Agent serves the first session that it meets, until Close. It goes on while
// the session is away: connections wait for the session to come back.
type Agent struct {
	cfg      Config
	times    timing
	log      *slog.Logger
	key      wire.Key
	instance string
	metrics  *metrics
	notes    notes
	unmet    chan struct{} // a slot for each stream not yet introduced

	cancelMu sync.Mutex
	cancel   context.CancelFunc
	done     chan struct{} // closed when Run has returned
	closed   bool

	// mu guards what the session brought. Lock order: mu, then a node's locks.
	mu    sync.Mutex
	owner *owner
}

// New makes an Agent with fresh keys. It opens nothing before Run.
func New(cfg Config) *Agent {
	cfg = cfg.withDefaults()
	var id [8]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand, Go 1.24)
	a := &Agent{
		cfg:      cfg,
		times:    defaultTiming(),
		log:      cfg.Log,
		key:      wire.NewPrivateKey(),
		instance: hex.EncodeToString(id[:]),
		unmet:    make(chan struct{}, maxUnmet),
	}
	a.metrics = newMetrics(a)
	return a
}

// Run serves until ctx ends or Close is called, and then returns nil; any other
// error is of the listeners. After the end of ctx it goes on while there are
// connections from the cluster, for Config.Drain at most. It may be called once.
func (a *Agent) Run(asked context.Context) error {
	ctx, cancel := context.WithCancel(context.WithoutCancel(asked))
	defer cancel()
	stop := context.AfterFunc(asked, func() {
		a.drain(ctx)
		cancel()
	})
	defer stop()
	a.cancelMu.Lock()
	if a.closed || a.done != nil {
		a.cancelMu.Unlock()
		return errors.New("running the agent: it ran before")
	}
	a.cancel, a.done = cancel, make(chan struct{})
	a.cancelMu.Unlock()
	defer close(a.done)

	if len(a.cfg.PodIPs) == 0 {
		a.cfg.PodIPs = interfaceAddrs()
	}
	control, err := net.Listen("tcp", a.cfg.ControlAddr)
	if err != nil {
		return fmt.Errorf("listening for sessions: %w", err)
	}
	defer control.Close()
	web, err := net.Listen("tcp", a.cfg.MetricsAddr)
	if err != nil {
		return fmt.Errorf("listening for metrics: %w", err)
	}
	defer web.Close()
	a.log.Info("agent listens", "control", control.Addr().String(), "metrics", web.Addr().String(),
		"instance", a.instance, "maxTCP", a.cfg.MaxTCP, "maxUDP", a.cfg.MaxUDP)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return a.serveControl(ctx, control) })
	g.Go(func() error { return a.serveWeb(ctx, web) })
	err = g.Wait()

	a.mu.Lock()
	o := a.owner
	a.mu.Unlock()
	if o != nil {
		o.node.close()
	}
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		return nil
	}
	return err
}

// drain waits until what is open from the cluster has ended.
func (a *Agent) drain(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, a.cfg.Drain)
	defer cancel()
	if n := a.node(); n != nil {
		n.door.drain(ctx)
	}
}

// Close ends Run, without waiting for connections, and waits for it. It may be
// called repeatedly.
func (a *Agent) Close() error {
	a.cancelMu.Lock()
	a.closed = true
	cancel, done := a.cancel, a.done
	a.cancelMu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
	return nil
}

// DialSession opens a TCP connection from the agent to port at the session's
// inbound address, where the session's own netstack answers.
func (a *Agent) DialSession(ctx context.Context, port uint16) (net.Conn, error) {
	a.mu.Lock()
	o := a.owner
	a.mu.Unlock()
	if o == nil {
		return nil, errors.New("dialling the session: none has connected yet")
	}
	return o.node.dialSession(ctx, port)
}

// interfaceAddrs lists the pod's addresses, without loopback and link-local.
func interfaceAddrs() []netip.Addr {
	var found []netip.Addr
	addrs, _ := net.InterfaceAddrs() // none found is the same as none there
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || p.Addr().IsLoopback() || p.Addr().IsLinkLocalUnicast() {
			continue
		}
		found = append(found, p.Addr().Unmap())
	}
	return found
}
