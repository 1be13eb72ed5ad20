package wire

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	wgtun "golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/tun"
	"github.com/culvert-dev/culvert/wire/carrier"
)

// namespace is a network namespace of the test's own, without a name.
type namespace struct{ h netns.NsHandle }

func newNamespace(t testing.TB) *namespace {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces and TUN devices need root")
	}
	n := &namespace{}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		h, err := netns.New()
		n.h = h
		if err == nil {
			var lo netlink.Link
			if lo, err = netlink.LinkByName("lo"); err == nil {
				err = netlink.LinkSetUp(lo)
			}
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.h.Close() })
	return n
}

// do runs f on a thread in the namespace.
func (n *namespace) do(t testing.TB, f func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := netns.Set(n.h)
		if err == nil {
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

const testMTU = 1420

// device makes a TUN device with the addresses, and routes to the others.
func (n *namespace) device(t testing.TB, own, others []netip.Addr) *tun.Device {
	t.Helper()
	var d *tun.Device
	n.do(t, func() error {
		f, err := tun.Create(tun.Config{Name: "wire0", MTU: testMTU})
		if err != nil {
			return err
		}
		if d, err = tun.Open(f); err != nil {
			return err
		}
		link, err := netlink.LinkByName("wire0")
		if err != nil {
			return err
		}
		for _, a := range own {
			addr := &netlink.Addr{IPNet: ipNet(a), Flags: 0x02} // IFA_F_NODAD
			if err := netlink.AddrAdd(link, addr); err != nil {
				return err
			}
		}
		for _, a := range others {
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(a)}); err != nil {
				return err
			}
		}
		return nil
	})
	return d
}

func ipNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// far is the other end in tests: a TUN device without a filter.
type far struct {
	*tun.Device
	events chan wgtun.Event
	gso    bool
}

func newFar(d *tun.Device, gso bool) *far {
	f := &far{d, make(chan wgtun.Event, 1), gso}
	f.events <- wgtun.EventUp
	return f
}

func (f *far) Read(bufs [][]byte, sizes []int, off int) (int, error) {
	if !f.gso {
		one, size := make([]byte, 1<<16), make([]int, 1)
		if _, err := f.ReadBatch([][]byte{one}, size, 1, true); err != nil {
			return 0, err
		}
		s, err := tun.NewSplitter(one, one[tun.HeaderLen:size[0]])
		if err != nil {
			return 0, err
		}
		k := 0
		for n := s.Next(bufs[0][off:]); n > 0 && k < len(bufs); n = s.Next(bufs[min(k, len(bufs)-1)][off:]) {
			sizes[k] = n
			k++
		}
		return k, nil
	}
	views, n := make([][]byte, len(bufs)), make([]int, len(bufs))
	for i := range views {
		views[i] = bufs[i][off-tun.HeaderLen : off+maxPacket]
	}
	k, err := f.ReadBatch(views, n, readLimit, true)
	for i := range k {
		sizes[i] = n[i] - tun.HeaderLen
	}
	return k, err
}

func (f *far) Write(bufs [][]byte, off int) (int, error) {
	for _, b := range bufs {
		tun.Prepare(b[off-tun.HeaderLen:off], b[off:], testMTU)
		if _, err := f.Device.Write(b[off-tun.HeaderLen:]); err != nil {
			return 0, err
		}
	}
	return len(bufs), nil
}

func (f *far) MTU() (int, error)          { return testMTU, nil }
func (f *far) Name() (string, error)      { return "far", nil }
func (f *far) Events() <-chan wgtun.Event { return f.events }
func (f *far) BatchSize() int             { return 128 }
func (f *far) Close() error               { close(f.events); return f.Device.Close() }

var (
	nearAddrs = []netip.Addr{netip.MustParseAddr("10.77.0.1"), netip.MustParseAddr("fd77::1")}
	farAddrs  = []netip.Addr{netip.MustParseAddr("10.77.0.2"), netip.MustParseAddr("fd77::2")}
	everyone  = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
)

// rig is a session's end and another one, in namespaces of their own, with a
// tunnel between them.
type rig struct {
	near, far             *namespace
	local                 *Local
	nearTunnel, farTunnel *Tunnel
	nearKey               Key
	nearBind, farBind     *carrier.Bind
}

func newRig(t testing.TB, gso bool) *rig {
	t.Helper()
	r := &rig{near: newNamespace(t), far: newNamespace(t)}
	d := r.near.device(t, nearAddrs, farAddrs)
	// OpenFlows reads the thread's namespace only where the process lives in it.
	r.local = NewLocal(LocalConfig{TUN: d, Tunnel: nearAddrs, MTU: testMTU, Split: split(gso)})
	r.join(t, r.local, newFar(r.far.device(t, farAddrs, nearAddrs), gso))
	return r
}

func (r *rig) join(t testing.TB, near, farDev wgtun.Device) {
	t.Helper()
	a, b := NewPrivateKey(), NewPrivateKey()
	r.nearKey = a
	r.nearBind, r.farBind = carrier.NewBind(carrier.BindConfig{}), carrier.NewBind(carrier.BindConfig{})
	var err error
	if r.nearTunnel, err = New(Config{Device: near, PrivateKey: a, Bind: r.nearBind}); err != nil {
		t.Fatal(err)
	}
	if r.farTunnel, err = New(Config{Device: farDev, PrivateKey: b, Bind: r.farBind, Passive: true}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.nearTunnel.Close(); r.farTunnel.Close() })
	r.dial(t)
	if err := r.farTunnel.SetPeer(a.Public(), everyone); err != nil {
		t.Fatal(err)
	}
	if err := r.nearTunnel.SetPeer(b.Public(), everyone); err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); r.nearTunnel.LastHandshake().IsZero(); time.Sleep(time.Millisecond) {
		if time.Since(start) > 3*time.Second {
			t.Fatal("no handshake")
		}
	}
}

// dial attaches a new pair of streams over loopback TCP.
func (r *rig) dial(t testing.TB) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	errs := make(chan error, 1)
	go func() {
		c, err := ln.Accept()
		if err == nil {
			var s *carrier.Stream
			s, _, err = carrier.Accept(context.Background(), c, func(carrier.Hello) carrier.Welcome { return carrier.Welcome{} })
			if err == nil {
				r.farBind.Attach(s)
			}
		}
		errs <- err
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	s, _, err := carrier.Dial(context.Background(), c, carrier.Hello{})
	if err := errors.Join(err, <-errs); err != nil {
		t.Fatal(err)
	}
	r.nearBind.Attach(s)
}

// connect opens a TCP connection from the near namespace to the far one.
func (r *rig) connect(t testing.TB, to netip.Addr) (near, farConn net.Conn) {
	t.Helper()
	var ln net.Listener
	r.far.do(t, func() (err error) {
		ln, err = net.Listen("tcp", netip.AddrPortFrom(to, 0).String())
		return err
	})
	defer ln.Close()
	r.near.do(t, func() (err error) {
		near, err = net.DialTimeout("tcp", ln.Addr().String(), 10*time.Second)
		return err
	})
	farConn, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { near.Close(); farConn.Close() })
	return near, farConn
}

// split is LocalConfig.Split of a peer that takes super-packets or not.
func split(gso bool) func() int {
	return func() int {
		if gso {
			return 0
		}
		return testMTU
	}
}
