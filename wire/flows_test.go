package wire

import (
	"encoding/binary"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/tun"
)

var (
	me4, me6       = nearAddrs[0], nearAddrs[1]
	there4, there6 = farAddrs[0], farAddrs[1]
)

// ip builds a packet around the payload.
func ip(src, dst netip.Addr, proto uint8, l4 []byte) []byte {
	var b []byte
	if src.Is4() {
		b = make([]byte, 20)
		b[0], b[8], b[9] = 0x45, 64, proto
		copy(b[12:], src.AsSlice())
		copy(b[16:], dst.AsSlice())
		binary.BigEndian.PutUint16(b[2:], uint16(20+len(l4)))
	} else {
		b = make([]byte, 40)
		b[0], b[6], b[7] = 0x60, proto, 64
		copy(b[8:], src.AsSlice())
		copy(b[24:], dst.AsSlice())
		binary.BigEndian.PutUint16(b[4:], uint16(len(l4)))
	}
	return append(b, l4...)
}

func segment(sport, dport uint16, flags byte) []byte {
	b := make([]byte, 20)
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	b[12], b[13] = 5<<4, flags
	return b
}

func datagram(sport, dport uint16, n int) []byte {
	b := make([]byte, 8+n)
	binary.BigEndian.PutUint16(b, sport)
	binary.BigEndian.PutUint16(b[2:], dport)
	binary.BigEndian.PutUint16(b[4:], uint16(8+n))
	return b
}

func echoMessage(typ byte, id uint16) []byte {
	b := make([]byte, 16)
	b[0] = typ
	binary.BigEndian.PutUint16(b[4:], id)
	return b
}

// frag makes an IPv4 packet a fragment.
func frag(b []byte, id uint16, offset int, more bool) []byte {
	binary.BigEndian.PutUint16(b[4:], id)
	f := uint16(offset / 8)
	if more {
		f |= 0x2000
	}
	binary.BigEndian.PutUint16(b[6:], f)
	return b
}

// frag6 puts a fragment header into an IPv6 packet.
func frag6(src, dst netip.Addr, proto uint8, data []byte, id uint32, offset int, more bool) []byte {
	h := make([]byte, 8, 8+len(data))
	h[0] = proto
	f := uint16(offset)
	if more {
		f |= 1
	}
	binary.BigEndian.PutUint16(h[2:], f)
	binary.BigEndian.PutUint32(h[4:], id)
	return ip(src, dst, 44, append(h, data...))
}

func icmpError(typ byte, about []byte) []byte {
	return append([]byte{typ, 1, 0, 0, 0, 0, 0, 0}, about...)
}

type filterTest struct {
	*filter
	t *testing.T
}

func newFilterTest(t *testing.T) filterTest { return filterTest{newFilter(nearAddrs), t} }

func (f filterTest) out(b []byte) {
	f.t.Helper()
	p, ok := tun.Parse(b)
	f.lock()
	defer f.mu.Unlock()
	if !ok || !f.outbound(&p, b) {
		f.t.Fatal("an honest packet was kept back")
	}
}

func (f filterTest) in(b []byte, want reason) {
	f.t.Helper()
	r := dropMalformed
	if p, ok := tun.Parse(b); ok {
		f.lock()
		r = f.inbound(&p, b)
		f.mu.Unlock()
	}
	if r != want {
		f.t.Fatalf("%q instead of %q", reasonNames[r], reasonNames[want])
	}
}

const (
	fin, syn, rst, ack = 0x01, 0x02, 0x04, 0x10
)

