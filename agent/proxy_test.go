package agent

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/queue"
)

var proxyAddr = netip.AddrPortFrom(target, carrier.ProxyPort).String()

// upgraded is a connection behind the 101, with what was read along.
type upgraded struct {
	net.Conn
	r *bufio.Reader
}

func (u upgraded) Read(p []byte) (int, error) { return u.r.Read(p) }

// proxied does what the API server does for the session.
func proxied(t *testing.T, addr string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", carrier.ProxyUpgrade)
	r := bufio.NewReader(conn)
	if resp, err := http.ReadResponse(r, nil); err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("%v, %v", resp, err)
	}
	return upgraded{conn, r}
}

func TestProxyDoor(t *testing.T) {
	a := startAgent(t, Config{PodIPs: []netip.Addr{target, target6}}, nil)
	if conn, err := net.Dial("tcp", proxyAddr); err == nil {
		conn.Close()
		t.Fatal("the port is open before a session was met")
	}
	c := connect(t, a, true)
	tcp := c.mustTCP(serve(t, target, echoTCP))
	checkEcho(t, tcp)
	secret := a.node().proxy.current()

	for _, addr := range []string{proxyAddr, netip.AddrPortFrom(target6, carrier.ProxyPort).String()} {
		s, err := carrier.Prove(context.Background(), proxied(t, addr), secret, queue.Sparse)
		if err != nil {
			t.Fatal(err)
		}
		c.bind.Move(s)
		checkEcho(t, tcp)
		if c.bind.Stream() != s {
			t.Error("the session does not use the new stream")
		}
	}

	// Who has no secret, or that of an older process, changes nothing.
	if _, err := carrier.Prove(context.Background(), proxied(t, proxyAddr), carrier.NewSecret(), queue.Sparse); err == nil {
		t.Error("a stranger was let in")
	}
	a.node().proxy.renew()
	if _, err := carrier.Prove(context.Background(), proxied(t, proxyAddr), secret, queue.Sparse); err == nil {
		t.Error("an older process was let in")
	}
	checkEcho(t, tcp)

	// And the tunnel does not lead there.
	if conn, err := c.dialTCP(netip.AddrPortFrom(target, carrier.ProxyPort), 3*time.Second); err == nil {
		conn.Close()
		t.Error("the port can be reached through the tunnel")
	}
}

// TestProxyDoorIsBounded: who holds connections open keeps only himself out.
func TestProxyDoorIsBounded(t *testing.T) {
	a := startAgent(t, Config{PodIPs: []netip.Addr{target, target6}}, func(x *timing) { x.proof = 500 * time.Millisecond })
	c := connect(t, a, true)
	secret := a.node().proxy.current()
	var held []net.Conn
	for range maxUnprovenFrom + 3 {
		conn, err := net.Dial("tcp", proxyAddr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, _ = io.WriteString(conn, "GET / HTTP/1.1\r\n") // and never the rest
		held = append(held, conn)
	}
	closed := func(conn net.Conn, within time.Duration) bool {
		_ = conn.SetReadDeadline(time.Now().Add(within))
		_, err := conn.Read(make([]byte, 1))
		ne, ok := err.(net.Error)
		return err != nil && !(ok && ne.Timeout())
	}
	if !closed(held[len(held)-1], 300*time.Millisecond) {
		t.Error("one connection too many is kept")
	}
	// Another source gets in meanwhile.
	s, err := carrier.Prove(context.Background(), proxied(t, netip.AddrPortFrom(target6, carrier.ProxyPort).String()), secret, queue.Sparse)
	if err != nil {
		t.Fatal(err)
	}
	c.bind.Move(s)
	if !closed(held[0], 5*time.Second) {
		t.Error("a connection without proof is kept")
	}
	eventually(t, "nobody waits", func() bool {
		l := a.node().proxy.unproven
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.waiting == 0 && len(l.from) == 0
	})
}
