package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// machineStub is a session's end for connections from the cluster, on the stack of
// a client.
type machineStub struct {
	c       *client
	l       *gonet.TCPListener
	status  atomic.Int32 // of connections
	dead    atomic.Bool  // says nothing any more
	checks  atomic.Int32 // watches of gates that it was asked about
	headers chan intercept.Header
	conns   chan *gonet.TCPConn // accepted, with TCP
	wg      sync.WaitGroup
}

// intercepted is a session with its machine, and its agent with shortened times.
func intercepted(t testing.TB, c Config, edit func(*timing)) (*Agent, *machineStub) {
	t.Helper()
	needRoot(t)
	c.PodIPs = []netip.Addr{target, target6}
	a := startAgent(t, c, func(x *timing) {
		x.silent, x.sessionDial, x.answer, x.watchDial = 750*time.Millisecond, 700*time.Millisecond, time.Second, 500*time.Millisecond
		if edit != nil {
			edit(x)
		}
	})
	return a, newMachineStub(t, connect(t, a, true))
}

func newMachineStub(t testing.TB, c *client) *machineStub {
	m := &machineStub{c: c, headers: make(chan intercept.Header, 8192), conns: make(chan *gonet.TCPConn, 8192)}
	m.status.Store(int32(intercept.Accepted))
	m.listen(t)
	t.Cleanup(m.stop)
	return m
}

func (m *machineStub) listen(t testing.TB) {
	t.Helper()
	var err error
	if m.l, err = gonet.ListenTCP(m.c.stack, full(inbound4, intercept.Port), protocolOf(inbound4)); err != nil {
		t.Fatal(err)
	}
	l := m.l
	m.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go m.serve(conn.(*gonet.TCPConn))
		}
	})
}

func (m *machineStub) stop() { m.l.Close(); m.wg.Wait() }

func (m *machineStub) serve(conn *gonet.TCPConn) {
	h, err := intercept.ReadHeader(conn)
	if err != nil {
		conn.Close()
		return
	}
	if m.dead.Load() {
		return
	}
	if h.Token == "wrong" {
		_ = intercept.WriteStatus(conn, intercept.Unknown)
		conn.Close()
		return
	}
	if h.Network == intercept.Watch {
		if h.ID != "" {
			m.checks.Add(1)
		}
		for !m.dead.Load() && intercept.WriteStatus(conn, intercept.Accepted) == nil {
			time.Sleep(100 * time.Millisecond)
		}
		if !m.dead.Load() {
			conn.Close()
		}
		return
	}
	m.headers <- h
	s := intercept.Status(m.status.Load())
	if intercept.WriteStatus(conn, s) != nil || s != intercept.Accepted {
		conn.Close()
		return
	}
	if h.Network == intercept.UDP {
		buf := make([]byte, intercept.MaxDatagram)
		for {
			n, err := intercept.ReadDatagram(conn, buf)
			if err != nil || intercept.WriteDatagram(conn, buf[:n], nil) != nil {
				conn.Close()
				return
			}
		}
	}
	m.conns <- conn
}

// cut makes the machine fall silent, or takes that back. Nothing passes meanwhile.
func (m *machineStub) cut(away bool) {
	m.dead.Store(away)
	if away {
		m.c.endpoint.Hold(true)
	} else {
		m.c.endpoint.Hold(false)
	}
}

// gate connects as a gate does, and returns the connection after its header.
func gate(t testing.TB, to netip.Addr, h intercept.Header) *net.TCPConn {
	t.Helper()
	conn := knock(t, netip.Addr{}, to)
	if err := intercept.WriteHeader(conn, h); err != nil {
		t.Fatal(err)
	}
	return conn
}

// knock connects from an address, if that is valid, and says nothing.
func knock(t testing.TB, from, to netip.Addr) *net.TCPConn {
	t.Helper()
	d := net.Dialer{Timeout: 5 * time.Second}
	if from.IsValid() {
		d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from, 0))
	}
	conn, err := d.Dial("tcp", netip.AddrPortFrom(to, intercept.Port).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	return conn.(*net.TCPConn)
}

func status(t testing.TB, conn net.Conn) intercept.Status {
	t.Helper()
	s, err := intercept.ReadStatus(conn)
	if err != nil {
		t.Fatalf("waiting for a status: %v", err)
	}
	return s
}

// through opens a connection from a gate to the machine: both ends.
func (m *machineStub) through(t testing.TB) (*net.TCPConn, *gonet.TCPConn) {
	t.Helper()
	conn := gate(t, target, tcpHeader)
	if s := status(t, conn); s != intercept.Accepted {
		t.Fatalf("a connection is %v", s)
	}
	end := <-m.conns
	_ = end.SetDeadline(time.Now().Add(30 * time.Second))
	t.Cleanup(func() { end.Close() })
	return conn, end
}

