package wire

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	wgtun "golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/tun"
	"github.com/culvert-dev/culvert/wire/carrier"
)

// hose is a device whose packets the test gives and takes.
type hose struct {
	in, out chan []byte
	events  chan wgtun.Event
	once    sync.Once
	closed  chan struct{}
}

func newHose() *hose {
	q := &hose{in: make(chan []byte), out: make(chan []byte, 8), events: make(chan wgtun.Event, 1), closed: make(chan struct{})}
	q.events <- wgtun.EventUp
	return q
}

func (q *hose) Read(bufs [][]byte, sizes []int, off int) (int, error) {
	select {
	case p := <-q.in:
		sizes[0] = copy(bufs[0][off:], p)
		return 1, nil
	case <-q.closed:
		return 0, os.ErrClosed
	}
}

func (q *hose) Write(bufs [][]byte, off int) (int, error) {
	for _, b := range bufs {
		q.out <- bytes.Clone(b[off:])
	}
	return len(bufs), nil
}

func (q *hose) File() *os.File             { return nil }
func (q *hose) MTU() (int, error)          { return testMTU, nil }
func (q *hose) Name() (string, error)      { return "hose", nil }
func (q *hose) Events() <-chan wgtun.Event { return q.events }
func (q *hose) BatchSize() int             { return 1 }
func (q *hose) Close() error {
	q.once.Do(func() { close(q.closed); close(q.events) })
	return nil
}

// silence measures how long a connection was silent in one direction, which is
// what a load balancer or a NAT does.
type silence struct {
	net.Conn
	mu      sync.Mutex
	last    time.Time
	longest time.Duration
}

func (s *silence) Write(p []byte) (int, error) {
	s.mu.Lock()
	if !s.last.IsZero() {
		s.longest = max(s.longest, time.Since(s.last))
	}
	s.last = time.Now()
	s.mu.Unlock()
	return s.Conn.Write(p)
}

func (s *silence) most() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return max(s.longest, time.Since(s.last))
}

// TestIdle: two hours of a simulated clock in which nobody sends anything. The
// stream is the same at the end, it was never silent long enough for what cuts
// idle connections on the way, keys were renewed, and the first packet each way
// is there at once: no handshake stands before it.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const idle = 2 * time.Hour
		nearDev, farDev := newHose(), newHose()
		a, b := NewPrivateKey(), NewPrivateKey()
		nearBind, farBind := carrier.NewBind(carrier.BindConfig{}), carrier.NewBind(carrier.BindConfig{})
		near, err := New(Config{Device: nearDev, PrivateKey: a, Bind: nearBind})
		if err != nil {
			t.Fatal(err)
		}
		defer near.Close()
		far, err := New(Config{Device: farDev, PrivateKey: b, Bind: farBind, Passive: true})
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()

		c1, c2 := net.Pipe()
		up, down := &silence{Conn: c1}, &silence{Conn: c2}
		accepted := make(chan error, 1)
		go func() {
			s, _, err := carrier.Accept(t.Context(), down, func(carrier.Hello) carrier.Welcome { return carrier.Welcome{} })
			if err == nil {
				farBind.Attach(s)
			}
			accepted <- err
		}()
		stream, _, err := carrier.Dial(t.Context(), up, carrier.Hello{})
		if err := errors.Join(err, <-accepted); err != nil {
			t.Fatal(err)
		}
		nearBind.Attach(stream)
		if err := errors.Join(far.SetPeer(a.Public(), everyone), near.SetPeer(b.Public(), everyone)); err != nil {
			t.Fatal(err)
		}

		// The filter in front of the machine has to remember its flows, too.
		filter := newFilter(nearAddrs)
		syn, synAck := tcpPacket(nearAddrs[0], farAddrs[0], 4000, 80, 0x02), tcpPacket(farAddrs[0], nearAddrs[0], 80, 4000, 0x12)
		judge := func(b []byte, out bool) reason {
			p, _ := tun.Parse(b)
			filter.lock()
			defer filter.mu.Unlock()
			if out {
				filter.outbound(&p, b)
				return pass
			}
			return filter.inbound(&p, b)
		}
		judge(syn, true)
		judge(synAck, false)

		send := func(from, to *hose, src, dst netip.Addr) {
			t.Helper()
			p := echo(src, dst, 7, []byte("nobody sends"))
			begun := time.Now()
			from.in <- p
			select {
			case got := <-to.out:
				if !bytes.HasPrefix(got, p) {
					t.Errorf("%x arrived instead of %x", got, p)
				}
			case <-time.After(time.Minute):
				t.Error("nothing arrives")
			}
			if took := time.Since(begun); took > 100*time.Millisecond {
				t.Errorf("it took %v", took)
			}
		}
		send(nearDev, farDev, nearAddrs[0], farAddrs[0])
		send(farDev, nearDev, farAddrs[0], nearAddrs[0])
		time.Sleep(idle)
		if err := stream.Err(); err != nil {
			t.Errorf("the stream ended: %v", err)
		}
		if n := nearBind.Stats().Streams; n != 1 {
			t.Errorf("%d streams", n)
		}
		for name, c := range map[string]*silence{"session": up, "agent": down} {
			// NATs and load balancers cut after 60 s, the strictest after 30.
			if most := c.most(); most > 15*time.Second {
				t.Errorf("the %s was silent for %v", name, most)
			}
		}
		if ago := time.Since(near.LastHandshake()); ago > 3*time.Minute {
			t.Errorf("the keys are %v old", ago)
		}
		send(farDev, nearDev, farAddrs[0], nearAddrs[0])
		send(nearDev, farDev, nearAddrs[0], farAddrs[0])
		if r := judge(tcpPacket(farAddrs[0], nearAddrs[0], 80, 4000, 0x10), false); r != pass {
			t.Errorf("a segment of the open connection is dropped: %s", reasonNames[r])
		}
		if d := nearBind.Stats().Dropped + farBind.Stats().Dropped; d != 0 {
			t.Errorf("%d packets were lost", d)
		}
	})
}

func tcpPacket(src, dst netip.Addr, sport, dport uint16, flags byte) []byte {
	b := bareAck(netip.AddrPortFrom(src, sport), netip.AddrPortFrom(dst, dport), 1)
	b[len(b)-20+13] = flags
	return b
}
