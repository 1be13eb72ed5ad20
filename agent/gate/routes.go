package gate

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// Protocols of a Route.
const (
	protocolTCP = "TCP"
	protocolUDP = "UDP"
)

// place is where a route is served.
type place struct {
	port     uint16
	protocol string
}

func (p place) String() string { return fmt.Sprintf("port %d/%s", p.port, p.protocol) }

func comparePlaces(a, b place) int {
	return cmp.Or(cmp.Compare(a.port, b.port), cmp.Compare(a.protocol, b.protocol))
}

// spec is what a state says about a route. It is never changed.
type spec struct {
	intercept.Route
	key      string
	draining bool
	over     bool      // draining, and nobody is at the machine's end
	since    time.Time // draining: by then its Service led elsewhere
	watch    *watcher  // of its machine, nil without one
	table    *table    // of a mesh's TCP route, nil otherwise
}

// machineNow tells whether something new may go to the machine.
func (s *spec) machineNow() bool { return s.Machine != nil && !s.draining && s.watch.usable() }

// serves tells whether a machine is the route's, or one of its members'.
func (s *spec) serves(k machineKey) bool {
	if s.table != nil {
		return s.table.has(k)
	}
	return s.watch == k.watch && s.machineID() == k.id
}

// machineID is the intercept's, empty without a machine.
func (s *spec) machineID() string {
	if s.Machine == nil {
		return ""
	}
	return s.Machine.ID
}

// route is a listener and what it counted. Its spec follows the state.
type route struct {
	gate  *Gate
	at    place
	count counters
	spec  atomic.Pointer[spec]
	gone  atomic.Bool // from the state
	// members has the counters of a mesh's members by session. gate.mu guards it.
	members map[string]*memberCount
	// speakers of a mesh were asked whether they speak HTTP/2.
	speakers speakers
	plain    plainServers
	// listener is a *net.TCPListener or a *net.UDPConn.
	listener io.Closer
}

// counters of a route.
type counters struct {
	openMachine, openOrigin   atomic.Int64
	totalMachine, totalOrigin atomic.Int64
	refused                   atomic.Int64
	up, down                  atomic.Int64 // bytes, as seen by the client
	requestsToOrigin          atomic.Int64 // of a mesh
}

// opened counts a connection or a flow; the result is called at its end.
func (c *counters) opened(machine bool) (ended func()) {
	open, total := &c.openOrigin, &c.totalOrigin
	if machine {
		open, total = &c.openMachine, &c.totalMachine
	}
	total.Add(1)
	open.Add(1)
	return func() { open.Add(-1) }
}

// applyLocked makes routes and watchers those of g.state. A listener that is
// there stays, with all that came by it. g.mu is held.
func (g *Gate) applyLocked() {
	specs := map[place]*spec{}
	watchers := map[string]*watcher{}
	proofs := map[*watcher][]proof{}
	clear(g.failed)
	g.skipped = nil
	for _, key := range slices.Sorted(maps.Keys(g.state.Entries)) {
		e := g.state.Entries[key]
		if e.Gate != g.cfg.Name {
			continue
		}
		for _, r := range e.Routes {
			at := place{r.Listen, r.Protocol}
			if other := specs[at]; other != nil {
				g.failed[at] = fmt.Sprintf("asked for by %s and %s", other.key, key)
				continue
			}
			s := &spec{Route: r, key: key, draining: e.Draining, over: e.Draining && e.Over, since: time.Now()}
			if r := g.routes[at]; r != nil {
				if old := r.spec.Load(); old.draining && old.key == key {
					s.since = old.since
				}
			}
			if r.Machine != nil {
				s.watch = g.watcherLocked(watchers, r.Machine.Agents)
				proofs[s.watch] = append(proofs[s.watch], proof{r.Machine.ID, r.Machine.Token, e.Holder.Since.UnixNano()})
			}
			if e.Kind == intercept.Mesh && r.Protocol == protocolTCP {
				s.table = g.tableLocked(at, e, r.Port, watchers, proofs)
			}
			specs[at] = s
		}
	}
	for key, w := range g.watchers {
		if watchers[key] == nil {
			w.stop()
		}
	}
	for key, w := range watchers {
		w.prove(proofs[w])
		if g.watchers[key] == nil {
			w.start()
		}
	}
	g.watchers = watchers
	for at, r := range g.routes {
		if specs[at] == nil {
			r.close()
			delete(g.routes, at)
		}
	}
	for _, at := range slices.SortedFunc(maps.Keys(specs), comparePlaces) {
		if r := g.routes[at]; r != nil {
			r.follow(specs[at])
			continue
		}
		if g.shut {
			continue
		}
		if err := g.openLocked(at, specs[at]); err != nil {
			g.failed[at] = reasonOf(err)
		}
	}
	g.drainLocked()
}

