package wire

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/carrier"
)

// slowConn is a connection whose writes take their time: a bottleneck of rate
// bytes per second with a socket buffer of a megabyte before it, and a delay.
type slowConn struct {
	net.Conn
	rate  float64
	delay time.Duration
	ended chan struct{}
	once  sync.Once

	mu      sync.Mutex
	room    sync.Cond
	queued  int
	closed  bool
	parcels chan parcel
}

type parcel struct {
	b  []byte
	by time.Time
}

func newSlowConn(c net.Conn, rate float64, delay time.Duration) *slowConn {
	s := &slowConn{Conn: c, rate: rate, delay: delay, parcels: make(chan parcel, 1<<16), ended: make(chan struct{})}
	s.room.L = &s.mu
	wire := make(chan parcel, 1<<16)
	go func() { // the bottleneck
		free := time.Now()
		for {
			select {
			case <-s.ended:
				return
			case p := <-s.parcels:
				if now := time.Now(); now.Sub(free) > 10*time.Millisecond { // idle, not overslept
					free = now
				}
				free = free.Add(time.Duration(float64(len(p.b)) / rate * 1e9))
				time.Sleep(time.Until(free))
				s.mu.Lock()
				s.queued -= len(p.b)
				s.room.Broadcast()
				s.mu.Unlock()
				by := free
				if now := time.Now(); by.Before(now) {
					by = now
				}
				wire <- parcel{p.b, by.Add(delay)}
			}
		}
	}()
	go func() {
		for {
			select {
			case <-s.ended:
				return
			case p := <-wire:
				time.Sleep(time.Until(p.by))
				if _, err := s.Conn.Write(p.b); err != nil {
					return
				}
			}
		}
	}()
	return s
}

func (s *slowConn) Write(b []byte) (int, error) {
	n := 0
	for chunk := range slices.Chunk(b, 4096) {
		s.mu.Lock()
		for s.queued > 1<<20 && !s.closed {
			s.room.Wait()
		}
		closed := s.closed
		s.queued += len(chunk)
		s.mu.Unlock()
		if closed {
			return n, net.ErrClosed
		}
		s.parcels <- parcel{slices.Clone(chunk), time.Time{}}
		n += len(chunk)
	}
	return n, nil
}

func (s *slowConn) Close() error {
	s.once.Do(func() {
		s.mu.Lock()
		s.closed = true
		s.room.Broadcast()
		s.mu.Unlock()
		close(s.ended)
	})
	return s.Conn.Close()
}

// dialSlow attaches streams that have a bottleneck each way.
func (r *rig) dialSlow(t testing.TB, rate float64, delay time.Duration) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	errs := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			var s *carrier.Stream
			s, _, err = carrier.Accept(context.Background(), newSlowConn(c, rate, delay), func(carrier.Hello) carrier.Welcome { return carrier.Welcome{} })
			if err == nil {
				r.farBind.Attach(s)
			}
		}
		errs <- err
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, _, err := carrier.Dial(context.Background(), newSlowConn(c, rate, delay), carrier.Hello{})
	if err := errors.Join(err, <-errs); err != nil {
		t.Fatal(err)
	}
	r.nearBind.Attach(s)
}

// roundTrips returns how long n round trips of a byte take, sorted.
func roundTrips(t testing.TB, near, far net.Conn, n int) []time.Duration {
	t.Helper()
	go func() {
		var b [1]byte
		for {
			if _, err := far.Read(b[:]); err != nil {
				return
			}
			if _, err := far.Write(b[:]); err != nil {
				return
			}
		}
	}()
	var all []time.Duration
	var b [1]byte
	for range n {
		begun := time.Now()
		if _, err := near.Write(b[:]); err != nil {
			t.Fatal(err)
		}
		if _, err := near.Read(b[:]); err != nil {
			t.Fatal(err)
		}
		all = append(all, time.Since(begun))
	}
	slices.Sort(all)
	return all
}

// TestLatencyUnderLoad: while one connection sends as much as a slow carrier
// takes, another one's round trips do not wait for what it has queued (the
// carrier's socket alone takes 200 ms of it), and it gets on. The bounds are wide,
// for a busy machine; the figures are the bench's.
func TestLatencyUnderLoad(t *testing.T) {
	const rate, delay = 5e6, 20 * time.Millisecond
	r := newRig(t, true)
	r.dialSlow(t, rate, delay)
	bulkNear, bulkFar := r.connect(t, netip.MustParseAddr("10.77.0.2"))
	near, far := r.connect(t, netip.MustParseAddr("fd77::2"))
	idle := roundTrips(t, near, far, 10)[5]
	go func() {
		b := make([]byte, 64<<10)
		for {
			if _, err := bulkNear.Write(b); err != nil {
				return
			}
		}
	}()
	got := make(chan int)
	go func() {
		b, n := make([]byte, 256<<10), 0
		for {
			m, err := bulkFar.Read(b)
			if err != nil {
				return
			}
			n += m
			select {
			case got <- n:
				n = 0
			default:
			}
		}
	}()
	time.Sleep(3 * time.Second)
	<-got
	begun := time.Now()
	busy := roundTrips(t, near, far, 30)
	bps := float64(<-got) / time.Since(begun).Seconds()
	t.Logf("idle %v, busy p50 %v, worst %v; bulk %.3g B/s; %+v", idle, busy[15], busy[29], bps, r.nearBind.Stats())
	if bps < 0.3*rate {
		t.Errorf("the bulk connection has %.3g B/s of %.3g", bps, rate)
	}
	if busy[15] > idle+150*time.Millisecond {
		t.Errorf("round trips take %v, idle %v", busy[15], idle)
	}
}
