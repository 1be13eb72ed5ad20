package carrier

import (
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/device"

	"github.com/culvert-dev/culvert/wire/queue"
)

// tagLen bytes at the end of every one of wireguard-go's 65,535-byte buffers
// hold the gate's tag. WireGuard encrypts and decrypts in place and hands the
// same buffer on, whatever the length of the slice it shows, so a tag that was
// written at one end of it is found at the other.
const tagLen = 16

// How long a packet may be, in bytes, where super-packets travel and where
// ordinary ones do.
const longUnit, shortUnit = 64 << 10, 2 << 10

// The running total of bytes leaves the highest bits of its word to the lane.
const (
	laneShift = 60
	laneMask  = 1<<laneShift - 1
)

// A gate bounds what is inside WireGuard in one direction, in bytes and in
// packets. wireguard-go's own queues hold 1,024 batches of 128 packets in
// 64 KiB buffers each, and nothing in them pushes back.
//
// Everything in WireGuard is first in, first out for one peer. So each packet
// is tagged with the running totals up to and including itself, and whichever
// packet comes out says that all before it are out too: packets that WireGuard
// dropped (no key yet, staged too long, not authentic) are settled by the next
// one that it did not drop. When there is none, one more packet is let in every
// stall: the gate never sticks.
type gate struct {
	maxBytes, maxPackets uint64
	stall                time.Duration
	probe                int           // packets let in when stalled
	idle                 time.Duration // nothing entered for so long: all is out; 0: do not conclude that
	magic                uint32        // tells this gate's tags from the other's and from garbage
	unit                 uint64        // bytes: how long a packet may be; of the one goroutine that waits

	busy   atomic.Int32  // somebody works at the way out: slow, not stuck
	signal chan struct{} // capacity 1: something came out
	timer  *time.Timer   // of the one goroutine that waits

	mu                    sync.Mutex
	inBytes, outBytes     uint64 // running totals
	inPackets, outPackets uint32 // running totals, modulo 2^32
	entered               time.Time
	stalls                uint64
}

func newGate(maxBytes, maxPackets int, stall, idle time.Duration, probe int) *gate {
	g := &gate{
		maxBytes: uint64(maxBytes), maxPackets: uint64(maxPackets),
		stall: stall, idle: idle, probe: probe,
		magic: rand.Uint32() | 1, unit: longUnit, signal: make(chan struct{}, 1),
		timer: time.NewTimer(time.Hour),
	}
	g.timer.Stop()
	return g
}

// credit is how many packets may enter now.
func (g *gate) credit() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.idle > 0 && g.outBytes != g.inBytes && g.busy.Load() == 0 && time.Since(g.entered) > g.idle {
		g.outBytes, g.outPackets = g.inBytes, g.inPackets
	}
	bytes, packets := g.inBytes-g.outBytes, uint64(g.inPackets-g.outPackets)
	if bytes >= g.maxBytes || packets >= g.maxPackets {
		return 0
	}
	// So no more than one can pass the bound in part.
	return int(min((g.maxBytes-bytes)/g.unit+1, g.maxPackets-packets))
}

// wait returns how many packets may enter, at least one, or 0 when closed is.
// Only one goroutine may wait at a time.
func (g *gate) wait(closed <-chan struct{}) int {
	for {
		if n := g.credit(); n > 0 {
			return n
		}
		g.timer.Reset(g.stall)
		select {
		case <-g.signal:
			g.timer.Stop()
		case <-closed:
			g.timer.Stop()
			return 0
		case <-g.timer.C:
			if g.busy.Load() == 0 {
				g.mu.Lock()
				g.stalls++
				g.mu.Unlock()
				return g.probe
			}
		}
	}
}

// enter accounts for n packets and tags their buffers, with the lanes that they
// are for (nil: none).
func (g *gate) enter(bufs [][]byte, sizes []int, lanes []queue.Lane, n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i, b := range bufs[:n] {
		g.inBytes += uint64(sizes[i])
		g.inPackets++
		if cap(b) != device.MaxMessageSize {
			continue // not one of WireGuard's own: a later tag settles it
		}
		t := b[:cap(b)][cap(b)-tagLen:]
		binary.LittleEndian.PutUint32(t, g.magic)
		binary.LittleEndian.PutUint32(t[4:], g.inPackets)
		total := g.inBytes
		if lanes != nil {
			total |= uint64(lanes[i]) << laneShift
		}
		binary.LittleEndian.PutUint64(t[8:], total)
	}
	g.entered = time.Now()
}

// leave settles all that the buffers' tags say is out.
func (g *gate) leave(bufs [][]byte) {
	g.mu.Lock()
	before := g.outBytes
	for _, b := range bufs {
		if cap(b) != device.MaxMessageSize {
			continue
		}
		t := b[:cap(b)][cap(b)-tagLen:]
		if binary.LittleEndian.Uint32(t) != g.magic {
			continue
		}
		// A buffer may carry the tag of an earlier use (a keepalive's does): it is
		// smaller than what is out by now and says nothing.
		if total := binary.LittleEndian.Uint64(t[8:]) & laneMask; total > g.outBytes && total <= g.inBytes {
			g.outBytes, g.outPackets = total, binary.LittleEndian.Uint32(t[4:])
		}
	}
	moved := g.outBytes != before
	g.mu.Unlock()
	if moved {
		select {
		case g.signal <- struct{}{}:
		default:
		}
	}
}

// laneOf is the lane that enter tagged a message with; WireGuard's own messages
// have none and go with the sparse flows.
func (g *gate) laneOf(b []byte) queue.Lane {
	if !isData(b) || cap(b) != device.MaxMessageSize {
		return queue.Sparse
	}
	t := b[:cap(b)][cap(b)-tagLen:]
	if binary.LittleEndian.Uint32(t) != g.magic {
		return queue.Sparse
	}
	return queue.Lane(binary.LittleEndian.Uint64(t[8:])>>laneShift) % queue.Lanes
}

// held is what is inside now, in bytes and packets.
func (g *gate) held() (bytes, packets int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return int(g.inBytes - g.outBytes), int(g.inPackets - g.outPackets)
}
