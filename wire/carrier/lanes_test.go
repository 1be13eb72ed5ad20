package carrier

import (
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/wire/queue"
)

// lanePair introduces two streams of a lane over loopback TCP.
func lanePair(t testing.TB, lane queue.Lane) (session, agent *Stream) {
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
			agent, _, err = Accept(context.Background(), c, func(Hello) Welcome { return Welcome{} })
		}
		errs <- err
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	session, _, err = Dial(context.Background(), c, Hello{Lane: lane})
	if err := errors.Join(err, <-errs); err != nil {
		t.Fatal(err)
	}
	if agent.Lane() != lane {
		t.Fatalf("the agent takes it for the lane %v", agent.Lane())
	}
	t.Cleanup(func() { session.Close(); agent.Close() })
	return session, agent
}

// source is a Source with packets of one byte of payload that says the lane.
type source struct {
	tun.Device
	mu     sync.Mutex
	woken  sync.Cond
	offer  [queue.Lanes]int // packets that wait
	size   int
	wakes  int
	closed bool
}

func newSource(size int) *source {
	s := &source{size: size}
	s.woken.L = &s.mu
	return s
}

func (s *source) add(l queue.Lane, n int) {
	s.mu.Lock()
	s.offer[l] += n
	s.mu.Unlock()
	s.Wake()
}

func (s *source) waiting(l queue.Lane) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.offer[l]
}

func (s *source) Pull(bufs [][]byte, sizes []int, offset int, adm queue.Admission) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.closed {
			return 0, os.ErrClosed
		}
		n := 0
		for l := range queue.Lanes {
			for s.offer[l] > 0 && n < len(bufs) && adm.Admit(l, s.size) {
				s.offer[l]--
				bufs[n][offset] = byte(l)
				sizes[n] = s.size
				n++
			}
		}
		if n > 0 {
			return n, nil
		}
		s.woken.Wait()
	}
}

func (s *source) Wake() {
	s.mu.Lock()
	s.wakes++
	s.woken.Broadcast()
	s.mu.Unlock()
}

func (s *source) Write(bufs [][]byte, _ int) (int, error) { return len(bufs), nil }

func (s *source) Close() error {
	s.mu.Lock()
	s.closed = true
	s.woken.Broadcast()
	s.mu.Unlock()
	return nil
}

