package wire

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/tun"
)

// pings are the echo probes under way. A probe is recognised by its whole
// payload, which is random, so the machine's own pings never lose an answer.
type pings struct {
	count atomic.Int32 // of waiting, for the data path to look at

	mu      sync.Mutex
	waiting map[pingKey]*probe
}

type pingKey struct {
	remote netip.Addr
	id     uint16
}

type probe struct {
	payload []byte
	at      chan time.Time
}

// nonceLen is the least payload of a probe: what tells its answer from others.
const nonceLen = 8

// Ping sends one ICMP or ICMPv6 echo request with size bytes of payload (at
// least 8) from the tunnel address, and returns how long the answer took.
func (l *Local) Ping(ctx context.Context, dst netip.Addr, size int) (time.Duration, error) {
	dst = dst.Unmap()
	var src netip.Addr
	for _, a := range l.own {
		if a.Is4() == dst.Is4() {
			src = a
		}
	}
	if !src.IsValid() {
		return 0, fmt.Errorf("pinging %s: the tunnel has no address of that family", dst)
	}
	size = max(size, nonceLen)
	payload := make([]byte, size+2)
	_, _ = rand.Read(payload[:min(len(payload), 64)])
	id := binary.BigEndian.Uint16(payload[size:])
	if size > 62 {
		id = uint16(time.Now().UnixNano())
	}
	packet := echo(src, dst, id, payload[:size])
	if len(packet) > l.mtu {
		return 0, fmt.Errorf("pinging %s with %d bytes: the packet would be longer than the MTU of %d", dst, size, l.mtu)
	}
	key, p := pingKey{dst, id}, &probe{payload: payload[:size], at: make(chan time.Time, 1)}
	l.pings.mu.Lock()
	if l.pings.waiting == nil {
		l.pings.waiting = make(map[pingKey]*probe)
	}
	for l.pings.waiting[key] != nil {
		key.id++
		packet = echo(src, dst, key.id, p.payload)
	}
	l.pings.waiting[key] = p
	l.pings.mu.Unlock()
	l.pings.count.Add(1)
	defer func() {
		l.pings.mu.Lock()
		delete(l.pings.waiting, key)
		l.pings.mu.Unlock()
		l.pings.count.Add(-1)
	}()
	start := time.Now()
	if !l.side.push(packet) {
		return 0, fmt.Errorf("pinging %s: the tunnel is closed", dst)
	}
	select {
	case at := <-p.at:
		return at.Sub(start), nil
	case <-ctx.Done():
		return 0, fmt.Errorf("pinging %s: no answer: %w", dst, context.Cause(ctx))
	}
}

// echo builds an echo request, RFC 792 and RFC 4443 section 4.1.
func echo(src, dst netip.Addr, id uint16, payload []byte) []byte {
	n, typ := 8+len(payload), byte(8)
	var b []byte
	if dst.Is4() {
		b = make([]byte, 20+n)
		b[0], b[8], b[9] = 0x45, 64, tun.ProtoICMP
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(b[10:], tun.Checksum(b[:20], nil, nil))
	} else {
		typ = 128
		b = make([]byte, 40+n)
		b[0], b[6], b[7] = 0x60, tun.ProtoICMPv6, 64
		binary.BigEndian.PutUint16(b[4:], uint16(n))
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
	}
	m := b[len(b)-n:]
	m[0] = typ
	binary.BigEndian.PutUint16(m[4:], id)
	binary.BigEndian.PutUint16(m[6:], 1)
	copy(m[8:], payload)
	var pseudo *tun.Packet
	if dst.Is6() {
		pseudo = &tun.Packet{Proto: tun.ProtoICMPv6, V6: true}
	}
	binary.BigEndian.PutUint16(m[2:], tun.Checksum(m, pseudo, b))
	return b
}

// reply takes the answer to a probe out of the stream of packets.
func (ps *pings) reply(p *tun.Packet, b []byte) bool {
	if ps.count.Load() == 0 || p.Fragment() || !isEcho(p, b[p.L4:], 0, 129) {
		return false
	}
	m := b[p.L4:]
	ps.mu.Lock()
	defer ps.mu.Unlock()
	w := ps.waiting[pingKey{p.Src, binary.BigEndian.Uint16(m[4:])}]
	if w == nil || !bytes.Equal(w.payload, m[8:]) {
		return false
	}
	select {
	case w.at <- time.Now():
	default:
	}
	return true
}
