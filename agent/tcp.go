package agent

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/wire/netstack"
)

const (
	// maxDialing bounds the connections whose target has not answered: a SYN
	// above it is dropped and comes again. About 10 KB each.
	maxDialing = 2048
	// maxDialingPerAddr leaves room for others when one address is a black hole.
	maxDialingPerAddr = 512
)

// tcpForwarder gives each TCP connection of the stack a socket. It dials before
// it answers the SYN, so that the client sees what the target said.
type tcpForwarder struct {
	node    *node
	forward *tcp.Forwarder
	dialer  net.Dialer

	mu      sync.Mutex
	dialing map[stack.TransportEndpointID]*dialling
	perAddr map[tcpip.Address]int
	relays  map[*relay]struct{}
	closed  bool
}

// dialling is a connection whose target has not answered.
type dialling struct {
	syn    header.TCP
	ctx    context.Context
	cancel context.CancelFunc // the client went away
}

func newTCPForwarder(n *node) *tcpForwarder {
	f := &tcpForwarder{
		node: n,
		dialer: net.Dialer{
			Timeout: n.agent.times.dial,
			KeepAliveConfig: net.KeepAliveConfig{
				Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4,
			},
		},
		dialing: map[stack.TransportEndpointID]*dialling{},
		perAddr: map[tcpip.Address]int{},
		relays:  map[*relay]struct{}{},
	}
	// Twice the bound, because the forwarder forgets a connection a little later
	// than dialing does.
	f.forward = tcp.NewForwarder(n.stack, 0, 2*maxDialing, f.accept)
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, f.handle)
	return f
}

// handle takes a segment that belongs to no connection, on the goroutine that
// delivers packets. False makes the stack answer with a reset.
func (f *tcpForwarder) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize || h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck) != header.TCPFlagSyn {
		if len(h) >= header.TCPMinimumSize && h.Flags()&(header.TCPFlagRst|header.TCPFlagFin) != 0 {
			f.clientLeft(id)
		}
		return f.forward.HandlePacket(id, pkt)
	}
	if !f.node.targets.allows(netipAddr(id.LocalAddress), id.LocalPort) {
		f.node.agent.metrics.refused("tcp")
		return false
	}
	f.mu.Lock()
	if _, again := f.dialing[id]; again || len(f.dialing) >= maxDialing || f.perAddr[id.LocalAddress] >= maxDialingPerAddr || f.closed {
		f.mu.Unlock()
		return true
	}
	n := len(f.dialing) + len(f.relays)
	if n >= f.node.agent.cfg.MaxTCP || !f.node.gov.admits() {
		f.mu.Unlock()
		f.node.agent.metrics.refused("tcp")
		return false
	}
	d := &dialling{syn: append(header.TCP(nil), h[:header.TCPMinimumSize]...)}
	d.ctx, d.cancel = context.WithCancel(f.node.ctx)
	f.dialing[id] = d
	f.perAddr[id.LocalAddress]++
	f.node.wg.Add(1) // for accept; closed is false, so close has not waited yet
	f.mu.Unlock()
	if !f.forward.HandlePacket(id, pkt) {
		f.dialed(id)
		f.node.wg.Done()
		return false
	}
	return true
}

// clientLeft ends the dial for a client that gave up before its target answered
// and said so. Linux leaves SYN-SENT without a word; other stacks send a RST.
func (f *tcpForwarder) clientLeft(id stack.TransportEndpointID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if d := f.dialing[id]; d != nil {
		d.cancel()
	}
}

// dialed forgets that id is being dialled and returns its SYN.
func (f *tcpForwarder) dialed(id stack.TransportEndpointID) header.TCP {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dialedLocked(id)
}

func (f *tcpForwarder) dialedLocked(id stack.TransportEndpointID) header.TCP {
	d := f.dialing[id]
	d.cancel()
	delete(f.dialing, id)
	if f.perAddr[id.LocalAddress]--; f.perAddr[id.LocalAddress] <= 0 {
		delete(f.perAddr, id.LocalAddress)
	}
	return d.syn
}

