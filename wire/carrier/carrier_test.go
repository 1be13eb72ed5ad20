package carrier

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/wire/queue"
)

// leaks fails the test if it leaves goroutines.
func leaks(t *testing.T) {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() {
		for range 200 {
			if runtime.NumGoroutine() <= before {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		buf := make([]byte, 1<<16)
		t.Errorf("%d goroutines instead of %d:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
	})
}

// pair introduces the two ends of a loopback TCP connection, or of a net.Pipe,
// which has no buffer at all.
func pair(t testing.TB, pipe bool) (session, agent *Stream) {
	t.Helper()
	a, b := net.Pipe()
	if !pipe {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
			t.Fatal(err)
		}
		if b, err = ln.Accept(); err != nil {
			t.Fatal(err)
		}
	}
	errs := make(chan error, 1)
	go func() {
		var err error
		agent, _, err = Accept(context.Background(), b, func(h Hello) Welcome { return Welcome{Instance: h.Session} })
		errs <- err
	}()
	session, w, err := Dial(context.Background(), a, Hello{Session: "s1"})
	if err := errors.Join(err, <-errs); err != nil {
		t.Fatal(err)
	}
	if w.Instance != "s1" || w.Protocol != Protocol {
		t.Fatalf("welcome %+v", w)
	}
	t.Cleanup(func() { session.Close(); agent.Close() })
	return session, agent
}

func open(t testing.TB, b *Bind) conn.ReceiveFunc {
	t.Helper()
	fns, _, err := b.Open(0)
	if err != nil || len(fns) != int(queue.Lanes) {
		t.Fatal(fns, err)
	}
	t.Cleanup(b.Shutdown)
	return fns[0]
}

func receive(fn conn.ReceiveFunc) ([][]byte, error) {
	bufs, sizes, eps := make([][]byte, 128), make([]int, 128), make([]conn.Endpoint, 128)
	for i := range bufs {
		bufs[i] = make([]byte, 65535)
	}
	n, err := fn(bufs, sizes, eps)
	for i := range n {
		bufs[i] = bufs[i][:sizes[i]]
	}
	return bufs[:n], err
}

func TestRefusals(t *testing.T) {
	leaks(t)
	for name, c := range map[string]struct {
		hello Hello
		check func(error) bool
	}{
		"protocol": {Hello{Protocol: 99, Version: "v9"}, func(err error) bool {
			var p *ProtocolError
			return errors.As(err, &p) && strings.Contains(err.Error(), "99") && strings.Contains(err.Error(), "speaks carrier protocol 2")
		}},
		"refused": {Hello{}, func(err error) bool {
			var r *RefusedError
			return errors.As(err, &r) && r.Reason == "another session?is here"
		}},
	} {
		a, b := net.Pipe()
		got := make(chan error, 1)
		go func() {
			_, _, err := Accept(context.Background(), b, func(Hello) Welcome { return Welcome{Error: "another session\x1bis here"} })
			got <- err
		}()
		_, _, err := Dial(context.Background(), a, c.hello)
		if !c.check(err) {
			t.Errorf("%s: %v", name, err)
		}
		if err := <-got; err == nil {
			t.Errorf("%s: the agent took it", name)
		}
	}
}

func TestIntroductionCanceled(t *testing.T) {
	leaks(t)
	a, b := net.Pipe()
	defer b.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Millisecond)
	defer cancel()
	if _, _, err := Dial(ctx, a, Hello{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	// Somebody who speaks HTTP.
	a, b = net.Pipe()
	go func() { _, _ = a.Write([]byte("GET / HTTP/1.1\r\n\r\n")); a.Close() }()
	if _, _, err := Accept(context.Background(), b, nil); err == nil {
		t.Fatal("an HTTP client was introduced")
	}
}

func TestBind(t *testing.T) {
	leaks(t)
	for _, pipe := range []bool{false, true} {
		a, b := NewBind(BindConfig{}), NewBind(BindConfig{})
		s, g := pair(t, pipe)
		open(t, a)
		fn := open(t, b)
		a.Attach(s)
		b.Attach(g)
		ep, err := a.ParseEndpoint(Endpoint)
		if err != nil {
			t.Fatal(err)
		}
		var msgs [][]byte
		for i := range 100 {
			m := bytes.Repeat([]byte{byte(i)}, 1+i*650)
			msgs = append(msgs, m)
		}
		go func() { _ = a.Send(msgs, ep) }()
		for got := 0; got < len(msgs); {
			batch, err := receive(fn)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range batch {
				if !bytes.Equal(m, msgs[got]) {
					t.Fatalf("message %d has %d bytes instead of %d", got, len(m), len(msgs[got]))
				}
				got++
			}
		}
		a.Shutdown()
		b.Shutdown()
		s.Close()
		g.Close()
	}
}

func TestPingAndSilence(t *testing.T) {
	leaks(t)
	s, g := pair(t, false)
	a, b := NewBind(BindConfig{}), NewBind(BindConfig{})
	fa, fb := open(t, a), open(t, b)
	s.SetLiveness(10*time.Millisecond, 200*time.Millisecond)
	a.Attach(s)
	b.Attach(g)
	done := make(chan struct{}, 2)
	for _, fn := range []conn.ReceiveFunc{fa, fb} {
		go func() { _, _ = receive(fn); done <- struct{}{} }()
	}
	time.Sleep(500 * time.Millisecond)
	before := s.Received()
	s.Doubt()
	time.Sleep(50 * time.Millisecond)
	if s.RTT() <= 0 || s.Err() != nil || s.Received() == before {
		t.Fatalf("RTT %v, %v", s.RTT(), s.Err())
	}
	b.Shutdown()
	g.Close()
	<-done
	// A stream whose other end reads nothing and says nothing.
	s2, g2 := pair(t, false)
	s2.SetLiveness(20*time.Millisecond, 100*time.Millisecond)
	a.Attach(s2)
	select {
	case <-s2.Done():
	case <-time.After(3 * time.Second):
		t.Fatal("silence was not noticed")
	}
	if !errors.Is(s2.Err(), ErrSilent) {
		t.Fatal(s2.Err())
	}
	g2.Close()
	a.Shutdown()
	<-done
	s.Close()
	s2.Close()
}

// TestCloseReleasesSend: WireGuard holds a lock during Send that its Close needs.
func TestCloseReleasesSend(t *testing.T) {
	leaks(t)
	for name, end := range map[string]func(*Bind, *Stream){
		"bind": func(b *Bind, _ *Stream) { b.Close() }, "stream": func(_ *Bind, s *Stream) { s.Close() },
	} {
		s, g := pair(t, true) // nobody reads the other end
		b := NewBind(BindConfig{})
		fn := open(t, b)
		b.Attach(s)
		sent := make(chan error, 1)
		go func() { sent <- b.Send([][]byte{make([]byte, 1000)}, &b.ep) }()
		time.Sleep(20 * time.Millisecond)
		select {
		case <-sent:
			t.Fatal("Send did not block")
		default:
		}
		end(b, s)
		select {
		case <-sent:
		case <-time.After(2 * time.Second):
			t.Fatalf("%s: Send is still blocked", name)
		}
		b.Close()
		if _, err := receive(fn); !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
		// And again.
		s2, g2 := pair(t, false)
		fn2 := open(t, b)
		b.Attach(s2)
		peer := NewBind(BindConfig{})
		open(t, peer)
		peer.Attach(g2)
		if err := peer.Send([][]byte{[]byte("again")}, &peer.ep); err != nil {
			t.Fatal(err)
		}
		if m, err := receive(fn2); err != nil || string(m[0]) != "again" {
			t.Fatal(m, err)
		}
		peer.Shutdown()
		b.Shutdown()
		g.Close()
		s.Close()
		s2.Close()
		g2.Close()
	}
}

// TestNoStream: Send drops in bounded time, and an attached stream releases it.
func TestNoStream(t *testing.T) {
	b := NewBind(BindConfig{})
	open(t, b)
	start := time.Now()
	if err := b.Send([][]byte{[]byte("x")}, &b.ep); err != nil || time.Since(start) > 2*sendWait || b.Stats().Dropped != 1 {
		t.Fatal(err, time.Since(start), b.Stats())
	}
	s, g := pair(t, false)
	time.AfterFunc(20*time.Millisecond, func() { b.Attach(s) })
	start = time.Now()
	if err := b.Send([][]byte{[]byte("x")}, &b.ep); err != nil || time.Since(start) > sendWait/2 || b.Stats().SentPackets != 1 {
		t.Fatal(err, time.Since(start), b.Stats())
	}
	_ = g
}

// wgBuffers are n buffers as WireGuard has them, cut to size.
// TestHold: what is sent between two streams goes out on the second.
func TestHold(t *testing.T) {
	leaks(t)
	a, b := NewBind(BindConfig{Hold: time.Minute}), NewBind(BindConfig{})
	open(t, a)
	fb := open(t, b)
	s, g := pair(t, false)
	a.Attach(s)
	s.Close()
	g.Close()
	sent := make(chan error, 1)
	go func() { sent <- a.Send([][]byte{[]byte("held")}, &a.ep) }()
	select {
	case <-sent:
		t.Fatal("it was not held")
	case <-time.After(sendWait + 200*time.Millisecond):
	}
	s, g = pair(t, false)
	b.Attach(g)
	a.Attach(s)
	if err := <-sent; err != nil || a.Stats().Dropped != 0 {
		t.Fatal(err, a.Stats())
	}
	if got, err := receive(fb); err != nil || len(got) != 1 || string(got[0]) != "held" {
		t.Fatalf("%q, %v", got, err)
	}
	a.Shutdown()
	b.Shutdown()
	s.Close()
	g.Close()
}

func wgBuffers(n, size int) ([][]byte, []int) {
	bufs, sizes := make([][]byte, n), make([]int, n)
	for i := range bufs {
		bufs[i], sizes[i] = make([]byte, device.MaxMessageSize)[:size], size
	}
	return bufs, sizes
}

// TestGateNeverSticks: whatever WireGuard drops, packets get in again.
func TestGateNeverSticks(t *testing.T) {
	g := newGate(1<<20, 16, 20*time.Millisecond, 0, 1)
	bufs, sizes := wgBuffers(16, 1000)
	if n := g.wait(nil); n != 16 {
		t.Fatalf("an empty gate lets %d in", n)
	}
	g.enter(bufs, sizes, nil, 16)
	if g.credit() != 0 {
		t.Fatal("a full gate is open")
	}
	g.leave(bufs[3:4]) // the first three were dropped
	if n := g.credit(); n != 4 {
		t.Fatalf("credit %d after the fourth of 16 came out", n)
	}
	// All others are dropped: after the stall one more passes, and settles all.
	more, msizes := wgBuffers(4, 1000)
	g.enter(more, msizes, nil, 4)
	start := time.Now()
	if n := g.wait(nil); n != 1 || time.Since(start) < 20*time.Millisecond {
		t.Fatalf("%d let in after %v", n, time.Since(start))
	}
	last, lsizes := wgBuffers(1, 1000)
	g.enter(last, lsizes, nil, 1)
	g.leave(last)
	if b, p := g.held(); b != 0 || p != 0 {
		t.Fatalf("still %d bytes in %d packets", b, p)
	}
	// Stale tags and garbage say nothing.
	g.enter(bufs[:2], sizes, nil, 2)
	binary.LittleEndian.PutUint64(bufs[1][:device.MaxMessageSize][device.MaxMessageSize-8:], 1<<60)
	g.leave(append(more, bufs[1]))
	if _, p := g.held(); p != 2 {
		t.Fatalf("%d packets held", p)
	}
	closed := make(chan struct{})
	close(closed)
	full, fsizes := wgBuffers(16, 1000)
	g.enter(full, fsizes, nil, 16)
	if g.wait(closed) != 0 {
		t.Fatal("a closed gate let something in")
	}
}

// sink is a device that gives packets without end.
type sink struct {
	tun.Device
	mu sync.Mutex
}

func (s *sink) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for i := range bufs {
		sizes[i] = 60000
	}
	return len(bufs), nil
}

// TestGateBounds: no more is read than the bound, however fast the device is.
func TestGateBounds(t *testing.T) {
	b := NewBind(BindConfig{GateBytes: 1 << 20, GatePackets: 64})
	d := b.Gate(&sink{})
	total := 0
	for total < 1<<20 {
		bufs, sizes := wgBuffers(128, device.MaxMessageSize)
		n, err := d.Read(bufs, sizes, 16)
		if err != nil {
			t.Fatal(err)
		}
		total += n * 60000
	}
	if total > 1<<20+1<<17 {
		t.Fatalf("%d bytes were read", total)
	}
}

func FuzzFrames(f *testing.F) {
	f.Add(appendFrame(appendFrame(nil, frameData, []byte("abc")), 77, make([]byte, 100)), 3)
	f.Add([]byte{frameData, 0xff, 0xff, 0xff}, 1)
	f.Fuzz(func(t *testing.T, in []byte, step int) {
		r := frameReader{src: &chunks{in, max(step, 1)}}
		total := 0
		for {
			for {
				_, body, ok, err := r.next()
				if err != nil {
					return
				}
				if !ok {
					break
				}
				if total += headerLen + len(body); total > len(in) {
					t.Fatal("more came out than went in")
				}
			}
			if r.fill(readBuffer) != nil {
				return
			}
		}
	})
}

// chunks is a reader that gives a few bytes at a time.
type chunks struct {
	b []byte
	n int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.b[:min(c.n, len(c.b))])
	c.b = c.b[n:]
	return n, nil
}

func BenchmarkBind(b *testing.B) {
	s, g := pair(b, false)
	from, to := NewBind(BindConfig{}), NewBind(BindConfig{})
	open(b, from)
	fn := open(b, to)
	from.Attach(s)
	to.Attach(g)
	msgs := [][]byte{make([]byte, 65000), make([]byte, 65000)}
	b.SetBytes(130000)
	b.ReportAllocs()
	bufs, sizes, eps := make([][]byte, 128), make([]int, 128), make([]conn.Endpoint, 128)
	for i := range bufs {
		bufs[i] = make([]byte, 65535)
	}
	b.ResetTimer()
	go func() {
		for range b.N {
			_ = from.Send(msgs, &from.ep)
		}
	}()
	for got := 0; got < 2*b.N; {
		n, err := fn(bufs, sizes, eps)
		if err != nil {
			b.Fatal(err)
		}
		got += n
	}
}
