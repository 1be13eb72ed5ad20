package tun

import (
	"errors"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// inNamespace runs f on a thread in a network namespace of its own.
func inNamespace(t *testing.T, f func() error) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces and TUN devices need root")
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine
		h, err := netns.New()
		if err == nil {
			defer h.Close()
			err = f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestCreate(t *testing.T) {
	inNamespace(t, func() error {
		if err := Available(); err != nil {
			return err
		}
		links, err := netlink.LinkList()
		if err != nil || len(links) != 1 {
			return errors.New("Available left a device behind")
		}
		f, err := Create(Config{Name: "culvert0", MTU: 1420})
		if err != nil {
			return err
		}
		link, err := netlink.LinkByName("culvert0")
		if err != nil {
			return err
		}
		a := link.Attrs()
		if a.MTU != 1420 || a.TxQLen != queueLen || a.Flags&net.FlagUp == 0 || a.GSOMaxSize != gsoMaxSize {
			t.Errorf("attributes: %+v", a)
		}
		for path, want := range map[string]string{"ipv4/conf/culvert0/rp_filter": "1", "ipv4/conf/culvert0/forwarding": "0",
			"ipv4/conf/culvert0/accept_redirects": "0", "ipv6/conf/culvert0/accept_ra": "0", "ipv6/conf/culvert0/addr_gen_mode": "1"} {
			if b, err := os.ReadFile("/proc/sys/net/" + path); err != nil || strings.TrimSpace(string(b)) != want {
				t.Errorf("%s is %q, %v", path, b, err)
			}
		}
		if addrs, _ := netlink.AddrList(link, netlink.FAMILY_ALL); len(addrs) != 0 {
			t.Errorf("addresses: %v", addrs)
		}
		if _, err := Create(Config{Name: "culvert0", MTU: 1420}); err == nil {
			t.Error("the same device was made twice")
		}
		d, err := Open(f)
		if err != nil {
			return err
		}
		// A blocked read is released by Wake and by Close.
		for _, release := range []func(){d.Wake, func() { d.Close() }} {
			time.AfterFunc(20*time.Millisecond, release)
			if _, err := d.ReadBatch([][]byte{make([]byte, 1<<16)}, make([]int, 1), 1, true); err == nil {
				t.Error("read a packet of nobody")
			}
		}
		for start := time.Now(); ; time.Sleep(time.Millisecond) { // Close may be the last to let go
			if _, err := netlink.LinkByName("culvert0"); err != nil {
				break
			}
			if time.Since(start) > 2*time.Second {
				t.Error("the device outlived its descriptor")
				break
			}
		}
		if f, err = Create(Config{Name: "culvert1", MTU: 1420}); err != nil {
			return err
		}
		defer f.Close()
		if err := Delete("culvert1"); err != nil {
			return err
		}
		if err := Delete("culvert1"); err != nil {
			return err
		}
		// A persistent one, whoever's it is, is not joined.
		if err := netlink.LinkAdd(&netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "culvert2"}, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR}); err != nil {
			return err
		}
		if f, err := Create(Config{Name: "culvert2", MTU: 1420}); err == nil || !strings.Contains(err.Error(), "in use") {
			f.Close()
			t.Errorf("joined a device that was there: %v", err)
		}
		if err := Delete("culvert2"); err != nil {
			return err
		}
		if err := Delete("lo"); err == nil {
			t.Error("deleted the loopback device")
		}
		return nil
	})
}

func TestOpenRefuses(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := Open(r); err == nil {
		t.Fatal("a pipe is no TUN device")
	}
}
