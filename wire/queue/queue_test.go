package queue

import (
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"
)

// gate admits what its lanes have room for.
type gate struct {
	room   [Lanes]int // bytes
	settle time.Duration
	took   [Lanes]int
}

func open() *gate { return &gate{room: [Lanes]int{1 << 40, 1 << 40}} }

func (g *gate) Admit(l Lane, size int) bool {
	if g.room[l] <= 0 {
		return false
	}
	g.room[l] -= size
	g.took[l] += size
	return true
}

func (g *gate) Settle() time.Duration { return g.settle }

// item is a packet of a flow, numbered.
type item struct{ flow, number, size int }

var start = time.Unix(1000, 0)

// TestOrder: whatever comes and whatever the lanes take, a flow's packets leave
// in their order, none is lost and the counts are right.
func TestOrder(t *testing.T) {
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 1))
		q, g := New[item](), &gate{settle: time.Duration(seed) * time.Millisecond}
		next, last := map[int]int{}, map[int]int{}
		in, out, dropped := 0, 0, 0
		now := start
		see := func(it item) {
			if it.number <= last[it.flow] {
				t.Fatalf("seed %d: packet %d of flow %d after %d", seed, it.number, it.flow, last[it.flow])
			}
			last[it.flow] = it.number
		}
		for range 3000 {
			now = now.Add(time.Duration(r.IntN(5)) * time.Millisecond)
			switch r.IntN(8) {
			case 0, 1, 2, 3:
				flow, size := r.IntN(12), 1+r.IntN(1<<(5+r.IntN(12)))
				next[flow]++
				it := item{flow, next[flow], size}
				in++
				if q.Pass(flow, size, now, g) {
					see(it)
					out++
				} else {
					q.Push(flow, size, it, now)
				}
			case 4:
				g.room = [Lanes]int{r.IntN(100_000) - 10_000, r.IntN(100_000) - 10_000}
			case 5:
				if it, ok := q.Drop(); ok && r.IntN(4) == 0 {
					see(it)
					dropped++
				} else if ok {
					q = requeue(q, it, now)
				}
			default:
				if it, size, ok := q.Pop(now, g); ok {
					if size != it.size {
						t.Fatal("another size")
					}
					see(it)
					out++
				}
			}
			if in != out+q.Len()+dropped {
				t.Fatalf("seed %d: %d in, %d out, %d wait, %d dropped", seed, in, out, q.Len(), dropped)
			}
		}
		g.room = [Lanes]int{1 << 40, 1 << 40}
		now = now.Add(time.Minute)
		for it, _, ok := q.Pop(now, g); ok; it, _, ok = q.Pop(now, g) {
			see(it)
			out++
		}
		if q.Len() != 0 || q.Bytes() != 0 || in != out+dropped {
			t.Fatalf("seed %d: an empty queue has %d packets, %d bytes", seed, q.Len(), q.Bytes())
		}
	}
}

// requeue puts a dropped packet back before its flow's others.
func requeue(q *Queue[item], it item, now time.Time) *Queue[item] {
	f := &q.flows[it.flow]
	f.packets = append([]packet[item]{{it, it.size}}, f.packets[f.head:]...)
	f.head = 0
	f.bytes += it.size
	q.packets++
	q.bytes += it.size
	return q
}

// TestFair: bulk flows get the same share of the bytes, whatever the sizes of
// their packets.
func TestFair(t *testing.T) {
	q, g := New[item](), open()
	sizes := []int{100, 1500, 20_000, 64_000}
	for i, size := range sizes {
		for n := range (4 << 20) / size {
			q.Push(i, size, item{i, n, size}, start)
		}
	}
	for { // what each flow brought before it counted as bulk
		if it, _, _ := q.Pop(start, g); g.took[Bulk] > 0 {
			g.took[Bulk] = it.size
			break
		}
	}
	got := make([]int, len(sizes))
	for total := 0; total < 8<<20; {
		it, size, ok := q.Pop(start, g)
		if !ok {
			t.Fatal("nothing left")
		}
		got[it.flow] += size
		total += size
	}
	for i, n := range got {
		if n < 2<<20-100_000 || n > 2<<20+100_000 {
			t.Errorf("packets of %d bytes: %d bytes of %d", sizes[i], n, 8<<20)
		}
	}
}

// TestSparseFirst: while bulk fills its lane, a flow that sends little passes, and
// by its own lane.
func TestSparseFirst(t *testing.T) {
	q, g := New[item](), open()
	g.room[Bulk] = 0
	for n := range 60 {
		q.Push(1, 64_000, item{1, n, 64_000}, start)
	}
	now := start
	for n := range 100 {
		now = now.Add(20 * time.Millisecond)
		if !q.Pass(3, 100, now, g) {
			t.Fatalf("packet %d of a sparse flow waits", n)
		}
	}
	if g.took[Sparse] != 10_000 || g.took[Bulk] != 0 {
		t.Fatal(g.took)
	}
	g.room[Bulk] = 1
	if it, _, ok := q.Pop(now, g); !ok || it.flow != 1 {
		t.Fatal("bulk does not go on")
	}
	if _, _, ok := q.Pop(now, g); ok {
		t.Fatal("more than its lane takes")
	}
}

