package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"sync"

	"github.com/culvert-dev/culvert/internal/nonblock"
	"github.com/culvert-dev/culvert/wire/carrier"
)

const (
	// maxUnproven bounds the connections to the proxy port that have not proved
	// themselves: 16 goroutines and less than 32 KiB each.
	maxUnproven = 16
	// maxUnprovenFrom bounds those of one source, so that a pod which holds
	// connections open cannot keep the API server's out.
	maxUnprovenFrom = 4
)

// proxyDoor is the second listener, on the pod's own addresses, where the API
// server's pods/proxy arrives and so may anybody else. Whoever does not prove the
// secret that the session was given over the port-forward gets nothing.
type proxyDoor struct {
	agent     *Agent
	node      *node
	listeners []net.Listener

	unproven *lobby

	mu     sync.Mutex
	secret []byte // of the session's present key
}

// openProxy listens on the addresses of the pod. Without any it is nil: then the
// session goes on with the port-forward.
func (a *Agent) openProxy(n *node) *proxyDoor {
	if a.cfg.ProxyPort <= 0 {
		return nil
	}
	d := &proxyDoor{agent: a, node: n, unproven: newLobby(maxUnproven, maxUnprovenFrom)}
	for _, ip := range a.cfg.PodIPs {
		l, err := net.Listen("tcp", netip.AddrPortFrom(ip, uint16(a.cfg.ProxyPort)).String())
		if err != nil {
			a.log.Warn("listening for pods/proxy", "error", err)
			continue
		}
		d.listeners = append(d.listeners, l)
		n.spawn(func() { d.serve(l) })
	}
	if len(d.listeners) == 0 {
		return nil
	}
	return d
}

// renew makes another secret: for every new key of the session, so that only the
// process with that key may add streams.
func (d *proxyDoor) renew() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.secret = carrier.NewSecret()
}

func (d *proxyDoor) current() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.secret
}

func (d *proxyDoor) close() {
	for _, l := range d.listeners {
		l.Close()
	}
}

func (d *proxyDoor) serve(l net.Listener) {
	d.node.acceptFrom(l, "pods/proxy", func(c *net.TCPConn) {
		from := remoteOf(c).Addr()
		if !d.unproven.enter(from) {
			c.Close()
			d.agent.metrics.refusedStreams.Inc()
			return
		}
		d.node.spawn(func() {
			defer d.unproven.leave(from)
			d.meet(c, from)
		})
	})
}

// meet has one connection prove itself and moves the session over to it.
func (d *proxyDoor) meet(c net.Conn, from netip.Addr) {
	a := d.agent
	ctx, cancel := context.WithTimeoutCause(d.node.ctx, a.times.proof, fmt.Errorf("no proof within %s", a.times.proof))
	defer cancel()
	secret := d.current()
	s, err := carrier.Verify(ctx, nonblock.Wrap(c), secret)
	if err != nil {
		a.metrics.refusedStreams.Inc()
		a.log.Debug("stream of pods/proxy refused", "from", from.String(), "error", err)
		return
	}
	// The session's process may have been replaced meanwhile.
	if &secret[0] != &d.current()[0] {
		s.CloseFor("another process of the session took over")
		return
	}
	d.node.bind.Move(s)
	d.node.door.machine.again()
	a.metrics.streams.Inc()
	a.log.Info("stream of pods/proxy attached", "from", from.String())
}
