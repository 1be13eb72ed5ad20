package wire

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

var inboundAddr = netip.MustParseAddr("10.77.0.3")

func inboundRig(t *testing.T) *rig {
	r := &rig{near: newNamespace(t), far: newNamespace(t)}
	r.local = NewLocal(LocalConfig{TUN: r.near.device(t, nearAddrs, farAddrs), Tunnel: nearAddrs,
		Inbound: []netip.Addr{inboundAddr}, MTU: testMTU})
	r.join(t, r.local, newFar(r.far.device(t, farAddrs, append([]netip.Addr{inboundAddr}, nearAddrs...)), true))
	return r
}

// dialInbound connects from the cluster's end.
func (r *rig) dialInbound(t *testing.T, port int) (c *net.TCPConn, err error) {
	r.far.do(t, func() error {
		var conn net.Conn
		if conn, err = net.DialTimeout("tcp", net.JoinHostPort(inboundAddr.String(), strconv.Itoa(port)), 5*time.Second); err == nil {
			c = conn.(*net.TCPConn)
			t.Cleanup(func() { c.Close() })
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		}
		return nil
	})
	return c, err
}

func (r *rig) mustInbound(t *testing.T) *net.TCPConn {
	t.Helper()
	c, err := r.dialInbound(t, intercept.Port)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestInbound: the handler has the connections to one port, all others are
// refused.
func TestInbound(t *testing.T) {
	r := inboundRig(t)
	if err := r.local.SetInbound(nil); err != nil || r.local.inbound.Load() != nil {
		t.Fatalf("a netstack that nobody needs: %v", err)
	}
	if err := r.local.SetInbound(func(c Inbound) {
		defer c.Close()
		c.Introduced()
		_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
		_ = c.CloseWrite()
	}); err != nil {
		t.Fatal(err)
	}
	c := r.mustInbound(t)
	msg := bytes.Repeat([]byte("culvert "), 1<<18)
	go func() { _, _ = c.Write(msg); _ = c.CloseWrite() }()
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, msg) {
		t.Errorf("%d of %d bytes came back: %v", len(got), len(msg), err)
	}
	refused := func(port int) error {
		start := time.Now()
		c, err := r.dialInbound(t, port)
		switch {
		case err == nil:
			c.Close()
			return fmt.Errorf("port %d answered", port)
		case !errors.Is(err, syscall.ECONNREFUSED) || time.Since(start) > 2*time.Second:
			return fmt.Errorf("port %d was not refused: %v", port, err)
		}
		return nil
	}
	if err := errors.Join(refused(80), refused(intercept.Port+1)); err != nil {
		t.Error(err)
	}
	if err := r.local.SetInbound(nil); err != nil {
		t.Fatal(err)
	}
	if err := refused(intercept.Port); err != nil {
		t.Errorf("without a handler: %v", err)
	}
}

// TestInboundResets: a RST passes in both directions, and none is left behind.
func TestInboundResets(t *testing.T) {
	r := inboundRig(t)
	conns := make(chan Inbound, 8)
	if err := r.local.SetInbound(func(c Inbound) { conns <- c }); err != nil {
		t.Fatal(err)
	}
	reset := func(what string, c *net.TCPConn) {
		t.Helper()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: %v", what, err)
		}
	}
	c := r.mustInbound(t)
	in := <-conns
	in.Abort()
	reset("aborted by the session", c)

	c = r.mustInbound(t)
	in = <-conns
	told := make(chan struct{}, 8)
	in.OnReset(func() { told <- struct{}{} })
	_ = c.SetLinger(0)
	c.Close()
	select {
	case <-told:
	case <-time.After(5 * time.Second):
		t.Error("the handler was not told of a reset")
	}
	if _, err := in.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("reading what was reset: %v", err)
	}
	in.Close()

	c = r.mustInbound(t)
	in = <-conns
	in.Introduced()
	r.local.ResetInbound()
	reset("reset with all", c)
	in.Close() // a handler may, too

	x := r.local.inbound.Load()
	x.mu.Lock()
	if len(x.conns) != 0 || x.unknown != 0 {
		t.Errorf("%d connections and %d unknown are left", len(x.conns), x.unknown)
	}
	x.unknown = maxUnknown
	x.mu.Unlock()
	if c, err := r.dialInbound(t, intercept.Port); err == nil {
		c.Close()
		t.Error("more than the maximum are open that nobody knows")
	}
	x.mu.Lock()
	x.unknown = 0
	x.mu.Unlock()

	// Close does not wait for a connection that nobody closes.
	r.mustInbound(t)
	<-conns
	begun := time.Now()
	r.local.Close()
	if d := time.Since(begun); d > time.Second {
		t.Errorf("Close took %v", d)
	}
	if err := r.local.SetInbound(func(Inbound) {}); err == nil {
		t.Error("a handler after Close")
	}
}
