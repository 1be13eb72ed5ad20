package carrier

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"github.com/culvert-dev/culvert/wire/queue"
)

const (
	// gateBytes bounds what is inside WireGuard, each way. A super-packet has
	// 64 KiB; two cores are busy with about eight of them. More is only delay:
	// 1 MiB is 84 ms at 100 Mbit/s, in front of what the sockets hold already.
	gateBytes = 1 << 20
	// gatePackets bounds the packets, each of which occupies 64 KiB whatever its
	// length: 256 of them are 16 MiB.
	gatePackets = 256
	// outStall and inStall are how long a full gate may be without progress before
	// a packet passes to find out. Outwards packets wait for a handshake, and they
	// may; inwards, only what is not authentic never comes out.
	outStall = time.Second
	inStall  = 100 * time.Millisecond
	// inIdle: what entered WireGuard so long ago is decrypted or dropped.
	inIdle = time.Second
	// sendWait is how long a batch waits for a stream when there is none and
	// BindConfig.Hold is over: a redial takes about a second. Then it is dropped.
	sendWait = time.Second
	// drainFor is how long what is under way in a stream may take to arrive after
	// Move replaced it: as much as a socket holds, on a slow path.
	drainFor = 2 * time.Second
)

// BindConfig tunes a Bind; the zero value is right.
type BindConfig struct {
	// GateBytes and GatePackets bound what is inside WireGuard, each way;
	// 0 means 1 MiB and 256.
	GateBytes, GatePackets int
	// Hold is how long packets wait for another stream after one has ended; 0
	// means 1 s. What waits is the oldest, at most what the gate lets in. A kernel's
	// TCP repeats itself ever more rarely, after a minute's cut a minute later: its
	// repetition that is held here goes out the moment a stream is back. WireGuard
	// refuses keys that are older than 3 min, so 2 min are a sensible most.
	Hold time.Duration
	// Datagrams is the UDP way beside the streams, nil for none. The Bind owns it
	// and closes it.
	Datagrams *Datagrams
}

// Stats counts what a Bind moved: WireGuard messages and their bytes.
type Stats struct {
	Sent, Received               uint64 // bytes
	SentPackets, ReceivedPackets uint64
	Dropped                      uint64        // packets that found no stream, or whose stream ended
	Streams                      uint64        // attached so far
	Stalls                       uint64        // times that a gate had to probe
	HeldBytes, HeldPackets       int           // inside WireGuard on the way out, now
	Datagrams                    DatagramStats // what went by UDP, which is in the sums above
	// Window is how many bytes the bulk lane's stream may have on its way, and
	// Unacknowledged how many it has.
	Window, Unacknowledged int
	Rate                   float64       // bytes per second that the window was made for
	MinRTT                 time.Duration // likewise
}

// Endpoint is how the one peer of a Bind is written in WireGuard's
// configuration.
const Endpoint = "stream:agent"

// endpoint is the only one there is: which stream carries is the Bind's affair,
// so WireGuard's roaming never sees a change.
type endpoint struct{}

func (*endpoint) ClearSrc()           {}
func (*endpoint) SrcToString() string { return "" }
func (*endpoint) DstToString() string { return Endpoint }
func (*endpoint) DstToBytes() []byte  { return []byte(Endpoint) }
func (*endpoint) DstIP() netip.Addr   { return netip.Addr{} }
func (*endpoint) SrcIP() netip.Addr   { return netip.Addr{} }

// Bind is WireGuard's conn.Bind over the attached Streams, one in each lane.
// Streams come and go while it is open; WireGuard sees loss at most. A lane
// without a stream uses the other's.
type Bind struct {
	ep      endpoint
	out     *gate
	gating  atomic.Bool // a device is at the other end of the gates
	hold    time.Duration
	udp     *Datagrams             // nil: none
	udpIn   *gate                  // of what comes by it
	wake    atomic.Pointer[Source] // whose Pull a window may have refused
	refused atomic.Bool            // one has

	sent, rcvd, sentPkts, rcvdPkts, dropped, streams, stalls, progress atomic.Uint64

	mu      sync.Mutex
	shut    bool          // for good
	closed  chan struct{} // of the present opening; nil while closed
	lanes   [queue.Lanes]lane
	changed chan struct{} // closed when a stream does
}

