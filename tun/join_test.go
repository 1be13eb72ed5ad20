package tun

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// buffers copies packets to buffers as WireGuard has them.
func buffers(offset int, packets ...[]byte) [][]byte {
	bufs := make([][]byte, len(packets))
	for i, p := range packets {
		b := make([]byte, joinCap)
		bufs[i] = b[:offset+copy(b[offset:], p)]
	}
	return bufs
}

// segments cuts packet for the MTU.
func segments(t testing.TB, packet []byte, mtu int) (all [][]byte) {
	t.Helper()
	s, err := Unfinished(packet)
	if err != nil {
		t.Fatal(err)
	}
	s.Limit(mtu)
	for {
		b := make([]byte, 65535)
		n := s.Next(b)
		if n == 0 {
			return all
		}
		if n > mtu {
			t.Fatalf("a segment of %d bytes", n)
		}
		all = append(all, b[:n])
	}
}

// same compares packets but for their checksums of TCP, which Join leaves alone,
// and IPv4 identifications.
func same(a, b []byte) bool {
	a, b = bytes.Clone(a), bytes.Clone(b)
	for _, p := range [][]byte{a, b} {
		h, _ := Parse(p)
		if !h.V6 {
			p[4], p[5], p[10], p[11] = 0, 0, 0, 0
		}
		if h.Proto == ProtoTCP && len(p) >= h.L4+18 {
			p[h.L4+16], p[h.L4+17] = 0, 0
		}
	}
	return bytes.Equal(a, b)
}

// port gives a packet another source port.
func port(p []byte, n uint16) []byte {
	p = bytes.Clone(p)
	h, _ := Parse(p)
	binary.BigEndian.PutUint16(p[h.L4:], n)
	return p
}

// TestJoin: what was cut is whole again, however the segments of several flows
// are mixed; each flow stays in order.
func TestJoin(t *testing.T) {
	const offset, mtu = 16, 1420
	payload := make([]byte, 64<<10)
	for i := range payload {
		payload[i] = byte(rand.Uint32())
	}
	for _, v6 := range []bool{false, true} {
		for _, flags := range []byte{0x10, 0x18} {
			for _, n := range []int{1, 1300, 1348, 1349, 5000, 40000} {
				a := build(v6, false, ProtoTCP, flags, payload[:n])
				b := port(a, 4001)
				as, bs := segments(t, a, mtu), segments(t, b, mtu)
				for _, s := range as {
					check(t, s)
				}
				var mixed [][]byte
				for len(as)+len(bs) > 0 {
					from := &as
					if len(as) == 0 || len(bs) > 0 && rand.IntN(2) == 0 {
						from = &bs
					}
					mixed = append(mixed, (*from)[0])
					*from = (*from)[1:]
				}
				got := Join(nil, buffers(offset, mixed...), offset, mtu)
				if len(got) != 2 {
					t.Fatalf("%d bytes of two flows became %d packets", n, len(got))
				}
				for _, j := range got {
					p := j.Buf[offset:]
					if !same(p, a) && !same(p, b) {
						t.Errorf("%d bytes came out changed", n)
					}
					if !v6 && Checksum(p[:20], nil, nil) != 0 {
						t.Error("wrong IP checksum")
					}
					hdr := make([]byte, HeaderLen)
					Prepare(hdr, p, j.Segment)
					if segment := int(binary.NativeEndian.Uint16(hdr[4:])); len(p) > mtu && segment != mtu-len(a)+n {
						t.Errorf("segments of %d bytes", segment)
					}
				}
			}
		}
	}
}

// TestJoinLeaves: what does not belong together stays apart, in order.
func TestJoinLeaves(t *testing.T) {
	const offset, mtu = 16, 1420
	data := build(false, false, ProtoTCP, 0x10, make([]byte, 2*1348))
	s := segments(t, data, mtu)
	change := func(p []byte, at int, to byte) []byte {
		p = bytes.Clone(p)
		p[at] ^= to
		return p
	}
	ack := build(false, false, ProtoTCP, 0x10, nil)
	for name, packets := range map[string][][]byte{
		"the other order":   {s[1], s[0]},
		"the same twice":    {s[0], s[0]},
		"another TTL":       {s[0], change(s[1], 8, 1)},
		"another TOS":       {s[0], change(s[1], 1, 1)},
		"don't fragment":    {s[0], change(s[1], 6, 0x40)},
		"another window":    {s[0], change(s[1], 34, 1)},
		"another ack":       {s[0], change(s[1], 28, 1)},
		"another timestamp": {s[0], change(s[1], 46, 1)},
		"FIN":               {s[0], change(s[1], 33, 0x01)},
		"CWR":               {s[0], change(s[1], 33, 0x80)},
		"URG":               {s[0], change(s[1], 33, 0x20)},
		"PSH before":        {change(s[0], 33, 0x08), s[1]},
		"an ACK in between": {s[0], ack, s[1]},
		"a longer one":      {segments(t, build(false, false, ProtoTCP, 0x10, make([]byte, 1000)), mtu)[0], s[1]},
		"UDP":               {build(false, false, ProtoUDP, 0, make([]byte, 100)), build(false, false, ProtoUDP, 0, make([]byte, 100))},
		"garbage":           {[]byte("hello"), {}, s[0]},
		"super-packets":     {data, data},
	} {
		bufs := buffers(offset, packets...)
		got := Join(nil, bufs, offset, mtu)
		if len(got) != len(packets) {
			t.Errorf("%s: %d packets became %d", name, len(packets), len(got))
			continue
		}
		for i, j := range got {
			if !bytes.Equal(j.Buf[offset:], packets[i]) {
				t.Errorf("%s: packet %d came out changed", name, i)
			}
		}
	}
	// Buffers that are not WireGuard's may be parts of something.
	whole := append(bytes.Clone(s[0]), s[1]...)
	got := Join(nil, [][]byte{whole[:len(s[0])], whole[len(s[0]):]}, 0, mtu)
	if len(got) != 2 || !bytes.Equal(whole[len(s[0]):], s[1]) {
		t.Error("Join wrote past the end of somebody's buffer")
	}
}

// FuzzJoin: no packet makes Join fail, or lose or invent bytes of payload.
func FuzzJoin(f *testing.F) {
	p := build(false, false, ProtoTCP, 0x10, make([]byte, 4000))
	for _, s := range segments(f, p, 1420) {
		f.Add(s, s)
	}
	f.Fuzz(func(t *testing.T, a, b []byte) {
		if len(a) > 60000 || len(b) > 60000 {
			return
		}
		before := len(a) + len(b)
		after := 0
		for _, j := range Join(nil, buffers(16, a, b), 16, 1420) {
			after += len(j.Buf) - 16
		}
		if after > before || after < before-120 {
			t.Fatalf("%d bytes became %d", before, after)
		}
	})
}

func BenchmarkJoin(b *testing.B) {
	packets := segments(b, build(false, false, ProtoTCP, 0x10, make([]byte, 60000)), 1420)
	bufs := buffers(16, packets...)
	var room [128]Joined
	b.SetBytes(60000)
	b.ReportAllocs()
	for b.Loop() {
		copy(bufs[0][16:], packets[0])
		Join(room[:0], bufs, 16, 1420)
	}
}
