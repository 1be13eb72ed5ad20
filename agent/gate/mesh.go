package gate

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/internal/nonblock"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// meshConn is a client's connection to a mesh while each request of it is routed by
// what it says. It has its own connection to the origin and to each machine that it
// used, and shares none with other clients: what the origin keeps by connection, and
// how connections are spread over its pods, is as without the router.
type meshConn struct {
	gate   *Gate
	route  *route
	client *net.TCPConn
	conn   *conn // which it serves

	from netip.AddrPort // the client
	at   netip.AddrPort // the gate, as he calls it
	left chan struct{}  // closed by leave
	// http2: the connection is of HTTP/2, whose own code ends it in time.
	http2 atomic.Bool
	// secure is set once, before anything of a request: the client speaks TLS, and
	// client is what is in it.
	secure *secured

	mu       sync.Mutex
	idle     bool       // no request is under way, and none has begun
	shut     bool       // ended from outside
	gone     bool       // the client's FIN was passed on
	told     bool       // left is closed
	looked   time.Time  // when sweep looked at its ends last
	last     *backend   // which was busy last
	backends []*backend // of HTTP/1 also those that are kept
}

// backend is a connection to a machine or the origin.
type backend struct {
	conn *net.TCPConn
	to   machineKey // zero: the origin

	// meshConn.mu guards these.
	busy  bool      // a request is under way
	until time.Time // when a machine that is no longer a member's is not waited for
}

func newMeshConn(c *conn) *meshConn {
	return &meshConn{gate: c.gate, route: c.route, client: c.client, conn: c, from: addrPort(c.client.RemoteAddr()), at: addrPort(c.client.LocalAddr()), left: make(chan struct{})}
}

// serveMesh serves c request by request, to its end or until it is handed to a relay.
func (c *conn) serveMesh() {
	m := newMeshConn(c)
	g := c.gate
	c.active.Store(time.Now().UnixNano())
	g.mu.Lock()
	c.mesh = m
	c.ended = c.route.count.opened(false)
	if c.mustDrain() {
		c.drain()
	}
	if g.life.Err() != nil {
		m.reset()
	}
	g.mu.Unlock()
	if err := m.run(); err != nil {
		if err == errHandedOver {
			return
		}
		g.log.Debug("a connection of a mesh ended", "port", c.route.at.port, "error", err)
		m.reset()
	}
	m.close()
	c.ended()
	c.forget()
}

// errHandedOver: the client's connection is another's to serve and to end.
var errHandedOver = errors.New("handed over")

// run finds out the protocol, and serves it.
func (c *meshConn) run() error {
	return c.serveSniffed(c.route.spec.Load().HTTP == intercept.HTTPKnown)
}

// serveSniffed is run, of what a client says or what is in his TLS. known: it is HTTP.
func (c *meshConn) serveSniffed(known bool) error {
	var origin *net.TCPConn
	if !known {
		var err error
		if origin, err = c.dialOrigin(c.gate.life); err != nil {
			// Machines may be there all the same.
			c.gate.log.Debug("the origin does not answer", "port", c.route.at.port, "error", err)
		}
	}
	proto, err := c.sniff(origin)
	if err == nil {
		switch proto {
		case protoHTTP1:
			return c.serveHTTP1(origin)
		case protoHTTP2:
			c.http2.Store(true)
			return c.serveHTTP2(origin)
		case protoTLS:
			if key := c.gate.enterTLS(c.route.spec.Load().key); key != nil {
				if origin != nil {
					origin.Close()
				}
				return c.serveTLS(key)
			}
		}
		if origin == nil {
			origin, err = c.dialOrigin(c.gate.life)
		}
	}
	if err != nil {
		c.route.count.refused.Add(1)
		if origin != nil {
			reset(origin)
		}
		return err
	}
	return c.handOver(origin, nil, protoUnknown)
}

// table has the members of the newest state.
func (c *meshConn) table() *table {
	if t := c.route.spec.Load().table; t != nil {
		return t
	}
	return &table{closed: true} // the port is no mesh's any more, and this connection drains
}

// dialMember connects to a member's machine. With errRefused nothing listens at his
// port, and the client shall know; with any other error the machine does not answer.
func (c *meshConn) dialMember(ctx context.Context, m *member) (*net.TCPConn, error) {
	dial := func() (*net.TCPConn, error) {
		return c.gate.dialMachine(ctx, m.watch, &m.machine, intercept.Header{Network: intercept.TCP, Client: c.from, Server: c.at})
	}
	if c.secure != nil {
		return c.machineTLS(ctx, m.key(), dial)
	}
	return dial()
}

// errNoOrigin: nobody served the port before the mesh.
var errNoOrigin = errors.New("there is no origin")

// dialOrigin connects to what serves all requests that are no member's.
func (c *meshConn) dialOrigin(ctx context.Context) (*net.TCPConn, error) {
	sp := c.route.spec.Load()
	if sp.Origin == "" {
		return nil, errNoOrigin
	}
	d := net.Dialer{Timeout: c.gate.times.dialOrigin, KeepAliveConfig: clientKeepAlive}
	o, err := dialOrigin(ctx, d, sp.Route)
	if err != nil || c.secure == nil {
		return o, err
	}
	return c.originTLS(ctx, o)
}

