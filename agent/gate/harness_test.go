package gate

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// TestMain runs more tests at one time than there are cores: most of them wait.
func TestMain(m *testing.M) {
	flag.Parse()
	_ = flag.Set("test.parallel", "8") // there is such a flag
	os.Exit(m.Run())
}

// testGate is a Gate that runs, with ports of its own.
type testGate struct {
	*Gate
	t       testing.TB
	stop    context.CancelFunc // SIGTERM
	stopped chan error
}

// startGate runs a gate that has loaded no state.
func startGate(t testing.TB, cfg Config, tune func(*timing)) *testGate {
	t.Helper()
	dir := t.TempDir()
	if cfg.StateDir == "" {
		cfg.StateDir = filepath.Join(dir, "mounted")
	}
	if cfg.KeepFile == "" {
		cfg.KeepFile = filepath.Join(dir, "state.json")
	}
	cfg.ControlAddr = fmt.Sprintf("127.0.0.1:%d", freePort(t))
	cfg.MetricsAddr = fmt.Sprintf("127.0.0.1:%d", freePort(t))
	cfg.Log = slog.New(slog.DiscardHandler)
	if testing.Verbose() {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	g := &testGate{Gate: New(cfg), t: t, stopped: make(chan error, 1)}
	g.times.linger = 300 * time.Millisecond
	g.times.sweep = 20 * time.Millisecond
	g.times.lull = 300 * time.Millisecond
	if tune != nil {
		tune(&g.times)
	}
	ctx, stop := context.WithCancel(context.Background())
	g.stop = stop
	go func() { g.stopped <- g.Run(ctx) }()
	t.Cleanup(func() { g.Close(); stop() })
	eventually(t, "the gate listens", func() bool {
		resp, err := http.Get("http://" + cfg.ControlAddr + "/v1/state")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	return g
}

// push sends a state as a session would.
func (g *testGate) push(s intercept.State) (status intercept.GateStatus) {
	g.t.Helper()
	b, _ := json.Marshal(s)
	code, answer := g.do(http.MethodPut, "/v1/state", b)
	if code != http.StatusOK {
		g.t.Fatalf("pushing a state: %d %s", code, answer)
	}
	if err := json.Unmarshal(answer, &status); err != nil {
		g.t.Fatal(err)
	}
	return status
}

func (g *testGate) do(method, path string, body []byte) (int, []byte) {
	g.t.Helper()
	r, err := http.NewRequest(method, "http://"+g.cfg.ControlAddr+path, bytes.NewReader(body))
	if err != nil {
		g.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		g.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		g.t.Fatal(err)
	}
	return resp.StatusCode, b
}

// stateOf is a state of one entry "web".
func stateOf(generation int64, routes ...intercept.Route) intercept.State {
	return intercept.State{Generation: generation, Entries: map[string]intercept.Entry{
		"web": {Kind: intercept.Exchange, Service: "web", Gate: intercept.GateName, Routes: routes},
	}}
}

// draining is s with its entry draining.
func draining(s intercept.State) intercept.State {
	e := s.Entries["web"]
	e.Draining = true
	return intercept.State{Generation: s.Generation + 1, Entries: map[string]intercept.Entry{"web": e}}
}

func tcpRoute(t testing.TB, origin string, m *intercept.Machine) intercept.Route {
	return intercept.Route{Listen: freePort(t), Protocol: "TCP", Port: 80, Origin: origin, Machine: m}
}

func udpRoute(t testing.TB, origin string, m *intercept.Machine) intercept.Route {
	return intercept.Route{Listen: freePort(t), Protocol: "UDP", Port: 53, Origin: origin, Machine: m}
}

// nextPort is below the ports that the kernel gives to clients.
var nextPort atomic.Uint32

func init() { nextPort.Store(16000 + uint32(os.Getpid()%8000)) }

// freePort is one that nobody has.
func freePort(t testing.TB) uint16 {
	t.Helper()
	for range 1000 {
		port := uint16(nextPort.Add(1))
		l, err := net.Listen("tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			continue
		}
		l.Close()
		if u, err := net.ListenPacket("udp", fmt.Sprintf(":%d", port)); err == nil {
			u.Close()
			return port
		}
	}
	t.Fatal("no port is free")
	return 0
}

func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 5 s: %s", what)
		}
	}
}

// dial connects to a route.
func dial(t testing.TB, port uint16) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", "127.0.0.1:"+strconv.Itoa(int(port)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

// mustReset connects to a route and wants a reset, which may come before the
// connection is known here.
func mustReset(t testing.TB, port uint16) {
	t.Helper()
	c, err := net.Dial("tcp", "127.0.0.1:"+strconv.Itoa(int(port)))
	if err == nil {
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		_, err = c.Read(make([]byte, 1))
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("not a reset: %v", err)
	}
}

