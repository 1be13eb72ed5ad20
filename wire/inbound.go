package wire

import (
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/wire/intercept"
	"github.com/culvert-dev/culvert/wire/netstack"
)

const (
	// maxOpening bounds connections in their handshake, which takes a round trip.
	maxOpening = 1024
	// maxInbound bounds those that are open, each of 10 KB when it is idle.
	maxInbound = 4096
	// maxUnknown bounds those of which the handler does not know yet what they are
	// for: the agent says it at once.
	maxUnknown = 256
	// pumpBatch packets of 64 KiB are carried from the netstack at once.
	pumpBatch = 8
)

// A connection whose agent is silent ends here after inboundIdle and
// inboundProbes of inboundEvery: somewhat later than in the agent
// (intercept.LostAfter), and soon after the path is back it learns from a probe
// that it ended there.
const (
	inboundIdle   = time.Minute
	inboundEvery  = 10 * time.Second
	inboundProbes = 3
)

// Inbound is a connection from the cluster, which ended in the session's own
// netstack. Its methods may be called from several goroutines.
type Inbound interface {
	net.Conn
	CloseWrite() error
	// Abort is Close with a RST instead of a FIN. It may follow a Close.
	Abort()
	// Introduced tells that the handler knows what it is for: only a few may be
	// open that are not.
	Introduced()
	// OnReset has f called in a goroutine of its own when the other end resets the
	// connection, or is silent for too long. It may be called once, and f may be
	// called more than once.
	OnReset(f func())
}

// inbound ends connections from the cluster in a netstack of the session's own.
type inbound struct {
	l     *Local
	ep    *netstack.Endpoint
	stack *stack.Stack
	wg    sync.WaitGroup
	once  sync.Once

	mu      sync.Mutex
	handler func(Inbound) // nil: all are refused
	conns   map[*inboundConn]struct{}
	unknown int // of conns, and those in their handshake
	closed  bool
}

// SetInbound has handler called, in a goroutine of its own, for each TCP
// connection to intercept.Port at the Inbound addresses; all other ports are
// refused, and this one with a nil handler. A handler owns its connection, may
// return before it has closed it, and must not go on for long when it was aborted:
// Close of the Local aborts all and waits. Open connections keep their handler.
func (l *Local) SetInbound(handler func(Inbound)) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return os.ErrClosed
	}
	in := l.inbound.Load()
	if in == nil {
		if handler == nil {
			return nil // no netstack until one is needed
		}
		ep := netstack.New(netstack.Config{MTU: l.mtu, GSO: true, Split: l.limit})
		s, err := netstack.NewStack(ep)
		if err != nil {
			return err
		}
		in = &inbound{l: l, ep: ep, stack: s, conns: map[*inboundConn]struct{}{}}
		forward := tcp.NewForwarder(s, 0, maxOpening, in.accept)
		s.SetTransportProtocolHandler(tcp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
			return id.LocalPort == intercept.Port && forward.HandlePacket(id, pkt) // else refused
		})
		in.wg.Add(1)
		go in.pump()
		l.inbound.Store(in)
	}
	in.mu.Lock()
	in.handler = handler
	in.mu.Unlock()
	return nil
}

// ResetInbound aborts all connections from the cluster: the agent that they came
// through is gone.
func (l *Local) ResetInbound() {
	if in := l.inbound.Load(); in != nil {
		in.abort()
	}
}

// pump carries the netstack's packets to the side queue.
func (in *inbound) pump() {
	defer in.wg.Done()
	bufs, sizes := make([][]byte, pumpBatch), make([]int, pumpBatch)
	for i := range bufs {
		bufs[i] = make([]byte, 64<<10)
	}
	for {
		n, err := in.ep.Read(bufs, sizes, 0)
		if err != nil {
			return
		}
		for i := range n {
			if !in.l.side.push(bufs[i][:sizes[i]]) {
				return
			}
		}
	}
}

// enter makes room for a connection; nil: there is none.
func (in *inbound) enter() *inboundConn {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.closed || in.handler == nil || len(in.conns) >= maxInbound || in.unknown >= maxUnknown {
		return nil
	}
	c := &inboundConn{in: in, unknown: true}
	in.conns[c] = struct{}{}
	in.unknown++
	in.wg.Add(1)
	return c
}

