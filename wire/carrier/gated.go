package carrier

import (
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/wire/queue"
)

// A Source is a tun.Device with a fair queue before it. Only with one does a
// Bind use windows and lanes.
type Source interface {
	tun.Device
	// Pull is Read of packets that adm admits, each asked for once and in order.
	// It waits for the first, but returns 0 when Wake was called before or
	// meanwhile. A size may be 0: that packet was not admitted, and is none.
	Pull(bufs [][]byte, sizes []int, offset int, adm queue.Admission) (int, error)
	// Wake has Pull ask adm again. It may be called from any goroutine.
	Wake()
}

// gated is a tun.Device whose packets pass the Bind's gates.
type gated struct {
	tun.Device
	b    *Bind
	once sync.Once
	done chan struct{}

	// Of the one goroutine in Read.
	source Source // nil: a plain device
	lanes  [conn.IdealBatchSize]queue.Lane
	n      int // admitted in this Pull
	bytes  int // their sizes
	stuck  struct {
		at    time.Time // when a window first refused without progress since
		moved uint64    // the progress then
	}
	again *time.Timer // asks the window that refused again
}

// Gate wraps the device that is used with b, so that b's bounds hold for what is
// inside WireGuard between the two, and, if it is a Source, flows share fairly
// what the streams take. wire.New does it; call it at most once.
func (b *Bind) Gate(d tun.Device) tun.Device {
	g := &gated{Device: d, b: b, done: make(chan struct{})}
	if s, ok := d.(Source); ok {
		g.source = s
		g.again = time.AfterFunc(time.Hour, s.Wake)
		b.wake.Store(&s)
	}
	b.gating.Store(true)
	return g
}

func (g *gated) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for {
		g.b.out.unit = longUnit
		if g.b.udp.MaxPacket(shortUnit) > 0 {
			g.b.out.unit = shortUnit
		}
		k := g.b.out.wait(g.done) // 0 when closed: then the device's Read says so
		k = min(max(k, 1), len(g.lanes), len(bufs))
		if g.source == nil {
			n, err := g.Device.Read(bufs[:k], sizes[:k], offset)
			if n > 0 {
				g.b.out.enter(bufs, sizes, nil, n)
			}
			return n, err
		}
		g.n, g.bytes = 0, 0
		n, err := g.source.Pull(bufs[:k], sizes[:k], offset, g)
		if n == 0 && err == nil {
			continue
		}
		if n > 0 {
			g.spread(sizes[:n])
			g.b.out.enter(bufs, sizes, g.lanes[:], n)
		}
		return n, err
	}
}

// spread puts the lanes of the admitted packets where these are among the others.
// Packets that were cut after their admission leave as datagrams, whatever their
// lane.
func (g *gated) spread(sizes []int) {
	if g.n == len(sizes) {
		return
	}
	if g.cut(sizes) {
		clear(g.lanes[:])
		return
	}
	at := g.n
	for i := len(sizes) - 1; i >= 0; i-- {
		if sizes[i] > 0 && at > 0 {
			at--
			g.lanes[i] = g.lanes[at]
		}
	}
}

// cut tells whether there are more packets than were admitted.
func (g *gated) cut(sizes []int) bool {
	n := 0
	for _, size := range sizes {
		if size > 0 {
			n++
		}
	}
	return n > g.n
}

// Admit implements queue.Admission.
func (g *gated) Admit(lane queue.Lane, size int) bool {
	if g.n == len(g.lanes) || !g.b.room(lane, g.bytes) && !g.probe() {
		return false
	}
	g.lanes[g.n] = lane
	g.n++
	g.bytes += size
	return true
}

// probe lets a packet through a full window when nothing has moved for outStall:
// what it counts may have been dropped inside WireGuard.
func (g *gated) probe() bool {
	if g.n == len(g.lanes) {
		return false
	}
	moved := g.b.moved()
	if now := time.Now(); moved != g.stuck.moved || g.stuck.at.IsZero() {
		g.stuck.at, g.stuck.moved = now, moved
	} else if now.Sub(g.stuck.at) > outStall && g.b.out.busy.Load() == 0 {
		g.stuck.at = now
		g.b.stalls.Add(1)
		return true
	}
	g.again.Reset(outStall)
	return false
}

// Settle implements queue.Admission.
func (g *gated) Settle() time.Duration { return g.b.settle() }

func (g *gated) Write(bufs [][]byte, offset int) (int, error) {
	gates := [...]*gate{g.b.lanes[queue.Sparse].in, g.b.lanes[queue.Bulk].in, g.b.udpIn}
	for _, in := range gates {
		in.busy.Add(1)
	}
	n, err := g.Device.Write(bufs, offset)
	for _, in := range gates {
		in.busy.Add(-1)
		in.leave(bufs)
	}
	return n, err
}

func (g *gated) Close() error {
	g.once.Do(func() {
		close(g.done)
		if g.again != nil {
			g.again.Stop()
		}
	})
	return g.Device.Close()
}