// ask sends a line and returns what comes back.
func ask(t testing.TB, c net.Conn, line string) string {
	t.Helper()
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		t.Fatalf("writing: %v", err)
	}
	got := make([]byte, 256)
	n, err := c.Read(got)
	if err != nil {
		t.Fatalf("reading: %v", err)
	}
	return string(got[:n])
}

// serve runs a server whose connections are served by handle.
func serve(t testing.TB, handle func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			go handle(c.(*net.TCPConn))
		}
	}()
	return l.Addr().String()
}

// lines answers each line with "NAME: line", and ends with its client.
func lines(name string) func(*net.TCPConn) {
	return func(c *net.TCPConn) { answerLines(name, c) }
}

func answerLines(name string, c net.Conn) {
	defer c.Close()
	b := make([]byte, 4096)
	for {
		n, err := c.Read(b)
		if err != nil {
			return
		}
		if _, err := io.WriteString(c, name+": "+string(b[:n])); err != nil {
			return
		}
	}
}

// fakeAgent speaks wire/intercept as an agent does.
type fakeAgent struct {
	addr  string
	l     net.Listener
	say   atomic.Int32 // the Status of connections, 0: none at all
	beat  atomic.Int32 // the Status of watches, 0: silence
	seen  chan intercept.Header
	shown chan intercept.Header // of watches
	bad   sync.Map              // IDs whose watches are told Unknown
	serve func(intercept.Header, *net.TCPConn)

	mu    sync.Mutex
	conns []net.Conn
}

func startAgent(t testing.TB, handle func(intercept.Header, *net.TCPConn)) *fakeAgent {
	t.Helper()
	if handle == nil {
		handle = func(_ intercept.Header, c *net.TCPConn) { answerLines("machine", c) }
	}
	a := &fakeAgent{seen: make(chan intercept.Header, 1000), shown: make(chan intercept.Header, 1000), serve: handle}
	a.say.Store(int32(intercept.Accepted))
	a.beat.Store(int32(intercept.Accepted))
	a.listen(t, "127.0.0.1:0")
	t.Cleanup(a.vanish)
	return a
}

func (a *fakeAgent) listen(t testing.TB, addr string) {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	a.l, a.addr = l, l.Addr().String()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			a.mu.Lock()
			a.conns = append(a.conns, c)
			a.mu.Unlock()
			go a.handle(c.(*net.TCPConn))
		}
	}()
}

// vanish ends the listener and all connections.
func (a *fakeAgent) vanish() {
	a.l.Close()
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, c := range a.conns {
		c.Close()
	}
	a.conns = nil
}

func (a *fakeAgent) handle(c *net.TCPConn) {
	h, err := intercept.ReadHeader(c)
	if err != nil {
		c.Close()
		return
	}
	if h.Network == intercept.Watch {
		defer c.Close()
		a.shown <- h
		if _, bad := a.bad.Load(h.ID); bad {
			_ = intercept.WriteStatus(c, intercept.Unknown)
			return
		}
		for {
			if s := a.beat.Load(); s != 0 {
				if intercept.WriteStatus(c, intercept.Status(s)) != nil {
					return
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	a.seen <- h
	s := a.say.Load()
	if s == 0 {
		return // and c stays open
	}
	if intercept.WriteStatus(c, intercept.Status(s)) != nil || intercept.Status(s) != intercept.Accepted {
		c.Close()
		return
	}
	a.serve(h, c)
}

// machine is what a route to the agent says.
func (a *fakeAgent) machine() *intercept.Machine {
	return &intercept.Machine{Agents: []string{a.addr}, ID: "i1", Token: "secret", Local: 8080}
}

// machineIs waits until the gate knows how the machine is.
func (g *testGate) machineIs(s intercept.Status) {
	g.t.Helper()
	eventually(g.t, "the machine is "+s.String(), func() bool {
		for _, r := range g.status().Routes {
			if r.Machine == s.String() {
				return true
			}
		}
		return false
	})
}

// deaf is an address whose SYNs are dropped: nobody accepts, and the queue of
// those who wait is full.
func deaf(t testing.TB) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Close(fd) })
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	fillBacklog(t, fd)
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", sa.(*syscall.SockaddrInet4).Port)
}

func fillBacklog(t testing.TB, fd int) {
	t.Helper()
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	sa, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	addr := fmt.Sprintf("127.0.0.1:%d", sa.(*syscall.SockaddrInet4).Port)
	for range 10 {
		c, err := net.DialTimeout("tcp", addr, 100*time.Millisecond)
		if err != nil {
			return
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the queue of a listener does not fill")
}
