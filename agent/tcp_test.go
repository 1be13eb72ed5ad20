package agent

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	mathrand "math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"runtime/pprof"
	"strings"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

func TestTCPEcho(t *testing.T) {
	for name, gso := range map[string]bool{"gso": true, "plain": false} {
		t.Run(name, func(t *testing.T) {
			a := startAgent(t, Config{}, nil)
			c := connect(t, a, gso)
			for _, addr := range []netip.Addr{target, target6} {
				conn := c.mustTCP(serve(t, addr, echoTCP))
				sent := make([]byte, 20<<20)
				_, _ = rand.Read(sent)
				go func() {
					_, _ = conn.Write(sent)
					_ = conn.CloseWrite()
				}()
				got, err := io.ReadAll(conn)
				if err != nil || !bytes.Equal(got, sent) {
					t.Fatalf("%s: %d of %d bytes came back: %v", addr, len(got), len(sent), err)
				}
			}
		})
	}
}

func TestTCPRefused(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	for _, addr := range []netip.Addr{target, target6} {
		began := time.Now()
		_, err := c.dialTCP(netip.AddrPortFrom(addr, 9), 10*time.Second)
		if err == nil || !strings.Contains(err.Error(), "refused") || time.Since(began) > 2*time.Second {
			t.Errorf("dialling a closed port of %s: %v after %s", addr, err, time.Since(began))
		}
	}
}

func TestTCPUnreachable(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	for addr, want := range map[netip.Addr]string{nowhere: "no route", closed: "no route"} {
		began := time.Now()
		_, err := c.dialTCP(netip.AddrPortFrom(addr, 80), 5*time.Second)
		if err == nil || !strings.Contains(err.Error(), want) || time.Since(began) > 3*time.Second {
			t.Errorf("dialling %s: %v after %s, want %q", addr, err, time.Since(began), want)
		}
	}
}

func TestTCPDeadAddressTimesOut(t *testing.T) {
	a := startAgent(t, Config{}, func(x *timing) { x.dial = 500 * time.Millisecond })
	c := connect(t, a, true)
	_, err := c.dialTCP(netip.AddrPortFrom(silent, 80), 3*time.Second)
	if err == nil || !strings.Contains(err.Error(), "deadline") {
		t.Errorf("dialling a dead address: %v, want silence until the client's own time-out", err)
	}
	eventually(t, "nothing is being dialled", func() bool { _, d := a.node().tcp.counts(); return d == 0 })
}

func TestTCPHalfClose(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	t.Run("the client ends first", func(t *testing.T) {
		addr := serve(t, target, func(s *net.TCPConn) {
			defer s.Close()
			b, _ := io.ReadAll(s)
			time.Sleep(50 * time.Millisecond)
			_, _ = s.Write(append([]byte("got "), b...))
		})
		conn := c.mustTCP(addr)
		_, _ = conn.Write([]byte("request"))
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(conn); string(b) != "got request" || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
	})
	t.Run("the target ends first", func(t *testing.T) {
		heard := make(chan string, 1)
		addr := serve(t, target, func(s *net.TCPConn) {
			defer s.Close()
			_, _ = s.Write([]byte("banner"))
			_ = s.CloseWrite()
			b, _ := io.ReadAll(s)
			heard <- string(b)
		})
		conn := c.mustTCP(addr)
		if b, err := io.ReadAll(conn); string(b) != "banner" || err != nil {
			t.Fatalf("read %q, %v", b, err)
		}
		_, _ = conn.Write([]byte("late"))
		_ = conn.CloseWrite()
		if s := <-heard; s != "late" {
			t.Errorf("the target heard %q", s)
		}
	})
}

func TestTCPResetByTarget(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	conn := c.mustTCP(serve(t, target, func(s *net.TCPConn) {
		_, _ = s.Read(make([]byte, 1))
		_ = s.SetLinger(0)
		s.Close()
	}))
	_, _ = conn.Write([]byte("x"))
	_, err := conn.Read(make([]byte, 1))
	if err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("reading from a connection that the target reset: %v", err)
	}
	eventually(t, "the connection is gone", func() bool { open, _ := a.node().tcp.counts(); return open == 0 })
}

