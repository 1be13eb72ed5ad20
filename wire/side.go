package wire

import (
	"encoding/binary"
	"sync"
)

// sideBytes bounds the packets that the session itself sends: as much as is
// inside WireGuard, so that an intercept's answers keep it busy.
const sideBytes = 1 << 20

// side is the queue of packets that do not come from the TUN: echo probes, and
// what the netstack for connections from the cluster sends.
type side struct {
	wake func() // called when the queue was empty

	mu     sync.Mutex
	room   sync.Cond
	buf    []byte // each packet after its length, 4 bytes
	head   int
	closed bool
}

func newSide(wake func()) *side {
	s := &side{wake: wake}
	s.room.L = &s.mu
	return s
}

// push copies p in, waiting for room; false after close.
func (s *side) push(p []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for len(s.buf)-s.head+4+len(p) > sideBytes && !s.closed {
		s.room.Wait()
	}
	if s.closed {
		return false
	}
	empty := len(s.buf) == s.head
	if s.head > 0 && len(s.buf)+4+len(p) > cap(s.buf) {
		s.buf = s.buf[:copy(s.buf, s.buf[s.head:])]
		s.head = 0
	}
	s.buf = binary.NativeEndian.AppendUint32(s.buf, uint32(len(p)))
	s.buf = append(s.buf, p...)
	if empty {
		s.wake()
	}
	return true
}

// take copies up to limit bytes of packets out.
func (s *side) take(bufs [][]byte, sizes []int, offset, limit int) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for total := 0; n < len(bufs) && total < limit && s.head < len(s.buf); n++ {
		l := int(binary.NativeEndian.Uint32(s.buf[s.head:]))
		sizes[n] = copy(bufs[n][offset:], s.buf[s.head+4:s.head+4+l])
		s.head += 4 + l
		total += l
	}
	if s.head == len(s.buf) {
		s.buf, s.head = s.buf[:0], 0
	} else if n > 0 {
		s.wake() // more is there for the next Read
	}
	if n > 0 {
		s.room.Broadcast()
	}
	return n
}

func (s *side) close() {
	s.mu.Lock()
	s.closed = true
	s.room.Broadcast()
	s.mu.Unlock()
}
