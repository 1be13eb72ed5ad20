package agent

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/ask"
	"github.com/culvert-dev/culvert/wire/expose"
	"github.com/culvert-dev/culvert/wire/intercept"
)

func exposer(a *Agent, secret string) *expose.Client {
	return expose.NewClient(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", a.cfg.MetricsAddr)
	}, secret)
}

func TestExposedRefusals(t *testing.T) {
	a, m := intercepted(t, Config{}, nil)
	var refusal *ask.Refusal
	if _, err := exposer(a, "wrong").Get(t.Context()); !errors.As(err, &refusal) || refusal.Status != 401 {
		t.Errorf("with another secret: %v", err)
	}
	c := exposer(a, m.c.hello.Secret)
	if _, err := c.Set(t.Context(), make([]expose.Port, expose.Max+1)); !errors.As(err, &refusal) || refusal.Status != 400 {
		t.Errorf("too many: %v", err)
	}
	busy := serve(t, target, echoTCP).Port()
	port := func(n uint16, protocol string) expose.Port {
		return expose.Port{Port: n, Protocol: protocol, ID: "i", Token: "t"}
	}
	ports := []expose.Port{
		port(0, expose.TCP), port(80, "SCTP"), {Port: 80, Protocol: expose.TCP, ID: "i"}, {Port: 80, Protocol: expose.TCP, Token: "t"},
		port(7531, expose.TCP), port(intercept.Port, expose.TCP), port(intercept.GatePort, expose.TCP), port(51820, expose.UDP),
		port(18080, expose.TCP), port(18080, expose.TCP), port(18080, expose.UDP), port(busy, expose.TCP),
	}
	st, err := c.Set(t.Context(), ports)
	if err != nil || len(st.Ports) != len(ports) || !slices.Equal(st.PodIPs, a.cfg.PodIPs) || st.Instance != a.instance {
		t.Fatalf("%+v, %v", st, err)
	}
	for i, p := range st.Ports {
		whole := i == 8 || i == 10
		half := i == 11 // at the other address
		if p.Port != ports[i].Port || p.Protocol != ports[i].Protocol || p.Listening != (whole || half) || (p.Error == "") != whole {
			t.Errorf("number %d: %+v", i, p)
		}
	}
	again, err := c.Get(t.Context())
	if err != nil || !slices.Equal(again.Ports, st.Ports) {
		t.Errorf("%+v, %v", again, err)
	}
	if st, err = c.Set(t.Context(), nil); err != nil || len(st.Ports) != 0 {
		t.Errorf("none: %+v, %v", st, err)
	}
	if conn, err := net.Dial("tcp", netip.AddrPortFrom(target, 18080).String()); err == nil {
		conn.Close()
		t.Error("a port that is not exposed any more answers")
	}
}

func TestExposedTCP(t *testing.T) {
	a, m := intercepted(t, Config{}, nil)
	c := exposer(a, m.c.hello.Secret)
	set := func(token string) {
		if st, err := c.Set(t.Context(), []expose.Port{{Port: 18081, Protocol: expose.TCP, ID: "i", Token: token}}); err != nil || !st.Ports[0].Listening {
			t.Fatalf("%+v, %v", st, err)
		}
	}
	dial := func(to netip.Addr) *net.TCPConn {
		conn, err := net.Dial("tcp", netip.AddrPortFrom(to, 18081).String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		return conn.(*net.TCPConn)
	}
	set("one")
	for i, to := range []netip.Addr{target, target6} {
		conn := dial(to)
		h, end := <-m.headers, <-m.conns
		want := intercept.Header{Network: intercept.TCP, ID: "i", Token: []string{"one", "two"}[i], Client: localOf(conn), Server: remoteOf(conn)}
		if h != want {
			t.Errorf("the session got %+v, not %+v", h, want)
		}
		go func() { _, _ = io.Copy(end, end); _ = end.CloseWrite() }()
		_, _ = conn.Write([]byte("hello"))
		_ = conn.CloseWrite()
		if b, err := io.ReadAll(conn); err != nil || string(b) != "hello" {
			t.Errorf("%q, %v", b, err)
		}
		set("two") // the same port, and nothing is closed
	}
	m.status.Store(int32(intercept.Refused))
	if !resets(t, 18081) {
		t.Error("what the session refuses is not reset")
	}
	m.cut(true)
	eventually(t, "the machine is away", func() bool { s, _ := a.node().door.machine.now(); return s == intercept.Away })
	if !resets(t, 18081) {
		t.Error("while the machine is away a connection is not reset")
	}
	m.cut(false)
}

func TestExposedUDP(t *testing.T) {
	a, m := intercepted(t, Config{}, func(x *timing) { x.flowIdle = 500 * time.Millisecond })
	st, err := exposer(a, m.c.hello.Secret).Set(t.Context(), []expose.Port{{Port: 18082, Protocol: expose.UDP, ID: "i", Token: "t"}})
	if err != nil || !st.Ports[0].Listening || st.Ports[0].Error != "" {
		t.Fatalf("%+v, %v", st, err)
	}
	var conns []*net.UDPConn
	for _, to := range []netip.Addr{target, target, target6} {
		conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 18082)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		conns = append(conns, conn)
	}
	buf := make([]byte, 65535)
	for _, size := range []int{0, 1, 1400, 65000} {
		for i, conn := range conns {
			sent := bytes.Repeat([]byte{byte('a' + i)}, size)
			if _, err := conn.Write(sent); err != nil {
				t.Fatal(err)
			}
			if n, err := conn.Read(buf); err != nil || !bytes.Equal(buf[:n], sent) {
				t.Fatalf("%d bytes of flow %d came back as %d, %v", size, i, n, err)
			}
		}
	}
	if n := a.node().door.count(); n != len(conns) {
		t.Errorf("%d clients have %d flows", len(conns), n)
	}
	for _, conn := range conns {
		h := <-m.headers
		if h.Network != intercept.UDP || h.ID != "i" || h.Token != "t" || h.Client.String() != conn.LocalAddr().String() || h.Server.String() != conn.RemoteAddr().String() {
			t.Errorf("the session got %+v", h)
		}
	}
	eventually(t, "idle flows end", func() bool { return a.node().door.count() == 0 })
	if n := a.node().exposed.queued.Load(); n != 0 {
		t.Errorf("%d bytes are still counted", n)
	}
	if _, err := conns[0].Write([]byte("again")); err != nil {
		t.Fatal(err)
	}
	if n, err := conns[0].Read(buf); err != nil || string(buf[:n]) != "again" {
		t.Errorf("after the flow's end: %q, %v", buf[:n], err)
	}
}