func TestTCPResetByClient(t *testing.T) {
	for name, stuck := range map[string]bool{"idle": false, "while the target does not read": true} {
		t.Run(name, func(t *testing.T) {
			a := startAgent(t, Config{}, nil)
			c := connect(t, a, true)
			failed := make(chan error, 1)
			first := make(chan struct{})
			release := make(chan struct{})
			addr := serve(t, target, func(s *net.TCPConn) {
				defer s.Close()
				_, _ = io.ReadFull(s, make([]byte, 1))
				close(first)
				<-release
				_, err := io.Copy(io.Discard, s)
				failed <- err
			})
			conn := c.mustTCP(addr)
			_, _ = conn.Write([]byte("x"))
			<-first
			if stuck {
				go conn.Write(make([]byte, 32<<20))
				time.Sleep(300 * time.Millisecond)
			}
			abort(t, c)
			if stuck {
				eventually(t, "the connection is gone", func() bool { open, _ := a.node().tcp.counts(); return open == 0 })
			}
			close(release)
			select {
			case err := <-failed:
				if err == nil || !strings.Contains(err.Error(), "reset") {
					t.Errorf("the target read %v, want a reset", err)
				}
			case <-time.After(5 * time.Second):
				t.Error("the target heard nothing of the client's reset")
			}
		})
	}
}

// abort resets all TCP connections of the client.
func abort(t *testing.T, c *client) {
	t.Helper()
	for _, e := range c.stack.RegisteredEndpoints() {
		e.Abort()
	}
}

func TestTCPForbiddenTargets(t *testing.T) {
	a := startAgent(t, Config{PodIPs: []netip.Addr{target}}, nil)
	c := connect(t, a, true)
	local := serve(t, netip.MustParseAddr("127.0.0.1"), echoTCP)
	metrics := netip.MustParseAddrPort(a.cfg.MetricsAddr)
	for _, to := range []netip.AddrPort{
		local,
		netip.AddrPortFrom(netip.MustParseAddr("::ffff:127.0.0.1"), local.Port()),
		netip.AddrPortFrom(netip.MustParseAddr("169.254.169.254"), 80),
		netip.AddrPortFrom(netip.MustParseAddr("fe80::1"), 80),
		netip.AddrPortFrom(netip.MustParseAddr("0.0.0.0"), local.Port()),
		netip.AddrPortFrom(target, metrics.Port()),
		netip.AddrPortFrom(agent4, 80),
		netip.AddrPortFrom(inbound4, 80),
	} {
		if conn, err := c.dialTCP(to, 500*time.Millisecond); err == nil {
			conn.Close()
			t.Errorf("%s was reached", to)
		}
	}
	before := a.node().targets
	if !before.allows(target, 80) || before.allows(netip.MustParseAddr("10.77.0.255"), 80) ||
		!before.allows(netip.MustParseAddr("10.78.0.255"), 80) || before.allows(netip.MustParseAddr("224.0.0.1"), 80) ||
		before.allows(netip.MustParseAddr("::ffff:127.0.0.1"), 80) || before.allows(netip.MustParseAddr("255.255.255.255"), 80) {
		t.Error("targets are not what they should be")
	}
}

