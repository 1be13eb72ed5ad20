package tun

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestSplitAsKernel: the segments that Splitter makes of a super-packet are, byte
// for byte, those that the kernel makes of it. The kernel gets it on one TUN
// device and routes it to another, which takes no super-packets.
func TestSplitAsKernel(t *testing.T) {
	inNamespace(t, func() error {
		in, out, err := router(t)
		if err != nil {
			return err
		}
		defer in.Close()
		defer out.Close()
		payload := make([]byte, 64<<10)
		for i := range payload {
			payload[i] = byte(rand.Uint32())
		}
		const fin, psh, ack, urg, ece, cwr = 0x01, 0x08, 0x10, 0x20, 0x40, 0x80
		compared := 0
		for _, v6 := range []bool{false, true} {
			for _, ext := range []bool{false, true} {
				for _, flags := range []byte{ack, ack | psh, ack | psh | fin, ack | cwr, ack | psh | cwr | ece | fin, ack | urg} {
					for _, mtu := range []int{1420, 1419, 1281, 600, 333} {
						for _, n := range []int{1, mtu - 200, mtu, 2 * mtu, 3001, 20000, 40001, 60000} {
							if v6 && ext && n > mtu-100 {
								continue // such super-packets the kernel drops
							}
							if n/(mtu-100) > queueLen/2 {
								continue // more than the device's ring would hold
							}
							name := fmt.Sprintf("v6 %v, more headers %v, flags %#x, %d bytes in segments for %d", v6, ext, flags, n, mtu)
							packet := build(v6, ext, ProtoTCP, flags, payload[:n])
							if !v6 {
								binary.BigEndian.PutUint16(packet[4:], 0xfffe) // the identification wraps around
								finishIP(packet)
							}
							if err := asKernel(t, name, in, out, packet, mtu); err != nil {
								return fmt.Errorf("%s: %w", name, err)
							}
							compared++
						}
					}
				}
			}
		}
		t.Logf("%d super-packets", compared)
		return nil
	})
}

// router makes two TUN devices: what is written to in comes out of out in
// ordinary packets.
func router(t *testing.T) (in, out *Device, err error) {
	open := func(name string) *Device {
		if err != nil {
			return nil
		}
		var f *os.File
		if f, err = Create(Config{Name: name, MTU: 1420}); err != nil {
			return nil
		}
		var d *Device
		d, err = Open(f)
		return d
	}
	if in, out = open("in0"), open("out0"); err != nil {
		return nil, nil, err
	}
	if err := control(out.File(), func(fd int) {
		if e := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, 0); e != nil {
			t.Errorf("taking out0's offloads away: %v", e)
		}
	}); err != nil {
		return nil, nil, err
	}
	for _, set := range []string{"ipv4/conf/all/rp_filter 0", "ipv4/conf/in0/rp_filter 0", "ipv4/conf/in0/forwarding 1", "ipv4/ip_forward 1",
		"ipv6/conf/all/forwarding 1", "ipv6/conf/in0/forwarding 1"} {
		var path, value string
		fmt.Sscan(set, &path, &value)
		if err := os.WriteFile("/proc/sys/net/"+path, []byte(value), 0o644); err != nil {
			return nil, nil, err
		}
	}
	for dev, addrs := range map[string][]string{"in0": {"10.77.0.1", "fd77::1"}, "out0": {"10.77.0.2", "fd77::2"}} {
		link, err := netlink.LinkByName(dev)
		if err != nil {
			return nil, nil, err
		}
		for _, a := range addrs {
			addr := netip.MustParseAddr(a)
			dst := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(addr.BitLen(), addr.BitLen())}
			if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: dst}); err != nil {
				return nil, nil, fmt.Errorf("routing %s to %s: %w", a, dev, err)
			}
		}
	}
	return in, out, nil
}

// asKernel has the kernel and Splitter cut packet, and compares.
func asKernel(t *testing.T, name string, in, out *Device, packet []byte, mtu int) error {
	written := append(make([]byte, HeaderLen), packet...)
	Prepare(written, written[HeaderLen:], mtu)
	if _, err := in.Write(written); err != nil {
		return fmt.Errorf("writing: %w", err)
	}

	// The kernel routes it, which takes one off the hop limit.
	routed := bytes.Clone(written)
	if p := routed[HeaderLen:]; p[0]>>4 == 6 {
		p[7]--
	} else {
		p[8]--
		finishIP(p)
	}
	split, err := NewSplitter(routed, routed[HeaderLen:])
	if err != nil {
		return err
	}
	buf, want, sizes := make([]byte, HeaderLen+65535), make([]byte, 65535), make([]int, 1)
	for i := 0; ; i++ {
		n := split.Next(want)
		if n == 0 {
			return nil
		}
		for {
			late := time.AfterFunc(2*time.Second, out.Wake)
			_, err := out.ReadBatch([][]byte{buf}, sizes, 1, true)
			late.Stop()
			if err != nil {
				return fmt.Errorf("segment %d of the kernel: %w", i, err)
			}
			if p, ok := Parse(buf[HeaderLen:sizes[0]]); ok && (p.Dst == netip.MustParseAddr("10.77.0.2") || p.Dst == netip.MustParseAddr("fd77::2")) {
				break // else it is a router solicitation or the like
			}
		}
		got := buf[HeaderLen:sizes[0]]
		if buf[0]&needsCsum != 0 || buf[1] != gsoNone {
			return fmt.Errorf("the kernel has not finished segment %d: % x", i, buf[:HeaderLen])
		}
		if !bytes.Equal(got, want[:n]) {
			at := 0
			for at < min(len(got), n) && got[at] == want[at] {
				at++
			}
			t.Fatalf("%s: segment %d has %d bytes, the kernel's %d; they differ at %d\nours   % x\nkernel % x", name, i, n, len(got), at, want[:min(n, 92)], got[:min(len(got), 92)])
		}
	}
}

// finishIP writes the checksum of an IPv4 header.
func finishIP(p []byte) {
	p[10], p[11] = 0, 0
	binary.BigEndian.PutUint16(p[10:], Checksum(p[:p[0]&15*4], nil, nil))
}
