package session

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// fakeInbound is a socket in the place of a connection of the netstack.
type fakeInbound struct {
	*net.TCPConn
	introduced chan struct{}
	once       sync.Once
}

func (f *fakeInbound) Abort()         { _ = f.SetLinger(0); f.Close() }
func (f *fakeInbound) Introduced()    { f.once.Do(func() { close(f.introduced) }) }
func (f *fakeInbound) OnReset(func()) {}

// pair is a connection: the agent's end, and the session's.
func pair(t testing.TB) (*net.TCPConn, *fakeInbound) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	_ = a.SetDeadline(time.Now().Add(10 * time.Second))
	return a.(*net.TCPConn), &fakeInbound{TCPConn: b.(*net.TCPConn), introduced: make(chan struct{})}
}

// arrive has a connection served, and returns its end and the answer to h.
func arrive(t testing.TB, in *inbound, h intercept.Header) (*net.TCPConn, intercept.Status) {
	t.Helper()
	c, served := pair(t)
	go in.serve(served)
	if err := intercept.WriteHeader(c, h); err != nil {
		t.Fatal(err)
	}
	s, err := intercept.ReadStatus(c)
	if err != nil {
		t.Fatalf("waiting for the status: %v", err)
	}
	<-served.introduced
	return c, s
}

// unlessWithout6 fails, or skips a test of IPv6 on a machine that has none.
func unlessWithout6(t testing.TB, addr string, err error) {
	t.Helper()
	if strings.HasPrefix(addr, "[") && (errors.Is(err, syscall.EADDRNOTAVAIL) || errors.Is(err, syscall.EAFNOSUPPORT)) {
		t.Skip(err)
	}
	t.Fatal(err)
}

func program(t testing.TB, addr string, handle func(*net.TCPConn)) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		unlessWithout6(t, addr, err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go handle(c.(*net.TCPConn))
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func echo(c *net.TCPConn) {
	defer c.Close()
	_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
}

// closedPort is one at which nothing listens.
func closedPort(t testing.TB) uint16 {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).AddrPort().Port()
}

func targetsOf(t testing.TB, all map[string]target) *inbound {
	t.Helper()
	in := newInbound(slog.New(slog.DiscardHandler))
	for id, x := range all {
		if err := in.Set(id, x); err != nil {
			t.Fatal(err)
		}
	}
	return in
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not so after 5 s: %s", what)
}

func TestInboundStatus(t *testing.T) {
	port4, port6 := program(t, "127.0.0.1:0", echo), program(t, "[::1]:0", echo)
	in := targetsOf(t, map[string]target{
		"four": {Token: "t", Network: intercept.TCP, Local: port4}, "six": {Token: "t", Network: intercept.TCP, Local: port6},
		"closed": {Token: "t", Network: intercept.TCP, Local: closedPort(t)}, "bare": {Network: intercept.TCP, Local: port4},
		"gone": {Token: "t", Network: intercept.TCP, Local: port4},
	})
	if err := errors.Join(in.Remove("gone"), in.Remove("gone")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		h    intercept.Header
		want intercept.Status
	}{
		{intercept.Header{Network: intercept.TCP, ID: "four", Token: "t"}, intercept.Accepted},
		{intercept.Header{Network: intercept.TCP, ID: "six", Token: "t"}, intercept.Accepted},
		{intercept.Header{Network: intercept.TCP, ID: "closed", Token: "t"}, intercept.Refused},
		{intercept.Header{Network: intercept.TCP, ID: "four", Token: "x"}, intercept.Unknown},
		{intercept.Header{Network: intercept.TCP, ID: "four"}, intercept.Unknown},
		{intercept.Header{Network: intercept.TCP, ID: "bare"}, intercept.Unknown}, // a token that nobody set is none
		{intercept.Header{Network: intercept.TCP, ID: "gone", Token: "t"}, intercept.Unknown},
		{intercept.Header{Network: intercept.TCP}, intercept.Unknown},
		{intercept.Header{Network: intercept.UDP, ID: "four", Token: "t"}, intercept.Unknown},
		{intercept.Header{ID: "four", Token: "t"}, intercept.Unknown},
	} {
		c, got := arrive(t, in, test.h)
		if got != test.want {
			t.Errorf("%+v: %v", test.h, got)
		}
		if got != intercept.Accepted {
			if _, err := c.Read(make([]byte, 1)); err != io.EOF {
				t.Errorf("%+v: after the status %v", test.h, err)
			}
			continue
		}
		if n := in.Open(test.h.ID); n != 1 {
			t.Errorf("%d connections of %s are open", n, test.h.ID)
		}
		msg := bytes.Repeat([]byte("culvert "), 1<<17)
		go func() { _, _ = c.Write(msg); _ = c.CloseWrite() }()
		if back, err := io.ReadAll(c); err != nil || !bytes.Equal(back, msg) {
			t.Errorf("%s: %d of %d bytes came back: %v", test.h.ID, len(back), len(msg), err)
		}
		eventually(t, "it is not open any more", func() bool { return in.Open(test.h.ID) == 0 })
	}
}

