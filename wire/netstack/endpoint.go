// Package netstack joins a gVisor network stack to a WireGuard device: an
// Endpoint is the stack's link on one side and the device's tun on the other,
// so that a packet crosses with one copy and without a goroutine between them.
package netstack

import (
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/wire/queue"
)

const (
	// DefaultMTU is what fits a WireGuard message into a UDP packet on Ethernet.
	DefaultMTU = 1420

	// DefaultQueueBytes bounds the packets that the stack has written and
	// WireGuard has not read. The data of TCP among them is in its connection's
	// send buffer anyway, which is smaller. The queue is fair, so what one flow has
	// here delays no other.
	DefaultQueueBytes = 8 << 20
	// queuePackets bounds their number: the stack spends about 650 bytes on each
	// beside its own, which makes 11 MB.
	queuePackets = 16 << 10
	// datagramBytes bounds those of one flow of UDP; above it its sender waits, and
	// the pod's socket drops. More would be only delay.
	datagramBytes = 256 << 10

	// batchSize is how many packets WireGuard asks for at once: its own maximum.
	batchSize = 128
)

// Config says what an Endpoint is like. A field's zero value is its default.
type Config struct {
	// MTU of ordinary packets in bytes, IP header included.
	MTU int
	// GSO: the far end takes TCP super-packets with partial checksums
	// (carrier.FeatureGSO). Without it every packet fits the MTU and has a
	// complete checksum.
	GSO bool
	// Split says how long packets may be, headers included, at the moment, beside
	// GSO; 0: as GSO has it. It is asked for each batch. May be nil.
	Split func() int
	// QueueBytes bounds the outgoing queue. Above it the flow that has most in it
	// loses its oldest packet.
	QueueBytes int
}

// Endpoint is a tun.Device; what the stack behind Link writes is what Read
// returns, and what Write is given goes into that stack. Its methods may be
// called concurrently, but Read by one goroutine at a time.
type Endpoint struct {
	gso    bool
	limit  int
	events chan tun.Event
	batch  []*stack.PacketBuffer // of Pull

	split func() int // Config.Split
	cut   cutter     // of Read

	// delivering is when the Write under way began, in nanoseconds since epoch;
	// 0 when there is none.
	delivering atomic.Int64

	mu       sync.Mutex
	readable sync.Cond // the queue has a packet, or closed
	writable sync.Cond // packets were read, or closed
	queue    *queue.Queue[*stack.PacketBuffer]
	again    *time.Timer // wakes Pull when a flow that settles may go on
	dropped  uint64
	held     bool
	closed   bool

	linkMu     sync.RWMutex
	dispatcher stack.NetworkDispatcher
	mtu        uint32
	onClose    func()
}

// epoch makes monotonic time fit an atomic integer.
var epoch = time.Now().Add(-time.Nanosecond)

var _ tun.Device = (*Endpoint)(nil)

// New makes an Endpoint that is up. It has no goroutine; Close releases who
// waits in Read or in the stack.
func New(c Config) *Endpoint {
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.QueueBytes == 0 {
		c.QueueBytes = DefaultQueueBytes
	}
	if c.Split == nil {
		c.Split = func() int { return 0 }
	}
	e := &Endpoint{
		gso:    c.GSO,
		limit:  c.QueueBytes,
		split:  c.Split,
		mtu:    uint32(c.MTU),
		events: make(chan tun.Event, 1),
		batch:  make([]*stack.PacketBuffer, 0, batchSize),
		queue:  queue.New[*stack.PacketBuffer](),
	}
	e.readable.L = &e.mu
	e.writable.L = &e.mu
	e.again = time.AfterFunc(time.Hour, e.Wake)
	e.again.Stop()
	e.events <- tun.EventUp
	return e
}

// Link is the side of the Endpoint that a stack's NIC is made of.
func (e *Endpoint) Link() stack.LinkEndpoint { return (*link)(e) }

// Read waits for packets and copies as many as are queued and fit, each to
// bufs[i][offset:], its length to sizes[i]. It returns os.ErrClosed after Close.
func (e *Endpoint) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for {
		if n, err := e.Pull(bufs, sizes, offset, everything{}); n > 0 || err != nil {
			return n, err
		}
	}
}

// everything admits all.
type everything struct{}

func (everything) Admit(queue.Lane, int) bool { return true }
func (everything) Settle() time.Duration      { return 0 }

// Pull implements carrier.Source. It asks adm for packets as they are before they
// are cut.
func (e *Endpoint) Pull(bufs [][]byte, sizes []int, offset int, adm queue.Admission) (int, error) {
	if n := e.cut.next(bufs, sizes, offset); n > 0 {
		return n, nil // of a packet that the last batch had no room for
	}
	e.mu.Lock()
	longest := 0
	for !e.closed {
		longest = e.split()
		if !e.held && e.queue.Len() > 0 && e.take(min(len(bufs), batchSize), longest, adm) {
			break
		}
		e.readable.Wait()
	}
	if e.closed {
		e.mu.Unlock()
		return 0, os.ErrClosed
	}
	e.writable.Broadcast()
	e.mu.Unlock()

	n := 0
	for i, p := range e.batch {
		if longest > 0 {
			e.cut.begin(p, longest)
			n += e.cut.next(bufs[n:], sizes[n:], offset)
		} else {
			copyPacket(bufs[n][offset:], p)
			sizes[n] = p.Size()
			n++
		}
		p.DecRef()
		e.batch[i] = nil
	}
	e.batch = e.batch[:0]
	return n, nil
}