var tcpHeader = intercept.Header{Network: intercept.TCP, ID: "i1", Token: "secret",
	Client: netip.MustParseAddrPort("10.1.2.3:4"), Server: netip.MustParseAddrPort("10.5.6.7:8")}

var watchHeader = intercept.Header{Network: intercept.Watch, ID: "i1", Token: "secret"}

// isReset tells whether conn ends with a RST.
func isReset(conn net.Conn) bool {
	_, err := io.Copy(io.Discard, struct{ io.Reader }{conn})
	return errors.Is(err, syscall.ECONNRESET)
}

// resets tells whether a connection to a port ends with a RST, which may come before
// the connection is known here.
func resets(t testing.TB, port uint16) bool {
	t.Helper()
	conn, err := net.Dial("tcp", netip.AddrPortFrom(target, port).String())
	if err != nil {
		return errors.Is(err, syscall.ECONNRESET)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	return isReset(conn)
}

func TestInboundPasses(t *testing.T) {
	a, m := intercepted(t, Config{}, nil)
	for _, to := range []netip.Addr{target, target6} {
		conn := gate(t, to, tcpHeader)
		if s := status(t, conn); s != intercept.Accepted {
			t.Fatalf("by %s: %v", to, s)
		}
		if h := <-m.headers; h != tcpHeader {
			t.Errorf("the session got %+v", h)
		}
		end := <-m.conns
		msg := bytes.Repeat([]byte("culvert "), 1<<18)
		go func() { _, _ = conn.Write(msg); _ = conn.CloseWrite() }()
		if got, err := io.ReadAll(end); err != nil || !bytes.Equal(got, msg) {
			t.Errorf("%d of %d bytes arrived: %v", len(got), len(msg), err)
		}
		// The client's direction has ended, the other one goes on.
		go func() { _, _ = end.Write(msg); _ = end.CloseWrite() }()
		if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, msg) {
			t.Errorf("%d of %d bytes came back: %v", len(got), len(msg), err)
		}
		end.Close()
	}
	eventually(t, "none is open", func() bool { return a.node().door.count() == 0 && a.node().tcp.total() == 0 })
}

// TestInboundStatus: what the session answers comes to the gate, and then the end.
func TestInboundStatus(t *testing.T) {
	a, m := intercepted(t, Config{}, nil)
	for _, want := range []intercept.Status{intercept.Refused, intercept.Unknown, intercept.Away} {
		m.status.Store(int32(want))
		conn := gate(t, target, tcpHeader)
		if s := status(t, conn); s != want {
			t.Errorf("%v came as %v", want, s)
		}
		if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("after %v: %v", want, err)
		}
	}
	if n := a.node().door.count(); n != 0 {
		t.Errorf("%d connections are left", n)
	}
	// Who says nothing, or nonsense, is not waited for.
	conn, err := net.Dial("tcp", netip.AddrPortFrom(target, intercept.Port).String())
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	_, _ = conn.Write([]byte("GET / HTTP/1.1\r\n\r\n"))
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("nonsense: %v", err)
	}
	if a.node().targets.allows(target, intercept.Port) {
		t.Error("the session may connect to its own agent's port")
	}
}

func TestInboundUnmet(t *testing.T) {
	a, _ := intercepted(t, Config{}, func(x *timing) { x.header = 300 * time.Millisecond })
	conns := make([]net.Conn, maxStrangersFrom+1)
	for i := range conns {
		var err error
		if conns[i], err = net.Dial("tcp", netip.AddrPortFrom(target, intercept.Port).String()); err != nil {
			t.Fatal(err)
		}
		defer conns[i].Close()
		_ = conns[i].SetDeadline(time.Now().Add(5 * time.Second))
	}
	for _, i := range []int{len(conns) - 1, 0} {
		if _, err := conns[i].Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
			t.Errorf("connection %d without a header is kept: %v", i, err)
		}
	}
	eventually(t, "nobody waits", func() bool {
		l := a.node().door.strangers
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.waiting == 0 && len(l.from) == 0
	})
}

func TestInboundMaximum(t *testing.T) {
	_, m := intercepted(t, Config{MaxInbound: 2}, nil)
	first, _ := m.through(t)
	m.through(t)
	if s := status(t, gate(t, target, tcpHeader)); s != intercept.Away {
		t.Errorf("one too many is %v", s)
	}
	first.SetLinger(0)
	first.Close()
	eventually(t, "there is room again", func() bool { return status(t, gate(t, target, tcpHeader)) == intercept.Accepted })
}