func TestFilterTCP(t *testing.T) {
	for i := range nearAddrs {
		f := newFilterTest(t)
		me, there := nearAddrs[i], farAddrs[i]
		in := func(flags byte) []byte { return ip(there, me, tun.ProtoTCP, segment(80, 4000, flags)) }
		f.in(in(syn|ack), dropUnasked)
		f.out(ip(me, there, tun.ProtoTCP, segment(4000, 80, syn)))
		f.in(in(syn|ack), pass)
		f.in(in(syn), dropSYN) // not even on an open flow
		f.in(ip(there, me, tun.ProtoTCP, segment(81, 4000, ack)), dropUnasked)
		f.in(ip(there, me, tun.ProtoTCP, segment(80, 22, ack)), dropUnasked)
		f.in(ip(there, me, tun.ProtoTCP, segment(80, 4000, ack)[:19]), dropMalformed)
		f.start = f.start.Add(-23 * time.Hour)
		f.in(in(ack), pass)
		f.out(ip(me, there, tun.ProtoTCP, segment(4000, 80, fin|ack)))
		f.in(in(fin|ack), pass)
		f.start = f.start.Add(-2 * time.Minute)
		f.in(in(ack), dropUnasked)
		// A restarted session sees a segment of an old connection.
		f.out(ip(me, there, tun.ProtoTCP, segment(4001, 80, ack)))
		f.in(ip(there, me, tun.ProtoTCP, segment(80, 4001, ack)), pass)
		// The machine's answers to strangers open nothing.
		for j, flags := range []byte{rst, rst | ack, syn | ack} {
			f.out(ip(me, there, tun.ProtoTCP, segment(uint16(5000+j), 80, flags)))
			f.in(ip(there, me, tun.ProtoTCP, segment(80, uint16(5000+j), ack)), dropUnasked)
		}
	}
}

func TestFilterAddresses(t *testing.T) {
	f := newFilterTest(t)
	f.out(ip(me4, there4, tun.ProtoUDP, datagram(4000, 53, 10)))
	reply := datagram(53, 4000, 10)
	f.in(ip(there4, me4, tun.ProtoUDP, reply), pass)
	for _, dst := range []string{"192.168.1.1", "127.0.0.1", "10.77.0.7", "224.0.0.251", "255.255.255.255"} {
		f.in(ip(there4, netip.MustParseAddr(dst), tun.ProtoUDP, reply), dropDestination)
	}
	for _, src := range []string{"127.0.0.1", "0.0.0.0", "224.0.0.1", "169.254.169.254", "255.255.255.255", "240.0.0.1", "10.77.0.1"} {
		f.in(ip(netip.MustParseAddr(src), me4, tun.ProtoUDP, reply), dropSource)
	}
	f.in(ip(netip.MustParseAddr("10.77.0.9"), me4, tun.ProtoUDP, reply), dropUnasked)
	for _, src := range []string{"::1", "::", "fe80::1", "ff02::1", "fd77::1", "::ffff:127.0.0.1"} {
		f.in(ip(netip.MustParseAddr(src), me6, tun.ProtoUDP, reply), dropSource)
	}
	// Router and neighbour messages, redirects, requests.
	for _, typ := range []byte{128, 129, 130, 133, 134, 135, 136, 137} {
		f.in(ip(there6, me6, tun.ProtoICMPv6, echoMessage(typ, 1)), dropUnasked)
	}
	for _, typ := range []byte{0, 4, 5, 8, 9, 13, 17} {
		f.in(ip(there4, me4, tun.ProtoICMP, append(echoMessage(typ, 1), make([]byte, 40)...)), dropUnasked)
	}
	f.in(ip(there4, me4, 47, reply), dropUnasked)
	p, _ := tun.Parse(ip(netip.MustParseAddr("192.168.1.5"), there4, tun.ProtoUDP, reply))
	if f.outbound(&p, nil) {
		t.Fatal("a foreign source left the machine")
	}
}

