// Package queue is a fair queue of packets by flow, for a path of which more
// is wanted than it takes. It is deficit round robin with priority for new
// flows, as in RFC 8290 section 4.2, in two classes: flows that send little, and
// bulk, so that the two can leave by different lanes.
package queue

import (
	"hash/maphash"
	"net/netip"
	"time"
)

// Lane is where a packet leaves.
type Lane uint8

// Sparse is for flows that send little: what a person waits for. Bulk is for all
// that always has something waiting.
const (
	Sparse Lane = iota
	Bulk
	Lanes
)

func (l Lane) String() string { return [...]string{"sparse", "bulk"}[l] }

const (
	// buckets is how many flows are told apart; two that share one share its turn.
	buckets = 1024
	// quantum is what a flow may send in its turn, in bytes: a quarter of a
	// super-packet, so that 60 bytes do not wait for whole rounds of 64 KiB. What
	// a packet has above it is paid back in later rounds.
	quantum = 16 << 10
	// A flow is bulk for bulkFor after it brought more than bulkBytes in
	// bulkWithin, which is 800 kbit/s: more than a shell or a screen of a web page
	// needs, and less than any transfer that somebody waits for.
	bulkBytes  = 24 << 10
	bulkWithin = 250 * time.Millisecond
	bulkFor    = 5 * time.Second
	// patience is how many bytes of sparse flows pass before a packet of bulk does,
	// when it waits and its lane is open: many sparse flows do not starve it.
	patience = 64 << 10
)

// Admission tells what may leave. It is called by the goroutine that calls the
// Queue.
type Admission interface {
	// Admit takes one packet of size bytes for a lane, or refuses it.
	Admit(lane Lane, size int) bool
	// Settle is how long what left by Sparse may take to arrive, so that what
	// leaves by Bulk later does not overtake it; 0 when it cannot.
	Settle() time.Duration
}

// Queue is the fair queue. It is not safe for concurrent use.
type Queue[T any] struct {
	seed    maphash.Seed
	flows   [buckets]flow[T]
	classes [Lanes]class[T]
	passed  int // bytes of sparse flows since the last of bulk
	held    time.Time

	packets, bytes int
}

// class is the flows of one lane that have something waiting.
type class[T any] struct {
	fresh list[T] // in their first turn
	old   list[T]
}

// flow is a bucket: a FIFO of packets, and its place in a list.
type flow[T any] struct {
	packets []packet[T] // packets[head:] wait
	head    int
	bytes   int
	deficit int
	listed  bool
	next    *flow[T]

	lane     Lane
	since    time.Time // begin of the span that recent counts
	recent   int       // bytes
	bulkTill time.Time
	sparseAt time.Time // when it last sent by Sparse; zero: it need not be waited for
}

type packet[T any] struct {
	item T
	size int
}

// list is a queue of flows that needs no memory of its own.
type list[T any] struct{ first, last *flow[T] }

func (l *list[T]) push(f *flow[T]) {
	f.next = nil
	if l.last == nil {
		l.first = f
	} else {
		l.last.next = f
	}
	l.last = f
}

func (l *list[T]) pop() *flow[T] {
	f := l.first
	if l.first = f.next; l.first == nil {
		l.last = nil
	}
	f.next = nil
	return f
}

// New makes an empty queue.
func New[T any]() *Queue[T] { return &Queue[T]{seed: maphash.MakeSeed()} }

// Len is the number of packets that wait.
func (q *Queue[T]) Len() int { return q.packets }

// Bytes is the sum of their sizes.
func (q *Queue[T]) Bytes() int { return q.bytes }

// FlowBytes is the sum of a flow's.
func (q *Queue[T]) FlowBytes(flow int) int { return q.flows[flow].bytes }

// Held is when a flow that only waits for what it sent before may go on; zero
// when none does.
func (q *Queue[T]) Held() time.Time { return q.held }

// Pass tells whether a packet that has just come may leave at once: nothing of
// its flow waits, and it is admitted. Otherwise Push it.
func (q *Queue[T]) Pass(flow, size int, now time.Time, adm Admission) bool {
	f := &q.flows[flow]
	if f.head < len(f.packets) {
		return false
	}
	lane := f.laneOf(size, now)
	if lane == Bulk && q.holds(f, now, adm) || !adm.Admit(lane, size) {
		return false
	}
	f.count(size, now)
	f.left(lane, now)
	return true
}

// Push adds a packet of size bytes.
func (q *Queue[T]) Push(flow, size int, item T, now time.Time) {
	f := &q.flows[flow]
	lane := f.laneOf(size, now)
	f.count(size, now)
	f.push(packet[T]{item, size})
	q.packets++
	q.bytes += size
	if !f.listed {
		f.listed, f.deficit, f.lane = true, quantum, lane
		q.classes[lane].fresh.push(f)
	} else {
		f.lane = lane // which list it is in is seen when its turn comes
	}
}