// take moves packets to the batch, of which cut to longest there are up to room,
// and tells whether there are any; mu is held.
func (e *Endpoint) take(room, longest int, adm queue.Admission) bool {
	now := time.Now()
	for ; room > 0; room-- {
		p, size, ok := e.queue.Pop(now, adm)
		if !ok {
			break
		}
		e.batch = append(e.batch, p)
		if longest > 0 {
			room -= size / max(longest-maxHeaders, 1) // or fewer: only the last is left in part
		}
	}
	if at := e.queue.Held(); len(e.batch) == 0 && !at.IsZero() {
		e.again.Reset(at.Sub(now))
	}
	return len(e.batch) > 0
}

// Wake implements carrier.Source.
func (e *Endpoint) Wake() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.readable.Broadcast()
}

// copyPacket writes the packet from its IP header on to b, which is large
// enough. It is PacketBuffer.AsSlices without the slice.
func copyPacket(b []byte, p *stack.PacketBuffer) {
	views, skip := p.AsViewList()
	n := 0
	for v := views.Front(); v != nil; v = v.Next() {
		s := v.AsSlice()
		if skip >= len(s) {
			skip -= len(s)
			continue
		}
		n += copy(b[n:], s[skip:])
		skip = 0
	}
}

// Write gives the packets bufs[i][offset:] to the stack, super-packets whole.
// It never waits for the outgoing queue (see link.WritePackets), so two
// Endpoints that face each other cannot block each other's delivery.
func (e *Endpoint) Write(bufs [][]byte, offset int) (int, error) {
	e.linkMu.RLock()
	d, mtu := e.dispatcher, int(e.mtu)
	e.linkMu.RUnlock()
	if d == nil {
		if e.isClosed() {
			return 0, os.ErrClosed
		}
		return len(bufs), nil // no stack attached: as a cable without a machine
	}
	e.delivering.Store(int64(time.Since(epoch)))
	defer e.delivering.Store(0)
	var room [batchSize]joined
	for _, j := range join(room[:0], bufs, offset, mtu) {
		b := j.Buf[offset:]
		if len(b) == 0 {
			continue
		}
		proto := header.IPv4ProtocolNumber
		switch b[0] >> 4 {
		case 4:
		case 6:
			proto = header.IPv6ProtocolNumber
		default:
			continue
		}
		p := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(b)})
		d.DeliverNetworkPacket(proto, p)
		p.DecRef()
	}
	return len(bufs), nil
}

// Hold makes Read wait, whatever is queued, until it is called with false. Data
// waits in its senders meanwhile.
func (e *Endpoint) Hold(hold bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.held = hold
	e.readable.Broadcast()
}

// Delivering is how long the Write under way has taken so far, 0 when there is
// none. More than a moment means that the stack hangs.
func (e *Endpoint) Delivering() time.Duration {
	began := e.delivering.Load()
	if began == 0 {
		return 0
	}
	return time.Since(epoch) - time.Duration(began)
}

// Dropped counts outgoing packets that the queue's bound has cost.
func (e *Endpoint) Dropped() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.dropped
}

// Queued is the size of the outgoing queue in bytes.
func (e *Endpoint) Queued() int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.queue.Bytes()
}

// MTU is that of ordinary packets, in bytes.
func (e *Endpoint) MTU() (int, error) {
	e.linkMu.RLock()
	defer e.linkMu.RUnlock()
	return int(e.mtu), nil
}

// BatchSize is how many packets one Read may return.
func (e *Endpoint) BatchSize() int { return batchSize }

// Events tells that the device is up, and is closed by Close.
func (e *Endpoint) Events() <-chan tun.Event { return e.events }

// Name is for WireGuard's log.
func (e *Endpoint) Name() (string, error) { return "netstack", nil }

// File is nil: there is no descriptor.
func (e *Endpoint) File() *os.File { return nil }

// Close drops what is queued and releases every waiting Read and sender. The
// stack is the caller's to close, afterwards. Close may be called repeatedly.
func (e *Endpoint) Close() error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return nil
	}
	e.closed = true
	e.again.Stop()
	for p, ok := e.queue.Drop(); ok; p, ok = e.queue.Drop() {
		p.DecRef()
	}
	close(e.events)
	e.readable.Broadcast()
	e.writable.Broadcast()
	e.mu.Unlock()

	e.linkMu.Lock()
	onClose := e.onClose
	e.onClose = nil
	e.linkMu.Unlock()
	if onClose != nil {
		onClose()
	}
	return nil
}

func (e *Endpoint) isClosed() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.closed
}

// SetMTU changes the MTU of ordinary packets, in bytes, for what is sent from
// now on.
func (e *Endpoint) SetMTU(mtu int) { (*link)(e).SetMTU(uint32(mtu)) }
