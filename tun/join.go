package tun

import (
	"bytes"
	"encoding/binary"
)

const (
	// joinMax bounds a joined packet, in bytes: what the kernel takes, and short of
	// the end of WireGuard's buffers, which holds accounts.
	joinMax = gsoMaxSize
	// joinFlows is how many flows of one batch are joined at the same time: more
	// are rarely among 128 packets, and each costs a look.
	joinFlows = 8
	// joinCap is the capacity of WireGuard's buffers. Others may be parts of
	// something, and writing past their end would change that.
	joinCap = 65535
)

// Joined is one packet after Join, from offset in Buf.
type Joined struct {
	Buf []byte
	// Segment is the longest packet that it was made of, or the MTU: what Prepare
	// takes.
	Segment int
	joined  bool
}

// Join makes super-packets of the TCP segments in bufs[i][offset:], where they
// follow each other: one system call, or one walk through a network stack, takes
// as much as dozens. It is what the kernel does with packets of a network card
// (GRO), by the same rules: nothing may differ but what a segmentation would make
// anew, and all but the last are of the same length. Segments longer than mtu are
// left alone, they are super-packets. It appends the packets to dst, in order for
// each flow, and writes to the buffers of first segments, if they are WireGuard's.
func Join(dst []Joined, bufs [][]byte, offset, mtu int) []Joined {
	var open [joinFlows]struct{ at, l4, headers, segment int }
	n := 0
next:
	for _, b := range bufs {
		packet := b[offset:]
		l4, headers, ok := joinable(packet)
		if !ok || len(packet) > mtu {
			// Of a flow that is being joined, or not: nothing may overtake it.
			if len(packet) > 0 {
				for i := range n {
					if sameFlow(dst[open[i].at].Buf[offset:], packet, open[i].l4) {
						n--
						open[i] = open[n]
						break
					}
				}
			}
			dst = append(dst, Joined{Buf: b, Segment: mtu})
			continue
		}
		for i := range n {
			o := &open[i]
			first := dst[o.at].Buf
			if !sameFlow(first[offset:], packet, o.l4) {
				continue
			}
			payload := packet[headers:]
			if o.l4 == l4 && o.headers == headers && len(payload) <= o.segment && len(first)-offset+len(payload) <= joinMax &&
				follows(first[offset:], packet, l4, headers) {
				first = append(first, payload...)
				first[offset+l4+13] |= packet[l4+13] & flagPSH
				dst[o.at] = Joined{Buf: first, Segment: o.headers + o.segment, joined: true}
				if len(payload) == o.segment && packet[l4+13]&flagPSH == 0 {
					continue next
				}
				n-- // a short one, or a pushed one, is the last
				open[i] = open[n]
				continue next
			}
			n--
			open[i] = open[n]
			break
		}
		dst = append(dst, Joined{Buf: b, Segment: mtu})
		if cap(b) == joinCap && packet[l4+13]&flagPSH == 0 && n < joinFlows {
			open[n].at, open[n].l4, open[n].headers, open[n].segment = len(dst)-1, l4, headers, len(packet)-headers
			n++
		}
	}
	for _, j := range dst {
		if j.joined {
			relength(j.Buf[offset:])
		}
	}
	return dst
}

// joinable finds the headers of a TCP segment with data and without anything
// special.
func joinable(b []byte) (l4, headers int, ok bool) {
	const flagACK, flagECE = 0x10, 0x40
	p, ok := Parse(b)
	if !ok || p.Proto != ProtoTCP || p.Fragment() || p.Routed || p.V6 && p.L4 != 40 || len(b) < p.L4+20 {
		return 0, 0, false
	}
	headers = p.L4 + int(b[p.L4+12]>>4)*4
	flags := b[p.L4+13] &^ (flagPSH | flagECE)
	return p.L4, headers, headers >= p.L4+20 && headers < len(b) && flags == flagACK
}

// sameFlow tells whether b is of the flow of a, whose TCP header is at l4. A
// packet that only looks so, with other headers in between, is taken for one.
func sameFlow(a, b []byte, l4 int) bool {
	if a[0]>>4 != b[0]>>4 || len(b) < l4+4 {
		return false
	}
	if a[0]>>4 == 4 {
		return bytes.Equal(a[12:20], b[12:20]) && bytes.Equal(a[l4:l4+4], b[l4:l4+4])
	}
	return bytes.Equal(a[8:40], b[8:40]) && bytes.Equal(a[l4:l4+4], b[l4:l4+4])
}

// follows tells whether segment b continues a, and differs in nothing else.
func follows(a, b []byte, l4, headers int) bool {
	if a[0]>>4 == 4 {
		// All but length, identification and checksum.
		if a[0] != b[0] || a[1] != b[1] || !bytes.Equal(a[6:10], b[6:10]) || !bytes.Equal(a[20:l4], b[20:l4]) {
			return false
		}
	} else if !bytes.Equal(a[:4], b[:4]) || a[6] != b[6] || a[7] != b[7] {
		return false
	}
	s, t := a[l4:headers], b[l4:headers]
	return binary.BigEndian.Uint32(s[4:])+uint32(len(a)-headers) == binary.BigEndian.Uint32(t[4:]) && // sequence number
		bytes.Equal(s[8:13], t[8:13]) && s[13]&^flagPSH == t[13]&^flagPSH && bytes.Equal(s[14:16], t[14:16]) && // up to the checksum
		bytes.Equal(s[18:], t[18:])
}

// relength writes the length of p into its IP header.
func relength(p []byte) {
	if p[0]>>4 == 6 {
		binary.BigEndian.PutUint16(p[4:], uint16(len(p)-40))
		return
	}
	binary.BigEndian.PutUint16(p[2:], uint16(len(p)))
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], ^fold(sum(p[:int(p[0]&15)*4], 0)))
}
