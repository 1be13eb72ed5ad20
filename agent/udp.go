package agent

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// udpQueue is what one flow may have waiting, in bytes, each way: two of the
	// largest datagrams; more is dropped, as a socket would.
	udpQueue = 128 << 10
	// datagramMax is the largest UDP payload, rounded up.
	datagramMax = 64 << 10
	// datagramBuffers bounds the buffers in use at one time: a flow takes one
	// only for the moment between a read and the write that follows.
	datagramBuffers = 64
)

// udpForwarder gives each UDP flow (addresses and ports of both ends) of the
// stack a connected socket.
type udpForwarder struct {
	node    *node
	dialer  net.Dialer
	buffers chan struct{} // slots for buffers in use
	pool    sync.Pool

	mu     sync.Mutex
	flows  map[stack.TransportEndpointID]*udpFlow
	closed bool
}

// udpFlow ends when it was idle, when it must give way, or when a side closes.
type udpFlow struct {
	forwarder *udpForwarder
	id        stack.TransportEndpointID
	ep        tcpip.Endpoint
	wq        waiter.Queue
	idle      time.Duration
	last      atomic.Int64 // unix nanoseconds of the last datagram
	done      chan struct{}
	once      sync.Once
}

func newUDPForwarder(n *node) *udpForwarder {
	f := &udpForwarder{
		node:    n,
		dialer:  net.Dialer{Control: forbidBroadcast},
		buffers: make(chan struct{}, datagramBuffers),
		pool:    sync.Pool{New: func() any { return new([datagramMax]byte) }},
		flows:   map[stack.TransportEndpointID]*udpFlow{},
	}
	forward := udp.NewForwarder(n.stack, f.handle)
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, forward.HandlePacket)
	return f
}

// forbidBroadcast takes back what Go allows every UDP socket: a datagram is for
// one pod.
func forbidBroadcast(_, _ string, c syscall.RawConn) error {
	var err error
	if cerr := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_BROADCAST, 0)
	}); cerr != nil {
		return cerr
	}
	return err
}

// handle takes the first datagram of a flow, on the goroutine that delivers
// packets: the endpoint must exist when it returns, or the next datagram would
// come here too. False makes the stack answer "port unreachable".
func (f *udpForwarder) handle(r *udp.ForwarderRequest) bool {
	id := r.ID()
	if !f.node.targets.allows(netipAddr(id.LocalAddress), id.LocalPort) {
		f.node.agent.metrics.refused("udp")
		return false
	}
	times := f.node.agent.times
	flow := &udpFlow{forwarder: f, id: id, idle: times.udpIdle, done: make(chan struct{})}
	if id.LocalPort == 53 {
		flow.idle = times.dnsIdle
	}
	flow.touch()

	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return true
	}
	var oldest *udpFlow
	if len(f.flows) >= f.node.agent.cfg.MaxUDP {
		for _, other := range f.flows {
			if oldest == nil || other.last.Load() < oldest.last.Load() {
				oldest = other
			}
		}
		delete(f.flows, oldest.id)
	}
	ep, err := r.CreateEndpoint(&flow.wq)
	if err == nil {
		flow.ep = ep
		f.flows[id] = flow
		f.node.wg.Add(1)
	}
	f.mu.Unlock()
	if oldest != nil {
		oldest.end()
		f.node.agent.metrics.udpEvicted.Inc()
	}
	if err != nil {
		return true // the flow exists after all, or its addresses are nonsense
	}
	ep.SocketOptions().SetReceiveBufferSize(udpQueue, false)
	ep.SocketOptions().SetSendBufferSize(udpQueue, false)
	f.node.agent.metrics.udpTotal.Inc()
	go flow.run()
	return true
}

// sweep ends idle flows.
func (f *udpForwarder) sweep() {
	t := time.NewTicker(f.node.agent.times.sweep)
	defer t.Stop()
	var idle []*udpFlow
	for {
		select {
		case <-f.node.ctx.Done():
			return
		case <-t.C:
		}
		now := time.Now()
		f.mu.Lock()
		for _, flow := range f.flows {
			if now.Sub(time.Unix(0, flow.last.Load())) > flow.idle {
				idle = append(idle, flow)
			}
		}
		f.mu.Unlock()
		for _, flow := range idle {
			flow.end()
		}
		clear(idle)
		idle = idle[:0]
	}
}

func (f *udpForwarder) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.flows)
}

// leave ends the flows of a client that is gone for good.
func (f *udpForwarder) leave(client tcpip.Address) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for id, flow := range f.flows {
		if id.RemoteAddress == client {
			flow.end()
		}
	}
}

