package gate

import (
	"bytes"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// udpServer answers each datagram with "NAME: datagram", or with itself alone
// when it is large.
func udpServer(t *testing.T, name string) string {
	t.Helper()
	c, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, intercept.MaxDatagram)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(answerTo(name, b[:n]), from)
		}
	}()
	return c.LocalAddr().String()
}

func answerTo(name string, p []byte) []byte {
	if len(p) > 1000 {
		return p
	}
	return append([]byte(name+": "), p...)
}

// datagrams is the machine's side of fakeAgent.
func datagrams(_ intercept.Header, c *net.TCPConn) {
	defer c.Close()
	b := make([]byte, intercept.MaxDatagram)
	for {
		n, err := intercept.ReadDatagram(c, b)
		if err != nil {
			return
		}
		if intercept.WriteDatagram(c, answerTo("machine", b[:n]), nil) != nil {
			return
		}
	}
}

func udpClient(t *testing.T, port uint16) *net.UDPConn {
	t.Helper()
	c, err := net.Dial("udp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c.(*net.UDPConn)
}

// exchange sends a datagram and returns the answer, "" if none comes.
func exchange(t *testing.T, c *net.UDPConn, p string, wait time.Duration) string {
	t.Helper()
	if _, err := c.Write([]byte(p)); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(wait))
	b := make([]byte, intercept.MaxDatagram)
	n, err := c.Read(b)
	if err != nil {
		return ""
	}
	return string(b[:n])
}

// TestUDP: a flow follows the machine, from datagram to datagram.
func TestUDP(t *testing.T) {
	t.Parallel()
	a := startAgent(t, datagrams)
	g := startGate(t, Config{}, nil)
	route := udpRoute(t, udpServer(t, "origin"), a.machine())
	s := stateOf(1, route)
	g.push(s)
	g.machineIs(intercept.Accepted)
	c := udpClient(t, route.Listen)
	served := func(want string) {
		t.Helper()
		if got := exchange(t, c, "x", 3*time.Second); got != want+": x" {
			t.Errorf("answer %q, not of the %s", got, want)
		}
		r := g.status().Routes[0]
		if machine := want == "machine"; (r.OpenToMachine == 1) != machine || (r.OpenToOrigin == 0) != machine {
			t.Errorf("counted %+v", r)
		}
	}
	served("machine")
	if h := <-a.seen; h.Network != intercept.UDP || h.ID != "i1" || h.Token != "secret" || h.Client.String() != c.LocalAddr().String() {
		t.Errorf("header %+v", h)
	}
	served("machine")
	if len(a.seen) > 0 {
		t.Error("a second stream for the flow")
	}
	for _, size := range []int{0, 1500, 65507} {
		p := string(bytes.Repeat([]byte{7}, size))
		if got := exchange(t, c, p, 3*time.Second); got != string(answerTo("machine", []byte(p))) {
			t.Errorf("of %d bytes %d came back", size, len(got))
		}
	}
	a.beat.Store(int32(intercept.Away))
	g.machineIs(intercept.Away)
	served("origin")
	for _, size := range []int{0, 1500, 65507} {
		p := string(bytes.Repeat([]byte{7}, size))
		if got := exchange(t, c, p, 3*time.Second); got != string(answerTo("origin", []byte(p))) {
			t.Errorf("of %d bytes %d came back", size, len(got))
		}
	}
	a.beat.Store(int32(intercept.Accepted))
	g.machineIs(intercept.Accepted)
	served("machine")
	// The stream breaks, and the watch comes back at once.
	a.vanish()
	a.listen(t, a.addr)
	g.machineIs(intercept.Accepted)
	eventually(t, "the machine serves again", func() bool { return exchange(t, c, "x", time.Second) == "machine: x" })
	g.push(draining(s))
	served("origin")
	g.push(intercept.State{Generation: 9})
	eventually(t, "the flow is forgotten", func() bool { return g.flows.count() == 0 })
}

// TestUDPAnswers: what the agent says of a flow decides.
func TestUDPAnswers(t *testing.T) {
	t.Parallel()
	origin := udpServer(t, "origin")
	for _, c := range []struct {
		name      string
		say       intercept.Status
		onRefused string
		origin    string
		want      string
	}{
		{"refused", intercept.Refused, "", origin, "origin: x"},
		{"refused, to client", intercept.Refused, intercept.RefusedToClient, origin, ""},
		{"away", intercept.Away, intercept.RefusedToClient, origin, "origin: x"},
		{"away without origin", intercept.Away, "", "", ""},
		{"no word", 0, "", origin, "origin: x"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := startAgent(t, datagrams)
			a.say.Store(int32(c.say))
			g := startGate(t, Config{}, nil)
			m := a.machine()
			m.OnRefused = c.onRefused
			route := udpRoute(t, c.origin, m)
			g.push(stateOf(1, route))
			g.machineIs(intercept.Accepted)
			client := udpClient(t, route.Listen)
			wait := 3 * time.Second
			if c.want == "" {
				wait = 200 * time.Millisecond
			}
			for range 3 {
				if got := exchange(t, client, "x", wait); got != c.want {
					t.Errorf("answer %q", got)
				}
			}
			if len(a.seen) != 1 {
				t.Errorf("the agent was asked %d times", len(a.seen))
			}
			if c.want == "" {
				if r := g.status().Routes[0]; r.Refused != 3 {
					t.Errorf("counted %+v", r)
				}
				return
			}
			if c.say == 0 {
				return
			}
			a.say.Store(int32(intercept.Accepted))
			eventually(t, "the machine is asked again", func() bool { return exchange(t, client, "x", time.Second) == "machine: x" })
		})
	}
}

// TestUDPBounds: idle flows end, and the idlest gives way.
func TestUDPBounds(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{MemoryLimit: 1}, func(x *timing) { x.udpIdle = 3 * time.Second })
	route := udpRoute(t, udpServer(t, "origin"), nil)
	g.push(stateOf(1, route))
	first := udpClient(t, route.Listen)
	for i := range 140 {
		c := first
		if i > 0 {
			c = udpClient(t, route.Listen)
		}
		if got := exchange(t, c, "x", time.Second); got != "origin: x" {
			t.Fatalf("flow %d: %q", i, got)
		}
	}
	if n, out := g.flows.count(), g.flows.evicted.Load(); n != 128 || out != 12 {
		t.Errorf("%d flows, %d gave way", n, out)
	}
	if got := exchange(t, first, "x", time.Second); got != "origin: x" {
		t.Errorf("the first, which gave way: %q", got)
	}
	eventually(t, "idle flows end", func() bool { return g.flows.count() == 0 && g.status().Routes[0].OpenToOrigin == 0 })
	if q := g.flows.queued.Load(); q != 0 {
		t.Errorf("%d bytes wait for nobody", q)
	}
}
