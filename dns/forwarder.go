// Package dns is the session's DNS forwarder. It stands between the machine's
// programs and two groups of servers: names of the cluster are asked of the
// agent, all others of the machine's own resolvers and of nothing else. It needs
// no privilege: its sockets are handed in.
//
// What a name means is decided in names.go; messages for the machine's
// resolvers are relayed octet for octet. There is no cache: the operating
// system has one, and a second one would only be stale.
package dns

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Names is what is known of the cluster at this moment. Its methods are called
// for each question, by several goroutines, and must not block.
type Names interface {
	// HasService tells whether the Service exists. A short form that ends in a
	// namespace's name is asked of the cluster only if it does.
	HasService(namespace, name string) bool
	HasNamespace(name string) bool
}

// Sibling is another session on this machine. Where /etc/resolv.conf names only
// one server, that server's session must know all.
type Sibling struct {
	Context string         // as in its Config
	Domains []string       // what its forwarder's Domains returned
	Addr    netip.AddrPort // of its forwarder
}

// Config says what the forwarder knows at the start.
type Config struct {
	Context       string // the kubeconfig's context; Label makes it a label of a name
	Namespace     string // completes single labels
	ClusterDomain string // empty: cluster.local
	// Cluster is the agent's addresses in the tunnel, port 53; any of them
	// answers for all.
	Cluster []netip.AddrPort
	// Machine is the machine's own resolvers. Nil where the operating system
	// splits names itself (systemd-resolved): then names that are not the
	// cluster's get NXDOMAIN if a domain of ours led them here, else REFUSED.
	Machine []netip.AddrPort
	Names   Names
	// Namespaces lists the namespaces for Domains; nil: only Namespace.
	Namespaces func() []string
	// Ranges lists the cluster's addresses, for PTR questions and Domains; nil:
	// none. It is called for each PTR question and must not block.
	Ranges   func() []netip.Prefix
	Siblings []Sibling // see SetSiblings
	Log      *slog.Logger
}

// Forwarder answers DNS questions over UDP and TCP. Its methods may be called at
// the same time, before, during and after Run.
type Forwarder struct {
	log      *slog.Logger
	settings atomic.Pointer[settings]
	loops    loops
	// Two bounds, so that an unreachable cluster never keeps the machine's own
	// names waiting. See maxAsking.
	askingCluster chan struct{}
	askingMachine chan struct{}

	mu     sync.Mutex
	config Config
	own    []netip.AddrPort // of the sockets, known from Run on
	looped []netip.AddrPort // machine servers that ask us in turn
	cancel context.CancelFunc
	done   chan struct{} // closed when Run has returned
	closed bool
}

// settings is the configuration in the form that questions need. It is never
// changed, only replaced.
type settings struct {
	label      string
	namespace  string
	domain     string
	names      Names
	namespaces func() []string
	ranges     func() []netip.Prefix
	cluster    *upstream
	machine    *upstream // nil: the operating system splits names
	before     []sibling // own what they share with us
	after      []sibling
}

type sibling struct {
	label    string
	domains  []string
	upstream *upstream
}

// covers tells whether name is in one of the sibling's domains.
func (s sibling) covers(name string) bool {
	return slices.ContainsFunc(s.domains, func(domain string) bool {
		_, ok := under(name, domain)
		return ok
	})
}

// nobody knows no names.
type nobody struct{}

func (nobody) HasService(string, string) bool { return false }
func (nobody) HasNamespace(string) bool       { return false }