func TestInboundGarbage(t *testing.T) {
	in := targetsOf(t, nil)
	c, served := pair(t)
	done := make(chan struct{})
	go func() { defer close(done); in.serve(served) }()
	if _, err := c.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("what is no header is answered with %v", err)
	}
	<-done
}

// TestInboundWatch: beats at their pace, until the connection ends.
func TestInboundWatch(t *testing.T) {
	in := targetsOf(t, nil)
	begun := time.Now()
	c, s := arrive(t, in, intercept.Header{Network: intercept.Watch})
	for range 2 {
		if s != intercept.Accepted {
			t.Errorf("a beat is %v", s)
		}
		var err error
		if s, err = intercept.ReadStatus(c); err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(begun); d < 2*intercept.BeatEvery-50*time.Millisecond || d > 2*intercept.BeatEvery+time.Second {
		t.Errorf("three beats took %v", d)
	}
}

// TestInboundWatchProof: what a gate shows to its agent is checked here; the agent
// itself shows nothing.
func TestInboundWatchProof(t *testing.T) {
	in := targetsOf(t, map[string]target{
		"tcp": {Token: "t", Network: intercept.TCP}, "udp": {Token: "u", Network: intercept.UDP}, "bare": {Network: intercept.TCP},
		"gone": {Token: "t", Network: intercept.TCP},
	})
	if err := in.Remove("gone"); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		id, token string
		want      intercept.Status
	}{
		{"", "", intercept.Accepted},
		{"tcp", "t", intercept.Accepted},
		{"udp", "u", intercept.Accepted},
		{"tcp", "u", intercept.Unknown},
		{"tcp", "", intercept.Unknown},
		{"", "t", intercept.Unknown},
		{"bare", "", intercept.Unknown},
		{"gone", "t", intercept.Unknown},
		{"other", "t", intercept.Unknown},
	} {
		c, got := arrive(t, in, intercept.Header{Network: intercept.Watch, ID: test.id, Token: test.token})
		if got != test.want {
			t.Errorf("%q, %q: %v", test.id, test.token, got)
		}
		_, err := intercept.ReadStatus(c)
		if beats := err == nil; beats != (test.want == intercept.Accepted) {
			t.Errorf("%q, %q: then %v", test.id, test.token, err)
		}
	}
}

// TestInboundHalfClose: the program answers after the client's FIN, and the
// client goes on after the program's.
func TestInboundHalfClose(t *testing.T) {
	answers := program(t, "127.0.0.1:0", func(c *net.TCPConn) {
		defer c.Close()
		asked, _ := io.ReadAll(c)
		_, _ = c.Write(append([]byte("you said "), asked...))
	})
	heard := make(chan string, 1)
	listens := program(t, "127.0.0.1:0", func(c *net.TCPConn) {
		defer c.Close()
		_ = c.CloseWrite()
		b, _ := io.ReadAll(c)
		heard <- string(b)
	})
	in := targetsOf(t, map[string]target{
		"a": {Token: "t", Network: intercept.TCP, Local: answers}, "b": {Token: "t", Network: intercept.TCP, Local: listens}})
	c, _ := arrive(t, in, intercept.Header{Network: intercept.TCP, ID: "a", Token: "t"})
	_, _ = c.Write([]byte("hello"))
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != "you said hello" {
		t.Errorf("%q, %v", b, err)
	}
	c, _ = arrive(t, in, intercept.Header{Network: intercept.TCP, ID: "b", Token: "t"})
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
	_, _ = c.Write([]byte("still here"))
	_ = c.CloseWrite()
	if got := <-heard; got != "still here" {
		t.Errorf("the program heard %q", got)
	}
}

