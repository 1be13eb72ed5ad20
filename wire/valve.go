package wire

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// wireguard-go's queues hold 1,024 batches of 128 packets each way and for each
// peer, every packet in a buffer of 64 KiB, and nothing in them pushes back. A
// valve, on both sides of a device, keeps what is inside to a few MiB.
const (
	// valveIn bounds the packets from all peers that WireGuard has taken from the
	// socket and not given to the device: 16 MiB. What comes meanwhile waits in the
	// socket's own buffer, and is lost above it, as on any busy router.
	valveIn = 256
	// valveOut bounds the packets for one peer that WireGuard has taken from the
	// device and not sent, and valveBatch those that it takes at once, which may
	// all be for that peer: 8 MiB together.
	valveOut, valveBatch = 64, 64
	// valveStall is how long a full valve may be without progress: then inwards
	// what was counted is gone (it was not authentic), and outwards the peer is
	// away, and what is for it is dropped, but one packet every valveProbe, which
	// makes WireGuard ask for a handshake.
	valveStall, valveProbe = 100 * time.Millisecond, time.Second
	// indexLife is how long a number that we gave to a peer may come back to us:
	// as long as WireGuard uses keys (180 s), and some more.
	indexLife = 4 * time.Minute
)

// tagSize bytes at the end of WireGuard's buffers say which peer's packet is in
// them: it encrypts in place, so a tag written at one end is found at the other.
const tagSize = 8

// valve bounds what is inside one WireGuard device, see above. It also drops
// what could not be authentic before it costs a queue's place: handshakes whose
// sender does not know our public key, and everything else that does not name a
// number that we gave out.
type valve struct {
	mac   device.CookieChecker
	magic uint32
	moved chan struct{} // one token: something left, outwards

	mu      sync.Mutex
	in      int           // packets inside, inwards
	leftIn  uint64        // running total
	busy    int           // writes to the device under way
	drained chan struct{} // one token: something left, inwards
	places  map[netip.Addr]*place
	byTag   map[uint32]*place
	lastTag uint32
	indices map[uint32]time.Time // that we gave out, and when
	pruned  time.Time
}

// place is one peer's, outwards.
type place struct {
	tag    uint32
	inside int
	left   time.Time // when one of its packets left last
	probed time.Time
	away   bool // full, and nothing leaves
}

func newValve(public Key) *valve {
	v := &valve{
		magic: rand.Uint32() | 1, moved: make(chan struct{}, 1), drained: make(chan struct{}, 1),
		places: map[netip.Addr]*place{}, byTag: map[uint32]*place{}, indices: map[uint32]time.Time{},
	}
	v.mac.Init(device.NoisePublicKey(public))
	return v
}

func (v *valve) add(addrs []netip.Addr) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.lastTag++
	p := &place{tag: v.lastTag}
	v.byTag[p.tag] = p
	for _, a := range addrs {
		v.places[a] = p
	}
}

func (v *valve) remove(addrs []netip.Addr) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, a := range addrs {
		if p := v.places[a]; p != nil {
			delete(v.byTag, p.tag)
		}
		delete(v.places, a)
	}
}

// device wraps the tun side.
func (v *valve) device(d wgtun.Device) wgtun.Device {
	return &valveDevice{Device: d, valve: v, closed: make(chan struct{})}
}

type valveDevice struct {
	wgtun.Device
	valve  *valve
	once   sync.Once
	closed chan struct{}
}

func (d *valveDevice) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	d.valve.settle(d.closed)
	k := min(len(bufs), valveBatch)
	n, err := d.Device.Read(bufs[:k], sizes[:k], offset)
	d.valve.leaving(bufs[:n], sizes[:n], offset)
	return n, err
}

func (d *valveDevice) Write(bufs [][]byte, offset int) (int, error) {
	d.valve.arriving(1)
	n, err := d.Device.Write(bufs, offset)
	d.valve.arrived(len(bufs))
	return n, err
}

func (d *valveDevice) Close() error {
	d.once.Do(func() { close(d.closed) })
	return d.Device.Close()
}

// settle waits until every peer that takes packets at all has room for some.
func (v *valve) settle(closed <-chan struct{}) {
	timer := time.NewTimer(valveStall)
	defer timer.Stop()
	for {
		v.mu.Lock()
		wait := false
		now := time.Now()
		for _, p := range v.byTag {
			if p.inside < valveOut {
				continue
			}
			if p.away = now.Sub(p.left) > valveStall; !p.away {
				wait = true
			}
		}
		v.mu.Unlock()
		if !wait {
			return
		}
		timer.Reset(valveStall)
		select {
		case <-v.moved:
		case <-timer.C:
		case <-closed:
			return
		}
	}
}

// leaving counts and tags packets on their way to a peer, and takes out (size
// 0) those whose peer is away or nobody.
func (v *valve) leaving(bufs [][]byte, sizes []int, offset int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	for i, b := range bufs {
		p := v.places[destination(b[offset:offset+sizes[i]])]
		switch {
		case p == nil:
			sizes[i] = 0
			continue
		case p.away && now.Sub(p.probed) < valveProbe:
			sizes[i] = 0
			continue
		case p.away:
			p.probed = now
		}
		p.inside++
		if p.inside == 1 {
			p.left = now // it begins to wait now
		}
		t := b[len(b)-tagSize:]
		binary.LittleEndian.PutUint32(t, v.magic)
		binary.LittleEndian.PutUint32(t[4:], p.tag)
	}
}

