package agent

import (
	"bytes"
	"crypto/rand"
	"net/netip"
	"strings"
	"testing"
	"time"
)

func same(b []byte) []byte { return b }

func TestUDPEchoOfAllSizes(t *testing.T) {
	for name, gso := range map[string]bool{"gso": true, "plain": false} {
		t.Run(name, func(t *testing.T) {
			a := startAgent(t, Config{}, nil)
			c := connect(t, a, gso)
			for _, addr := range []netip.Addr{target, target6} {
				conn := c.dialUDP(serveUDP(t, netip.AddrPortFrom(addr, 0), same))
				for _, size := range []int{0, 1, 1200, 1400, 1500, 9000, 25 << 10, 65507} {
					if addr.Is6() && size == 65507 {
						size = 65487
					}
					sent := make([]byte, size)
					_, _ = rand.Read(sent)
					if _, err := conn.Write(sent); err != nil {
						t.Fatalf("%s: writing %d bytes: %v", addr, size, err)
					}
					got := make([]byte, 65536)
					n, err := conn.Read(got)
					if err != nil || !bytes.Equal(got[:n], sent) {
						t.Fatalf("%s: %d of %d bytes came back: %v", addr, n, size, err)
					}
				}
			}
		})
	}
}

// udpRefused tells whether "port unreachable" comes back for a datagram; the
// stack tells it on a later write.
func (c *client) udpRefused(to netip.AddrPort) bool {
	c.t.Helper()
	conn := c.dialUDP(to)
	for range 100 {
		if _, err := conn.Write([]byte("x")); err != nil {
			return strings.Contains(err.Error(), "refused")
		}
		time.Sleep(20 * time.Millisecond)
	}
	return false
}

func TestUDPPortUnreachable(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	for _, addr := range []netip.Addr{target, target6, agent4} {
		if !c.udpRefused(netip.AddrPortFrom(addr, 9)) {
			t.Errorf("a closed port of %s was not refused", addr)
		}
	}
}

func TestUDPFlowExpiresAndStartsAgain(t *testing.T) {
	a := startAgent(t, Config{}, func(x *timing) {
		x.udpIdle, x.sweep = 300*time.Millisecond, 20*time.Millisecond
	})
	c := connect(t, a, true)
	conn := c.dialUDP(serveUDP(t, netip.AddrPortFrom(target, 0), same))
	ask := func() {
		t.Helper()
		_, _ = conn.Write([]byte("x"))
		if _, err := conn.Read(make([]byte, 10)); err != nil {
			t.Fatal(err)
		}
	}
	for range 10 { // in use, it lives longer than the idle time
		ask()
		time.Sleep(60 * time.Millisecond)
	}
	if n := a.node().udp.count(); n != 1 {
		t.Fatalf("%d flows while one is in use", n)
	}
	eventually(t, "the idle flow is gone", func() bool { return a.node().udp.count() == 0 })
	ask()
}

func TestUDPOldestFlowGivesWay(t *testing.T) {
	a := startAgent(t, Config{MaxUDP: 8}, nil)
	c := connect(t, a, true)
	addr := serveUDP(t, netip.AddrPortFrom(target, 0), same)
	for i := range 20 {
		conn := c.dialUDP(addr)
		_, _ = conn.Write([]byte("x"))
		if _, err := conn.Read(make([]byte, 10)); err != nil {
			t.Fatalf("flow %d: %v", i, err)
		}
		if n := a.node().udp.count(); n > 8 {
			t.Fatalf("%d flows", n)
		}
	}
}

func TestUDPBroadcastStaysHere(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	if !c.udpRefused(netip.AddrPortFrom(netip.MustParseAddr("10.77.0.255"), 9)) {
		t.Error("a broadcast was not refused")
	}
}
