package queue

import (
	"math/bits"
	"sync"
)

const (
	// minClass is the smallest buffer, 256 bytes: an acknowledgement or a query.
	minClass = 8
	maxClass = 16
)

// Buffers is a pool of packet buffers in the powers of two from 256 bytes to
// 64 KiB: no packet occupies more than twice its length, or 256 bytes, so a
// bound of the packets' Cap is one of memory.
type Buffers struct {
	classes [maxClass + 1]sync.Pool
}

// Copy is p in a buffer of the pool; len(p) is at most 64 KiB.
func (b *Buffers) Copy(p []byte) *Buffer {
	c := max(bits.Len(uint(len(p)-1)), minClass)
	buf, ok := b.classes[c].Get().(*Buffer)
	if !ok {
		buf = &Buffer{mem: make([]byte, 1<<c)}
	}
	buf.n = copy(buf.mem, p)
	return buf
}

// Free gives a buffer back.
func (b *Buffers) Free(buf *Buffer) { b.classes[bits.Len(uint(len(buf.mem)))-1].Put(buf) }

// Buffer holds one packet.
type Buffer struct {
	mem []byte
	n   int
}

// Bytes is the packet, until Free.
func (b *Buffer) Bytes() []byte { return b.mem[:b.n] }

// Cap is the memory that the packet occupies.
func (b *Buffer) Cap() int { return len(b.mem) }