func TestInboundResets(t *testing.T) {
	a, m := intercepted(t, Config{}, nil)
	conn, end := m.through(t)
	_ = conn.SetLinger(0)
	conn.Close()
	if _, err := end.Read(make([]byte, 1)); err == nil || err == io.EOF {
		t.Errorf("the machine's end of a reset: %v", err)
	}
	conn, _ = m.through(t)
	abort(t, m.c)
	if !isReset(conn) {
		t.Error("the gate's end is not reset")
	}
	eventually(t, "none is open", func() bool { return a.node().door.count() == 0 })
}

// TestInboundAway: the machine falls silent, and comes back.
func TestInboundAway(t *testing.T) {
	a, m := intercepted(t, Config{}, func(x *timing) { x.lost = 3 * time.Second })
	watch := gate(t, target, watchHeader)
	if s := status(t, watch); s != intercept.Accepted {
		t.Fatalf("the machine is %v", s)
	}
	kept, keptEnd := m.through(t)

	m.cut(true)
	begun := time.Now()
	if s := status(t, gate(t, target, tcpHeader)); s != intercept.Away {
		t.Errorf("a connection during the cut is %v", s)
	}
	if d := time.Since(begun); d > a.times.answer+300*time.Millisecond {
		t.Errorf("it took %v", d)
	}
	for s := intercept.Accepted; s == intercept.Accepted; {
		s = status(t, watch)
		if d := time.Since(begun); d > a.times.silent+500*time.Millisecond {
			t.Fatalf("the watch says it after %v", d)
		}
	}
	begun = time.Now()
	if s := status(t, gate(t, target, tcpHeader)); s != intercept.Away || time.Since(begun) > 100*time.Millisecond {
		t.Errorf("while away: %v after %v", s, time.Since(begun))
	}

	m.cut(false)
	begun = time.Now()
	for s := intercept.Away; s != intercept.Accepted; {
		s = status(t, watch)
	}
	if d := time.Since(begun); d > 2*time.Second {
		t.Errorf("it is back after %v", d)
	}
	_, _ = kept.Write([]byte("still here"))
	got := make([]byte, 10)
	if _, err := io.ReadFull(keptEnd, got); err != nil || string(got) != "still here" {
		t.Errorf("what was open: %q, %v", got, err)
	}
	m.through(t)

	// Away for too long.
	m.cut(true)
	begun = time.Now()
	if !isReset(kept) {
		t.Error("the connection to a lost machine is not reset")
	}
	if d := time.Since(begun); d < a.times.lost || d > a.times.lost+a.times.silent+time.Second {
		t.Errorf("it was reset after %v", d)
	}
	m.cut(false)
	eventually(t, "it is back", func() bool { s, _ := a.node().door.machine.now(); return s == intercept.Accepted })
	m.through(t)
}

// TestInboundWithoutIntercepts: a session whose port is closed is away at once.
func TestInboundWithoutIntercepts(t *testing.T) {
	a, m := intercepted(t, Config{}, nil)
	m.stop()
	begun := time.Now()
	if s := status(t, gate(t, target, tcpHeader)); s != intercept.Away || time.Since(begun) > 500*time.Millisecond {
		t.Errorf("%v after %v", s, time.Since(begun))
	}
	m.listen(t)
	eventually(t, "it is served", func() bool { return status(t, gate(t, target, tcpHeader)) == intercept.Accepted })
	_ = a
}

// TestInboundNewProcess: another process of the session knows nothing of the old
// one's connections.
func TestInboundNewProcess(t *testing.T) {
	a, m := intercepted(t, Config{}, nil)
	conn, _ := m.through(t)
	if err := a.node().setPeer(m.c.key.Public()); err != nil {
		t.Fatal(err)
	}
	if !isReset(conn) {
		t.Error("the connection to the old process is not reset")
	}
}

// TestWatchEnds: nobody needs the machine, and nobody watches it.
func TestWatchEnds(t *testing.T) {
	a, m := intercepted(t, Config{}, func(x *timing) { x.unused = 100 * time.Millisecond })
	known := func() bool { s, _ := a.node().door.machine.now(); return s != 0 }
	if known() {
		t.Error("it is watched before anybody needs it")
	}
	conn, end := m.through(t)
	eventually(t, "it is known", known)
	time.Sleep(300 * time.Millisecond)
	if !known() {
		t.Error("it is not watched while a connection is open")
	}
	conn.Close()
	end.Close()
	eventually(t, "it is watched no longer", func() bool { return !known() })
	m.through(t)
}

