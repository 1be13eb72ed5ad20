package tun

import (
	"encoding/binary"
	"errors"
	"math/bits"
)

// HeaderLen is the length of the virtio header before each packet, the legacy
// form of struct virtio_net_hdr (linux/virtio_net.h), in the machine's byte
// order: flags, gso_type, hdr_len, gso_size, csum_start, csum_offset.
const HeaderLen = 10

const (
	needsCsum = 1    // flags: the checksum at csum_start+csum_offset is to be finished
	gsoNone   = 0    // gso_type
	gsoTCPv4  = 1    //
	gsoTCPv6  = 4    //
	gsoECN    = 0x80 // or-ed: the first segment alone has CWR

	flagFIN, flagPSH, flagCWR = 0x01, 0x08, 0x80 // TCP, byte 13
)

var (
	errHeader = errors.New("malformed virtio header")
	errPacket = errors.New("malformed packet")
)

// Prepare fills hdr, HeaderLen bytes, for packet, which came through WireGuard
// and so is authentic: the kernel need not verify its checksum, and need not
// have one. TCP longer than mtu becomes a super-packet of segments of that length
// (of packets that were joined: of the length that they had). It writes the
// pseudo-header's sum into the packet, which is what the kernel expects of an
// unfinished checksum. A packet that is no plain TCP or UDP goes as it is.
func Prepare(hdr, packet []byte, mtu int) {
	clear(hdr[:HeaderLen])
	p, ok := Parse(packet)
	if !ok || p.Fragment() || p.Routed {
		return
	}
	n := len(packet) - p.L4
	var field int
	switch {
	case p.Proto == ProtoTCP && n >= 20:
		field = 16
	case p.Proto == ProtoUDP && n >= 8:
		field = 6
	default:
		return
	}
	headers := p.L4
	if p.Proto == ProtoTCP {
		l := int(packet[p.L4+12]>>4) * 4
		if l < 20 || l > n {
			return
		}
		headers += l
	}
	binary.BigEndian.PutUint16(packet[p.L4+field:], fold(pseudo(packet, &p, n)))
	hdr[0] = needsCsum
	binary.NativeEndian.PutUint16(hdr[6:], uint16(p.L4))
	binary.NativeEndian.PutUint16(hdr[8:], uint16(field))
	if p.Proto != ProtoTCP || len(packet) <= mtu || mtu <= headers {
		return
	}
	hdr[1] = gsoTCPv4
	if p.V6 {
		hdr[1] = gsoTCPv6
	}
	if packet[p.L4+13]&flagCWR != 0 {
		hdr[1] |= gsoECN
	}
	binary.NativeEndian.PutUint16(hdr[2:], uint16(headers))
	binary.NativeEndian.PutUint16(hdr[4:], uint16(mtu-headers))
}

// Splitter makes ordinary packets with finished checksums of what the kernel
// handed over, or Prepare prepared: for a peer that does not take super-packets,
// or a path that does not.
type Splitter struct {
	packet  []byte
	p       Packet
	field   int // offset of the checksum to finish; 0: none
	headers int // TCP super-packets: length of all headers
	size    int // and of the segments' payload; 0: one packet
	at, seg int // the next segment
	done    bool
}

// NewSplitter checks hdr and packet and begins. The packet must stay untouched
// until Next has returned 0.
func NewSplitter(hdr, packet []byte) (Splitter, error) {
	s := Splitter{packet: packet}
	if len(hdr) < HeaderLen {
		return s, errHeader
	}
	var ok bool
	if s.p, ok = Parse(packet); !ok {
		return s, errPacket
	}
	if hdr[0]&needsCsum != 0 {
		start, off := int(binary.NativeEndian.Uint16(hdr[6:])), int(binary.NativeEndian.Uint16(hdr[8:]))
		if start != s.p.L4 || start+off+2 > len(packet) ||
			!(s.p.Proto == ProtoTCP && off == 16 || s.p.Proto == ProtoUDP && off == 6) || s.p.Fragment() {
			return s, errHeader
		}
		s.field = start + off
	}
	switch hdr[1] &^ gsoECN {
	case gsoNone:
		return s, nil
	case gsoTCPv4, gsoTCPv6:
	default:
		return s, errHeader
	}
	if s.p.Proto != ProtoTCP || s.p.Fragment() || len(packet) < s.p.L4+20 || s.p.V6 != (hdr[1]&^gsoECN == gsoTCPv6) {
		return s, errHeader
	}
	s.size = int(binary.NativeEndian.Uint16(hdr[4:]))
	s.headers = s.p.L4 + int(packet[s.p.L4+12]>>4)*4
	if s.size == 0 || s.headers < s.p.L4+20 || s.headers > len(packet) {
		return s, errHeader
	}
	s.field, s.at = s.p.L4+16, s.headers
	return s, nil
}

// Unfinished begins with a packet that has no virtio header, of a stack that
// leaves the checksums of TCP to its device. The packet must stay untouched until
// Next has returned 0.
func Unfinished(packet []byte) (Splitter, error) {
	s := Splitter{packet: packet}
	var ok bool
	if s.p, ok = Parse(packet); !ok {
		return s, errPacket
	}
	if s.p.Proto == ProtoTCP && !s.p.Fragment() && len(packet) >= s.p.L4+20 {
		s.field = s.p.L4 + 16
	}
	return s, nil
}

