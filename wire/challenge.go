package wire

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"

	"github.com/culvert-dev/culvert/tun"
)

// Challenge has the machine's kernel say a word in each of its open TCP
// connections, and returns how many there are. A far end that knows the
// connection takes the word for a duplicate; one that does not, an agent that
// replaced another, answers with a reset, and a program that only waits hears at
// once what it would otherwise never hear.
//
// The word is the acknowledgement by which TCP answers a segment outside of its
// window (RFC 9293, section 3.10.7.4). A reset of our own making would have to
// know the sequence number (RFC 5961, section 3).
func (l *Local) Challenge() int {
	keys := l.filter.connections()
	for _, k := range keys {
		seq := rand.Uint32()
		// Of two numbers so far apart one at least is outside any window.
		for _, seq := range []uint32{seq, seq + 1<<31} {
			if b := l.acknowledgement(k, seq); b != nil {
				_, _ = l.tun.Write(b) // a full device drops it as any other packet
			}
		}
	}
	return len(keys)
}

// connections lists the TCP flows that were answered and are not over.
func (t *filter) connections() []flowKey {
	t.lock()
	defer t.mu.Unlock()
	var keys []flowKey
	for f := t.lists[1].newest; f != nil; f = f.older {
		if f.until > t.now && !(f.finIn && f.finOut) {
			keys = append(keys, f.key)
		}
	}
	return keys
}

// acknowledgement is a bare segment of k from its far end, with a virtio header
// before it; nil if the tunnel has no address of that family.
func (l *Local) acknowledgement(k flowKey, seq uint32) []byte {
	remote := netip.AddrFrom16(k.remote)
	if !k.v6 {
		remote = remote.Unmap()
	}
	for _, own := range l.own {
		if own.Is4() == remote.Is4() {
			b := make([]byte, tun.HeaderLen, tun.HeaderLen+60)
			return append(b, bareAck(netip.AddrPortFrom(remote, k.rport), netip.AddrPortFrom(own, k.port), seq)...)
		}
	}
	return nil
}

// bareAck is a TCP segment with nothing but ACK, number seq, no window.
func bareAck(src, dst netip.AddrPort, seq uint32) []byte {
	const size, ack = 20, 0x10
	var b []byte
	if src.Addr().Is4() {
		b = make([]byte, 20+size)
		b[0], b[8], b[9] = 0x45, 64, tun.ProtoTCP
		binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
		copy(b[12:], src.Addr().AsSlice())
		copy(b[16:], dst.Addr().AsSlice())
		binary.BigEndian.PutUint16(b[10:], tun.Checksum(b[:20], nil, nil))
	} else {
		b = make([]byte, 40+size)
		b[0], b[6], b[7] = 0x60, tun.ProtoTCP, 64
		binary.BigEndian.PutUint16(b[4:], size)
		copy(b[8:], src.Addr().AsSlice())
		copy(b[24:], dst.Addr().AsSlice())
	}
	m := b[len(b)-size:]
	binary.BigEndian.PutUint16(m, src.Port())
	binary.BigEndian.PutUint16(m[2:], dst.Port())
	binary.BigEndian.PutUint32(m[4:], seq)
	m[12], m[13] = size/4<<4, ack
	binary.BigEndian.PutUint16(m[16:], tun.Checksum(m, &tun.Packet{Proto: tun.ProtoTCP, V6: src.Addr().Is6()}, b))
	return b
}
