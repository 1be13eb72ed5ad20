package agent

import (
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

const (
	// exposedQueue bounds the datagrams of one flow that wait for the session; more
	// are dropped, as a socket would.
	exposedQueue = 64
	// exposedBytes bounds those of all flows.
	exposedBytes = 8 << 20
)

// exposedSocket is an exposed UDP port at one address of the pod.
type exposedSocket struct {
	port *exposedPort
	conn *net.UDPConn
	at   netip.AddrPort

	mu     sync.Mutex
	flows  map[netip.AddrPort]*exposedFlow // by client
	closed bool
}

// exposedFlow is one client's datagrams, which have a connection to the session
// of their own.
type exposedFlow struct {
	socket *exposedSocket
	client netip.AddrPort
	in     chan []byte  // what waits for the session, counted in exposed.queued
	last   atomic.Int64 // unix nanoseconds of the last datagram
	done   chan struct{}
	once   sync.Once
	conn   *sessionConn // set before it is noted
}

// serve takes datagrams until the socket is closed.
func (s *exposedSocket) serve() {
	buf := make([]byte, datagramMax)
	for {
		n, from, err := s.conn.ReadFromUDPAddrPort(buf)
		if err != nil {
			s.mu.Lock()
			closed := s.closed
			s.mu.Unlock()
			if closed {
				return
			}
			time.Sleep(time.Millisecond) // an ICMP error, or no memory: it passes
			continue
		}
		s.mu.Lock()
		if f := s.flow(netip.AddrPortFrom(from.Addr().Unmap(), from.Port())); f != nil {
			f.push(buf[:n])
		}
		s.mu.Unlock()
	}
}

// flow is a client's, new if need be; nil when there are too many. s.mu is held.
func (s *exposedSocket) flow(client netip.AddrPort) *exposedFlow {
	n := s.port.all.node
	if f := s.flows[client]; f != nil {
		return f
	}
	// Half of the room stays for TCP: anybody can make up clients.
	if s.closed || len(s.flows) >= max(1, n.agent.cfg.MaxInbound/2) {
		return nil
	}
	f := &exposedFlow{socket: s, client: client, in: make(chan []byte, exposedQueue), done: make(chan struct{})}
	f.last.Store(time.Now().UnixNano())
	s.flows[client] = f
	n.spawn(f.run)
	return f
}

// Close ends the port and its flows. It may be called repeatedly.
func (s *exposedSocket) Close() error {
	s.mu.Lock()
	s.closed = true
	for _, f := range s.flows {
		f.end()
	}
	s.mu.Unlock()
	return s.conn.Close()
}

// push has a datagram wait for the session. The socket's mu is held, so that none
// comes after forget.
func (f *exposedFlow) push(p []byte) {
	queued := &f.socket.port.all.queued
	if queued.Add(int64(len(p))) <= exposedBytes {
		select {
		case f.in <- append([]byte(nil), p...):
			return
		default:
		}
	}
	queued.Add(-int64(len(p)))
}

// end has run end.
func (f *exposedFlow) end() { f.once.Do(func() { close(f.done) }) }

// reset implements resetter.
func (f *exposedFlow) reset() {
	f.end()
	f.conn.reset()
}

// run leads the flow to the session and back. One that the session does not take
// ends without a word: UDP has none for it.
func (f *exposedFlow) run() {
	defer f.forget()
	door := f.socket.port.all.node.door
	c, s := door.ask(f.socket.port.header(intercept.UDP, f.client, f.socket.at), f.socket.port.all.most())
	if s != intercept.Accepted {
		return
	}
	f.conn = c
	door.note(f, c.turn)
	defer door.forget(f)
	var down sync.WaitGroup
	down.Go(f.down)
	f.up()
	c.Close()
	down.Wait()
}

// forget takes the flow out of the socket's table, and drops what waits.
func (f *exposedFlow) forget() {
	f.socket.mu.Lock()
	delete(f.socket.flows, f.client)
	f.socket.mu.Unlock()
	for {
		select {
		case p := <-f.in:
			f.socket.port.all.queued.Add(-int64(len(p)))
		default:
			return
		}
	}
}

// up moves datagrams to the session until the flow ends or is idle.
func (f *exposedFlow) up() {
	idle := f.socket.port.all.node.agent.times.flowIdle
	t := time.NewTimer(idle)
	defer t.Stop()
	for {
		select {
		case p := <-f.in:
			f.socket.port.all.queued.Add(-int64(len(p)))
			f.last.Store(time.Now().UnixNano())
			if intercept.WriteDatagram(f.conn, p, nil) != nil {
				return
			}
		case <-t.C:
			left := idle - time.Since(time.Unix(0, f.last.Load()))
			if left <= 0 {
				return
			}
			t.Reset(left)
		case <-f.done:
			return
		}
	}
}

// down moves datagrams of the session to the client.
func (f *exposedFlow) down() {
	defer f.end()
	for {
		n, err := intercept.DatagramSize(f.conn)
		if err != nil {
			return
		}
		p := make([]byte, n) // no longer than it takes to come: idle flows are many
		if _, err := io.ReadFull(f.conn, p); err != nil {
			return
		}
		f.last.Store(time.Now().UnixNano())
		_, _ = f.socket.conn.WriteToUDPAddrPort(p, f.client) // datagrams may be lost
	}
}