// lane is where the packets of a kind of flow leave and arrive.
type lane struct {
	in  *gate
	cur *Stream // may have ended
	old *Stream // the one before cur, while frames may still come out of it
	// after is when cur may be used: when what its flows sent by the other lane's
	// stream has arrived.
	after time.Time
}

// NewBind makes a Bind without a stream.
func NewBind(cfg BindConfig) *Bind {
	if cfg.GateBytes == 0 {
		cfg.GateBytes = gateBytes
	}
	if cfg.GatePackets == 0 {
		cfg.GatePackets = gatePackets
	}
	b := &Bind{
		out:     newGate(cfg.GateBytes, cfg.GatePackets, outStall, 0, 1),
		hold:    cfg.Hold,
		udp:     cfg.Datagrams,
		udpIn:   newGate(cfg.GateBytes, cfg.GatePackets, inStall, inIdle, conn.IdealBatchSize),
		changed: make(chan struct{}),
	}
	b.udpIn.unit = shortUnit
	for i := range b.lanes {
		b.lanes[i].in = newGate(cfg.GateBytes, cfg.GatePackets, inStall, inIdle, conn.IdealBatchSize)
	}
	return b
}

// Attach makes s the stream in use in its lane and ends the one before it. The
// Bind owns s: it ends it when it closes. A Bind that was shut down ends s at once.
//
// A sparse lane's stream that replaces one which nobody here knows to be dead ends
// the bulk lane's too: the other end has lost the first one without a word, as by
// another address, and most likely both. Bulk would go into the void for deadAfter.
func (b *Bind) Attach(s *Stream) {
	for _, old := range b.replace(s, false) {
		old.end(ErrReplaced, ErrReplaced.Error())
	}
}

// Move is Attach when both ends know that the stream before s still works: what
// is under way in it arrives first, in order and without loss. The other end has
// to Move as well. It is ended when 2 s have passed.
func (b *Bind) Move(s *Stream) {
	for _, old := range b.replace(s, true) {
		if old.Err() == nil {
			go old.move() // which may have to wait for a write
		}
		time.AfterFunc(drainFor, func() { old.end(ErrReplaced, ErrReplaced.Error()) })
	}
}

// replace makes s the stream in use and returns those that are not any more.
func (b *Bind) replace(s *Stream, drain bool) (gone []*Stream) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shut {
		s.end(net.ErrClosed, "")
		return nil
	}
	l := &b.lanes[s.lane]
	if l.cur == s {
		return nil
	}
	if l.old != nil {
		l.old.end(ErrReplaced, ErrReplaced.Error())
		l.old = nil
	}
	if l.cur != nil {
		gone = append(gone, l.cur)
		if drain {
			l.old = l.cur
		} else if bulk := &b.lanes[queue.Bulk]; s.lane == queue.Sparse && l.cur.Err() == nil && bulk.cur != nil {
			gone = append(gone, bulk.cur)
			if bulk.old != nil {
				gone = append(gone, bulk.old)
			}
			bulk.cur, bulk.old = nil, nil
		}
	}
	if other := b.lanes[1-s.lane].cur; s.lane == queue.Bulk && (l.cur == nil || l.cur.Err() != nil) && other != nil {
		wait := other.window.explains()
		l.after = time.Now().Add(wait)
		time.AfterFunc(wait, b.roomier)
	}
	l.cur = s
	s.window.notify(b.roomier)
	go func() { // what its window holds back goes by another stream, or waits for one
		<-s.Done()
		b.roomier()
	}()
	close(b.changed)
	b.changed = make(chan struct{})
	b.streams.Add(1)
	go b.roomier()
	return gone
}

// Stream is the stream that sparse flows use, nil when none is up.
func (b *Bind) Stream() *Stream { return b.path(queue.Sparse) }

// path is the stream that a lane uses, nil when there is none.
func (b *Bind) path(l queue.Lane) *Stream {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, _ := b.pathLocked(l)
	return s
}

// pathLocked is path, and whether the two lanes share it; mu is held.
func (b *Bind) pathLocked(l queue.Lane) (s *Stream, shared bool) {
	own, other := b.lanes[l].cur, b.lanes[1-l].cur
	switch ownUp, otherUp := own != nil && own.Err() == nil, other != nil && other.Err() == nil; {
	case ownUp:
		return own, !otherUp
	case otherUp:
		return other, true
	}
	return nil, true
}