// tableLocked compiles the members of a mesh that expose a port. One that cannot be
// served is left out, and told of in the status: the others need their requests, and
// what was pushed is everybody's.
func (g *Gate) tableLocked(at place, e intercept.Entry, port int32, watchers map[string]*watcher, proofs map[*watcher][]proof) *table {
	var members []*member
	for _, m := range e.Members {
		if err := checkMember(m); err != nil {
			g.skipped = append(g.skipped, fmt.Sprintf("%s: member %s: %v", at, m.Holder.Session, err))
			continue
		}
		for _, p := range m.Ports {
			if p.Port != port {
				continue
			}
			x := &member{Member: m, machine: p.Machine, watch: g.watcherLocked(watchers, p.Machine.Agents)}
			proofs[x.watch] = append(proofs[x.watch], proof{p.Machine.ID, p.Machine.Token, m.Holder.Since.UnixNano()})
			members = append(members, x)
			break
		}
	}
	return newTable(members, e.Draining)
}

// follow makes s what the route is. Counters of members stay theirs; those of
// members that left are forgotten. gate.mu is held.
func (r *route) follow(s *spec) {
	before := r.members
	r.members = nil
	if s.table != nil {
		r.members = make(map[string]*memberCount, len(s.table.members))
		for _, m := range s.table.members {
			if m.count = before[m.Holder.Session]; m.count == nil {
				m.count = &memberCount{}
			}
			r.members[m.Holder.Session] = m.count
		}
	}
	r.spec.Store(s)
	r.speakers.forget()
	r.plain.forget()
}

// watcherLocked is the one watcher of these agents: of all routes, and of the
// state before. A new one is not started.
func (g *Gate) watcherLocked(next map[string]*watcher, agents []string) *watcher {
	key := strings.Join(agents, ",")
	w := next[key]
	if w == nil {
		w = g.watchers[key]
	}
	if w == nil {
		w = newWatcher(g, agents)
	}
	next[key] = w
	return w
}

// openLocked listens on all addresses, of both families.
func (g *Gate) openLocked(at place, s *spec) error {
	r := &route{gate: g, at: at}
	r.follow(s)
	addr := fmt.Sprintf(":%d", at.port)
	if at.protocol == protocolUDP {
		var lc net.ListenConfig
		c, err := lc.ListenPacket(g.life, "udp", addr)
		if err != nil {
			return err
		}
		u := c.(*net.UDPConn)
		r.listener = u
		g.wg.Go(func() { g.flows.serve(r, u) })
	} else {
		lc := net.ListenConfig{KeepAliveConfig: clientKeepAlive}
		l, err := lc.Listen(g.life, "tcp", addr)
		if err != nil {
			return err
		}
		t := l.(*net.TCPListener)
		r.listener = t
		g.wg.Go(func() { r.accept(t) })
	}
	g.routes[at] = r
	return nil
}

// accept takes connections until the listener is closed.
func (r *route) accept(l *net.TCPListener) {
	for {
		c, err := l.AcceptTCP()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			// Most likely no descriptors are left; some will be.
			r.gate.log.Warn("accepting", "port", r.at.port, "error", err)
			sleep(r.gate.life, 20*time.Millisecond)
		default:
			r.gate.admit(r, c)
		}
	}
}

// close ends the listener, and of UDP the flows. Open connections are drained.
func (r *route) close() {
	r.gone.Store(true)
	r.listener.Close()
	if r.at.protocol == protocolUDP {
		r.gate.flows.leave(r)
	}
}

// stopAccepting ends the listener of TCP. UDP is served until the very end.
func (r *route) stopAccepting() {
	if r.at.protocol == protocolTCP {
		r.listener.Close()
	}
}

// status of the gate, for the control API.
func (g *Gate) status() intercept.GateStatus {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := intercept.GateStatus{Generation: g.state.Generation, Keys: slices.Sorted(maps.Keys(g.keys)), Failed: g.failuresLocked(), Skipped: slices.Clone(g.skipped), Routes: []intercept.RouteStatus{}}
	for _, at := range slices.SortedFunc(maps.Keys(g.routes), comparePlaces) {
		r := g.routes[at]
		sp := r.spec.Load()
		rs := intercept.RouteStatus{
			Key: sp.key, Listen: at.port, Protocol: at.protocol,
			OpenToMachine: int(r.count.openMachine.Load()), OpenToOrigin: int(r.count.openOrigin.Load()),
			TotalToMachine: r.count.totalMachine.Load(), TotalToOrigin: r.count.totalOrigin.Load(),
			Refused: r.count.refused.Load(),
		}
		if sp.watch != nil {
			if now := sp.watch.status(); now != 0 {
				rs.Machine = now.String()
			}
		}
		if sp.table != nil {
			rs.RequestsToOrigin = r.count.requestsToOrigin.Load()
			for _, m := range sp.table.members {
				rs.Members = append(rs.Members, m.status())
			}
		}
		s.Routes = append(s.Routes, rs)
	}
	return s
}

// failuresLocked are the places of the state that are not served. g.mu is held.
func (g *Gate) failuresLocked() []string {
	var all []string
	for _, at := range slices.SortedFunc(maps.Keys(g.failed), comparePlaces) {
		all = append(all, at.String()+": "+g.failed[at])
	}
	return all
}

// reasonOf is why it could not be listened, in a few words.
func reasonOf(err error) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return "address in use"
	case errors.Is(err, syscall.EACCES):
		return "permission denied"
	}
	return err.Error()
}
