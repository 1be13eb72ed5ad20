package tun

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
)

// build makes a TCP or UDP packet with a right checksum. With ext, it has IPv4
// options or an IPv6 extension header.
func build(v6, ext bool, proto uint8, flags byte, payload []byte) []byte {
	var l4 []byte
	if proto == ProtoTCP {
		l4 = make([]byte, 32, 32+len(payload))
		l4[12], l4[13] = 8<<4, flags
		binary.BigEndian.PutUint32(l4[4:], 0xfffffff0) // wraps around
		copy(l4[20:], []byte{1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8})
	} else {
		l4 = make([]byte, 8, 8+len(payload))
		binary.BigEndian.PutUint16(l4[4:], uint16(8+len(payload)))
	}
	binary.BigEndian.PutUint16(l4, 4000)
	binary.BigEndian.PutUint16(l4[2:], 80)
	l4 = append(l4, payload...)
	var ip []byte
	if v6 {
		ip = make([]byte, 40)
		ip[0], ip[6], ip[7] = 0x60, proto, 64
		if ext {
			ip[6] = protoDestOpts
			ip = append(ip, proto, 0, 1, 4, 0, 0, 0, 0)
		}
		binary.BigEndian.PutUint16(ip[4:], uint16(len(ip)-40+len(l4)))
		copy(ip[8:], netip.MustParseAddr("fd77::1").AsSlice())
		copy(ip[24:], netip.MustParseAddr("fd77::2").AsSlice())
	} else {
		ip = make([]byte, 20)
		ip[0] = 0x45
		if ext {
			ip = append(ip, 1, 1, 1, 0)
			ip[0] = 0x46
		}
		ip[8], ip[9], ip[5] = 64, proto, 0xff
		binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+len(l4)))
		copy(ip[12:], []byte{10, 77, 0, 1, 10, 77, 0, 2})
		binary.BigEndian.PutUint16(ip[10:], Checksum(ip, nil, nil))
	}
	packet := append(ip, l4...)
	p, _ := Parse(packet)
	field := p.L4 + 16
	if proto == ProtoUDP {
		field = p.L4 + 6
	}
	c := Checksum(packet[p.L4:], &p, packet)
	if c == 0 && proto == ProtoUDP {
		c = 0xffff
	}
	binary.BigEndian.PutUint16(packet[field:], c)
	return packet
}

// check fails unless packet is well formed with right checksums.
func check(t *testing.T, packet []byte) Packet {
	t.Helper()
	p, ok := Parse(packet)
	if !ok {
		t.Fatalf("malformed: % x", packet[:min(len(packet), 60)])
	}
	if !p.V6 && Checksum(packet[:packet[0]&15*4], nil, nil) != 0 {
		t.Fatal("wrong IP checksum")
	}
	if c := Checksum(packet[p.L4:], &p, packet); c != 0 {
		t.Fatalf("wrong transport checksum, off by %#x", c)
	}
	return p
}

// TestSplit: what Prepare makes one super-packet of, NewSplitter makes packets
// of, which carry the same bytes at the right places.
func TestSplit(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for _, v6 := range []bool{false, true} {
		for _, ext := range []bool{false, true} {
			for _, n := range []int{0, 1, 1300, 1368, 1369, 3000, 40001, 65000} {
				t.Run(fmt.Sprintf("v6=%v/ext=%v/%d", v6, ext, n), func(t *testing.T) {
					payload := make([]byte, n)
					for i := range payload {
						payload[i] = byte(rng.Uint32())
					}
					packet := build(v6, ext, ProtoTCP, flagCWR|flagFIN|flagPSH|0x10, payload)
					hdr := make([]byte, HeaderLen)
					whole := bytes.Clone(packet)
					Prepare(hdr, whole, 1420)
					if hdr[0] != needsCsum || (hdr[1] != 0) != (len(packet) > 1420) {
						t.Fatalf("header % x", hdr)
					}
					s, err := NewSplitter(hdr, whole)
					if err != nil {
						t.Fatal(err)
					}
					var got []byte
					buf := make([]byte, 65535)
					for seg := 0; ; seg++ {
						k := s.Next(buf)
						if k == 0 {
							break
						}
						if k > 1420 {
							t.Fatalf("a segment of %d bytes", k)
						}
						p := check(t, buf[:k])
						tcp := buf[p.L4:k]
						if seq := binary.BigEndian.Uint32(tcp[4:]); seq != uint32(0xfffffff0)+uint32(len(got)) {
							t.Fatalf("sequence number %#x after %d bytes", seq, len(got))
						}
						got = append(got, tcp[32:]...)
						last := len(got) == n
						if (tcp[13]&flagFIN != 0) != last || (tcp[13]&flagPSH != 0) != last || (tcp[13]&flagCWR != 0) != (seg == 0) {
							t.Fatalf("segment %d, last %v: flags %#x", seg, last, tcp[13])
						}
						if !v6 && binary.BigEndian.Uint16(buf[4:]) != uint16(seg)+binary.BigEndian.Uint16(packet[4:]) {
							t.Fatal("IP identification")
						}
					}
					if !bytes.Equal(got, payload) {
						t.Fatalf("%d bytes of %d came out", len(got), n)
					}
				})
			}
		}
	}
}

