package agent

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/wire/intercept"
	"github.com/culvert-dev/culvert/wire/netstack"
)

const (
	// maxStrangers bounds the connections that have not shown a good token, from
	// addresses that never did, and maxStrangersFrom those of one address: what other
	// pods do is to leave room for a gate that is new.
	maxStrangers     = 256
	maxStrangersFrom = 32
	// maxUnmetGates bounds the same for addresses of gates; the token of one may be new,
	// too, and a gate may open many at once.
	maxUnmetGates    = 256
	maxUnmetGateFrom = 128
	// maxWatches bounds the watches of gates: each gate has one, and a namespace has
	// two gates, or two for each headless Service.
	maxWatches = 256
)

// inboundDoor takes connections from the cluster on the pod's addresses, from
// gates and at exposed ports, and leads them to the session.
type inboundDoor struct {
	node      *node
	machine   *machine
	listeners []net.Listener
	strangers *lobby              // those that have shown no good token
	unmet     *lobby              // the same, from addresses in gates
	gates     *proven[netip.Addr] // addresses that showed one
	proofs    *proven[proof]      // of headers
	leaving   chan struct{}       // closed when the agent is about to end

	mu      sync.Mutex
	open    int // led or being led to the session
	watches int
	turn    int                   // counts resetAll
	joined  map[resetter]struct{} // of open, those that the session accepted
	left    bool                  // leaving is closed
	empty   chan struct{}         // closed when left and open is 0
}

// resetter is a connection that can be ended with a RST both ways.
type resetter interface{ reset() }

// sessionConn is a connection to the session.
type sessionConn struct {
	*gonet.TCPConn
	ep   tcpip.Endpoint
	wq   *waiter.Queue
	turn int // of the door, before it was dialled
}

func newInboundDoor(n *node) *inboundDoor {
	d := &inboundDoor{
		node:      n,
		strangers: newLobby(maxStrangers, maxStrangersFrom),
		unmet:     newLobby(maxUnmetGates, maxUnmetGateFrom),
		gates:     newProven[netip.Addr](n.agent.times.proven),
		proofs:    newProven[proof](n.agent.times.proven),
		leaving:   make(chan struct{}),
		joined:    map[resetter]struct{}{},
		empty:     make(chan struct{}),
	}
	d.machine = newMachine(n, d.resetAll)
	return d
}

// listen opens the port for gates on the pod's addresses. Where that fails gates
// find nobody, and lead all to the origin.
func (d *inboundDoor) listen() {
	a := d.node.agent
	if a.cfg.InterceptPort <= 0 {
		return
	}
	for _, ip := range a.cfg.PodIPs {
		l, err := net.Listen("tcp", netip.AddrPortFrom(ip, uint16(a.cfg.InterceptPort)).String())
		if err != nil {
			a.log.Warn("listening for gates", "error", err)
			continue
		}
		d.listeners = append(d.listeners, l)
		d.node.spawn(func() { d.node.acceptFrom(l, "gates", d.met) })
	}
}

func (d *inboundDoor) close() {
	for _, l := range d.listeners {
		l.Close()
	}
	d.machine.close()
	d.resetAll()
}

// met has one connection of a gate say what it is for. Anybody can connect: who has
// not shown a good token is in a lobby, and takes no room from those who have.
func (d *inboundDoor) met(c *net.TCPConn) {
	from := remoteOf(c).Addr()
	lobby := d.strangers
	if d.gates.has(from) {
		lobby = d.unmet
	}
	if !lobby.enter(from) {
		c.Close()
		d.node.agent.metrics.refused("inbound")
		return
	}
	d.node.spawn(func() {
		known := sync.OnceFunc(func() { lobby.leave(from) })
		defer known()
		stop := context.AfterFunc(d.node.ctx, func() { c.Close() })
		_ = c.SetReadDeadline(time.Now().Add(d.node.agent.times.header))
		h, err := intercept.ReadHeader(c)
		if err != nil || !stop() {
			reset(c)
			return
		}
		_ = c.SetReadDeadline(time.Time{})
		if d.proofs.has(proofOf(h)) {
			known()
		}
		say := func(s intercept.Status) error {
			known()
			_ = c.SetWriteDeadline(time.Now().Add(d.node.agent.times.header))
			defer func() { _ = c.SetWriteDeadline(time.Time{}) }()
			return intercept.WriteStatus(c, s)
		}
		if h.Network != intercept.Watch {
			d.lead(h, d.node.agent.cfg.MaxInbound, c, func(s intercept.Status) error {
				d.learn(h, from, s)
				return say(s)
			})
			return
		}
		if s := d.check(h, from); s != intercept.Accepted {
			_ = say(s) // who does not hear it asks again
			c.Close()
			return
		}
		known()
		d.beat(c, from)
	})
}

// learn remembers what the session's answer to a header from an address proves.
func (d *inboundDoor) learn(h intercept.Header, from netip.Addr, s intercept.Status) {
	switch s {
	case intercept.Accepted, intercept.Refused:
		d.proofs.add(proofOf(h))
		d.gates.add(from)
	case intercept.Unknown:
		d.proofs.drop(proofOf(h))
	}
}

// check is whether a watch may be had with h: Accepted, or what there is to say
// instead. None is kept for who could not be checked: it would be the session's
// work, and a gate asks again soon.
func (d *inboundDoor) check(h intercept.Header, from netip.Addr) intercept.Status {
	switch {
	case h.ID == "" || h.Token == "":
		return intercept.Unknown // the session would take it for the agent's own
	case d.proofs.has(proofOf(h)):
		return intercept.Accepted
	}
	c, s := d.machine.ask(h)
	if s == intercept.Accepted {
		c.reset()
	}
	d.learn(h, from, s)
	return s
}

