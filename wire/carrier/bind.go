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

// Bind is WireGuard's conn.Bind over the attached Stream. Streams come and go
// while it is open; WireGuard sees loss at most.
type Bind struct {
	ep      endpoint
	out, in *gate
	gating  atomic.Bool // a device is at the other end of the gates
	hold    time.Duration
	udp     *Datagrams // nil: none
	udpIn   *gate      // of what comes by it

	sent, rcvd, sentPkts, rcvdPkts, dropped, streams atomic.Uint64

	mu      sync.Mutex
	shut    bool          // for good
	closed  chan struct{} // of the present opening; nil while closed
	cur     *Stream       // may have ended
	old     *Stream       // the one before cur, while frames may still come out of it
	changed chan struct{} // closed when cur changes
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
		in:      newGate(cfg.GateBytes, cfg.GatePackets, inStall, inIdle, conn.IdealBatchSize),
		hold:    cfg.Hold,
		udp:     cfg.Datagrams,
		udpIn:   newGate(cfg.GateBytes, cfg.GatePackets, inStall, inIdle, conn.IdealBatchSize),
		changed: make(chan struct{}),
	}
	b.udpIn.unit = shortUnit
	return b
}

// Attach makes s the stream in use and ends the one before it. The Bind owns s:
// it ends it when it closes. A Bind that was shut down ends s at once.
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
	if b.cur == s {
		return nil
	}
	if b.old != nil {
		b.old.end(ErrReplaced, ErrReplaced.Error())
		b.old = nil
	}
	if b.cur != nil {
		gone = append(gone, b.cur)
		if drain {
			b.old = b.cur
		}
	}
	b.cur = s
	close(b.changed)
	b.changed = make(chan struct{})
	b.streams.Add(1)
	return gone
}

// Stream is the attached stream, nil when none is or it has ended.
func (b *Bind) Stream() *Stream {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cur == nil || b.cur.Err() != nil {
		return nil
	}
	return b.cur
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
	for _, g := range []*gate{b.out, b.in, b.udpIn} {
		g.mu.Lock()
		st.Stalls += g.stalls
		g.mu.Unlock()
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
	fns := []conn.ReceiveFunc{func(msgs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
		return b.receive(closed, msgs, sizes, eps)
	}}
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
	open := []*Stream{b.old, b.cur}
	b.old, b.cur = nil, nil
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

// live returns the attached stream if it lives; else what to wait for.
func (b *Bind) live() (s *Stream, changed, closed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.cur != nil && b.cur.Err() == nil {
		s = b.cur
	}
	return s, b.changed, b.closed
}

// patience is how long a batch waits for a stream from now on.
func (b *Bind) patience() time.Duration {
	b.mu.Lock()
	s := b.cur
	b.mu.Unlock()
	if s == nil || s.Err() == nil {
		return sendWait
	}
	return max(sendWait, b.hold-time.Since(s.ended))
}

// source returns the stream to read: the old one as long as there may be
// something in it, then the one in use; else what to wait for.
func (b *Bind) source() (s *Stream, changed <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.old != nil && (b.old.Err() != nil || b.old.drained.Load()) {
		b.old = nil
	}
	switch {
	case b.old != nil:
		s = b.old
	case b.cur != nil && b.cur.Err() == nil && !b.cur.drained.Load():
		s = b.cur
	}
	return s, b.changed
}

// Send implements conn.Bind. It blocks as long as the carrier pushes back, but
// not longer than the stream or the Bind lives. Packets without a stream are
// dropped after a while (see BindConfig.Hold), which is no error: IP promises no delivery.
func (b *Bind) Send(msgs [][]byte, ep conn.Endpoint) error {
	if e, ok := ep.(*endpoint); !ok || e != &b.ep {
		return conn.ErrWrongEndpointType
	}
	b.out.busy.Add(1)
	all := msgs
	defer func() {
		b.out.busy.Add(-1)
		b.out.leave(all)
	}()
	if b.udp != nil {
		rest, copies := b.udp.send(msgs)
		if len(rest) == 0 || copies && b.Stream() == nil {
			return nil // who waited for a stream would keep UDP waiting
		}
		msgs = rest
	}
	return b.sendByStream(msgs)
}

func (b *Bind) sendByStream(msgs [][]byte) error {
	s, changed, closed := b.live()
	if closed == nil {
		return net.ErrClosed
	}
	if s == nil {
		limit := time.NewTimer(b.patience())
		defer limit.Stop()
		select {
		case <-changed:
			s, _, _ = b.live()
		case <-closed:
			return net.ErrClosed
		case <-limit.C:
		}
	}
	written := 0
	for s != nil && written < len(msgs) {
		n, err := s.write(msgs[written:])
		written += n
		if err != errMoved {
			break
		}
		s, _, _ = b.live() // Move put another one in its place before that
	}
	if lost := len(msgs) - written; lost > 0 {
		b.dropped.Add(uint64(lost))
		if written == 0 {
			return nil
		}
	}
	total := 0
	for _, m := range msgs[:written] {
		total += len(m)
	}
	b.sent.Add(uint64(total))
	b.sentPkts.Add(uint64(written))
	return nil
}

// receive is the ReceiveFunc: WireGuard gives up on one that returns an error
// other than net.ErrClosed, so it waits for the next stream itself.
func (b *Bind) receive(closed <-chan struct{}, msgs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
	gating := b.gating.Load()
	k := len(msgs)
	if gating {
		if k = min(k, b.in.wait(closed)); k == 0 {
			return 0, net.ErrClosed
		}
	}
	for {
		select {
		case <-closed:
			return 0, net.ErrClosed
		default:
		}
		s, changed := b.source()
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
			b.in.enter(msgs, sizes, n)
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
		b.udpIn.enter(msgs, sizes, n)
	}
	return n, err
}

// isData tells a WireGuard message that carries a packet from handshakes and
// keepalives, which never reach the device.
func isData(m []byte) bool {
	const transport, keepalive = 4, 32
	return len(m) > keepalive && binary.LittleEndian.Uint32(m) == transport
}