func TestPrepareUDP(t *testing.T) {
	for _, v6 := range []bool{false, true} {
		packet := build(v6, false, ProtoUDP, 0, []byte("hello"))
		want := bytes.Clone(packet)
		hdr := make([]byte, HeaderLen)
		Prepare(hdr, packet, 1420)
		s, err := NewSplitter(hdr, packet)
		if err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 2000)
		if n := s.Next(buf); !bytes.Equal(buf[:n], want) || s.Next(buf) != 0 {
			t.Fatal("the finished packet differs")
		}
	}
}

// TestPrepareFragment: a fragment goes as it is.
func TestPrepareFragment(t *testing.T) {
	packet := build(false, false, ProtoUDP, 0, make([]byte, 100))
	packet[6] = 0x20
	want := bytes.Clone(packet)
	hdr := bytes.Repeat([]byte{0xff}, HeaderLen)
	Prepare(hdr, packet, 1420)
	if !bytes.Equal(packet, want) || !bytes.Equal(hdr, make([]byte, HeaderLen)) {
		t.Fatal("a fragment was touched")
	}
}

func TestChecksumEverySize(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	for n := range 200 {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(rng.Uint32()) | 0xf0 // carries
		}
		var s uint32
		for i := 0; i < n; i += 2 {
			s += uint32(b[i]) << 8
			if i+1 < n {
				s += uint32(b[i+1])
			}
		}
		for s>>16 != 0 {
			s = s>>16 + s&0xffff
		}
		if got := Checksum(b, nil, nil); got != ^uint16(s) {
			t.Fatalf("%d bytes: %#x, want %#x", n, got, ^uint16(s))
		}
	}
}

func TestParseRejects(t *testing.T) {
	good := build(false, true, ProtoTCP, 0x10, []byte("x"))
	good6 := build(true, true, ProtoTCP, 0x10, []byte("x"))
	change := func(b []byte, i int, v byte) []byte { c := bytes.Clone(b); c[i] = v; return c }
	for name, b := range map[string][]byte{
		"empty": {}, "short": good[:19], "version": change(good, 0, 0x56), "header too short": change(good, 0, 0x44),
		"header too long": change(good, 0, 0x4f)[:50], "total length": change(good, 3, 0), "trailing": append(bytes.Clone(good), 0),
		"option length 0": change(change(good, 20, 7), 21, 0), "option too long": change(change(good, 20, 7), 21, 5),
		"v6 short": good6[:39], "v6 length": change(good6, 5, 1), "v6 extension too long": change(good6, 41, 200),
	} {
		if _, ok := Parse(b); ok {
			t.Errorf("%s: accepted", name)
		}
	}
	for name, b := range map[string][]byte{
		"lsrr":    change(change(change(change(good, 20, 131), 21, 3), 22, 4), 23, 0),
		"routing": change(good6, 6, protoRouting),
	} {
		if p, ok := Parse(b); !ok || !p.Routed {
			t.Errorf("%s: not seen", name)
		}
	}
}

func FuzzSplitter(f *testing.F) {
	for _, v6 := range []bool{false, true} {
		b := build(v6, true, ProtoTCP, 0x18, make([]byte, 5000))
		hdr := make([]byte, HeaderLen)
		Prepare(hdr, b, 1420)
		f.Add(hdr, b)
	}
	buf := make([]byte, 65535)
	f.Fuzz(func(t *testing.T, hdr, packet []byte) {
		if len(packet) > 65535 {
			return
		}
		s, err := NewSplitter(hdr, packet)
		if err != nil {
			return
		}
		total := 0
		for n := s.Next(buf); n > 0; n = s.Next(buf) {
			if _, ok := Parse(buf[:n]); !ok {
				t.Fatalf("made a malformed packet of % x, % x", hdr, packet)
			}
			if total += n; total > 65535*200 {
				t.Fatal("endless")
			}
		}
	})
}

func FuzzPrepare(f *testing.F) {
	f.Add(build(false, true, ProtoTCP, 0x18, make([]byte, 5000)))
	f.Add(build(true, true, ProtoUDP, 0, make([]byte, 50)))
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) > 65535 {
			return
		}
		hdr := make([]byte, HeaderLen)
		Prepare(hdr, packet, 1420)
		if _, ok := Parse(packet); !ok && !bytes.Equal(hdr, make([]byte, HeaderLen)) {
			t.Fatal("offloads for a malformed packet")
		}
		if _, ok := Parse(packet); ok {
			if _, err := NewSplitter(hdr, packet); err != nil {
				t.Fatalf("%v: hdr % x packet % x", err, hdr, packet)
			}
		}
	})
}

func BenchmarkPrepare(b *testing.B) {
	packet := build(false, false, ProtoTCP, 0x10, make([]byte, 64000))
	hdr := make([]byte, HeaderLen)
	b.ReportAllocs()
	for b.Loop() {
		Prepare(hdr, packet, 1420)
	}
}