func TestInboundResets(t *testing.T) {
	ended := make(chan error, 1)
	reads := program(t, "127.0.0.1:0", func(c *net.TCPConn) {
		defer c.Close()
		_, err := c.Read(make([]byte, 1))
		ended <- err
	})
	resets := program(t, "127.0.0.1:0", func(c *net.TCPConn) {
		_, _ = c.Read(make([]byte, 1))
		_ = c.SetLinger(0)
		c.Close()
	})
	in := targetsOf(t, map[string]target{
		"a": {Token: "t", Network: intercept.TCP, Local: reads}, "b": {Token: "t", Network: intercept.TCP, Local: resets}})
	c, _ := arrive(t, in, intercept.Header{Network: intercept.TCP, ID: "a", Token: "t"})
	_ = c.SetLinger(0)
	c.Close()
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the program's end of a reset: %v", err)
	}
	c, _ = arrive(t, in, intercept.Header{Network: intercept.TCP, ID: "b", Token: "t"})
	_, _ = c.Write([]byte("x"))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client's end of a reset: %v", err)
	}
	c, _ = arrive(t, in, intercept.Header{Network: intercept.TCP, ID: "a", Token: "t"})
	in.Reset("a")
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the program's end of Reset: %v", err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the client's end of Reset: %v", err)
	}
	eventually(t, "none is open", func() bool { return in.Open("a")+in.Open("b") == 0 })
}

func TestProxyHeader(t *testing.T) {
	const signature = "0d0a0d0a000d0a515549540a"
	for _, test := range []struct{ client, server, want string }{
		{"10.0.0.1:256", "10.0.0.2:80", "2111000c0a0000010a00000201000050"},
		{"[::ffff:10.0.0.1]:256", "10.0.0.2:80", "2111000c0a0000010a00000201000050"},
		{"[fd00::1]:1", "[fd00::2]:2", "21210024fd000000000000000000000000000001fd00000000000000000000000000000200010002"},
		{"10.0.0.1:1", "[fd00::2]:2", "2121002400000000000000000000ffff0a000001fd00000000000000000000000000000200010002"},
		{"", "10.0.0.2:80", "20000000"},
		{"10.0.0.1:1", "", "20000000"},
	} {
		client, _ := netip.ParseAddrPort(test.client)
		server, _ := netip.ParseAddrPort(test.server)
		if got := hex.EncodeToString(proxyHeader(client, server)); got != signature+test.want {
			t.Errorf("%s to %s: %s", test.client, test.server, got)
		}
	}
}

func TestInboundProxyProtocol(t *testing.T) {
	port := program(t, "127.0.0.1:0", echo)
	in := targetsOf(t, map[string]target{"a": {Token: "t", Network: intercept.TCP, Local: port, ProxyProtocol: true}})
	from, to := netip.MustParseAddrPort("10.0.0.1:256"), netip.MustParseAddrPort("10.0.0.2:80")
	c, _ := arrive(t, in, intercept.Header{Network: intercept.TCP, ID: "a", Token: "t", Client: from, Server: to})
	_, _ = c.Write([]byte("hello"))
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || !bytes.Equal(b, append(proxyHeader(from, to), "hello"...)) {
		t.Errorf("%q, %v", b, err)
	}
}

func udpProgram(t *testing.T, addr string) (*net.UDPConn, uint16) {
	t.Helper()
	c, err := net.ListenPacket("udp", addr)
	if err != nil {
		unlessWithout6(t, addr, err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 65535)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			_, _ = c.WriteTo(b[:n], from)
		}
	}()
	u := c.(*net.UDPConn)
	return u, u.LocalAddr().(*net.UDPAddr).AddrPort().Port()
}