func TestFilterICMP(t *testing.T) {
	f := newFilterTest(t)
	f.out(ip(me4, there4, tun.ProtoICMP, echoMessage(8, 7)))
	f.in(ip(there4, me4, tun.ProtoICMP, echoMessage(0, 7)), pass)
	f.in(ip(there4, me4, tun.ProtoICMP, echoMessage(0, 8)), dropUnasked)
	f.out(ip(me6, there6, tun.ProtoICMPv6, echoMessage(128, 7)))
	f.in(ip(there6, me6, tun.ProtoICMPv6, echoMessage(129, 7)), pass)

	mine := ip(me4, there4, tun.ProtoTCP, segment(4000, 80, syn))
	router := netip.MustParseAddr("10.77.9.9")
	f.in(ip(router, me4, tun.ProtoICMP, icmpError(3, mine)), dropUnasked)
	f.out(mine)
	f.in(ip(router, me4, tun.ProtoICMP, icmpError(3, mine)), pass)
	f.in(ip(router, me4, tun.ProtoICMP, icmpError(3, mine[:28])), pass) // eight bytes are enough
	f.in(ip(router, me4, tun.ProtoICMP, icmpError(3, mine[:27])), dropUnasked)
	f.in(ip(router, me4, tun.ProtoICMP, icmpError(5, mine)), dropUnasked) // redirect
	f.in(ip(router, me4, tun.ProtoICMP, icmpError(3, ip(netip.MustParseAddr("192.168.1.5"), there4, tun.ProtoTCP, segment(4000, 80, syn)))), dropUnasked)
	mine6 := ip(me6, there6, tun.ProtoUDP, datagram(4000, 53, 0))
	f.out(mine6)
	f.in(ip(there6, me6, tun.ProtoICMPv6, icmpError(2, mine6)), pass)
	f.in(ip(there6, me6, tun.ProtoICMPv6, icmpError(2, ip(me6, there6, tun.ProtoUDP, datagram(4001, 53, 0)))), dropUnasked)
}

func TestFilterFragments(t *testing.T) {
	f := newFilterTest(t)
	f.out(ip(me4, there4, tun.ProtoUDP, datagram(4000, 53, 10)))
	first := datagram(53, 4000, 1392)
	later := func(id uint16, offset int) []byte {
		return frag(ip(there4, me4, tun.ProtoUDP, make([]byte, 400)), id, offset, false)
	}
	f.in(later(1, 1400), dropFragment)
	f.in(frag(ip(there4, me4, tun.ProtoUDP, first), 1, 0, true), pass)
	f.in(later(1, 1400), pass)
	f.in(later(2, 1400), dropFragment)
	f.in(later(1, 8), dropFragment) // would overwrite the first one
	f.in(later(1, 1392), dropFragment)
	f.in(frag(ip(there4, me4, tun.ProtoUDP, datagram(53, 22, 1392)), 3, 0, true), dropUnasked)
	f.in(later(3, 1400), dropFragment)
	f.in(frag(ip(there4, me4, tun.ProtoTCP, segment(53, 4000, ack)[:16]), 4, 0, true), dropMalformed)
	f.start = f.start.Add(-time.Minute)
	f.in(later(1, 1400), dropFragment)

	f.out(ip(me6, there6, tun.ProtoUDP, datagram(4000, 53, 10)))
	f.in(frag6(there6, me6, tun.ProtoUDP, make([]byte, 400), 9, 1400, false), dropFragment)
	f.in(frag6(there6, me6, tun.ProtoUDP, first, 9, 0, true), pass)
	f.in(frag6(there6, me6, tun.ProtoUDP, make([]byte, 400), 9, 1400, false), pass)
	// Many datagrams push the oldest out and use no more memory.
	for id := range 5 * maxFragments {
		f.start = f.start.Add(-4 * time.Minute)
		f.in(frag(ip(there4, me4, tun.ProtoUDP, datagram(53, 4000, 16)), uint16(id), 0, true), dropUnasked)
		f.out(ip(me4, there4, tun.ProtoUDP, datagram(4000, 53, 10)))
		f.in(frag(ip(there4, me4, tun.ProtoUDP, datagram(53, 4000, 16)), uint16(id), 0, true), pass)
	}
	if len(f.frags) > maxFragments {
		t.Fatalf("%d fragments", len(f.frags))
	}
}