// wireguard stands for WireGuard between a gated device and its Bind: it hands
// on what it reads, as messages that carry data.
func wireguard(t testing.TB, b *Bind, s *source) {
	t.Helper()
	d := b.Gate(s)
	ep, err := b.ParseEndpoint(Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		bufs, sizes := make([][]byte, 128), make([]int, 128)
		for i := range bufs {
			bufs[i] = make([]byte, device.MaxMessageSize)
		}
		for {
			n, err := d.Read(bufs, sizes, 16)
			if err != nil {
				return
			}
			var msgs [][]byte
			for i := range n {
				m := bufs[i][:16+sizes[i]]
				binary.LittleEndian.PutUint32(m, 4)
				msgs = append(msgs, m)
			}
			if b.Send(msgs, ep) != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { b.Shutdown(); d.Close(); <-ended })
}

// arrivals counts the packets that arrive by each receive function, by their lane.
func arrivals(t testing.TB, b *Bind) (count func() [queue.Lanes][queue.Lanes]int) {
	t.Helper()
	fns, _, err := b.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var got [queue.Lanes][queue.Lanes]int
	var wg sync.WaitGroup
	for i, fn := range fns {
		wg.Go(func() {
			bufs, sizes, eps := make([][]byte, 128), make([]int, 128), make([]conn.Endpoint, 128)
			for i := range bufs {
				bufs[i] = make([]byte, device.MaxMessageSize)
			}
			for {
				n, err := fn(bufs, sizes, eps)
				if err != nil {
					return
				}
				mu.Lock()
				for j := range n {
					got[i][bufs[j][16]]++
				}
				mu.Unlock()
			}
		})
	}
	t.Cleanup(func() { b.Shutdown(); wg.Wait() })
	return func() [queue.Lanes][queue.Lanes]int {
		mu.Lock()
		defer mu.Unlock()
		return got
	}
}

// TestLanes: each lane's packets go by its own stream, by the other's when it has
// none, and again by its own when that is back. All arrive.
func TestLanes(t *testing.T) {
	leaks(t)
	near, far := NewBind(BindConfig{}), NewBind(BindConfig{})
	arrivals(t, near) // acknowledgements
	src := newSource(1000)
	wireguard(t, near, src)
	got := arrivals(t, far)
	sparse, sparseFar := lanePair(t, queue.Sparse)
	near.Attach(sparse)
	far.Attach(sparseFar)
	const n = 500
	want := [queue.Lanes][queue.Lanes]int{}
	for _, step := range []struct {
		what  string
		do    func()
		lanes [queue.Lanes]queue.Lane // which stream carries a lane
	}{
		{"one stream", func() {}, [queue.Lanes]queue.Lane{queue.Sparse, queue.Sparse}},
		{"two streams", func() {
			bulk, bulkFar := lanePair(t, queue.Bulk)
			far.Attach(bulkFar)
			near.Attach(bulk)
		}, [queue.Lanes]queue.Lane{queue.Sparse, queue.Bulk}},
		{"only bulk's", func() { sparse.Close(); sparseFar.Close() }, [queue.Lanes]queue.Lane{queue.Bulk, queue.Bulk}},
		{"two again", func() {
			sparse, sparseFar = lanePair(t, queue.Sparse)
			far.Attach(sparseFar)
			near.Attach(sparse)
		}, [queue.Lanes]queue.Lane{queue.Sparse, queue.Bulk}},
		{"the first moves", func() {
			sparse, sparseFar = lanePair(t, queue.Sparse)
			far.Move(sparseFar)
			near.Move(sparse)
		}, [queue.Lanes]queue.Lane{queue.Sparse, queue.Bulk}},
	} {
		step.do()
		for l := range queue.Lanes {
			src.add(l, n)
			want[step.lanes[l]][l] += n
		}
		eventually(t, step.what, func() bool { return got() == want })
	}
}

// TestWindowHoldsBulkOnly: what waits for the bulk lane's window keeps nothing out
// of the sparse lane, and goes on when it is acknowledged.
func TestWindowHoldsBulkOnly(t *testing.T) {
	leaks(t)
	near, far := NewBind(BindConfig{}), NewBind(BindConfig{})
	arrivals(t, near) // acknowledgements
	sparse, sparseFar := lanePair(t, queue.Sparse)
	bulk, bulkFar := lanePair(t, queue.Bulk)
	for _, s := range []*Stream{sparse, bulk} {
		near.Attach(s)
	}
	src := newSource(60_000)
	wireguard(t, near, src)
	src.add(queue.Bulk, 100) // 6 MB: nobody reads at the far end yet
	time.Sleep(200 * time.Millisecond)
	if left := src.waiting(queue.Bulk); left < 90 {
		t.Fatalf("%d packets of 100 wait", left)
	}
	src.add(queue.Sparse, 1)
	eventually(t, "the sparse lane waits for the bulk lane", func() bool { return src.waiting(queue.Sparse) == 0 })

	got := arrivals(t, far)
	far.Attach(sparseFar)
	far.Attach(bulkFar)
	eventually(t, "bulk does not go on", func() bool { return got()[queue.Bulk][queue.Bulk] == 100 })
}

// TestAcknowledged: what arrived is told, to the byte, though nothing is sent back.
func TestAcknowledged(t *testing.T) {
	leaks(t)
	for l := range queue.Lanes {
		a, b := lanePair(t, l)
		var wg sync.WaitGroup
		for _, s := range []*Stream{a, b} { // somebody has to read
			wg.Go(func() {
				msgs, sizes := make([][]byte, 8), make([]int, 8)
				for i := range msgs {
					msgs[i] = make([]byte, 65535)
				}
				for {
					if _, err := s.read(msgs, sizes); err != nil {
						return
					}
				}
			})
		}
		for range 50 {
			if _, err := a.write([][]byte{make([]byte, 3000), make([]byte, 60_000)}); err != nil {
				t.Fatal(err)
			}
		}
		var st Stats
		eventually(t, "not all is acknowledged", func() bool {
			a.window.report(&st)
			return st.Unacknowledged == 0
		})
		if st.Window == 0 || st.MinRTT == 0 {
			t.Errorf("%v: %+v", l, st)
		}
		a.Close()
		b.Close()
		wg.Wait()
	}
}

// TestFarPathIsNudged: on a long path something follows a lone packet.
func TestFarPathIsNudged(t *testing.T) {
	near, far := lanePair(t, queue.Sparse)
	near.window.mu.Lock()
	near.window.minRTT = 80 * time.Millisecond
	near.window.mu.Unlock()
	time.Sleep(20 * time.Millisecond) // the first pings
	before := near.Sent()
	if _, err := near.write([][]byte{make([]byte, 100)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing follows", func() bool { return near.Sent() == before+headerLen+100+headerLen+8 })
	time.Sleep(50 * time.Millisecond)
	if n := near.Sent() - before; n != headerLen+100+headerLen+8 {
		t.Errorf("%d bytes for a packet of 100", n)
	}
	_ = far
}

// FuzzAck: no acknowledgement, however wrong, breaks the window or makes it
// believe that less than nothing is under way.
func FuzzAck(f *testing.F) {
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 9, 255, 255, 255, 255, 255, 255, 255, 255})
	f.Add([]byte{0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1})
	f.Fuzz(func(t *testing.T, b []byte) {
		w := &window{}
		w.start()
		now := time.Unix(1000, 0)
		for len(b) >= 8 {
			v := binary.BigEndian.Uint64(b)
			b = b[8:]
			now = now.Add(time.Duration(v % uint64(time.Second)))
			w.wroteAt(int(v%70_000), now)
			w.ackAt(v, now)
			w.ackAt(v%(w.sent+1), now)
			if w.acked > w.sent || w.size < minWindow/2 || w.size > maxWindow || w.minRTT < 0 || w.rate < 0 {
				t.Fatalf("%+v", w)
			}
		}
	})
}

// TestWindowNeverSticks: after an application's pause, a probe cut short or a
// full ring of samples, a window that is acknowledged lets more through.
func TestWindowNeverSticks(t *testing.T) {
	w := &window{}
	w.start()
	now := time.Unix(1000, 0)
	for round := range 2000 {
		for w.room(0) > 0 {
			w.wroteAt(100+round%3000, now)
		}
		now = now.Add(time.Duration(round%90) * time.Millisecond)
		w.ackAt(w.sent, now)
		if w.room(0) <= 0 {
			t.Fatalf("round %d: all is acknowledged and the window is closed: %d", round, w.size)
		}
		if round%50 == 0 {
			now = now.Add(30 * time.Second)
		}
	}
}

// TestLanesLostSilently: a first stream that replaces a silent one takes the bulk
// lane away from a stream that is as dead; one that replaces an ended one does not.
func TestLanesLostSilently(t *testing.T) {
	b := NewBind(BindConfig{})
	defer b.Shutdown()
	attach := func(l queue.Lane) (theirs *Stream) {
		theirs, ours := lanePair(t, l)
		b.Attach(ours)
		return theirs
	}
	attach(queue.Sparse)
	attach(queue.Bulk)
	bulk := b.path(queue.Bulk)
	attach(queue.Sparse)
	if b.path(queue.Bulk) != b.path(queue.Sparse) || bulk.Err() == nil {
		t.Error("bulk goes on in a stream that the other end has given up")
	}
	attach(queue.Bulk)
	bulk = b.path(queue.Bulk)
	b.Stream().Close()
	attach(queue.Sparse)
	if b.path(queue.Bulk) != bulk || bulk.Err() != nil {
		t.Error("a bulk stream ended that works")
	}
}

// TestBulkStreamEnds: what the window of a stream that ends held back goes on at
// once by the other one.
func TestBulkStreamEnds(t *testing.T) {
	b := NewBind(BindConfig{})
	defer b.Shutdown()
	if _, _, err := b.Open(0); err != nil {
		t.Fatal(err)
	}
	_, sparse := lanePair(t, queue.Sparse)
	_, bulk := lanePair(t, queue.Bulk) // nobody reads it, so nothing is acknowledged
	b.Attach(sparse)
	b.Attach(bulk)
	src := newSource(1000)
	wireguard(t, b, src)
	time.Sleep(100 * time.Millisecond) // bulk may be used
	src.add(queue.Bulk, 2*firstWindow/1000)
	eventually(t, "a full window", func() bool { return b.refused.Load() })
	time.Sleep(50 * time.Millisecond)
	left := src.waiting(queue.Bulk)
	if left == 0 {
		t.Fatal("the window held nothing back")
	}
	bulk.Close()
	begun := time.Now()
	eventually(t, "going on", func() bool { return src.waiting(queue.Bulk) < left })
	if took := time.Since(begun); took > outStall/2 {
		t.Errorf("it took %v", took)
	}
}
