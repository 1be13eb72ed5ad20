package agent

import (
	"errors"
	"net"
	"net/netip"
	"sync"
	"time"
)

// lobby counts the connections from the cluster that have not said yet what they
// want, so that they are few, and not all from one source.
type lobby struct {
	most, mostFrom int

	mu      sync.Mutex
	from    map[netip.Addr]int
	waiting int // sum of from
}

func newLobby(most, mostFrom int) *lobby {
	return &lobby{most: most, mostFrom: mostFrom, from: map[netip.Addr]int{}}
}

func (l *lobby) enter(from netip.Addr) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting >= l.most || l.from[from] >= l.mostFrom {
		return false
	}
	l.waiting++
	l.from[from]++
	return true
}

func (l *lobby) leave(from netip.Addr) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting--
	if l.from[from]--; l.from[from] == 0 {
		delete(l.from, from)
	}
}

// acceptFrom gives each connection that l accepts to met, which must not wait,
// until l is closed or the node is; what says who comes.
func (n *node) acceptFrom(l net.Listener, what string, met func(*net.TCPConn)) {
	for {
		c, err := l.Accept()
		if n.ctx.Err() != nil {
			if err == nil {
				c.Close()
			}
			return
		}
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of descriptors is the one that happens; it passes.
			n.agent.log.Warn("accepting a connection", "from", what, "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-n.ctx.Done():
			}
			continue
		}
		met(c.(*net.TCPConn))
	}
}

// remoteOf and localOf are the ends of a connection.
func remoteOf(c *net.TCPConn) netip.AddrPort { return unmapped(c.RemoteAddr()) }
func localOf(c *net.TCPConn) netip.AddrPort  { return unmapped(c.LocalAddr()) }

func unmapped(a net.Addr) netip.AddrPort {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}
	}
	ap := t.AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}