// TestInboundLeaving: an agent that ends waits for what is open.
func TestInboundLeaving(t *testing.T) {
	a, m := intercepted(t, Config{Drain: 10 * time.Second}, nil)
	watch := gate(t, target, watchHeader)
	status(t, watch)
	conn, end := m.through(t)
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	drained := make(chan struct{})
	go func() { defer close(drained); a.drain(ctx) }()
	for s := intercept.Accepted; s != intercept.Leaving; {
		s = status(t, watch)
	}
	if s := status(t, gate(t, target, tcpHeader)); s != intercept.Away {
		t.Errorf("a new connection is %v", s)
	}
	go func() { _, _ = conn.Write([]byte("hello")); _ = conn.CloseWrite() }()
	if b, err := io.ReadAll(end); err != nil || string(b) != "hello" {
		t.Errorf("what is open: %q, %v", b, err)
	}
	select {
	case <-drained:
		t.Error("it does not wait")
	default:
	}
	end.Close()
	select {
	case <-drained:
	case <-time.After(2 * time.Second):
		t.Error("it waits for nothing")
	}
}

// TestRunDrains: the end of Run's context waits, Close does not.
func TestRunDrains(t *testing.T) {
	needRoot(t)
	for name, test := range map[string]struct {
		open     bool
		drain    time.Duration
		min, max time.Duration
	}{
		"nothing open":  {false, 5 * time.Second, 0, time.Second},
		"open for good": {true, 500 * time.Millisecond, 500 * time.Millisecond, 1500 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			c := Config{ControlAddr: freeAddr(), MetricsAddr: freeAddr(), MemoryLimit: 8 << 30, PodIPs: []netip.Addr{target}, Drain: test.drain}
			a := New(c)
			ctx, cancel := context.WithCancel(context.Background())
			ran := make(chan error, 1)
			go func() { ran <- a.Run(ctx) }()
			t.Cleanup(func() { a.Close() })
			eventually(t, "the agent is ready", func() bool { return CheckHealth(context.Background(), a.cfg.MetricsAddr, true) == nil })
			m := newMachineStub(t, connect(t, a, true))
			if test.open {
				m.through(t)
			}
			begun := time.Now()
			cancel()
			if err := <-ran; err != nil {
				t.Error(err)
			}
			if d := time.Since(begun); d < test.min || d > test.max {
				t.Errorf("Run returned after %v", d)
			}
		})
	}
}

func TestInboundUDPOfGates(t *testing.T) {
	_, m := intercepted(t, Config{}, nil)
	h := tcpHeader
	h.Network = intercept.UDP
	conn := gate(t, target, h)
	if s := status(t, conn); s != intercept.Accepted {
		t.Fatal(s)
	}
	if got := <-m.headers; got != h {
		t.Errorf("the session got %+v", got)
	}
	buf := make([]byte, intercept.MaxDatagram)
	for _, size := range []int{0, 1, 1400, intercept.MaxDatagram} {
		if err := intercept.WriteDatagram(conn, make([]byte, size), nil); err != nil {
			t.Fatal(err)
		}
		if n, err := intercept.ReadDatagram(conn, buf); err != nil || n != size {
			t.Errorf("%d bytes came back as %d, %v", size, n, err)
		}
	}
}

// TestIdleInboundIsLight measures what idle connections hold, with both ends of
// each in this process too.
func TestIdleInboundIsLight(t *testing.T) {
	const n = 1000
	a, m := intercepted(t, Config{}, func(x *timing) { x.silent, x.answer, x.sessionDial = 5*time.Second, 5*time.Second, 5*time.Second })
	m.through(t)
	used := func() uint64 {
		time.Sleep(500 * time.Millisecond) // a lull, twice
		runtime.GC()
		runtime.GC()
		var s runtime.MemStats
		runtime.ReadMemStats(&s)
		return s.HeapAlloc + s.StackInuse
	}
	before, goroutines := used(), runtime.NumGoroutine()
	for range n {
		conn, end := m.through(t)
		_, _ = conn.Write([]byte("x"))
		if _, err := io.ReadFull(end, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		_, _ = end.Write([]byte("y"))
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if c := a.node().door.count(); c != n+1 {
		t.Fatalf("%d connections are open", c)
	}
	each := (used() - before) / n
	t.Logf("%d idle connections hold %d bytes and %.1f goroutines each, with the endpoint and the socket of their other ends",
		n, each, float64(runtime.NumGoroutine()-goroutines)/n)
	if each > 30<<10 {
		t.Errorf("an idle connection holds %d bytes", each)
	}
}
