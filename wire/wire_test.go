package wire

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"testing"
	"time"
)

// transfer sends n random bytes and checks what arrives.
func transfer(t testing.TB, from, to net.Conn, n int) time.Duration {
	t.Helper()
	src := rand.NewChaCha8([32]byte{1})
	sum := sha256.New()
	start := time.Now()
	go func() {
		_, _ = io.CopyN(from, src, int64(n))
		_ = from.(*net.TCPConn).CloseWrite()
	}()
	to.SetReadDeadline(time.Now().Add(60 * time.Second))
	got, err := io.Copy(sum, to)
	if err != nil || got != int64(n) {
		t.Fatalf("%d of %d bytes arrived: %v", got, n, err)
	}
	want := sha256.New()
	_, _ = io.CopyN(want, rand.NewChaCha8([32]byte{1}), int64(n))
	if !bytes.Equal(sum.Sum(nil), want.Sum(nil)) {
		t.Fatal("the bytes that arrived differ")
	}
	return time.Since(start)
}

// TestTCP sends through TUN, WireGuard, a stream, WireGuard and TUN, both ways.
// The kernel takes nothing with a wrong checksum or length on the way that
// splits; on the other one Poly1305 does.
func TestTCP(t *testing.T) {
	for _, gso := range []bool{true, false} {
		for i, to := range farAddrs {
			t.Run(fmt.Sprintf("gso=%v/%s", gso, to), func(t *testing.T) {
				r := newRig(t, gso)
				near, far := r.connect(t, farAddrs[i])
				transfer(t, near, far, 24<<20)
				held(t, r)
				near, far = r.connect(t, farAddrs[i])
				transfer(t, far, near, 24<<20)
			})
		}
	}
}

// held checks that the gates settle.
func held(t testing.TB, r *rig) {
	t.Helper()
	for range 100 {
		if st := r.nearBind.Stats(); st.HeldBytes < 4<<10 {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("packets are still accounted for: %+v", r.nearBind.Stats())
}

func TestPing(t *testing.T) {
	r := newRig(t, true)
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	for _, a := range farAddrs {
		for _, size := range []int{0, 56, 1000} {
			d, err := r.local.Ping(ctx, a, size)
			if err != nil || d <= 0 {
				t.Fatalf("ping %s with %d bytes: %v, %v", a, size, d, err)
			}
		}
	}
	if _, err := r.local.Ping(ctx, farAddrs[0], testMTU); err == nil {
		t.Fatal("a probe longer than the MTU was sent")
	}
	short, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.local.Ping(short, netip.MustParseAddr("10.77.0.9"), 8); err == nil {
		t.Fatal("an address that nobody has answered")
	}
}

// TestUDP sends a datagram of 25 KB, which travels in fragments both ways.
func TestUDP(t *testing.T) {
	r := newRig(t, true)
	for _, a := range farAddrs {
		var srv net.PacketConn
		var c net.Conn
		r.far.do(t, func() (err error) {
			srv, err = net.ListenPacket("udp", netip.AddrPortFrom(a, 0).String())
			return err
		})
		defer srv.Close()
		r.near.do(t, func() (err error) {
			c, err = net.Dial("udp", srv.LocalAddr().String())
			return err
		})
		defer c.Close()
		for _, n := range []int{1, 1300, 25000} {
			msg := bytes.Repeat([]byte{byte(n)}, n)
			if _, err := c.Write(msg); err != nil {
				t.Fatal(err)
			}
			buf := make([]byte, 64<<10)
			srv.SetReadDeadline(time.Now().Add(5 * time.Second))
			k, from, err := srv.ReadFrom(buf)
			if err != nil || !bytes.Equal(buf[:k], msg) {
				t.Fatalf("%s, %d bytes: %d arrived, %v", a, n, k, err)
			}
			if _, err := srv.WriteTo(msg, from); err != nil {
				t.Fatal(err)
			}
			c.SetReadDeadline(time.Now().Add(5 * time.Second))
			if k, err = c.Read(buf); err != nil || !bytes.Equal(buf[:k], msg) {
				t.Fatalf("%s, %d bytes: %d came back, %v, %v", a, n, k, err, r.local.Drops())
			}
		}
	}
}

// TestRedial replaces the carrier while a connection transfers, and cuts it.
func TestRedial(t *testing.T) {
	r := newRig(t, true)
	near, far := r.connect(t, farAddrs[0])
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(30 * time.Millisecond):
			}
			if i%3 == 2 {
				r.nearBind.Stream().Close()
				time.Sleep(50 * time.Millisecond)
			}
			r.dial(t)
		}
	}()
	transfer(t, near, far, 48<<20)
	close(stop)
	<-stopped
	if r.nearBind.Stats().Streams < 3 {
		t.Fatal("the carrier was not replaced while it was used")
	}
}

