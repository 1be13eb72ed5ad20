package gate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// TestWhoServes: what the agent says decides.
func TestWhoServes(t *testing.T) {
	origin := serve(t, lines("origin"))
	for _, c := range []struct {
		name      string
		say       intercept.Status
		onRefused string
		origin    string
		want      string // empty: a RST
	}{
		{"accepted", intercept.Accepted, "", origin, "machine"},
		{"accepted without origin", intercept.Accepted, "", "", "machine"},
		{"refused", intercept.Refused, "", origin, "origin"},
		{"refused, to origin", intercept.Refused, intercept.RefusedToOrigin, origin, "origin"},
		{"refused, to client", intercept.Refused, intercept.RefusedToClient, origin, ""},
		{"refused without origin", intercept.Refused, "", "", ""},
		{"away", intercept.Away, "", origin, "origin"},
		{"away without origin", intercept.Away, "", "", ""},
		{"away, refuse", intercept.Away, intercept.RefusedToClient, origin, "origin"},
		{"unknown token", intercept.Unknown, "", origin, "origin"},
		{"leaving", intercept.Leaving, "", origin, "origin"},
		{"no word", 0, "", origin, "origin"},
		{"nonsense", 77, "", origin, "origin"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			a := startAgent(t, nil)
			a.say.Store(int32(c.say))
			g := startGate(t, Config{}, nil)
			m := a.machine()
			m.OnRefused = c.onRefused
			route := tcpRoute(t, c.origin, m)
			if s := g.push(stateOf(1, route)); len(s.Failed) > 0 || len(s.Routes) != 1 {
				t.Fatalf("status %+v", s)
			}
			g.machineIs(intercept.Accepted)
			begin := time.Now()
			if c.want == "" {
				mustReset(t, route.Listen)
				if r := g.status().Routes[0]; r.Refused != 1 || r.TotalToMachine != 0 {
					t.Errorf("counted %+v", r)
				}
				return
			}
			conn := dial(t, route.Listen)
			if got := ask(t, conn, "hello"); got != c.want+": hello\n" {
				t.Errorf("answer %q", got)
			}
			if d := time.Since(begin); d > 3*time.Second {
				t.Errorf("after %s", d)
			}
			h := <-a.seen
			local := conn.LocalAddr().(*net.TCPAddr).AddrPort()
			if h.Network != intercept.TCP || h.ID != "i1" || h.Token != "secret" || h.Client != local ||
				h.Server != netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), route.Listen) {
				t.Errorf("header %+v, client %s", h, local)
			}
			machine := c.want == "machine"
			r := g.status().Routes[0]
			if (r.OpenToMachine == 1) != machine || (r.TotalToMachine == 1) != machine || (r.OpenToOrigin == 1) == machine || (r.TotalToOrigin == 1) == machine {
				t.Errorf("counted %+v", r)
			}
			conn.Close()
			eventually(t, "it is counted as closed", func() bool {
				r := g.status().Routes[0]
				return r.OpenToMachine+r.OpenToOrigin == 0
			})
		})
	}
}

// TestAway: by the watch a gate knows, and dials nobody in vain.
func TestAway(t *testing.T) {
	t.Parallel()
	a := startAgent(t, nil)
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, lines("origin")), a.machine())
	g.push(stateOf(1, route))
	served := func(want string) {
		t.Helper()
		if got := ask(t, dial(t, route.Listen), "x"); got != want+": x\n" {
			t.Errorf("answer %q, not of the %s", got, want)
		}
	}
	g.machineIs(intercept.Accepted)
	served("machine")
	<-a.seen

	for _, how := range []struct {
		name string
		do   func()
	}{
		{"it says so", func() { a.beat.Store(int32(intercept.Away)) }},
		{"silence", func() { a.beat.Store(0) }},
		{"it is gone", a.vanish},
	} {
		begin := time.Now()
		how.do()
		g.machineIs(intercept.Away)
		served("origin")
		if d := time.Since(begin); d > 3*time.Second {
			t.Errorf("%s: after %s", how.name, d)
		}
		if len(a.seen) > 0 {
			t.Errorf("%s: the agent was asked", how.name)
		}
		if how.name == "it is gone" {
			a.listen(t, a.addr)
		}
		a.beat.Store(int32(intercept.Accepted))
		g.machineIs(intercept.Accepted)
		served("machine")
		<-a.seen
	}
}