func TestTCPMaximum(t *testing.T) {
	a := startAgent(t, Config{MaxTCP: 2}, nil)
	c := connect(t, a, true)
	addr := serve(t, target, echoTCP)
	first, second := c.mustTCP(addr), c.mustTCP(addr)
	if _, err := c.dialTCP(addr, 2*time.Second); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("the third connection: %v", err)
	}
	first.Close()
	eventually(t, "there is room again", func() bool {
		conn, err := c.dialTCP(addr, time.Second)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	second.Close()
}

func TestThousandConnectionsLeakNothing(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	addr := serve(t, target, echoTCP)
	round := func(n int) {
		var wg sync.WaitGroup
		slots := make(chan struct{}, 50)
		for range n {
			wg.Add(1)
			slots <- struct{}{}
			go func() {
				defer func() { <-slots; wg.Done() }()
				conn, err := c.dialTCP(addr, 10*time.Second)
				if err != nil {
					t.Error(err)
					return
				}
				defer conn.Close()
				_, _ = conn.Write([]byte("hello"))
				if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil {
					t.Error(err)
				}
			}()
		}
		wg.Wait()
		eventually(t, "all connections are gone", func() bool { open, d := a.node().tcp.counts(); return open+d == 0 })
	}
	round(50)
	goroutines, fds := runtime.NumGoroutine(), countFDs(t)
	round(1000)
	defer func() {
		if t.Failed() {
			t.Logf("goroutines %d, then %d; descriptors %d, then %d", goroutines, runtime.NumGoroutine(), fds, countFDs(t))
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
		}
	}()
	eventually(t, "goroutines and descriptors are as before", func() bool {
		return runtime.NumGoroutine() <= goroutines+5 && countFDs(t) <= fds+2
	})
}

func countFDs(t *testing.T) int {
	dir, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(dir)
}

// TestStuckConnectionsHoldNobody: targets that do not read must not keep others
// from moving, however many they are.
func TestStuckConnectionsHoldNobody(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	release := make(chan struct{})
	defer close(release)
	deaf := serve(t, target, func(s *net.TCPConn) { <-release; s.Close() })
	for range 20 {
		conn := c.mustTCP(deaf)
		go conn.Write(make([]byte, 16<<20))
	}
	time.Sleep(500 * time.Millisecond)
	conn := c.mustTCP(serve(t, target, echoTCP))
	began := time.Now()
	_, _ = conn.Write([]byte("hello"))
	if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil || time.Since(began) > 2*time.Second {
		t.Errorf("echo beside stuck connections: %v after %s", err, time.Since(began))
	}
}

func checkEcho(t *testing.T, conn *gonet.TCPConn) {
	t.Helper()
	sent := make([]byte, 1<<20)
	_, _ = rand.Read(sent)
	go conn.Write(sent)
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, sent) {
		t.Fatalf("echo: %v", err)
	}
}

// TestIdleTCPSleeps: a connection that is idle has one goroutine, and moves bytes
// whenever they come, also in the moment when it falls asleep.
func TestIdleTCPSleeps(t *testing.T) {
	const lull = 2 * time.Millisecond
	a := startAgent(t, Config{}, func(x *timing) { x.lull = lull })
	c := connect(t, a, true)
	addr := serve(t, target, echoTCP)
	const n = 20
	var wg sync.WaitGroup
	for range n {
		conn := c.mustTCP(addr)
		wg.Go(func() {
			one := make([]byte, 1)
			for range 200 {
				time.Sleep(mathrand.N(3 * lull))
				_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
				_, _ = conn.Write(one)
				if _, err := io.ReadFull(conn, one); err != nil {
					t.Errorf("echo after a while: %v", err)
					return
				}
			}
		})
	}
	wg.Wait()
	running := func(what string) int {
		b := make([]byte, 4<<20)
		return bytes.Count(b[:runtime.Stack(b, true)], []byte("agent.(*relay)."+what+"(0x"))
	}
	eventually(t, "all are asleep", func() bool { return running("up") == 0 && running("down") == n })
}

// TestSleepLosesNoCall of the stack, however it falls between the ticks.
func TestSleepLosesNoCall(t *testing.T) {
	r := &relay{more: make(chan struct{}, 1), calm: true, tick: time.NewTimer(time.Hour)}
	r.wake(0)
	if r.sleep() {
		t.Error("up sleeps when the stack has called of late")
	}
	r.calm = true // by a tick, before up has looked
	if r.sleep() {
		t.Error("up sleeps before it has looked")
	}
	<-r.more
	if !r.sleep() {
		t.Error("up does not sleep")
	}
}

// TestTCPPortsAreUsedAgain: a client may come back from a port whose last
// connection the target ended, and is heard at once.
func TestTCPPortsAreUsedAgain(t *testing.T) {
	a := startAgent(t, Config{}, nil)
	c := connect(t, a, true)
	addr := serve(t, target, func(s *net.TCPConn) {
		_, _ = s.Write([]byte{1})
		s.Close()
	})
	for i := range 3 {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		began := time.Now()
		conn, err := gonet.DialTCPWithBind(ctx, c.stack, full(tunnel4, 34567), full(addr.Addr(), addr.Port()), protocolOf(target))
		cancel()
		if err != nil || time.Since(began) > 500*time.Millisecond {
			t.Fatalf("dial %d from the same port: %v after %s", i, err, time.Since(began))
		}
		if _, err := io.ReadAll(conn); err != nil {
			t.Fatal(err)
		}
		conn.Close()
		time.Sleep(300 * time.Millisecond)
	}
}