// TestSparseDoesNotStarveBulk: many sparse flows at once leave bulk its turn.
func TestSparseDoesNotStarveBulk(t *testing.T) {
	q, g := New[item](), open()
	for n := range 100 {
		q.Push(0, 64_000, item{0, n, 64_000}, start)
	}
	for f := range 500 {
		for n := range 10 {
			q.Push(1+f, 1000, item{1 + f, n, 1000}, start)
		}
	}
	bulk := 0
	for range 1000 {
		if it, _, _ := q.Pop(start, g); it.flow == 0 {
			bulk++
		}
	}
	if bulk < 8 || bulk > 20 {
		t.Errorf("%d packets of bulk among 1000", bulk)
	}
}

// TestSettles: a flow that turns into bulk waits for what it sent by the sparse
// lane, also when bulk has the next turn, and Held says until when.
func TestSettles(t *testing.T) {
	for _, passed := range []int{0, patience} {
		q, g := New[item](), open()
		g.settle = 50 * time.Millisecond
		q.passed = passed
		if !q.Pass(1, 14_000, start, g) || g.took[Sparse] != 14_000 {
			t.Fatal("the beginning of a flow is not sparse")
		}
		now := start.Add(10 * time.Millisecond)
		q.Push(1, 14_000, item{1, 1, 14_000}, now)
		if _, _, ok := q.Pop(now, g); ok || !q.Held().Equal(start.Add(g.settle)) {
			t.Fatalf("sent %v, held until %v", ok, q.Held())
		}
		q.Push(2, 40_000, item{2, 1, 40_000}, now)
		if it, _, ok := q.Pop(now, g); !ok || it.flow != 2 {
			t.Fatal("another flow waits for the one that is held")
		}
		if it, _, ok := q.Pop(start.Add(g.settle), g); !ok || it.flow != 1 || g.took[Bulk] != 54_000 {
			t.Fatal("not sent when it had settled")
		}
	}
}

// TestBulkEnds: a flow that has sent little for a while is sparse again.
func TestBulkEnds(t *testing.T) {
	q, g := New[item](), open()
	q.Pass(1, 60_000, start, g)
	q.Pass(1, 100, start.Add(bulkFor/2), g)
	if g.took[Sparse] != 0 {
		t.Fatal("sparse too early")
	}
	q.Pass(1, 100, start.Add(bulkFor+time.Second), g)
	if g.took[Sparse] != 100 {
		t.Fatal("bulk for ever")
	}
}

// TestLongestLoses: Drop takes from the flow that has most waiting, oldest first.
func TestLongestLoses(t *testing.T) {
	q := New[item]()
	q.Push(1, 100, item{1, 1, 100}, start)
	for n := range 10 {
		q.Push(2, 60_000, item{2, n, 60_000}, start)
	}
	for n := range 5 {
		if it, ok := q.Drop(); !ok || it.flow != 2 || it.number != n {
			t.Fatal(it, ok)
		}
	}
}

func TestKey(t *testing.T) {
	a, b := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")
	keys := map[Key]string{}
	for name, k := range map[string]Key{
		"tcp":         MakeKey(a, a, 6, []byte{0, 1, 0, 2}),
		"other port":  MakeKey(a, a, 6, []byte{0, 1, 0, 3}),
		"udp":         MakeKey(a, a, 17, []byte{0, 1, 0, 2}),
		"fragment":    MakeKey(a, a, 17, nil),
		"destination": MakeKey(a, b, 6, []byte{0, 1, 0, 2}),
		"source":      MakeKey(b, a, 6, []byte{0, 1, 0, 2}),
	} {
		if other, ok := keys[k]; ok {
			t.Errorf("%s is the flow of %s", name, other)
		}
		keys[k] = name
	}
}

func TestBuffers(t *testing.T) {
	var b Buffers
	for _, n := range []int{1, 255, 256, 257, 1500, 65_000, 65_536} {
		p := make([]byte, n)
		p[n-1] = byte(n)
		buf := b.Copy(p)
		if got := buf.Bytes(); len(got) != n || got[n-1] != byte(n) || buf.Cap() < n || buf.Cap() > max(256, 2*n) {
			t.Errorf("%d bytes: %d in %d", n, len(got), buf.Cap())
		}
		b.Free(buf)
	}
}

// TestNoAllocations: in the steady state a packet costs no memory.
func TestNoAllocations(t *testing.T) {
	q, g := New[*Buffer](), open()
	var b Buffers
	p := make([]byte, 1400)
	if n := testing.AllocsPerRun(1000, func() {
		q.Push(1, len(p), b.Copy(p), start)
		it, _, _ := q.Pop(start, g)
		b.Free(it)
	}); n > 0.1 { // a collection may empty the pool
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkPushPop(b *testing.B) {
	q, g := New[*Buffer](), open()
	var bufs Buffers
	p := make([]byte, 1400)
	b.ReportAllocs()
	for b.Loop() {
		q.Push(1, len(p), bufs.Copy(p), start)
		it, _, _ := q.Pop(start, g)
		bufs.Free(it)
	}
}