// TestSilentAgent: a new connection finds the origin within 3 s though the
// agent's node drops every SYN, when the gate knows nothing yet and later.
func TestSilentAgent(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, lines("origin")), &intercept.Machine{Agents: []string{deaf(t), deaf(t)}, ID: "i1"})
	g.push(stateOf(1, route))
	for range 2 {
		begin := time.Now()
		if got := ask(t, dial(t, route.Listen), "x"); got != "origin: x\n" {
			t.Errorf("answer %q", got)
		}
		if d := time.Since(begin); d > 3*time.Second {
			t.Errorf("after %s", d)
		}
		g.machineIs(intercept.Away)
	}
}

// TestAgentsAddresses: the first that answers is good.
func TestAgentsAddresses(t *testing.T) {
	t.Parallel()
	a := startAgent(t, nil)
	g := startGate(t, Config{}, nil)
	m := a.machine()
	m.Agents = []string{deaf(t), "[fd00:dead::1]:7535", a.addr}
	route := tcpRoute(t, "", m)
	g.push(stateOf(1, route))
	g.machineIs(intercept.Accepted)
	begin := time.Now()
	if got := ask(t, dial(t, route.Listen), "x"); got != "machine: x\n" {
		t.Errorf("answer %q", got)
	}
	if d := time.Since(begin); d > 150*time.Millisecond {
		t.Errorf("%s, though the address was known", d)
	}
}

// TestLostAgent: what is open to an agent that cannot be reached is reset, and
// not before that time.
func TestLostAgent(t *testing.T) {
	t.Parallel()
	a := startAgent(t, func(_ intercept.Header, c *net.TCPConn) {}) // c is not closed by vanishing
	g := startGate(t, Config{}, func(x *timing) { x.lost = 800 * time.Millisecond })
	route := tcpRoute(t, "", a.machine())
	g.push(stateOf(1, route))
	g.machineIs(intercept.Accepted)
	c := dial(t, route.Listen)
	<-a.seen
	begin := time.Now()
	a.l.Close()
	a.mu.Lock()
	a.conns[0].Close() // the watch
	a.mu.Unlock()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("not a reset: %v", err)
	}
	if d := time.Since(begin); d < 700*time.Millisecond || d > 4*time.Second {
		t.Errorf("after %s", d)
	}
}

// TestOriginRefuses: the client sees it.
func TestOriginRefuses(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, fmt.Sprintf("127.0.0.1:%d", freePort(t)), nil)
	g.push(stateOf(1, route))
	mustReset(t, route.Listen)
}

// TestEnds: FINs and RSTs pass, either way.
func TestEnds(t *testing.T) {
	t.Parallel()
	accepted := make(chan *net.TCPConn, 1)
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, func(c *net.TCPConn) { accepted <- c }), nil)
	g.push(stateOf(1, route))
	pair := func() (client, server *net.TCPConn) {
		client = dial(t, route.Listen)
		server = <-accepted
		_ = server.SetDeadline(time.Now().Add(10 * time.Second))
		return client, server
	}
	for _, swapped := range []bool{false, true} {
		a, b := pair()
		if swapped {
			a, b = b, a
		}
		io.WriteString(a, "request")
		a.CloseWrite()
		if got, err := io.ReadAll(b); string(got) != "request" || err != nil {
			t.Errorf("swapped %t: %q, %v", swapped, got, err)
		}
		io.WriteString(b, "response")
		b.Close()
		if got, err := io.ReadAll(a); string(got) != "response" || err != nil {
			t.Errorf("swapped %t: %q, %v", swapped, got, err)
		}

		a, b = pair()
		if swapped {
			a, b = b, a
		}
		reset(a)
		if _, err := b.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("swapped %t: not a reset: %v", swapped, err)
		}
	}
	eventually(t, "all are forgotten", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return len(g.conns) == 0
	})
}

// TestBulk: 32 MB each way at once, with a client that reads late.
func TestBulk(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, func(c *net.TCPConn) {
		defer c.Close()
		io.Copy(c, c)
	}), nil)
	g.push(stateOf(1, route))
	c := dial(t, route.Listen)
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	const size = 32 << 20
	sent := make(chan [32]byte, 1)
	go func() {
		h := sha256.New()
		io.CopyN(io.MultiWriter(c, h), rand.NewChaCha8([32]byte{1}), size)
		c.CloseWrite()
		sent <- [32]byte(h.Sum(nil))
	}()
	time.Sleep(300 * time.Millisecond)
	h := sha256.New()
	n, err := io.Copy(h, c)
	if err != nil || n != size {
		t.Fatalf("%d bytes, %v", n, err)
	}
	if [32]byte(h.Sum(nil)) != <-sent {
		t.Error("other bytes came back")
	}
}