// accept dials the target of one SYN and answers it; a goroutine of its own.
func (f *tcpForwarder) accept(r *tcp.ForwarderRequest) {
	defer f.node.wg.Done()
	id := r.ID()
	f.mu.Lock()
	ctx := f.dialing[id].ctx
	f.mu.Unlock()
	// Here, and not in handle: it takes the locks of endpoints, which may be held
	// by senders who wait for the queue.
	f.node.gov.fit(f.total())
	target := netip.AddrPortFrom(netipAddr(id.LocalAddress), id.LocalPort)
	conn, err := f.dialer.DialContext(ctx, "tcp", target.String())
	if err != nil {
		f.node.agent.metrics.dialFailed(err)
		syn := f.dialed(id)
		r.Complete(refusedByTarget(err))
		if code, ok := unreachable(err); ok {
			f.node.sendUnreachable(code, header.TCPProtocolNumber, id.RemoteAddress, id.LocalAddress, syn)
		}
		return
	}
	backend := conn.(*net.TCPConn)
	wq := new(waiter.Queue)
	ep, terr := r.CreateEndpoint(wq)
	r.Complete(false)
	if terr != nil {
		f.dialed(id)
		// The client went away before the handshake's end, as far as one can know.
		reset(backend)
		return
	}
	netstack.KeepAlive(ep)
	f.start(id, newRelay(f, ep, wq, backend))
}

// start runs r, which was dialled as id, unless the forwarder is closed.
func (f *tcpForwarder) start(id stack.TransportEndpointID, r *relay) {
	f.mu.Lock()
	f.dialedLocked(id) // not before: it would count as neither
	ok := f.addLocked(r)
	f.mu.Unlock()
	if f.begin(r, ok) {
		f.node.agent.metrics.tcpTotal.Inc()
	}
}

// join runs r, whose client is the session, unless the forwarder is closed.
func (f *tcpForwarder) join(r *relay) bool {
	f.mu.Lock()
	ok := f.addLocked(r)
	f.mu.Unlock()
	return f.begin(r, ok)
}

func (f *tcpForwarder) addLocked(r *relay) bool {
	if f.closed {
		return false
	}
	f.relays[r] = struct{}{}
	f.node.wg.Add(1)
	return true
}

// begin runs r if it was added, and ends it if not.
func (f *tcpForwarder) begin(r *relay, added bool) bool {
	if !added {
		r.reset()
		r.ep.Close()
		return false
	}
	f.node.gov.begin(r)
	r.start()
	return true
}

// ended forgets r.
func (f *tcpForwarder) ended(r *relay) {
	f.mu.Lock()
	delete(f.relays, r)
	f.mu.Unlock()
	f.node.wg.Done()
}

// counts are the open connections and those whose target has not answered.
func (f *tcpForwarder) counts() (open, dialing int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.relays), len(f.dialing)
}

// total is the number of connections, answered or not.
func (f *tcpForwarder) total() int {
	open, dialing := f.counts()
	return open + dialing
}

func (f *tcpForwarder) each(do func(*relay)) {
	f.mu.Lock()
	all := make([]*relay, 0, len(f.relays))
	for r := range f.relays {
		all = append(all, r)
	}
	f.mu.Unlock()
	for _, r := range all {
		do(r)
	}
}

// leave ends the connections of a client that is gone for good.
func (f *tcpForwarder) leave(client tcpip.Address) {
	f.mu.Lock()
	for id, d := range f.dialing {
		if id.RemoteAddress == client {
			d.cancel()
		}
	}
	f.mu.Unlock()
	f.each(func(r *relay) {
		if from, err := r.ep.GetRemoteAddress(); err == nil && from.Addr == client {
			r.reset()
		}
	})
}

// close resets every connection; node.close waits for them.
func (f *tcpForwarder) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.each((*relay).reset)
}

// reset closes c so that its other end gets a RST instead of a FIN.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // of a socket that is closed already there is nothing to reset
	c.Close()
}

// refusedByTarget: the target, or a firewall in its name, sent a reset. A
// time-out on the other hand stays silent, as it was.
func refusedByTarget(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET)
}

// unreachable maps what the pod's kernel said to what the client's kernel shall
// be told.
func unreachable(err error) (unreachableCode, bool) {
	switch {
	case errors.Is(err, context.Canceled):
		return 0, false
	case errors.Is(err, syscall.EHOSTUNREACH):
		return hostUnreachable, true
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL):
		return netUnreachable, true
	case errors.Is(err, syscall.EACCES), errors.Is(err, syscall.EPERM):
		return prohibited, true
	}
	return 0, false
}