// leaving is closed when the connection shall end soon: the gate, the route or its
// entry does.
func (c *meshConn) leaving() <-chan struct{} { return c.left }

// leave closes it.
func (c *meshConn) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.told {
		c.told = true
		close(c.left)
	}
}

// hold has conn end with the machine it leads to: it is reset when that is lost, and
// some time after the machine is no longer a member's. A nil m is the origin. It is
// busy until told otherwise. Where the client's connection has ended already, so has
// conn when hold returns.
func (c *meshConn) hold(m *member, conn *net.TCPConn) *backend {
	b := &backend{conn: conn, busy: true}
	if m != nil {
		b.to = m.key()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.backends, c.last = append(c.backends, b), b
	if c.shut {
		reset(conn)
	}
	return b
}

// drop closes b and forgets it. It may be called repeatedly.
func (c *meshConn) drop(b *backend) {
	b.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.backends = slices.DeleteFunc(c.backends, func(x *backend) bool { return x == b })
}

// setBusy tells whether a request is under way on b. One that is idle, and no
// member's any more, is closed by the gate.
func (c *meshConn) setBusy(b *backend, busy bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	b.busy = busy
	if busy {
		c.last = b
	}
}

// reset ends the client's connection and all that belong to it with a RST.
func (c *meshConn) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shut = true
	reset(c.client)
	for _, b := range c.backends {
		reset(b.conn)
	}
}

// close ends them with a FIN, where they still stand.
func (c *meshConn) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shut = true
	c.client.Close()
	for _, b := range c.backends {
		b.conn.Close()
	}
	c.backends = nil
}

// handOver has the relay of bytes serve the client from now on, with the connection
// to. Of a member it counts as his until its end. Nothing may be left in buffers.
func (c *meshConn) handOver(to *net.TCPConn, m *member, proto int32) error {
	conn := c.conn
	c.gate.mu.Lock()
	c.mu.Lock()
	if c.shut {
		c.mu.Unlock()
		c.gate.mu.Unlock()
		reset(to)
		return net.ErrClosed
	}
	for _, b := range c.backends {
		if b.conn != to {
			b.conn.Close()
		}
	}
	c.backends = nil
	c.mu.Unlock()
	conn.mesh, conn.backend = nil, to
	conn.proto.Store(proto)
	if m != nil {
		conn.watch, conn.machineID = m.watch, m.machine.ID
		ended := conn.ended
		conn.ended = func() { m.count.open.Add(-1); ended() }
	}
	conn.active.Store(time.Now().UnixNano())
	if conn.mustDrain() {
		conn.drain()
	}
	conn.running.Store(2)
	c.gate.mu.Unlock()
	go conn.direction(conn.up)
	go conn.direction(conn.down)
	return errHandedOver
}

// lost resets what leads to a machine that cannot be reached any more.
func (c *meshConn) lost(w *watcher) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.backends {
		if b.to.watch == w {
			reset(b.conn)
		}
	}
}

// follow has connections end that lead to machines which are no longer members' or
// are about to go: those that are kept at once, others when their request has ended,
// or the drain. Of an entry that is over all end.
func (c *meshConn) follow(sp *spec) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, b := range c.backends {
		switch {
		case b.to.watch == nil:
		case sp.over:
			reset(b.conn)
		case sp.serves(b.to) && b.to.watch.status() != intercept.Leaving:
			b.until = time.Time{}
		case !b.busy:
			b.conn.Close()
		case b.until.IsZero():
			b.until = time.Now().Add(c.gate.cfg.Drain)
		}
	}
}

// lookAfter is how long a connection does nothing before sweep looks at its ends, and
// between two looks, each of which is a system call or two.
const lookAfter = time.Second

// sweep looks at what only happens while nothing else does: idle connections of
// drained ones, ends of who waits, and requests whose time is over. gate.mu is held.
func (c *meshConn) sweep(now time.Time) {
	sp := c.route.spec.Load()
	c.follow(sp)
	quiet := time.Duration(now.UnixNano() - c.conn.active.Load())
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.shut {
		return
	}
	for _, b := range c.backends {
		if !b.until.IsZero() && now.After(b.until) {
			reset(b.conn)
		}
	}
	if draining := c.conn.draining.Load(); draining {
		late := now.UnixNano() >= c.conn.until.Load()
		switch {
		case c.idle && (late || quiet >= c.gate.times.keepAlive) && !hasBytes(c.client):
			c.endLocked()
			return
		case late && !c.idle:
			c.shut = true
			reset(c.client)
			for _, b := range c.backends {
				reset(b.conn)
			}
			return
		}
	}
	if quiet >= lookAfter && now.Sub(c.looked) >= lookAfter && !c.http2.Load() {
		c.looked = now
		c.lookLocked()
	}
}