// TestStuckBackend: a client's RST passes though the backend takes no bytes.
func TestStuckBackend(t *testing.T) {
	t.Parallel()
	accepted := make(chan *net.TCPConn, 1)
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, func(c *net.TCPConn) { accepted <- c }), nil)
	g.push(stateOf(1, route))
	c := dial(t, route.Listen)
	server := <-accepted
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	if _, err := c.Write(make([]byte, 64<<20)); !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
		t.Fatalf("all was taken: %v", err)
	}
	reset(c)
	eventually(t, "it is forgotten", func() bool {
		time.Sleep(50 * time.Millisecond)
		return g.status().Routes[0].OpenToOrigin == 0
	})
	_ = server.SetReadDeadline(time.Now().Add(time.Second))
	if _, err := io.Copy(io.Discard, server); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the backend saw %v", err)
	}
}

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// TestBothFamilies: gates listen on all addresses.
func TestBothFamilies(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, lines("origin")), nil)
	g.push(stateOf(1, route))
	c, err := net.Dial("tcp", fmt.Sprintf("[::1]:%d", route.Listen))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := ask(t, c, "x"); got != "origin: x\n" {
		t.Errorf("answer %q", got)
	}
}

// TestTooMany: above the bound a connection is reset, and what is open goes on.
func TestTooMany(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{MemoryLimit: 1}, nil)
	route := tcpRoute(t, serve(t, lines("origin")), nil)
	g.push(stateOf(1, route))
	first := dial(t, route.Listen)
	ask(t, first, "x")
	for range 255 {
		ask(t, dial(t, route.Listen), "x")
	}
	mustReset(t, route.Listen)
	if got := ask(t, first, "x"); got != "origin: x\n" {
		t.Errorf("answer %q", got)
	}
}

// TestMemory: what a thousand open connections take, idle and stuck.
func TestMemory(t *testing.T) {
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, func(*net.TCPConn) {}), nil)
	g.push(stateOf(1, route))
	const n = 1000
	// The clients and servers are in this process too; what they take is known
	// from connections without a gate.
	open := func(addr string) []net.Conn {
		var all []net.Conn
		for range n {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			all = append(all, c)
		}
		time.Sleep(200 * time.Millisecond)
		return all
	}
	before := inUse()
	open(serve(t, func(*net.TCPConn) {}))
	direct := inUse() - before
	before = inUse()
	clients := open(fmt.Sprintf("127.0.0.1:%d", route.Listen))
	eventually(t, "all are served", func() bool { return g.status().Routes[0].OpenToOrigin == n })
	idle := inUse() - before - direct
	// Small, so that the kernel is not short of memory, and more than any buffer.
	for _, c := range clients[:100] {
		_ = c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
		c.Write(make([]byte, 4<<20))
	}
	stuck := inUse() - before - direct
	t.Logf("%d connections: %d bytes each when idle; 100 of them stuck: %d more each", n, idle/n, (stuck-idle)/100)
	if idle/n > connectionCost {
		t.Errorf("an idle connection takes %d bytes", idle/n)
	}
	if stuck-idle > 100*connectionCost {
		t.Errorf("a stuck connection takes %d bytes more", (stuck-idle)/100)
	}
}

func inUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// TestRunAndClose: once, and any number of times.
func TestRunAndClose(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, lines("origin")), nil)
	g.push(stateOf(1, route, udpRoute(t, "127.0.0.1:9", nil)))
	c := dial(t, route.Listen)
	ask(t, c, "x")
	if err := g.Run(context.Background()); err == nil || !strings.Contains(err.Error(), "ran before") {
		t.Errorf("a second Run: %v", err)
	}
	g.Close()
	g.Close()
	if err := <-g.stopped; err != nil {
		t.Errorf("Run: %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("what was open: %v", err)
	}
	if err := New(Config{}).Close(); err != nil {
		t.Errorf("closing what never ran: %v", err)
	}
	busy := New(Config{ControlAddr: "127.0.0.1:1x"})
	if err := busy.Run(context.Background()); err == nil {
		t.Error("it listens at nonsense")
	}
}

// BenchmarkRelay moves bytes through a gate.
func BenchmarkRelay(b *testing.B) {
	buf := bytes.Repeat([]byte{1}, 256<<10)
	src, dst := tcpPair(b), tcpPair(b)
	p, err := newPump(src[1], dst[0])
	if err != nil {
		b.Fatal(err)
	}
	p.limit = func(x []byte) int { return len(x) }
	p.moved = func([]byte) {}
	go p.run()
	go func() {
		for {
			if _, err := src[0].Write(buf); err != nil {
				return
			}
		}
	}()
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, err := io.ReadFull(dst[1], buf); err != nil {
			b.Fatal(err)
		}
	}
}

func tcpPair(tb testing.TB) [2]*net.TCPConn {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		tb.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { a.Close(); c.Close() })
	return [2]*net.TCPConn{a.(*net.TCPConn), c.(*net.TCPConn)}
}
