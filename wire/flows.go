package wire

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/tun"
)

const (
	// maxFlows bounds the table: about 4 MB. More than the 28,000 ephemeral ports
	// that a machine has per destination; at the bound the least recently used
	// flow goes, unanswered ones before established TCP.
	maxFlows = 32 << 10
	// maxFragments bounds the datagrams whose later fragments are awaited.
	maxFragments = 512
)

// How long a silent flow stays, in the style of RFC 5382 and RFC 4787: longer
// than the applications' own keepalives. A machine's next packet brings it back
// anyway.
const (
	idleTCP      = 24 * time.Hour
	idleOpening  = 4 * time.Minute // SYN sent, nothing back
	idleClosing  = time.Minute     // both FINs
	idleReset    = 5 * time.Second
	idleUDP      = 3 * time.Minute
	idleEcho     = time.Minute
	idleFragment = 30 * time.Second // the kernel's own, net.ipv4.ipfrag_time
)

// Why a packet was dropped: keys of Local.Drops.
type reason int

const (
	pass reason = iota
	dropMalformed
	dropDestination // not for this session
	dropSource      // from an address that no answer has
	dropRouted      // source route or routing header
	dropSYN         // somebody opens a connection to this machine
	dropUnasked     // answers no flow that the machine opened
	dropFragment    // of no datagram that passed
	dropDevice      // the TUN device did not take it
	reasons
)

var reasonNames = [reasons]string{"", "malformed", "destination", "source", "routed", "syn", "unasked", "fragment", "device"}

// Flow is an open socket of this machine, for Local.Seed.
type Flow struct {
	Proto         uint8 // tun.ProtoTCP or tun.ProtoUDP
	Local, Remote netip.AddrPort
}

type flowKey struct {
	remote      [16]byte
	rport, port uint16 // port is the machine's, or the echo identifier
	proto       uint8
	v6          bool
}

type flow struct {
	key          flowKey
	until        int64 // nanoseconds since filter.start
	answered     bool  // TCP: is in the second list
	finIn        bool
	finOut       bool
	older, newer *flow
}

// lru is a list of flows by use.
type lru struct{ oldest, newest *flow }

func (l *lru) remove(f *flow) {
	if f.older != nil {
		f.older.newer = f.newer
	} else {
		l.oldest = f.newer
	}
	if f.newer != nil {
		f.newer.older = f.older
	} else {
		l.newest = f.older
	}
	f.older, f.newer = nil, nil
}

func (l *lru) push(f *flow) {
	f.older, f.newer = l.newest, nil
	if l.newest != nil {
		l.newest.newer = f
	} else {
		l.oldest = f
	}
	l.newest = f
}

type fragKey struct {
	src [16]byte
	id  uint32
	v6  bool
}

type fragment struct {
	key   fragKey
	end   int // of the first fragment's data: later ones must not overlap it
	until int64
}

// filter lets packets from the tunnel pass only if they answer a flow that this
// machine opened: whoever holds the agent can otherwise reach every local
// listener and, where forwarding is on, the LAN.
type filter struct {
	own   []netip.Addr
	start time.Time

	mu       sync.Mutex
	now      int64 // of this batch
	flows    map[flowKey]*flow
	lists    [2]lru // unanswered and UDP; answered TCP
	free     *flow
	frags    map[fragKey]int // index in ring
	ring     [maxFragments]fragment
	nextFrag int
}

func newFilter(own []netip.Addr) *filter {
	return &filter{own: own, start: time.Now(), flows: make(map[flowKey]*flow), frags: make(map[fragKey]int)}
}

// lock begins a batch.
func (t *filter) lock() {
	t.mu.Lock()
	t.now = int64(time.Since(t.start))
}

func (t *filter) isOwn(a netip.Addr) bool {
	for _, o := range t.own {
		if a == o {
			return true
		}
	}
	return false
}

// outbound records what the machine sends; false means that it must not leave:
// the agent would drop what is not from the tunnel address.
func (t *filter) outbound(p *tun.Packet, b []byte) bool {
	if !t.isOwn(p.Src) {
		return false
	}
	if p.Offset != 0 {
		return true
	}
	l4 := b[p.L4:]
	k := flowKey{remote: p.Dst.As16(), proto: p.Proto, v6: p.V6}
	switch {
	case p.Proto == tun.ProtoTCP && len(l4) >= 20:
		k.port, k.rport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		t.tcp(k, l4[13], true)
	case p.Proto == tun.ProtoUDP && len(l4) >= 8:
		k.port, k.rport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		t.open(k, idleUDP)
	case isEcho(p, l4, 8, 128):
		k.port = binary.BigEndian.Uint16(l4[4:])
		t.open(k, idleEcho)
	}
	return true
}