// Limit makes segments of TCP at most n bytes long, headers included; it comes
// before Next. Any sender may cut his data as he likes, so an ordinary packet is
// cut as well. What is not TCP stays as long as it is.
func (s *Splitter) Limit(n int) {
	const flagSYN, flagRST, flagURG = 0x02, 0x04, 0x20
	if s.size == 0 {
		p := &s.p
		if len(s.packet) <= n || p.Proto != ProtoTCP || p.Fragment() || p.Routed || len(s.packet) < p.L4+20 ||
			s.packet[p.L4+13]&(flagSYN|flagRST|flagURG) != 0 {
			return
		}
		s.headers = p.L4 + int(s.packet[p.L4+12]>>4)*4
		if s.headers < p.L4+20 || s.headers >= len(s.packet) || s.headers >= n {
			return
		}
		s.field, s.at, s.size = p.L4+16, s.headers, n-s.headers
		return
	}
	if n > s.headers {
		s.size = min(s.size, n-s.headers)
	}
}

// Next writes the next packet to dst and returns its length, 0 after the last
// one or when dst is too short, which ends it too.
func (s *Splitter) Next(dst []byte) int {
	if s.done {
		return 0
	}
	if s.size == 0 {
		s.done = true
		if len(dst) < len(s.packet) {
			return 0
		}
		n := copy(dst, s.packet)
		if s.field != 0 {
			s.finish(dst[:n])
		}
		return n
	}
	end := min(s.at+s.size, len(s.packet))
	n := s.headers + end - s.at
	if len(dst) < n {
		s.done = true
		return 0
	}
	b := dst[:n]
	copy(b, s.packet[:s.headers])
	copy(b[s.headers:], s.packet[s.at:end])
	if s.p.V6 {
		binary.BigEndian.PutUint16(b[4:], uint16(n-40))
	} else {
		binary.BigEndian.PutUint16(b[2:], uint16(n))
		binary.BigEndian.PutUint16(b[4:], binary.BigEndian.Uint16(b[4:])+uint16(s.seg))
		b[10], b[11] = 0, 0
		ip := b[:int(b[0]&15)*4]
		binary.BigEndian.PutUint16(b[10:], ^fold(sum(ip, 0)))
	}
	tcp := b[s.p.L4:]
	binary.BigEndian.PutUint32(tcp[4:], binary.BigEndian.Uint32(tcp[4:])+uint32(s.at-s.headers))
	if end < len(s.packet) {
		tcp[13] &^= flagFIN | flagPSH
	}
	if s.seg > 0 {
		tcp[13] &^= flagCWR // RFC 3168 section 6.1.2: once
	}
	s.finish(b)
	s.at = end
	s.seg++
	s.done = end == len(s.packet)
	return n
}

// finish computes the transport checksum of b from nothing.
func (s *Splitter) finish(b []byte) {
	b[s.field], b[s.field+1] = 0, 0
	l4 := b[s.p.L4:]
	c := ^fold(sum(l4, pseudo(b, &s.p, len(l4))))
	if c == 0 && s.p.Proto == ProtoUDP {
		c = 0xffff // RFC 768: 0 means none
	}
	binary.BigEndian.PutUint16(b[s.field:], c)
}

// pseudo is the sum of the pseudo header (RFC 9293 section 3.1, RFC 8200
// section 8.1) with n bytes of payload.
func pseudo(b []byte, p *Packet, n int) uint64 {
	start := uint64(n) + uint64(p.Proto)
	if p.V6 {
		return sum(b[8:40], start)
	}
	return sum(b[12:20], start)
}

// Checksum is the Internet checksum of b (RFC 1071), with the pseudo header of
// the packet p if that is not nil.
func Checksum(b []byte, p *Packet, packet []byte) uint16 {
	start := uint64(0)
	if p != nil {
		start = pseudo(packet, p, len(b))
	}
	return ^fold(sum(b, start))
}

// sum adds b in 64-bit words; RFC 1071 section 2 says why that is the same.
func sum(b []byte, acc uint64) uint64 {
	var c uint64
	for len(b) >= 32 {
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b), c)
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b[8:]), c)
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b[16:]), c)
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b[24:]), c)
		b = b[32:]
	}
	for len(b) >= 8 {
		acc, c = bits.Add64(acc, binary.BigEndian.Uint64(b), c)
		b = b[8:]
	}
	var tail [8]byte
	copy(tail[:], b)
	acc, c = bits.Add64(acc, binary.BigEndian.Uint64(tail[:]), c)
	acc, c = bits.Add64(acc, 0, c)
	return acc + c
}

func fold(s uint64) uint16 {
	s = s>>32 + s&0xffffffff
	s = s>>32 + s&0xffffffff
	s = s>>16 + s&0xffff
	s = s>>16 + s&0xffff
	return uint16(s>>16 + s&0xffff)
}
