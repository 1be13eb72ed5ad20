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
	// maxUnmetInbound bounds the connections of gates whose header has not come:
	// it comes with the first packet.
	maxUnmetInbound = 256
	// maxUnmetInboundFrom bounds those of one source, so that one pod cannot keep
	// the gates out; a gate may open many at once.
	maxUnmetInboundFrom = 128
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
	unmet     *lobby
	leaving   chan struct{} // closed when the agent is about to end

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
		node:    n,
		unmet:   newLobby(maxUnmetInbound, maxUnmetInboundFrom),
		leaving: make(chan struct{}),
		joined:  map[resetter]struct{}{},
		empty:   make(chan struct{}),
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

// met has one connection of a gate say what it is for.
func (d *inboundDoor) met(c *net.TCPConn) {
	from := remoteOf(c).Addr()
	if !d.unmet.enter(from) {
		c.Close()
		d.node.agent.metrics.refused("inbound")
		return
	}
	d.node.spawn(func() {
		stop := context.AfterFunc(d.node.ctx, func() { c.Close() })
		_ = c.SetReadDeadline(time.Now().Add(d.node.agent.times.header))
		h, err := intercept.ReadHeader(c)
		d.unmet.leave(from)
		if err != nil || !stop() {
			reset(c)
			return
		}
		_ = c.SetReadDeadline(time.Time{})
		if h.Network == intercept.Watch {
			d.beat(c)
			return
		}
		d.lead(h, c, func(s intercept.Status) error {
			_ = c.SetWriteDeadline(time.Now().Add(d.node.agent.times.header))
			defer func() { _ = c.SetWriteDeadline(time.Time{}) }()
			return intercept.WriteStatus(c, s)
		})
	})
}

// lead joins c to the session, as h introduces it, and owns it. What came of it is
// given to say before anything else moves; an error of that ends both.
func (d *inboundDoor) lead(h intercept.Header, c *net.TCPConn, say func(intercept.Status) error) {
	to, s := d.ask(h)
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

// ask leads h to the session. After Accepted the connection counts as open, until
// leave, or note and forget.
func (d *inboundDoor) ask(h intercept.Header) (*sessionConn, intercept.Status) {
	m := d.node.agent.metrics
	m.inboundTotal.Inc()
	if !d.enter() {
		m.inboundAway.Inc()
		return nil, intercept.Away
	}
	d.machine.need()
	d.mu.Lock()
	turn := d.turn
	d.mu.Unlock()
	c, s := d.machine.ask(h)
	switch s {
	case intercept.Accepted:
		c.turn = turn
		return c, s
	case intercept.Away:
		m.inboundAway.Inc()
	default:
		m.inboundRefused.Inc()
	}
	d.leave()
	return nil, s
}

// enter counts a connection; false when there is no room for it, or the agent is
// about to end: then it is better served elsewhere.
func (d *inboundDoor) enter() bool {
	n := d.node
	if !n.gov.admits() || n.tcp.total() >= n.agent.cfg.MaxTCP {
		return false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.left || d.open >= n.agent.cfg.MaxInbound || n.ctx.Err() != nil {
		return false
	}
	d.open++
	return true
}

// leave is the opposite of enter, and of the need for the machine.
func (d *inboundDoor) leave() {
	d.mu.Lock()
	d.open--
	if d.left && d.open == 0 {
		close(d.empty)
	}
	d.mu.Unlock()
	d.machine.release()
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

// forget is the opposite of note, and leave, once.
func (d *inboundDoor) forget(r resetter) {
	d.mu.Lock()
	_, ok := d.joined[r]
	delete(d.joined, r)
	d.mu.Unlock()
	if ok {
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
// changes.
func (d *inboundDoor) beat(c *net.TCPConn) {
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