// New makes a forwarder; it does nothing until Run.
func New(c Config) *Forwarder {
	if c.Names == nil {
		c.Names = nobody{}
	}
	if c.Namespaces == nil {
		c.Namespaces = func() []string { return nil }
	}
	if c.Ranges == nil {
		c.Ranges = func() []netip.Prefix { return nil }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	f := &Forwarder{
		log:           c.Log,
		config:        c,
		askingCluster: make(chan struct{}, maxAsking),
		askingMachine: make(chan struct{}, maxAsking),
		done:          make(chan struct{}),
	}
	f.loops.wake = make(chan struct{}, 1)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.applyLocked()
	return f
}

// Run serves the sockets, which it owns from now on, until ctx ends, Close is
// called (it then returns nil) or a socket breaks. All its goroutines have ended
// when it returns. It can be called once.
func (f *Forwarder) Run(ctx context.Context, udp []net.PacketConn, tcp []net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	closeAll := func() {
		for _, c := range udp {
			c.Close()
		}
		for _, l := range tcp {
			l.Close()
		}
	}
	f.mu.Lock()
	if f.cancel != nil || f.closed {
		f.mu.Unlock()
		closeAll()
		return errors.New("serving DNS: forwarder was run or closed before")
	}
	f.cancel = cancel
	for _, c := range udp {
		f.own = append(f.own, addrPort(c.LocalAddr()))
	}
	for _, l := range tcp {
		f.own = append(f.own, addrPort(l.Addr()))
	}
	f.applyLocked()
	f.mu.Unlock()
	defer close(f.done)

	group, ctx := errgroup.WithContext(ctx)
	stop := context.AfterFunc(ctx, closeAll)
	defer stop()
	for _, c := range udp {
		group.Go(func() error { return f.serveUDP(ctx, c) })
	}
	for _, l := range tcp {
		group.Go(func() error { return f.serveTCP(ctx, l) })
	}
	group.Go(func() error { f.watchLoops(ctx); return nil })
	group.Go(func() error { <-ctx.Done(); return nil }) // with no socket at all, too
	return group.Wait()
}

// Close ends Run and waits for it. It returns nil, every time.
func (f *Forwarder) Close() error {
	f.mu.Lock()
	f.closed = true
	cancel := f.cancel
	f.mu.Unlock()
	if cancel != nil {
		cancel()
		<-f.done
	}
	return nil
}

// SetSiblings replaces the other sessions, in the order in which they own what
// they share: the first session to have a cluster domain keeps it. The list may
// contain this session, known by its address; without it, this session is first.
func (f *Forwarder) SetSiblings(siblings []Sibling) {
	f.set(func(c *Config) { c.Siblings = slices.Clone(siblings) })
}

// SetMachine replaces the machine's own resolvers; nil as in Config.
func (f *Forwarder) SetMachine(servers []netip.AddrPort) {
	f.set(func(c *Config) { c.Machine = slices.Clone(servers) })
	f.checkLoops()
}

// SetCluster replaces what the agent's resolv.conf and the session's options
// say. An empty domain is cluster.local.
func (f *Forwarder) SetCluster(domain, namespace string, servers []netip.AddrPort) {
	f.set(func(c *Config) {
		c.ClusterDomain, c.Namespace, c.Cluster = domain, namespace, slices.Clone(servers)
	})
}

func (f *Forwarder) set(change func(*Config)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(&f.config)
	f.applyLocked()
}

// applyLocked makes settings of the configuration.
func (f *Forwarder) applyLocked() {
	c := f.config
	s := &settings{
		label:      Label(c.Context),
		namespace:  normal(c.Namespace),
		domain:     normal(c.ClusterDomain),
		names:      c.Names,
		namespaces: c.Namespaces,
		ranges:     c.Ranges,
	}
	if s.namespace == "" {
		s.namespace = "default"
	}
	if s.domain == "" {
		s.domain = "cluster.local"
	}
	// 2 s: the agent answers in one round trip or is away, and then the asker
	// must hear of it before it gives up. 500 ms: above any round trip to an API
	// server, so that only lost packets are sent again.
	s.cluster = &upstream{servers: c.Cluster, patience: 2 * time.Second, stagger: 500 * time.Millisecond}

	siblings, self := make([]sibling, 0, len(c.Siblings)), -1
	var addrs []netip.AddrPort
	for _, sib := range c.Siblings {
		if f.isOwnLocked(sib.Addr) {
			self = len(siblings)
			continue
		}
		// Their own answer comes after at most total.
		u := &upstream{servers: []netip.AddrPort{sib.Addr}, patience: total, stagger: time.Second}
		u.local = f.localLocked(sib.Addr)
		domains := make([]string, 0, len(sib.Domains))
		for _, domain := range sib.Domains {
			domains = append(domains, normal(domain))
		}
		siblings = append(siblings, sibling{Label(sib.Context), domains, u})
		addrs = append(addrs, sib.Addr)
	}
	self = max(self, 0)
	s.before, s.after = siblings[:self:self], siblings[self:]

	if c.Machine != nil {
		s.machine = &upstream{patience: total, stagger: time.Second, servers: []netip.AddrPort{}}
		for _, server := range c.Machine {
			if !f.isOwnLocked(server) && !slices.Contains(addrs, server) && !slices.Contains(f.looped, server) {
				s.machine.servers = append(s.machine.servers, server)
			}
		}
	}
	f.settings.Store(s)
}

// isOwnLocked tells whether a is one of our sockets.
func (f *Forwarder) isOwnLocked(a netip.AddrPort) bool {
	a = unmap(a)
	return slices.ContainsFunc(f.own, func(own netip.AddrPort) bool {
		return own == a || own.Port() == a.Port() && own.Addr().IsUnspecified() && a.Addr().IsLoopback()
	})
}

// localLocked is the address to ask a sibling from: our own, if it is on
// loopback as well. By that the sibling knows us and sends nothing back, so that
// two sessions which disagree for a moment on an owner make no loop.
func (f *Forwarder) localLocked(to netip.AddrPort) netip.Addr {
	for _, own := range f.own {
		if own.Addr().IsLoopback() && to.Addr().IsLoopback() && own.Addr().Is4() == to.Addr().Is4() {
			return own.Addr()
		}
	}
	return netip.Addr{}
}

// fromSibling tells whether a question came from another session's forwarder.
func (s *settings) fromSibling(from netip.AddrPort) bool {
	is := func(sib sibling) bool { return sib.upstream.servers[0].Addr() == from.Addr() }
	return slices.ContainsFunc(s.before, is) || slices.ContainsFunc(s.after, is)
}

func addrPort(a net.Addr) netip.AddrPort {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPort{} // a kind of socket that has no address to compare
	}
	return unmap(ap)
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