// Pop takes the next packet that may leave; ok is false when none may.
func (q *Queue[T]) Pop(now time.Time, adm Admission) (item T, size int, ok bool) {
	q.held = time.Time{}
	if q.packets == 0 {
		return item, 0, false
	}
	order := []Lane{Bulk, Sparse, Bulk} // flows move to Bulk while Sparse is looked at
	if q.passed < patience {
		order = order[1:]
	}
	for _, lane := range order {
		if p, ok := q.popLane(lane, now, adm); ok {
			if lane == Bulk {
				q.passed = 0
			} else {
				q.passed += p.size
			}
			return p.item, p.size, true
		}
	}
	q.passed = 0 // bulk could not leave, which is not the sparse flows' doing
	return item, 0, false
}

func (q *Queue[T]) popLane(lane Lane, now time.Time, adm Admission) (p packet[T], ok bool) {
	c := &q.classes[lane]
	var waits *flow[T] // the first one that is held: with it a round is over
	lent := false      // in this round somebody got another quantum
	for {
		from := &c.fresh
		if from.first == nil {
			from = &c.old
		}
		f := from.first
		switch {
		case f == nil || f == waits && !lent:
			return p, false
		case f == waits:
			lent = false
			c.old.push(from.pop())
			continue
		case f.head == len(f.packets):
			from.pop()
			if from == &c.fresh && c.old.first != nil {
				c.old.push(f) // once round, or coming back at once would starve the others
			} else {
				f.listed = false
			}
			continue
		case f.lane != lane: // it has become bulk, or sparse again
			from.pop()
			q.classes[f.lane].old.push(f)
			continue
		case f.deficit <= 0:
			f.deficit += quantum
			lent = true
			c.old.push(from.pop())
			continue
		case lane == Bulk && q.holds(f, now, adm):
			c.old.push(from.pop())
			if waits == nil {
				waits = f
			}
			continue
		}
		if !adm.Admit(lane, f.packets[f.head].size) {
			return p, false
		}
		p = f.pop()
		q.packets--
		q.bytes -= p.size
		f.deficit -= p.size
		f.left(lane, now)
		return p, true
	}
}

// Drop takes the oldest packet of the longest flow away: for that flow a loss is
// the sign to slow down. ok is false when the queue is empty.
func (q *Queue[T]) Drop() (item T, ok bool) {
	if q.packets == 0 {
		return item, false
	}
	longest := &q.flows[0]
	for i := range q.flows {
		if q.flows[i].bytes > longest.bytes {
			longest = &q.flows[i]
		}
	}
	p := longest.pop()
	q.packets--
	q.bytes -= p.size
	return p.item, true
}

// holds tells whether f, which is bulk now, has to wait for what it sent by the
// other lane: in a connection whose packets overtake each other TCP sees loss.
func (q *Queue[T]) holds(f *flow[T], now time.Time, adm Admission) bool {
	if f.sparseAt.IsZero() {
		return false
	}
	until := f.sparseAt.Add(adm.Settle())
	if !until.After(now) {
		f.sparseAt = time.Time{}
		return false
	}
	if q.held.IsZero() || until.Before(q.held) {
		q.held = until
	}
	return true
}

// laneOf is the lane of a packet of size bytes that comes now.
func (f *flow[T]) laneOf(size int, now time.Time) Lane {
	recent := f.recent
	if now.Sub(f.since) > bulkWithin {
		recent = 0
	}
	if recent+size > bulkBytes || now.Before(f.bulkTill) {
		return Bulk
	}
	return Sparse
}

// count adds a packet to what the flow brought lately.
func (f *flow[T]) count(size int, now time.Time) {
	if now.Sub(f.since) > bulkWithin {
		f.since, f.recent = now, 0
	}
	if f.recent += size; f.recent > bulkBytes {
		f.bulkTill = now.Add(bulkFor)
	}
}

func (f *flow[T]) left(lane Lane, now time.Time) {
	if lane == Sparse {
		f.sparseAt = now
	}
}

func (f *flow[T]) push(p packet[T]) {
	if f.head > 0 && len(f.packets) == cap(f.packets) {
		n := copy(f.packets, f.packets[f.head:])
		clear(f.packets[n:])
		f.packets, f.head = f.packets[:n], 0
	}
	f.packets = append(f.packets, p)
	f.bytes += p.size
}

func (f *flow[T]) pop() packet[T] {
	p := f.packets[f.head]
	f.packets[f.head] = packet[T]{}
	f.head++
	f.bytes -= p.size
	if f.head == len(f.packets) {
		f.head = 0
		if f.packets = f.packets[:0]; cap(f.packets) > 256 {
			f.packets = nil // do not keep the memory of a burst
		}
	}
	return p
}

// Key names a flow.
type Key [37]byte

// MakeKey is the flow of packets between two addresses, of an IP protocol and,
// unless ports is shorter than 4 bytes, with the ports that its header begins
// with. Fragments have none, so all of a datagram go together.
func MakeKey(src, dst netip.Addr, proto uint8, ports []byte) (k Key) {
	a, b := src.As16(), dst.As16()
	copy(k[:], a[:])
	copy(k[16:], b[:])
	k[32] = proto
	if len(ports) >= 4 {
		copy(k[33:], ports[:4])
	}
	return k
}

// Flow is the bucket of a flow. The seed is secret, so nobody can aim at
// another's.
func (q *Queue[T]) Flow(k *Key) int { return int(maphash.Bytes(q.seed, k[:]) % buckets) }