// leave is the opposite of enter, once.
func (in *inbound) leave(c *inboundConn) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if _, ok := in.conns[c]; ok {
		delete(in.conns, c)
		in.introduced(c)
		in.wg.Done()
	}
}

// introduced takes c out of the unknown. in.mu is held.
func (in *inbound) introduced(c *inboundConn) {
	if c.unknown {
		c.unknown = false
		in.unknown--
	}
}

// accept finishes one handshake. The forwarder calls it in a goroutine of its own.
func (in *inbound) accept(r *tcp.ForwarderRequest) {
	c := in.enter()
	if c == nil {
		r.Complete(true)
		return
	}
	var wq waiter.Queue
	ep, err := r.CreateEndpoint(&wq)
	r.Complete(false)
	if err != nil {
		in.leave(c)
		return
	}
	ep.SocketOptions().SetKeepAlive(true)
	idle, every := tcpip.KeepaliveIdleOption(inboundIdle), tcpip.KeepaliveIntervalOption(inboundEvery)
	silent := tcpip.TCPUserTimeoutOption(inboundIdle + inboundProbes*inboundEvery)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&every)
	ep.SetSockOpt(&silent) // the same while data waits to be acknowledged
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, inboundProbes)

	in.mu.Lock()
	c.TCPConn, c.ep, c.wq = gonet.NewTCPConn(&wq, ep), ep, &wq
	handler, closed := in.handler, in.closed
	if handler != nil && !closed {
		in.wg.Add(1)
	}
	in.mu.Unlock()
	if handler == nil || closed {
		c.Abort()
		return
	}
	go func() { // this goroutine's stack has grown
		defer in.wg.Done()
		handler(c)
	}()
}

// abort resets all connections.
func (in *inbound) abort() {
	in.mu.Lock()
	var all []*inboundConn
	for c := range in.conns {
		if c.ep != nil { // else it is in its handshake
			all = append(all, c)
		}
	}
	in.mu.Unlock()
	for _, c := range all {
		c.Abort()
	}
}

func (in *inbound) close() {
	in.once.Do(func() {
		in.mu.Lock()
		in.closed = true
		in.mu.Unlock()
		in.abort()
		in.ep.Close()
		in.stack.Close() // and with it the handshakes
		in.wg.Wait()
		in.stack.Destroy()
	})
}

// inboundConn implements Inbound.
type inboundConn struct {
	*gonet.TCPConn
	in      *inbound
	ep      tcpip.Endpoint
	wq      *waiter.Queue
	unknown bool // guarded by in.mu
}

// Read implements net.Conn. To gonet a connection that was reset is at its end,
// or has an error that nobody knows.
func (c *inboundConn) Read(b []byte) (int, error) {
	n, err := c.TCPConn.Read(b)
	if err != nil && tcp.EndpointState(c.ep.State()) == tcp.StateError {
		err = &net.OpError{Op: "read", Net: "tcp", Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: syscall.ECONNRESET}
	}
	return n, err
}

// Close implements net.Conn.
func (c *inboundConn) Close() error {
	err := c.TCPConn.Close()
	c.in.leave(c)
	return err
}

// Abort implements Inbound.
func (c *inboundConn) Abort() {
	c.ep.Abort()
	c.in.leave(c)
}

// Introduced implements Inbound.
func (c *inboundConn) Introduced() {
	c.in.mu.Lock()
	defer c.in.mu.Unlock()
	c.in.introduced(c)
}

// OnReset implements Inbound.
func (c *inboundConn) OnReset(f func()) {
	const events = waiter.EventHUp | waiter.EventErr
	look := func(waiter.EventMask) { // called by the stack, with locks held
		if tcp.EndpointState(c.ep.State()) == tcp.StateError {
			go f()
		}
	}
	e := waiter.NewFunctionEntry(events, look)
	c.wq.EventRegister(&e)
	if c.ep.Readiness(events) != 0 {
		look(events)
	}
}
