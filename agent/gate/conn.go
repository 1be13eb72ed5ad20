package gate

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// clientKeepAlive is that of clients and origins: a peer that vanished without a
// word is found after two minutes.
var clientKeepAlive = net.KeepAliveConfig{Enable: true, Idle: time.Minute, Interval: 15 * time.Second, Count: 4}

// conn is a client's TCP connection and the one that serves it. Nothing is read
// from the client before that one is chosen.
type conn struct {
	gate   *Gate
	route  *route
	client *net.TCPConn

	// Set before the relay starts, with gate.mu held.
	backend   *net.TCPConn
	watch     *watcher // of the agent that serves it; nil: the origin does
	machineID string
	ended     func()    // counts
	mesh      *meshConn // while requests are routed one by one; there is no backend then

	resetOnce sync.Once
	running   atomic.Int32 // directions

	// What the two directions and the drain tell each other.
	proto    atomic.Int32           // proto*
	last     atomic.Int32           // direction of the last bytes
	active   atomic.Int64           // when bytes were moved last, Unix time in ns
	draining atomic.Bool            //
	until    atomic.Int64           // when a drain is over, Unix time in ns
	final    atomic.Pointer[string] // the method of the last HTTP/1 request
	answered atomic.Bool            // the last HTTP/1 response is through

	head       []byte // up's: the client's first bytes, while they do not tell the protocol
	fromClient frames // up's
	fromServer frames // down's
	goAway     bool   // down's: GOAWAY was sent
	streams    streams
}

// Directions of conn.last.
const (
	upward   = 1
	downward = 2
)

// admit takes a connection, or refuses it where there are too many.
func (g *Gate) admit(r *route, client *net.TCPConn) {
	c := &conn{gate: g, route: r, client: client}
	g.mu.Lock()
	full := g.shut || len(g.conns) >= g.cfg.maxConns()
	if !full {
		g.conns[c] = struct{}{}
		g.wg.Add(1)
	}
	g.mu.Unlock()
	if full {
		r.count.refused.Add(1)
		reset(client)
		return
	}
	go c.serve()
}

// serve chooses who serves c, and starts the relay in goroutines of their own:
// this one's stack has grown with the dial.
func (c *conn) serve() {
	if sp := c.route.spec.Load(); sp.table != nil && sp.HTTP != intercept.HTTPNever {
		c.serveMesh()
		return
	}
	backend, sp, machine, err := c.choose()
	if err != nil {
		c.gate.log.Debug("connection refused", "port", c.route.at.port, "error", err)
		c.route.count.refused.Add(1)
		reset(c.client)
		c.forget()
		return
	}
	c.active.Store(time.Now().UnixNano())
	g := c.gate
	g.mu.Lock()
	c.backend = backend
	if machine {
		c.watch, c.machineID = sp.watch, sp.machineID()
	}
	c.ended = c.route.count.opened(machine)
	end := g.life.Err() != nil
	if c.mustDrain() {
		c.drain()
	}
	g.mu.Unlock()
	if end { // shutdown did not see the backend
		c.reset()
		reset(backend)
	}
	c.running.Store(2)
	go c.direction(c.up)
	go c.direction(c.down)
}

// choose connects to the machine or the origin.
func (c *conn) choose() (backend *net.TCPConn, sp *spec, machine bool, err error) {
	sp = c.route.spec.Load()
	if sp.machineNow() {
		backend, err := c.gate.dialMachine(c.gate.life, sp.watch, sp.Machine, intercept.Header{
			Network: intercept.TCP, Client: addrPort(c.client.RemoteAddr()), Server: addrPort(c.client.LocalAddr()),
		})
		if backend != nil || errors.Is(err, errRefused) {
			return backend, sp, true, err
		}
		c.gate.log.Debug("the machine does not serve a connection", "port", c.route.at.port, "error", err)
	}
	if sp.Origin == "" {
		return nil, sp, false, errors.New("there is no origin")
	}
	d := net.Dialer{Timeout: c.gate.times.dialOrigin, KeepAliveConfig: clientKeepAlive}
	o, err := dialOrigin(c.gate.life, d, sp.Route)
	return o, sp, false, err
}

func addrPort(a net.Addr) netip.AddrPort {
	switch t := a.(type) {
	case *net.TCPAddr:
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	case *net.UDPAddr:
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}

// direction runs one of the two; the last to end closes both sides.
func (c *conn) direction(run func() error) {
	if err := run(); err != nil {
		c.reset()
	}
	if c.running.Add(-1) > 0 {
		return
	}
	c.client.Close()
	c.backend.Close()
	c.ended()
	c.forget()
}

func (c *conn) forget() {
	c.gate.mu.Lock()
	delete(c.gate.conns, c)
	c.gate.mu.Unlock()
	c.gate.wg.Done()
}

// reset ends both sides with a RST, whichever of them still stands. The directions
// then find their sockets closed.
func (c *conn) reset() {
	if c.mesh != nil {
		c.mesh.reset()
		return
	}
	c.resetOnce.Do(func() {
		reset(c.client)
		if c.backend != nil {
			reset(c.backend)
		}
	})
}

// finish ends both sides with a FIN.
func (c *conn) finish() {
	c.resetOnce.Do(func() {
		c.client.Close()
		c.backend.Close()
	})
}

// reset closes c so that its other end gets a RST instead of a FIN.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // of a socket that is closed already there is nothing to reset
	c.Close()
}

// up moves the client's bytes until its FIN.
func (c *conn) up() error {
	p, err := newPump(c.client, c.backend)
	if err != nil {
		return err
	}
	c.fromClient = frames{is: c.streams.clientFrame, payload: len(http2Preface)}
	p.limit = c.lookUp
	p.moved = func(b []byte) {
		c.active.Store(time.Now().UnixNano())
		c.route.count.up.Add(int64(len(b)))
		if proto := c.proto.Load(); proto == protoUnknown || proto == protoHTTP2 {
			c.fromClient.feed(b)
		}
		if c.proto.Load() == protoUnknown {
			c.head = append(c.head, b[:min(len(b), maxHead-len(c.head))]...)
		} else {
			c.head = nil
		}
	}
	if err := p.run(); err != nil {
		return err
	}
	return c.backend.CloseWrite()
}

// down moves the backend's bytes until its FIN, or the end of the last response.
func (c *conn) down() error {
	p, err := newPump(c.backend, c.client)
	if err != nil {
		return err
	}
	c.fromServer.is = c.streams.serverFrame
	p.before = c.sayGoAway
	p.limit = c.lookDown
	p.moved = func(b []byte) {
		c.movedDown(len(b))
		if proto := c.proto.Load(); proto == protoUnknown || proto == protoHTTP2 {
			c.fromServer.feed(b)
		}
	}
	err = p.run()
	if errors.Is(err, errTakeOver) {
		if err = c.lastResponse(); errors.Is(err, errTakeOver) {
			// It was no response after all.
			c.proto.Store(protoOther)
			err = p.run()
		}
	}
	if err != nil {
		return err
	}
	return c.client.CloseWrite()
}

func (c *conn) movedDown(n int) {
	c.last.Store(downward)
	c.active.Store(time.Now().UnixNano())
	c.route.count.down.Add(int64(n))
}