// lead joins c to the session, as h introduces it, and owns it; most is for ask. What
// came of it is given to say before anything else moves; an error of that ends both.
func (d *inboundDoor) lead(h intercept.Header, most int, c *net.TCPConn, say func(intercept.Status) error) {
	to, s := d.ask(h, most)
	if s != intercept.Accepted {
		_ = say(s) // who does not hear it waits for no connection
		c.Close()
		return
	}
	_ = c.SetKeepAliveConfig(d.node.tcp.dialer.KeepAliveConfig) // it works without, too
	netstack.KeepAlive(to.ep)
	r := newRelay(d.node.tcp, to.ep, to.wq, c)
	r.onEnd = func() { d.forget(r) }
	d.note(r, to.turn)
	if err := say(s); err != nil {
		r.reset() // and what begins now ends at once
	}
	if !d.node.tcp.join(r) {
		d.forget(r)
	}
}

// ask leads h to the session, if fewer than most connections are open. After
// Accepted it counts as open, and the machine is needed, until note and forget.
func (d *inboundDoor) ask(h intercept.Header, most int) (*sessionConn, intercept.Status) {
	m := d.node.agent.metrics
	m.inboundTotal.Inc()
	if !d.enter(most) {
		m.inboundAway.Inc()
		return nil, intercept.Away
	}
	d.mu.Lock()
	turn := d.turn
	d.mu.Unlock()
	c, s := d.machine.ask(h)
	switch s {
	case intercept.Accepted:
		c.turn = turn
		d.machine.need() // not before: anybody may ask
		return c, s
	case intercept.Away:
		m.inboundAway.Inc()
	default:
		m.inboundRefused.Inc()
	}
	d.leave()
	return nil, s
}

// enter counts a connection, of which there may be most; false when there is no room for it, or the agent is
// about to end: then it is better served elsewhere.
func (d *inboundDoor) enter(most int) bool {
	n := d.node
	if !n.gov.admits() || n.tcp.total() >= n.agent.cfg.MaxTCP {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left || d.open >= most || n.ctx.Err() != nil {
		return false
	}
	d.open++
	return true
}

// leave is the opposite of enter.
func (d *inboundDoor) leave() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.open--
	if d.left && d.open == 0 {
		close(d.empty)
	}
}

// note has a connection of a turn end when the machine is lost: at once, if that
// was since it was dialled.
func (d *inboundDoor) note(r resetter, turn int) {
	d.mu.Lock()
	d.joined[r] = struct{}{}
	late := turn != d.turn
	d.mu.Unlock()
	if late {
		r.reset()
	}
}

// forget is the opposite of note and of ask, once.
func (d *inboundDoor) forget(r resetter) {
	d.mu.Lock()
	_, ok := d.joined[r]
	delete(d.joined, r)
	d.mu.Unlock()
	if ok {
		d.machine.release()
		d.leave()
	}
}

// count is the number of connections.
func (d *inboundDoor) count() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.open
}

// resetAll ends all connections: their machine is lost, or its process is another.
func (d *inboundDoor) resetAll() {
	d.mu.Lock()
	d.turn++
	all := make([]resetter, 0, len(d.joined))
	for r := range d.joined {
		all = append(all, r)
	}
	d.mu.Unlock()
	if len(all) > 0 {
		d.node.agent.log.Info("resetting connections from the cluster", "connections", len(all))
	}
	for _, r := range all {
		r.reset()
	}
}

// renew is when another process of the session introduced itself, or the same one
// after a cut in which keys ran out: none of the old connections goes on.
func (d *inboundDoor) renew() {
	d.resetAll()
	d.machine.again()
}

// drain tells gates that the agent is about to end, takes no new connection, and
// waits until those that are open have ended, or ctx.
func (d *inboundDoor) drain(ctx context.Context) {
	d.mu.Lock()
	if !d.left {
		d.left = true
		close(d.leaving)
		if d.open == 0 {
			close(d.empty)
		}
	}
	open := d.open
	d.mu.Unlock()
	if open > 0 {
		d.node.agent.log.Info("waiting for connections from the cluster to end", "connections", open)
	}
	select {
	case <-d.empty:
	case <-ctx.Done():
	}
}

// beat tells a gate how the machine is: every BeatEvery, and at once when that
// changes. As long as it does the address is known as a gate's.
func (d *inboundDoor) beat(c *net.TCPConn, from netip.Addr) {
	defer c.Close()
	d.mu.Lock()
	full := d.watches >= maxWatches
	if !full {
		d.watches++
	}
	d.mu.Unlock()
	if full {
		d.node.agent.metrics.refused("inbound")
		return
	}
	defer func() {
		d.mu.Lock()
		d.watches--
		d.mu.Unlock()
	}()
	d.machine.need()
	defer d.machine.release()
	t := time.NewTicker(intercept.BeatEvery)
	defer t.Stop()
	leaving := d.leaving
	for {
		d.gates.add(from)
		s, change := d.machine.now()
		if leaving == nil {
			s = intercept.Leaving
		}
		if s != 0 { // a gate knows what silence means
			_ = c.SetWriteDeadline(time.Now().Add(intercept.SilentAfter))
			if err := intercept.WriteStatus(c, s); err != nil {
				return
			}
		}
		select {
		case <-t.C:
		case <-change:
		case <-leaving:
			leaving = nil
		case <-d.node.ctx.Done():
			return
		}
	}
}

// reset ends both directions with a RST.
func (c *sessionConn) reset() {
	c.ep.Abort()
	c.ep.Close()
}
