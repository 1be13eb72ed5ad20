package agent

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/netstack"
	"github.com/culvert-dev/culvert/wire/queue"
)

// refusal introduces h and returns why the agent refused it.
func refusal(t *testing.T, a *Agent, h carrier.Hello) string {
	t.Helper()
	conn, err := net.Dial("tcp", a.cfg.ControlAddr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	s, _, err := carrier.Dial(ctx, conn, h)
	if err == nil {
		s.Close()
		return ""
	}
	return err.Error()
}

func TestOnlyOneSession(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	for name, test := range map[string]struct {
		change func(*carrier.Hello)
		want   string
	}{
		"another session": {func(h *carrier.Hello) { h.Session = "s2" }, "another session"},
		"another secret":  {func(h *carrier.Hello) { h.Secret = strings.Repeat("x", 44) }, "another secret"},
		"another address": {func(h *carrier.Hello) { h.Tunnel = []netip.Addr{netip.MustParseAddr("198.18.9.9")} }, "other tunnel addresses"},
		"no gso":          {func(h *carrier.Hello) { h.Features = nil }, "without the feature"},
		"a bad key":       {func(h *carrier.Hello) { h.PublicKey = "x" }, "key"},
		"bulk, another key": {func(h *carrier.Hello) {
			h.Lane, h.PublicKey = queue.Bulk, wire.NewPrivateKey().Public().String()
		}, "another key by now"},
		"another protocol": {func(h *carrier.Hello) { h.Protocol = 99 }, "protocol"},
	} {
		t.Run(name, func(t *testing.T) {
			h := c.hello
			test.change(&h)
			if r := refusal(t, a, h); !strings.Contains(r, test.want) {
				t.Errorf("refused with %q, want %q", r, test.want)
			}
		})
	}
	checkEcho(t, c.mustTCP(serve(t, target, echoTCP)))
}

func TestBadFirstHelloOwnsNothing(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	for name, change := range map[string]func(*carrier.Hello){
		"loopback":  func(h *carrier.Hello) { h.Tunnel = []netip.Addr{netip.MustParseAddr("127.0.0.1")} },
		"same":      func(h *carrier.Hello) { h.Agent = h.Tunnel },
		"none":      func(h *carrier.Hello) { h.Inbound = nil },
		"mtu":       func(h *carrier.Hello) { h.MTU = 100 },
		"no secret": func(h *carrier.Hello) { h.Secret = "" },
	} {
		h, _ := newHello(true)
		change(&h)
		if refusal(t, a, h) == "" {
			t.Errorf("%s was admitted", name)
		}
	}
	connect(t, a, true)
}

func TestResumeWithNewKeyKeepsConnections(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	var packets <-chan []byte
	c := connectBy(t, a, true, func(e *netstack.Endpoint) tun.Device {
		packets = pump(e)
		return newDevice(e, packets)
	})
	conn := c.mustTCP(serve(t, target, echoTCP))
	checkEcho(t, conn)

	// A new process of the session: other keys, another device, the same stack
	// (which stands for the machine's kernel).
	key := wire.NewPrivateKey()
	c.tunnel.Close()
	c.key, c.hello.PublicKey = key, key.Public().String()
	c.tunnel = nil
	c.device = newDevice(c.endpoint, packets)
	c.bind = carrier.NewBind(carrier.BindConfig{})
	c.introduce(a)
	checkEcho(t, conn)

	// Another stream of the same process.
	c.introduce(a)
	checkEcho(t, conn)
}

func TestConnectionSurvivesAPause(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	conn := c.mustTCP(serve(t, target, echoTCP))
	checkEcho(t, conn)
	c.bind.Stream().Close()
	go conn.Write([]byte("later"))
	time.Sleep(2 * time.Second)
	c.introduce(a)
	b := make([]byte, 5)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "later" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestSilentStreamsAreBounded(t *testing.T) {
	a := startAgent(t, Config{}, func(x *timing) { x.hello = 300 * time.Millisecond })
	var conns []net.Conn
	for range maxUnmet + 5 {
		conn, err := net.Dial("tcp", a.cfg.ControlAddr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	last := conns[len(conns)-1]
	_ = last.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if _, err := last.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one stream too many: %v", err)
	}
	_ = conns[0].SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := conns[0].Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a silent stream is kept")
	}
	eventually(t, "no stream is silent", func() bool { return len(a.unmet) == 0 })
	connect(t, a, true)
}

func TestDialSession(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	if _, err := a.DialSession(context.Background(), 80); err == nil {
		t.Error("dialled without a session")
	}
	c := connect(t, a, true)
	l, err := gonet.ListenTCP(c.stack, full(inbound4, 80), protocolOf(inbound4))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err == nil {
			_, _ = io.Copy(conn, conn)
			conn.Close()
		}
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn, err := a.DialSession(ctx, 80)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	checkEcho(t, conn.(*gonet.TCPConn))
	if conn, err := a.DialSession(ctx, 81); err == nil {
		conn.Close()
		t.Error("a closed port of the session was reached")
	}
}

func TestHealthAndMetrics(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	checkEcho(t, c.mustTCP(serve(t, target, echoTCP)))
	ctx := context.Background()
	if err := CheckHealth(ctx, a.cfg.MetricsAddr, false); err != nil {
		t.Error(err)
	}
	resp, err := http.Get("http://" + a.cfg.MetricsAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	for _, want := range []string{"culvert_agent_tcp_connections 1", "culvert_agent_streams_total 1", "culvert_agent_tcp_up_bytes_total 1.048576e+06"} {
		if !strings.Contains(string(b), want) {
			t.Errorf("metrics lack %q", want)
		}
	}
	// A lock that is not given back is what liveness is about.
	n := a.node()
	n.tcp.mu.Lock()
	short, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
	defer cancel()
	if err := a.alive(short); err == nil {
		t.Error("alive with a lock held for ever")
	}
	n.tcp.mu.Unlock()
	a.Close()
	if err := CheckHealth(ctx, a.cfg.MetricsAddr, false); err == nil {
		t.Error("healthy after Close")
	}
}

func TestMemoryLimitOfBothCgroupVersions(t *testing.T) {
	dir := t.TempDir()
	write := func(path, text string) {
		path = filepath.Join(dir, path)
		_ = os.MkdirAll(filepath.Dir(path), 0o755)
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	check := func(want int64, wantOK bool) {
		t.Helper()
		if got, ok := memoryLimitAt(filepath.Join(dir, "cg"), filepath.Join(dir, "self")); ok != wantOK || ok && got != want {
			t.Errorf("limit %d, %v, want %d, %v", got, ok, want, wantOK)
		}
	}
	check(0, false)
	write("self", "0::/kube/pod\n")
	write("cg/kube/pod/memory.max", "max\n")
	check(0, false)
	write("cg/kube/memory.max", "300000000\n")
	check(300000000, true)
	write("cg/memory.max", "200000000\n") // the pod's own mount
	check(200000000, true)
	write("self", "5:cpu:/x\n4:memory:/y\n")
	write("cg/memory.max", "max\n")
	write("cg/memory/y/memory.limit_in_bytes", "9223372036854771712\n")
	check(0, false)
	write("cg/memory/memory.limit_in_bytes", "100000000\n")
	check(100000000, true)
}

// TestImports: the agent's image has neither a Kubernetes client nor the
// daemon's privileges.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "../cmd/culvert-agent", "../wire/...").Output()
	if err != nil {
		t.Fatalf("listing imports: %v", err)
	}
	for dep := range strings.Lines(string(out)) {
		dep = strings.TrimSpace(dep)
		if dep == "github.com/culvert-dev/culvert/daemon/api" {
			continue // types only, for errors
		}
		for _, bad := range []string{"k8s.io/", "sigs.k8s.io/", "github.com/culvert-dev/culvert/daemon", "github.com/culvert-dev/culvert/router",
			"github.com/culvert-dev/culvert/cluster", "github.com/culvert-dev/culvert/session"} {
			if strings.HasPrefix(dep, bad) {
				t.Errorf("the agent imports %s", dep)
			}
		}
	}

	// A gate is no peer of the tunnel, and links nothing of it.
	out, err = exec.Command("go", "list", "-deps", "./gate").Output()
	if err != nil {
		t.Fatalf("listing imports: %v", err)
	}
	for dep := range strings.Lines(string(out)) {
		dep = strings.TrimSpace(dep)
		for _, bad := range []string{"k8s.io/", "sigs.k8s.io/", "gvisor.dev/", "golang.zx2c4.com/"} {
			if strings.HasPrefix(dep, bad) {
				t.Errorf("the gate imports %s", dep)
			}
		}
		own, is := strings.CutPrefix(dep, "github.com/culvert-dev/culvert/")
		if is && own != "agent/gate" && own != "wire/intercept" && !strings.HasPrefix(own, "internal/") {
			t.Errorf("the gate imports %s", dep)
		}
	}
}