// TestUnsolicited: nothing that this machine did not ask for is delivered.
func TestUnsolicited(t *testing.T) {
	r := newRig(t, true)
	for i := range nearAddrs {
		var ln net.Listener
		var u net.PacketConn
		r.near.do(t, func() (err error) {
			if ln, err = net.Listen("tcp", netip.AddrPortFrom(nearAddrs[i], 0).String()); err != nil {
				return err
			}
			u, err = net.ListenPacket("udp", netip.AddrPortFrom(nearAddrs[i], 0).String())
			return err
		})
		defer ln.Close()
		defer u.Close()
		r.far.do(t, func() error {
			if c, err := net.DialTimeout("tcp", ln.Addr().String(), 300*time.Millisecond); err == nil {
				c.Close()
				return fmt.Errorf("the cluster reached a listener of this machine")
			}
			c, err := net.Dial("udp", u.LocalAddr().String())
			if err == nil {
				_, err = c.Write([]byte("hello"))
				c.Close()
			}
			return err
		})
		u.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if _, _, err := u.ReadFrom(make([]byte, 10)); err == nil {
			t.Fatal("the cluster's datagram reached this machine")
		}
	}
	if d := r.local.Drops(); d["syn"] == 0 || d["unasked"] == 0 {
		t.Fatalf("drops: %v", d)
	}
}

// TestReplacePeer: a new peer's key takes the place of the old one's.
func TestReplacePeer(t *testing.T) {
	r := newRig(t, true)
	near, far := r.connect(t, farAddrs[0])
	_ = far
	if r.nearTunnel.LastHandshake().IsZero() {
		t.Fatal("no handshake yet traffic")
	}
	if err := r.nearTunnel.SetPeer(NewPrivateKey().Public(), everyone); err != nil {
		t.Fatal(err)
	}
	if !r.nearTunnel.LastHandshake().IsZero() {
		t.Fatal("the old peer is still there")
	}
	// Packets for a peer that never answers must not hold the gate for good.
	go func() { _, _ = near.Write(make([]byte, 1<<20)) }()
	start := time.Now()
	r.nearTunnel.Close()
	r.nearTunnel.Close()
	if d := time.Since(start); d > 2*time.Second {
		t.Fatalf("Close took %v", d)
	}
}

func BenchmarkTCP(b *testing.B) {
	for _, dir := range []string{"up", "down"} {
		b.Run(dir, func(b *testing.B) {
			r := newRig(b, true)
			near, far := r.connect(b, farAddrs[0])
			from, to := near, far
			if dir == "down" {
				from, to = far, near
			}
			chunk := make([]byte, 1<<20)
			b.SetBytes(1 << 20)
			b.ReportAllocs()
			b.ResetTimer()
			go func() {
				for range b.N {
					_, _ = from.Write(chunk)
				}
			}()
			buf := make([]byte, 1<<20)
			if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{io.LimitReader(to, int64(b.N)<<20)}, buf); err != nil {
				b.Fatal(err)
			}
		})
	}
}

// TestNewKey: a tunnel goes on with another key of its own over another stream,
// and what is open in it goes on, too.
func TestNewKey(t *testing.T) {
	r := newRig(t, true)
	near, far := r.connect(t, farAddrs[0])
	for range 3 {
		key := NewPrivateKey()
		if err := r.nearTunnel.SetKey(key); err != nil {
			t.Fatal(err)
		}
		if err := r.farTunnel.SetPeer(key.Public(), everyone); err != nil {
			t.Fatal(err)
		}
		r.dial(t)
		begun := time.Now()
		if _, err := near.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		far.SetReadDeadline(time.Now().Add(10 * time.Second))
		if _, err := far.Read(make([]byte, 1)); err != nil || time.Since(begun) > 2*time.Second {
			t.Errorf("after %v: %v", time.Since(begun), err)
		}
	}
	if err := r.nearTunnel.SetPeer(r.nearTunnel.own, everyone); err == nil {
		t.Error("its own key is taken for the peer's")
	}
}