// destination of an IP packet; the zero Addr for anything else.
func destination(packet []byte) netip.Addr {
	switch {
	case len(packet) >= 20 && packet[0]>>4 == 4:
		return netip.AddrFrom4([4]byte(packet[16:20]))
	case len(packet) >= 40 && packet[0]>>4 == 6:
		return netip.AddrFrom16([16]byte(packet[24:40]))
	}
	return netip.Addr{}
}

// sent settles packets that WireGuard sends, and learns the numbers by which
// peers will name us.
func (v *valve) sent(bufs [][]byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	now := time.Now()
	progress := false
	for _, b := range bufs {
		if len(b) < device.MinMessageSize {
			continue
		}
		switch binary.LittleEndian.Uint32(b) {
		case device.MessageInitiationType, device.MessageResponseType:
			v.indices[binary.LittleEndian.Uint32(b[4:])] = now
			v.prune(now)
		case device.MessageTransportType:
			if cap(b) != device.MaxMessageSize || len(b) <= device.MessageTransportSize { // a keepalive is nobody's
				continue
			}
			t := b[:cap(b)][cap(b)-tagSize:]
			p := v.byTag[binary.LittleEndian.Uint32(t[4:])]
			if binary.LittleEndian.Uint32(t) != v.magic || p == nil {
				continue
			}
			p.left, progress = now, true
			if p.away {
				// It is back. WireGuard dropped some of what was counted, nobody knows
				// how much, and now sends all the rest.
				p.away, p.inside = false, 0
			}
			p.inside = max(0, p.inside-1)
		}
	}
	if progress {
		token(v.moved)
	}
}

// prune forgets numbers that nobody uses any more, now and then.
func (v *valve) prune(now time.Time) {
	if now.Sub(v.pruned) < indexLife/4 {
		return
	}
	v.pruned = now
	for i, since := range v.indices {
		if now.Sub(since) > indexLife {
			delete(v.indices, i)
		}
	}
}

// admit takes out (size 0) what cannot be authentic and counts data.
func (v *valve) admit(bufs [][]byte, sizes []int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for i, size := range sizes {
		if size < device.MinMessageSize {
			continue
		}
		b := bufs[i][:size]
		ok := false
		switch kind := binary.LittleEndian.Uint32(b); kind {
		case device.MessageInitiationType, device.MessageResponseType:
			ok = (kind == device.MessageInitiationType && size == device.MessageInitiationSize ||
				kind == device.MessageResponseType && size == device.MessageResponseSize) && v.mac.CheckMAC1(b)
		case device.MessageCookieReplyType, device.MessageTransportType:
			_, ok = v.indices[binary.LittleEndian.Uint32(b[4:])]
			if ok && kind == device.MessageTransportType && size > device.MessageTransportSize {
				v.in++
			}
		}
		if !ok {
			sizes[i] = 0
		}
	}
}

// enter waits until there is room inwards.
func (v *valve) enter(closed <-chan struct{}) {
	for {
		v.mu.Lock()
		full, seen := v.in >= valveIn, v.leftIn
		v.mu.Unlock()
		if !full {
			return
		}
		select {
		case <-v.drained:
		case <-closed:
			return
		case <-time.After(valveStall):
			v.mu.Lock()
			if v.leftIn == seen && v.busy == 0 {
				v.in = 0
			}
			v.mu.Unlock()
		}
	}
}

// arriving and arrived enclose a write to the device.
func (v *valve) arriving(writes int) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.busy += writes
}

func (v *valve) arrived(packets int) {
	v.mu.Lock()
	v.busy--
	v.in = max(0, v.in-packets)
	v.leftIn += uint64(packets)
	v.mu.Unlock()
	token(v.drained)
}

func token(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// bind wraps the socket side.
func (v *valve) bind(b conn.Bind) conn.Bind { return &valveBind{Bind: b, valve: v} }

type valveBind struct {
	conn.Bind
	valve *valve

	mu     sync.Mutex
	closed chan struct{} // of the present opening
}

func (b *valveBind) Open(port uint16) ([]conn.ReceiveFunc, uint16, error) {
	fns, port, err := b.Bind.Open(port)
	if err != nil {
		return nil, 0, err
	}
	closed := make(chan struct{})
	b.mu.Lock()
	b.closed = closed
	b.mu.Unlock()
	for i, receive := range fns {
		fns[i] = func(bufs [][]byte, sizes []int, eps []conn.Endpoint) (int, error) {
			b.valve.enter(closed)
			n, err := receive(bufs, sizes, eps)
			b.valve.admit(bufs[:n], sizes[:n])
			return n, err
		}
	}
	return fns, port, nil
}

func (b *valveBind) Close() error {
	b.mu.Lock()
	if b.closed != nil {
		close(b.closed)
		b.closed = nil
	}
	b.mu.Unlock()
	return b.Bind.Close()
}

func (b *valveBind) Send(bufs [][]byte, ep conn.Endpoint) error {
	b.valve.sent(bufs)
	return b.Bind.Send(bufs, ep)
}