// room tells whether the window of a lane's stream takes a packet, beside batch
// bytes that are on their way to WireGuard. What is inside WireGuard belongs to
// the bulk lane, but for a little.
func (b *Bind) room(l queue.Lane, batch int) bool {
	if b.udp.MaxPacket(shortUnit) > 0 {
		return true // UDP has no window: its queue is the kernel's
	}
	b.mu.Lock()
	s, shared := b.pathLocked(l)
	after := b.lanes[l].after
	b.mu.Unlock()
	if !shared && time.Now().Before(after) {
		b.refused.Store(true)
		return !time.Now().Before(after) // as below
	}
	if s == nil {
		return true // the gate bounds what waits for a stream
	}
	if l == queue.Bulk || shared {
		bytes, _ := b.out.held()
		batch += bytes
	}
	if s.window.room(batch) > 0 {
		return true
	}
	b.refused.Store(true)
	return s.window.room(batch) > 0 // it may have grown before roomier could see refused
}

// roomier wakes the device's reader if a window has refused it.
func (b *Bind) roomier() {
	b.progress.Add(1)
	if b.refused.Swap(false) {
		if w := b.wake.Load(); w != nil {
			(*w).Wake()
		}
	}
}

// moved changes when something left WireGuard or was acknowledged.
func (b *Bind) moved() uint64 {
	b.out.mu.Lock()
	defer b.out.mu.Unlock()
	return b.out.outBytes + b.progress.Load()
}

// settle is how long a packet in the sparse lane may take to arrive, 0 when the
// bulk lane cannot overtake it.
func (b *Bind) settle() time.Duration {
	b.mu.Lock()
	s, shared := b.pathLocked(queue.Sparse)
	b.mu.Unlock()
	if shared || s == nil {
		return 0
	}
	return s.window.explains()
}

// Shutdown closes the Bind for good and releases whatever is blocked in it.
// Call it before the WireGuard device's Close, which otherwise waits for a Send
// that waits for the carrier.
func (b *Bind) Shutdown() {
	b.mu.Lock()
	b.shut = true
	b.mu.Unlock()
	_ = b.close(true)
}

// Stats is a snapshot of the counters.
func (b *Bind) Stats() Stats {
	st := Stats{
		Sent: b.sent.Load(), Received: b.rcvd.Load(),
		SentPackets: b.sentPkts.Load(), ReceivedPackets: b.rcvdPkts.Load(),
		Dropped: b.dropped.Load(), Streams: b.streams.Load(),
	}
	if b.udp != nil {
		st.Datagrams = b.udp.Stats()
		st.Sent += st.Datagrams.Sent
		st.SentPackets += st.Datagrams.SentPackets
		st.Received += st.Datagrams.Received
		st.ReceivedPackets += st.Datagrams.ReceivedPackets
	}
	st.HeldBytes, st.HeldPackets = b.out.held()
	st.Stalls = b.stalls.Load()
	for _, g := range []*gate{b.out, b.lanes[queue.Sparse].in, b.lanes[queue.Bulk].in, b.udpIn} {
		g.mu.Lock()
		st.Stalls += g.stalls
		g.mu.Unlock()
	}
	if s := b.path(queue.Bulk); s != nil {
		s.window.report(&st)
	}
	return st
}

// Open implements conn.Bind. The port means nothing.
func (b *Bind) Open(uint16) ([]conn.ReceiveFunc, uint16, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.shut {
		return nil, 0, net.ErrClosed
	}
	if b.closed != nil {
		return nil, 0, conn.ErrBindAlreadyOpen
	}
	closed := make(chan struct{})
	b.closed = closed
	var fns []conn.ReceiveFunc
	for l := range queue.Lanes {
		fns = append(fns, func(msgs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
			return b.receive(l, closed, msgs, sizes, eps)
		})
	}
	if b.udp != nil {
		b.udp.resume()
		fns = append(fns, func(msgs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
			return b.receiveUDP(closed, msgs, sizes, eps)
		})
	}
	return fns, 1, nil
}

// Close implements conn.Bind: it releases Send and the receive function. An
// open Bind ends its stream, because nothing else releases a blocked read of a
// connection without deadlines; after the next Open, attach a new one.
func (b *Bind) Close() error { return b.close(false) }