// isEcho tells whether the payload is an ICMP message of the given type.
func isEcho(p *tun.Packet, l4 []byte, type4, type6 byte) bool {
	if len(l4) < 8 || l4[1] != 0 {
		return false
	}
	return p.Proto == tun.ProtoICMP && !p.V6 && l4[0] == type4 || p.Proto == tun.ProtoICMPv6 && p.V6 && l4[0] == type6
}

// inbound judges a packet from the tunnel for one of the machine's addresses.
func (t *filter) inbound(p *tun.Packet, b []byte) reason {
	if p.Routed {
		return dropRouted
	}
	if !t.isOwn(p.Dst) {
		return dropDestination
	}
	if !answers(p.Src) || t.isOwn(p.Src) {
		return dropSource
	}
	if p.Offset != 0 {
		return t.later(p)
	}
	l4 := b[p.L4:]
	k := flowKey{remote: p.Src.As16(), proto: p.Proto, v6: p.V6}
	switch {
	case p.Proto == tun.ProtoTCP:
		const syn, ack = 0x02, 0x10
		if len(l4) < 20 || int(l4[12]>>4)*4 < 20 || int(l4[12]>>4)*4 > len(l4) {
			return dropMalformed
		}
		if l4[13]&(syn|ack) == syn {
			return dropSYN
		}
		k.rport, k.port = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		if !t.tcp(k, l4[13], false) {
			return dropUnasked
		}
	case p.Proto == tun.ProtoUDP:
		if len(l4) < 8 {
			return dropMalformed
		}
		k.rport, k.port = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
		if !t.touch(k, idleUDP) {
			return dropUnasked
		}
	case isEcho(p, l4, 0, 129):
		k.port = binary.BigEndian.Uint16(l4[4:])
		if !t.touch(k, idleEcho) {
			return dropUnasked
		}
	case isError(p, l4):
		if p.More || !t.embedded(p, l4[8:]) {
			return dropUnasked
		}
	default: // also neighbour discovery, router advertisements, redirects
		return dropUnasked
	}
	if p.More {
		t.first(p, len(l4))
	}
	return pass
}

// answers tells whether an honest packet can come from a: not what the kernel
// calls martian.
func answers(a netip.Addr) bool {
	a = a.Unmap()
	return a.IsGlobalUnicast() && !(a.Is4() && (a.As4()[0] == 0 || a.As4()[0] >= 240))
}

// isError: destination unreachable, time exceeded, parameter problem (RFC 792),
// and packet too big (RFC 4443). Redirects and source quench never pass.
func isError(p *tun.Packet, l4 []byte) bool {
	if len(l4) < 8+20+8 {
		return false
	}
	if p.V6 {
		return p.Proto == tun.ProtoICMPv6 && l4[0] >= 1 && l4[0] <= 4
	}
	return p.Proto == tun.ProtoICMP && (l4[0] == 3 || l4[0] == 11 || l4[0] == 12)
}

// embedded tells whether e, the beginning of a packet that an ICMP error is
// about, belongs to an open flow of this machine.
func (t *filter) embedded(p *tun.Packet, e []byte) bool {
	k := flowKey{v6: p.V6}
	var l4 []byte
	if p.V6 {
		if len(e) < 48 || e[0]>>4 != 6 || !t.isOwn(netip.AddrFrom16([16]byte(e[8:24]))) {
			return false
		}
		k.remote, k.proto, l4 = [16]byte(e[24:40]), e[6], e[40:]
		if k.proto == 44 { // a fragment: the first one has the ports
			if len(l4) < 16 || binary.BigEndian.Uint16(l4[2:])&^7 != 0 {
				return false
			}
			k.proto, l4 = l4[0], l4[8:]
		}
	} else {
		n := int(e[0]&15) * 4
		if e[0]>>4 != 4 || n < 20 || len(e) < n+8 || binary.BigEndian.Uint16(e[6:])&0x1fff != 0 ||
			!t.isOwn(netip.AddrFrom4([4]byte(e[12:16]))) {
			return false
		}
		k.remote, k.proto, l4 = netip.AddrFrom4([4]byte(e[16:20])).As16(), e[9], e[n:]
	}
	switch k.proto {
	case tun.ProtoTCP, tun.ProtoUDP:
		k.port, k.rport = binary.BigEndian.Uint16(l4), binary.BigEndian.Uint16(l4[2:])
	case tun.ProtoICMP, tun.ProtoICMPv6:
		if l4[0] != 8 && l4[0] != 128 {
			return false
		}
		k.port = binary.BigEndian.Uint16(l4[4:])
	default:
		return false
	}
	f := t.flows[k]
	return f != nil && f.until > t.now
}

