package wire

import (
	"net"
	"net/netip"
	"testing"

	"github.com/culvert-dev/culvert/tun"
)

// desk is a Local, an application's UDP socket behind it, and an answer to it.
type desk struct {
	local  *Local
	app    *net.UDPConn
	bufs   [][]byte
	sizes  []int
	data   []byte
	answer []byte // after deskOffset bytes
}

const deskOffset = 16

func newDesk(t testing.TB) *desk {
	n := newNamespace(t)
	d := &desk{data: make([]byte, 1200)}
	d.local = NewLocal(LocalConfig{TUN: n.device(t, nearAddrs, farAddrs), Tunnel: nearAddrs, MTU: testMTU})
	t.Cleanup(func() { d.local.Close() })
	n.do(t, func() (err error) {
		d.app, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(farAddrs[0], 53)))
		return err
	})
	t.Cleanup(func() { d.app.Close() })
	for range 128 {
		d.bufs = append(d.bufs, make([]byte, 65535))
	}
	d.sizes = make([]int, len(d.bufs))
	asked := d.up(t)
	d.answer = append(make([]byte, deskOffset), asked...)
	ip := d.answer[deskOffset:]
	copy(ip[12:], asked[16:20])
	copy(ip[16:], asked[12:16])
	copy(ip[20:], asked[22:24])
	copy(ip[22:], asked[20:22])
	ip[10], ip[11] = 0, 0
	sum := tun.Checksum(ip[:20], nil, nil)
	ip[10], ip[11] = byte(sum>>8), byte(sum)
	return d
}

// up sends the application's datagram and returns it as WireGuard gets it.
func (d *desk) up(t testing.TB) []byte {
	if _, err := d.app.Write(d.data); err != nil {
		t.Fatal(err)
	}
	for {
		n, err := d.local.Read(d.bufs, d.sizes, deskOffset)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n { // among what the kernel says by itself
			if p := d.bufs[i][deskOffset : deskOffset+d.sizes[i]]; len(p) == 28+len(d.data) {
				return p
			}
		}
	}
}

// down has the answer come out of WireGuard and the application read it.
func (d *desk) down(t testing.TB) {
	one := [1][]byte{d.answer}
	if _, err := d.local.Write(one[:], deskOffset); err != nil {
		t.Fatal(err)
	}
	if n, err := d.app.Read(d.data); err != nil || n != len(d.data) {
		t.Fatal(n, err, d.local.Drops())
	}
}

func TestLocalAllocatesNothing(t *testing.T) {
	d := newDesk(t)
	if n := testing.AllocsPerRun(200, func() { d.up(t) }); n > 0 {
		t.Errorf("%v allocations per packet to the cluster", n)
	}
	if n := testing.AllocsPerRun(200, func() { d.down(t) }); n > 0 {
		t.Errorf("%v allocations per packet from the cluster", n)
	}
}

func BenchmarkLocal(b *testing.B) {
	for name, move := range map[string]func(*desk, testing.TB){"Read": func(d *desk, t testing.TB) { d.up(t) }, "Write": (*desk).down} {
		b.Run(name, func(b *testing.B) {
			d := newDesk(b)
			b.SetBytes(int64(len(d.data)))
			b.ReportAllocs()
			for b.Loop() {
				move(d, b)
			}
		})
	}
}