func (f *udpForwarder) close() {
	f.mu.Lock()
	f.closed = true
	var all []*udpFlow
	for _, flow := range f.flows {
		all = append(all, flow)
	}
	f.mu.Unlock()
	for _, flow := range all {
		flow.end()
	}
}

func (f *udpForwarder) buffer() *[datagramMax]byte {
	f.buffers <- struct{}{}
	return f.pool.Get().(*[datagramMax]byte)
}

func (f *udpForwarder) release(b *[datagramMax]byte) {
	f.pool.Put(b)
	<-f.buffers
}

func (u *udpFlow) touch() { u.last.Store(time.Now().UnixNano()) }

// end stops the flow's goroutines; run does the rest.
func (u *udpFlow) end() { u.once.Do(func() { close(u.done) }) }

// run opens the socket and forwards until the flow ends.
func (u *udpFlow) run() {
	f := u.forwarder
	defer f.node.wg.Done()
	defer func() {
		u.end()
		f.mu.Lock()
		if f.flows[u.id] == u {
			delete(f.flows, u.id)
		}
		f.mu.Unlock()
		u.ep.Close()
	}()
	target := netip.AddrPortFrom(netipAddr(u.id.LocalAddress), u.id.LocalPort)
	conn, err := f.dialer.DialContext(f.node.ctx, "udp", target.String())
	if err != nil {
		u.report(err)
		return
	}
	backend := conn.(*net.UDPConn)
	var down sync.WaitGroup
	down.Go(func() { u.down(backend) })
	u.up(backend)
	backend.Close()
	down.Wait()
}

// up forwards from the client to the target.
func (u *udpFlow) up(backend *net.UDPConn) {
	readable, notify := waiter.NewChannelEntry(waiter.ReadableEvents)
	u.wq.EventRegister(&readable)
	defer u.wq.EventUnregister(&readable)
	for {
		if more := u.forwardOne(backend); more {
			continue
		}
		select {
		case <-notify:
		case <-u.done:
			return
		}
	}
}

// forwardOne takes one datagram from the stack to the socket, if there is one.
func (u *udpFlow) forwardOne(backend *net.UDPConn) bool {
	if u.ep.Readiness(waiter.ReadableEvents) == 0 {
		return false
	}
	b := u.forwarder.buffer()
	defer u.forwarder.release(b)
	w := tcpip.SliceWriter(b[:])
	res, err := u.ep.Read(&w, tcpip.ReadOptions{})
	if err != nil {
		return false
	}
	u.touch()
	u.forwarder.node.agent.metrics.udpUp.Add(float64(res.Count))
	if _, err := backend.Write(b[:res.Count]); err != nil {
		// What an earlier datagram brought back is told on the next send, which
		// then has not been tried: udp(7).
		u.report(err)
		if errors.Is(err, syscall.ECONNREFUSED) {
			_, _ = backend.Write(b[:res.Count]) // datagrams may be lost
		}
	}
	return true
}

// down forwards from the target to the client.
func (u *udpFlow) down(backend *net.UDPConn) {
	raw, err := backend.SyscallConn()
	if err != nil {
		return
	}
	f := u.forwarder
	var rerr error
	step := func(fd uintptr) bool {
		b := f.buffer()
		defer f.release(b)
		var n int
		n, rerr = unix.Read(int(fd), b[:])
		if rerr == unix.EAGAIN {
			return false
		}
		if rerr == nil {
			u.touch()
			f.node.agent.metrics.udpDown.Add(float64(n))
			u.ep.Write(bytes.NewReader(b[:n]), tcpip.WriteOptions{}) // full or gone: datagrams may be lost
		}
		return true
	}
	for {
		if err := raw.Read(step); err != nil {
			return
		}
		if rerr != nil && rerr != unix.EINTR {
			u.report(rerr)
		}
	}
}

// report tells the client what the target's side answered instead of a datagram.
func (u *udpFlow) report(err error) {
	code, ok := unreachable(err)
	if errors.Is(err, syscall.ECONNREFUSED) {
		code, ok = portUnreachable, true
	}
	if !ok {
		return
	}
	h := header.UDP(make([]byte, header.UDPMinimumSize))
	h.Encode(&header.UDPFields{SrcPort: u.id.RemotePort, DstPort: u.id.LocalPort, Length: header.UDPMinimumSize})
	u.forwarder.node.sendUnreachable(code, header.UDPProtocolNumber, u.id.RemoteAddress, u.id.LocalAddress, h)
}