// TestFilterBound: a port scan does not push established connections out, and
// the table stays bounded.
func TestFilterBound(t *testing.T) {
	f := newFilterTest(t)
	f.out(ip(me4, there4, tun.ProtoTCP, segment(4000, 80, syn)))
	f.in(ip(there4, me4, tun.ProtoTCP, segment(80, 4000, syn|ack)), pass)
	for i := range 2 * maxFlows {
		f.out(ip(me4, there4, tun.ProtoUDP, datagram(uint16(i), uint16(i>>15), 0)))
	}
	if len(f.flows) > maxFlows {
		t.Fatalf("%d flows", len(f.flows))
	}
	f.in(ip(there4, me4, tun.ProtoTCP, segment(80, 4000, ack)), pass)
	f.in(ip(there4, me4, tun.ProtoUDP, datagram(0, 0, 0)), dropUnasked)
	if n := testing.AllocsPerRun(1000, func() {
		f.out(ip4packet)
		f.in(ip4packetBack, pass)
	}); n > 0 {
		t.Fatalf("%v allocations per packet", n)
	}
}

var (
	ip4packet     = ip(me4, there4, tun.ProtoTCP, segment(4000, 80, ack))
	ip4packetBack = ip(there4, me4, tun.ProtoTCP, segment(80, 4000, ack))
)

func TestSeed(t *testing.T) {
	dir := t.TempDir()
	lines := "  sl  local_address rem_address   st\n" +
		"   0: 01004D0A:0FA0 02004D0A:0050 01 0 0\n" + // 10.77.0.1:4000 to 10.77.0.2:80, established
		"   1: 01004D0A:0016 00000000:0000 0A 0 0\n" + // listening
		"   2: 0100007F:0FA0 0100007F:0050 01 0 0\n" // loopback
	if err := os.WriteFile(filepath.Join(dir, "tcp"), []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}
	flows := openFlows(dir, nearAddrs)
	if len(flows) != 1 || flows[0].Local.String() != "10.77.0.1:4000" || flows[0].Remote.String() != "10.77.0.2:80" {
		t.Fatalf("%v", flows)
	}
	f := newFilterTest(t)
	f.seed(flows)
	f.in(ip(there4, me4, tun.ProtoTCP, segment(80, 4000, ack)), pass)
	f.in(ip(there4, me4, tun.ProtoTCP, segment(80, 4001, ack)), dropUnasked)
}

// TestImports: the root daemon links tun, and the agent links wire.
func TestImports(t *testing.T) {
	for pkg, forbidden := range map[string][]string{
		"github.com/culvert-dev/culvert/tun":      {"k8s.io/", "golang.zx2c4.com/wireguard", "gvisor.dev/"},
		"github.com/culvert-dev/culvert/wire/...": {"k8s.io/"},
	} {
		out, err := exec.Command("go", "list", "-deps", pkg).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for l := range strings.Lines(string(out)) {
			for _, f := range forbidden {
				if strings.HasPrefix(l, f) {
					t.Errorf("%s imports %s", pkg, l)
				}
			}
		}
	}
}

// FuzzInbound: no packet from the agent passes an empty filter, none crashes it.
func FuzzInbound(f *testing.F) {
	f.Add(ip(there4, me4, tun.ProtoTCP, segment(80, 4000, ack)))
	f.Add(frag6(there6, me6, tun.ProtoUDP, datagram(53, 4000, 100), 9, 0, true))
	f.Add(ip(there4, me4, tun.ProtoICMP, icmpError(3, ip(me4, there4, tun.ProtoTCP, segment(4000, 80, syn)))))
	f.Fuzz(func(t *testing.T, b []byte) {
		ft := newFilter(nearAddrs)
		if p, ok := tun.Parse(b); ok {
			ft.lock()
			r := ft.inbound(&p, b)
			ft.mu.Unlock()
			if r == pass {
				t.Fatalf("% x passed", b)
			}
		}
	})
}