// tcp follows a segment of k with the flags; false if there is no such flow and
// the segment opens none.
func (t *filter) tcp(k flowKey, flags byte, out bool) bool {
	const fin, syn, rst, ack = 0x01, 0x02, 0x04, 0x10
	f := t.flows[k]
	if f != nil && f.until <= t.now {
		t.drop(f)
		f = nil
	}
	if f == nil {
		// Any segment that the machine sends opens the flow, not only a SYN: after
		// a restart of this process the connections are still there. But a RST or
		// SYN-ACK answers somebody else's.
		if !out || flags&rst != 0 || flags&(syn|ack) == syn|ack {
			return false
		}
		f = t.open(k, idleOpening)
		if flags&syn == 0 {
			t.answer(f)
		}
	}
	if out && flags&(syn|ack) == syn { // the ports are used anew
		f.finIn, f.finOut = false, false
	}
	f.finIn = f.finIn || !out && flags&fin != 0
	f.finOut = f.finOut || out && flags&fin != 0
	if !out && !f.answered {
		t.answer(f)
	}
	idle := idleOpening
	switch {
	case flags&rst != 0:
		idle = idleReset
	case f.finIn && f.finOut:
		idle = idleClosing
	case f.answered:
		idle = idleTCP
	}
	f.until = t.now + int64(idle)
	t.use(f)
	return true
}

// answer moves f to the list of flows that are dropped last.
func (t *filter) answer(f *flow) {
	t.lists[0].remove(f)
	f.answered = true
	t.lists[1].push(f)
}

func (f *flow) list() int {
	if f.answered {
		return 1
	}
	return 0
}

// use makes f the newest of its list.
func (t *filter) use(f *flow) {
	l := &t.lists[f.list()]
	if l.newest != f {
		l.remove(f)
		l.push(f)
	}
}

// touch prolongs a flow; false if there is none.
func (t *filter) touch(k flowKey, idle time.Duration) bool {
	f := t.flows[k]
	if f == nil {
		return false
	}
	if f.until <= t.now {
		t.drop(f)
		return false
	}
	f.until = t.now + int64(idle)
	t.use(f)
	return true
}

// open finds or makes a flow and prolongs it.
func (t *filter) open(k flowKey, idle time.Duration) *flow {
	f := t.flows[k]
	if f == nil {
		t.expire()
		if f = t.free; f != nil {
			t.free = f.older
			*f = flow{}
		} else {
			f = new(flow)
		}
		f.key = k
		t.flows[k] = f
		t.lists[0].push(f)
	}
	f.until = t.now + int64(idle)
	t.use(f)
	return f
}

// expire makes room: a few flows that ended, and one that did not if the table
// is full.
func (t *filter) expire() {
	for i := range t.lists {
		for range 4 {
			if f := t.lists[i].oldest; f != nil && f.until <= t.now {
				t.drop(f)
			}
		}
	}
	if len(t.flows) < maxFlows {
		return
	}
	if f := t.lists[0].oldest; f != nil {
		t.drop(f)
	} else if f := t.lists[1].oldest; f != nil {
		t.drop(f)
	}
}

func (t *filter) drop(f *flow) {
	delete(t.flows, f.key)
	t.lists[f.list()].remove(f)
	f.older, t.free = t.free, f
}

// first remembers a first fragment that passed, with n bytes of data.
func (t *filter) first(p *tun.Packet, n int) {
	k := fragKey{src: p.Src.As16(), id: p.ID, v6: p.V6}
	i, ok := t.frags[k]
	if !ok {
		i = t.nextFrag
		t.nextFrag = (i + 1) % maxFragments
		delete(t.frags, t.ring[i].key)
		t.frags[k] = i
	}
	t.ring[i] = fragment{key: k, end: n, until: t.now + int64(idleFragment)}
}

// later judges a fragment that is not the first: it belongs to a datagram whose
// first one passed (the tunnel keeps the order), and must not overwrite that
// one's ports (RFC 3128).
func (t *filter) later(p *tun.Packet) reason {
	i, ok := t.frags[fragKey{src: p.Src.As16(), id: p.ID, v6: p.V6}]
	if !ok || t.ring[i].until <= t.now || p.Offset < t.ring[i].end {
		return dropFragment
	}
	return pass
}

// seed opens flows that exist already.
func (t *filter) seed(flows []Flow) {
	t.lock()
	defer t.mu.Unlock()
	for _, s := range flows {
		local, remote := s.Local.Addr().Unmap(), s.Remote.Addr().Unmap()
		if !t.isOwn(local) {
			continue
		}
		k := flowKey{remote: remote.As16(), rport: s.Remote.Port(), port: s.Local.Port(), proto: s.Proto, v6: remote.Is6()}
		switch s.Proto {
		case tun.ProtoTCP:
			t.tcp(k, 0x10, true)
		case tun.ProtoUDP:
			t.open(k, idleUDP)
		}
	}
}