func TestInboundUDP(t *testing.T) {
	for _, at := range []string{"127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"} {
		p, port := udpProgram(t, at)
		in := targetsOf(t, map[string]target{"a": {Token: "t", Network: intercept.UDP, Local: port}})
		h := intercept.Header{Network: intercept.UDP, ID: "a", Token: "t"}
		c, s := arrive(t, in, h)
		if s != intercept.Accepted || in.Open("a") != 1 {
			t.Errorf("%s: %v, %d open", at, s, in.Open("a"))
			continue
		}
		buf := make([]byte, intercept.MaxDatagram)
		for _, size := range []int{0, 1, 1400, 65000} {
			if err := intercept.WriteDatagram(c, bytes.Repeat([]byte("d"), size), nil); err != nil {
				t.Fatal(err)
			}
			if n, err := intercept.ReadDatagram(c, buf); err != nil || n != size {
				t.Errorf("%s: %d bytes came back as %d, %v", at, size, n, err)
			}
		}
		p.Close() // the port is closed: ICMP says so
		_ = intercept.WriteDatagram(c, []byte("x"), nil)
		if _, err := intercept.ReadDatagram(c, buf); err != io.EOF {
			t.Errorf("%s: after the program's end: %v", at, err)
		}
		eventually(t, "the flow has ended", func() bool { return in.Open("a") == 0 })
		if _, s := arrive(t, in, h); s != intercept.Refused {
			t.Errorf("%s: a flow to a closed port: %v", at, s)
		}
	}
}

func TestListening(t *testing.T) {
	tcp := program(t, "127.0.0.1:0", echo)
	tcp6 := program(t, "[::1]:0", echo)
	_, udp := udpProgram(t, "127.0.0.1:0")
	_, udp6 := udpProgram(t, "[::1]:0")
	for _, test := range []struct {
		network string
		port    uint16
		want    bool
	}{
		{intercept.TCP, tcp, true}, {intercept.TCP, tcp6, true}, {intercept.TCP, closedPort(t), false},
		{intercept.UDP, udp, true}, {intercept.UDP, udp6, true}, {intercept.UDP, closedPort(t), false},
	} {
		if got := listening(test.network, test.port); got != test.want {
			t.Errorf("%s port %d: %v", test.network, test.port, got)
		}
	}
	// A client's socket is no listener.
	c, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if port := c.LocalAddr().(*net.UDPAddr).AddrPort().Port(); runtime.GOOS == "linux" && listening(intercept.UDP, port) {
		t.Error("a connected socket is taken for a program that listens")
	}
}

// TestDialLocalEnds: a backlog that is full holds nobody for long.
func TestDialLocalEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := dialLocal(ctx, 1); err == nil {
		t.Error("a dial goes on after its end")
	}
}

// TestIdleRelayIsLight: what a thousand idle connections hold in this process
// beside their sockets.
func TestIdleRelayIsLight(t *testing.T) {
	const n = 1000
	port := program(t, "127.0.0.1:0", func(c *net.TCPConn) {
		var b [5]byte
		for {
			if _, err := io.ReadFull(c, b[:]); err != nil {
				c.Close()
				return
			}
			_, _ = c.Write(b[:])
		}
	})
	in := targetsOf(t, map[string]target{"a": {Token: "t", Network: intercept.TCP, Local: port}})
	used := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc + m.StackInuse
	}
	before := used()
	for range n {
		c, s := arrive(t, in, intercept.Header{Network: intercept.TCP, ID: "a", Token: "t"})
		if s != intercept.Accepted {
			t.Fatal(s)
		}
		_, _ = c.Write([]byte("hello"))
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
	}
	each := (used() - before) / n
	t.Logf("an idle connection holds %d bytes, with the test's three sockets and its program", each)
	if each > 24<<10 { // 12 KB, and 18 with the race detector
		t.Errorf("an idle connection holds %d bytes", each)
	}
}