func (b *Bind) close(force bool) error {
	b.mu.Lock()
	if b.closed == nil && !force {
		b.mu.Unlock()
		return nil // WireGuard closes before it opens: a stream attached early stays
	}
	if b.closed != nil {
		close(b.closed)
		b.closed = nil
	}
	if b.udp != nil {
		b.udp.pause()
		if force {
			b.udp.Close()
		}
	}
	var open []*Stream
	for i := range b.lanes {
		l := &b.lanes[i]
		open = append(open, l.old, l.cur)
		l.old, l.cur = nil, nil
	}
	b.mu.Unlock()
	for _, s := range open {
		if s != nil {
			s.end(net.ErrClosed, "bind closed")
		}
	}
	return nil
}

// SetMark implements conn.Bind; a stream has no marks.
func (b *Bind) SetMark(uint32) error { return nil }

// BatchSize implements conn.Bind.
func (b *Bind) BatchSize() int { return conn.IdealBatchSize }

// ParseEndpoint implements conn.Bind: it knows Endpoint only.
func (b *Bind) ParseEndpoint(s string) (conn.Endpoint, error) {
	if s != Endpoint {
		return nil, fmt.Errorf("endpoint %q is not %q", s, Endpoint)
	}
	return &b.ep, nil
}

// live returns the stream that a lane uses; else what to wait for.
func (b *Bind) live(l queue.Lane) (s *Stream, changed, closed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	s, _ = b.pathLocked(l)
	return s, b.changed, b.closed
}

// source returns the stream of a lane to read: the old one as long as there may
// be something in it, then the one in use; else what to wait for.
func (b *Bind) source(i queue.Lane) (s *Stream, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := &b.lanes[i]
	if l.old != nil && (l.old.Err() != nil || l.old.drained.Load()) {
		l.old = nil
	}
	switch {
	case l.old != nil:
		s = l.old
	case l.cur != nil && l.cur.Err() == nil && !l.cur.drained.Load():
		s = l.cur
	}
	return s, b.changed
}

// receive is the ReceiveFunc of a lane: WireGuard gives up on one that returns an
// error other than net.ErrClosed, so it waits for the next stream itself.
func (b *Bind) receive(l queue.Lane, closed <-chan struct{}, msgs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	gating, in := b.gating.Load(), b.lanes[l].in
	k := len(msgs)
	if gating {
		if k = min(k, in.wait(closed)); k == 0 {
			return 0, net.ErrClosed
		}
	}
	for {
		select {
		case <-closed:
			return 0, net.ErrClosed
		default:
		}
		s, changed := b.source(l)
		if s == nil {
			select {
			case <-closed:
			case <-changed:
			}
			continue
		}
		n, err := s.read(msgs[:k], sizes)
		if n == 0 && err != nil {
			continue // the stream has ended, or moved: the next one
		}
		if n == 0 {
			continue
		}
		total, data := 0, false
		for i := range n {
			eps[i] = &b.ep
			total += sizes[i]
			data = data || isData(msgs[i][:sizes[i]])
		}
		// A lone handshake or keepalive never comes out at the device and is not
		// counted; a flood of them is.
		if gating && (data || n > 8) {
			in.enter(msgs, sizes, nil, n)
		}
		b.rcvd.Add(uint64(total))
		b.rcvdPkts.Add(uint64(n))
		return n, nil
	}
}

// receiveUDP is the ReceiveFunc of Datagrams.
func (b *Bind) receiveUDP(closed <-chan struct{}, msgs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	gating := b.gating.Load()
	k := len(msgs)
	if gating {
		if k = min(k, b.udpIn.wait(closed)); k == 0 {
			return 0, net.ErrClosed
		}
	}
	n, err := b.udp.receive(msgs[:k], sizes)
	data := false
	for i := range n {
		eps[i] = &b.ep
		data = data || isData(msgs[i][:sizes[i]])
	}
	if gating && (data || n > 8) {
		b.udpIn.enter(msgs, sizes, nil, n)
	}
	return n, err
}

// isData tells a WireGuard message that carries a packet from handshakes and
// keepalives, which never reach the device.
func isData(m []byte) bool {
	const transport, keepalive = 4, 32
	return len(m) > keepalive && binary.LittleEndian.Uint32(m) == transport
}