// endLocked ends an idle connection. c.mu is held.
func (c *meshConn) endLocked() {
	c.shut = true
	c.client.Close()
	for _, b := range c.backends {
		b.conn.Close()
	}
}

// lookLocked passes on the ends that nobody waits for: of the origin, where it served
// last, to a client that sends nothing; and of a client to who still works for it. c.mu is held.
func (c *meshConn) lookLocked() {
	for _, b := range c.backends {
		switch {
		case b.busy && c.gone:
		case b.busy:
			n, err := pending(c.client)
			switch {
			case err == nil && n == 0:
				c.gone = true
				_ = b.conn.CloseWrite() // fails when it has ended too
			case err != nil && err != syscall.EAGAIN:
				reset(b.conn)
			}
		case ended(b.conn) && b.to.watch == nil && b == c.last && c.idle && !hasBytes(c.client):
			c.endLocked()
			return
		case ended(b.conn):
			b.conn.Close()
		}
	}
}

// ended tells whether the other side has closed c, or reset it, and nothing is left
// to read.
func ended(c *net.TCPConn) bool {
	n, err := pending(c)
	return err != nil && err != syscall.EAGAIN || err == nil && n == 0
}

func hasBytes(c *net.TCPConn) bool {
	n, _ := pending(c)
	return n > 0
}

// pending is as nonblock.Pending.
func pending(c *net.TCPConn) (n int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	if cerr := raw.Control(func(fd uintptr) { n, err = nonblock.Pending(fd, 1) }); cerr != nil {
		return 0, cerr
	}
	return n, err
}

// maxSniff is how long the first line of a request may be, in bytes, where the port
// is not known to be HTTP.
const maxSniff = chunk

// sniff waits until the client's first bytes tell the protocol, or origin has said
// something or ended; then it is another. It takes nothing off either's queue. A nil
// origin is not waited for.
func (c *meshConn) sniff(origin *net.TCPConn) (int32, error) {
	c.setIdle(true)
	defer c.setIdle(false)
	var first atomic.Bool // the origin was
	if origin != nil {
		raw, err := origin.SyscallConn()
		if err != nil {
			return 0, err
		}
		done := make(chan struct{})
		go func() {
			defer close(done)
			var b [1]byte
			var is bool
			_ = raw.Read(func(fd uintptr) bool {
				_, err := nonblock.Peek(fd, b[:])
				is = err != syscall.EAGAIN
				return is
			})
			if is {
				first.Store(true)
				_ = c.client.SetReadDeadline(time.Unix(1, 0)) // fails when it is closed, and so does the read
			}
		}()
		defer func() {
			_ = origin.SetReadDeadline(time.Unix(1, 0))
			<-done
			_ = origin.SetReadDeadline(time.Time{})
			_ = c.client.SetReadDeadline(time.Time{})
		}()
	}
	raw, err := c.client.SyscallConn()
	if err != nil {
		return 0, err
	}
	known := origin == nil
	secret := c.secure == nil && c.route.spec.Load().HTTP == intercept.HTTPTLS
	proto, seen := int32(protoUnknown), 0
	err = raw.Read(func(fd uintptr) bool {
		b := chunks.Get().(*[chunk]byte)
		defer chunks.Put(b)
		n, err := nonblock.Peek(fd, b[:])
		switch {
		case err == syscall.EAGAIN:
			return false
		case err != nil || n == 0, polled(fd, unix.POLLRDHUP) && n == seen:
			proto = protoOther // its end is passed on, too
			return true
		}
		seen = n
		proto = sniffed(b[:n], known)
		if secret && proto == protoOther && b[0] == 22 { // a handshake (RFC 8446, 5.1)
			proto = protoTLS
		}
		return proto != protoUnknown || polled(fd, unix.POLLRDHUP)
	})
	switch {
	case first.Load():
		return protoOther, nil
	case err != nil:
		return 0, err
	case proto == protoUnknown:
		return protoOther, nil
	}
	return proto, nil
}

// sniffed is protocolOf, but for HTTP/1 it wants to see the whole first line, unless
// the port is known to be HTTP: others have words, too.
func sniffed(b []byte, known bool) int32 {
	if known { // empty lines before a request are ignored
		b = bytes.TrimLeft(b, "\r\n")
	}
	proto := protocolOf(b)
	if proto != protoHTTP1 || known {
		return proto
	}
	for i, x := range b {
		if x != '\n' {
			continue
		}
		if i > len(" HTTP/1.1\r") && string(b[i-len(" HTTP/1.1\r"):i-len("1\r")]) == " HTTP/1." && b[i-1] == '\r' {
			return protoHTTP1
		}
		return protoOther
	}
	if len(b) >= maxSniff {
		return protoOther
	}
	return protoUnknown
}

// setIdle tells whether the client may be left without a word: nothing of a request
// has come. It is false where the connection has been ended in that time.
func (c *meshConn) setIdle(idle bool) bool {
	c.conn.active.Store(time.Now().UnixNano())
	c.mu.Lock()
	defer c.mu.Unlock()
	c.idle = idle
	return !c.shut
}
