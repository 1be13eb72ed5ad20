package session

import (
	"context"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// A change of the machine's network is told to a process without privilege.
func TestNetworkChangeIsNoticed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	changed := make(chan struct{}, 100)
	ended := make(chan error, 1)
	inside := make(chan netns.NsHandle, 1)
	go func() {
		defer close(inside)
		runtime.LockOSThread() // never unlocked: the namespace ends with the thread
		ns, err := netns.New()
		if err != nil {
			ended <- err
			return
		}
		inside <- ns
		ended <- watchNetwork(ctx, func() { changed <- struct{}{} })
	}()
	ns, ok := <-inside
	if !ok {
		t.Fatal(<-ended)
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond) // for the socket to be bound
	addr, _ := netlink.ParseAddr("192.0.2.1/24")
	for what, change := range map[string]func() error{
		"link up":     func() error { return h.LinkSetUp(lo) },
		"new address": func() error { return h.AddrAdd(lo, addr) },
	} {
		for len(changed) > 0 {
			<-changed
		}
		if err := change(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-changed:
		case <-time.After(2 * time.Second):
			t.Errorf("%s: nothing noticed", what)
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

func TestSleepClock(t *testing.T) {
	var c sleepClock
	now := time.Now()
	for i, step := range []struct{ wall, mono, want time.Duration }{
		{0, 0, 0},
		{time.Second, time.Second, 0},
		{time.Minute, time.Second, 59 * time.Second},
		{time.Second, time.Second, 0},
		{-time.Hour, time.Second, -time.Hour - time.Second},
		{time.Second, time.Second, 0},
	} {
		now = now.Add(step.wall)
		if got := c.slept(now, c.mono+step.mono); got != step.want {
			t.Errorf("step %d: %v, want %v", i, got, step.want)
		}
	}
}

func TestHasAddr(t *testing.T) {
	own := []net.Addr{&net.IPNet{IP: net.IPv4(192, 0, 2, 7), Mask: net.CIDRMask(24, 32)}, &net.IPNet{IP: net.ParseIP("2001:db8::7"), Mask: net.CIDRMask(64, 128)}}
	for addr, want := range map[string]bool{
		"192.0.2.7:1": true, "192.0.2.8:1": false, "[2001:db8::7]:1": true, "[2001:db8::8]:1": false,
		"127.0.0.1:1": true, "[::ffff:192.0.2.7]:1": true,
	} {
		if got := hasAddr(own, net.TCPAddrFromAddrPort(netip.MustParseAddrPort(addr))); got != want {
			t.Errorf("%s: %v", addr, got)
		}
	}
	if !hasAddr(own, &net.UnixAddr{}) {
		t.Error("what cannot be told counts as gone")
	}
}

func TestAnswered(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{&api.Error{Code: api.CodeUnreachable}, false}, {&api.Error{Code: api.CodeTimeout}, false},
		{&api.Error{Code: api.CodeNotFound}, true}, {&api.Error{Code: api.CodeCredentials}, true},
		{context.DeadlineExceeded, false}, {net.ErrClosed, true},
	} {
		if answered(c.err) != c.want {
			t.Errorf("%v: %v", c.err, !c.want)
		}
	}
}

func TestPace(t *testing.T) {
	for away, want := range map[time.Duration]time.Duration{
		0: 300 * time.Millisecond, 4 * time.Minute: 300 * time.Millisecond,
		10 * time.Minute: time.Second, 2 * time.Hour: 5 * time.Second,
	} {
		if got := pace(away); got != want {
			t.Errorf("after %v: every %v, want %v", away, got, want)
		}
	}
}
