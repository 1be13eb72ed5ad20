package tun

import (
	"encoding/binary"
	"net/netip"
)

// IP protocol numbers (IANA).
const (
	ProtoICMP   = 1
	ProtoTCP    = 6
	ProtoUDP    = 17
	ProtoICMPv6 = 58

	protoHopByHop = 0
	protoRouting  = 43
	protoFragment = 44
	protoDestOpts = 60
)

// Packet is what the IP headers of a packet say.
type Packet struct {
	Src, Dst netip.Addr
	Proto    uint8  // of the payload at L4
	L4       int    // offset of the payload: transport header or fragment data
	V6       bool   //
	More     bool   // more fragments follow
	Offset   int    // of this fragment's data, in bytes
	ID       uint32 // of the fragmented datagram
	Routed   bool   // has a source route or routing header
}

// Fragment tells whether p is one.
func (p *Packet) Fragment() bool { return p.More || p.Offset != 0 }

// Parse reads the IP headers of b, which must be exactly one packet; ok is false
// for everything malformed. It does not look at checksums.
func Parse(b []byte) (p Packet, ok bool) {
	if len(b) < 20 {
		return p, false
	}
	switch b[0] >> 4 {
	case 4:
		return parse4(b)
	case 6:
		return parse6(b)
	}
	return p, false
}

// parse4 follows RFC 791.
func parse4(b []byte) (p Packet, ok bool) {
	p.L4 = int(b[0]&15) * 4
	if p.L4 < 20 || p.L4 > len(b) || int(binary.BigEndian.Uint16(b[2:])) != len(b) {
		return p, false
	}
	f := binary.BigEndian.Uint16(b[6:])
	p.More, p.Offset = f&0x2000 != 0, int(f&0x1fff)*8
	p.ID = uint32(binary.BigEndian.Uint16(b[4:]))
	p.Proto = b[9]
	p.Src = netip.AddrFrom4([4]byte(b[12:16]))
	p.Dst = netip.AddrFrom4([4]byte(b[16:20]))
	for o := b[20:p.L4]; len(o) > 0; {
		const end, nop, lsrr, ssrr = 0, 1, 131, 137
		if o[0] == end {
			break
		}
		if o[0] == nop {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			return p, false
		}
		p.Routed = p.Routed || o[0] == lsrr || o[0] == ssrr
		o = o[o[1]:]
	}
	return p, p.Offset+len(b)-p.L4 <= 65535
}

// parse6 follows RFC 8200.
func parse6(b []byte) (p Packet, ok bool) {
	if len(b) < 40 || int(binary.BigEndian.Uint16(b[4:]))+40 != len(b) {
		return p, false
	}
	p.V6, p.Proto, p.L4 = true, b[6], 40
	p.Src = netip.AddrFrom16([16]byte(b[8:24]))
	p.Dst = netip.AddrFrom16([16]byte(b[24:40]))
	for range 8 { // more extension headers are an attack
		var n int
		rest := b[p.L4:]
		switch p.Proto {
		case protoHopByHop, protoRouting, protoDestOpts:
			if len(rest) < 8 {
				return p, false
			}
			n = int(rest[1])*8 + 8
			p.Routed = p.Routed || p.Proto == protoRouting
		case protoFragment:
			if len(rest) < 8 || p.Fragment() {
				return p, false
			}
			n = 8
			f := binary.BigEndian.Uint16(rest[2:])
			p.More, p.Offset = f&1 != 0, int(f&^7)
			p.ID = binary.BigEndian.Uint32(rest[4:])
		default:
			return p, p.Offset+len(rest) <= 65535
		}
		if n > len(rest) {
			return p, false
		}
		p.Proto = rest[0]
		p.L4 += n
		if p.Offset != 0 {
			return p, p.Offset+len(b)-p.L4 <= 65535 // what follows is data
		}
	}
	return p, false
}
