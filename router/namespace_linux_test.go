package router

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
	"unsafe"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// inNamespace runs the calling test again in a process with network and mount
// namespaces of its own, and returns true there and false here.
func inNamespace(t *testing.T) bool {
	t.Helper()
	const env = "CULVERT_ROUTER_TEST_NAMESPACE"
	if os.Getenv(env) == t.Name() {
		run(t, "ip", "link", "set", "lo", "up")
		return true
	}
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=90s")
	cmd.Env = append(os.Environ(), env+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in its namespaces: %v\n%s", err, out)
	}
	if testing.Verbose() {
		t.Logf("%s", out)
	}
	if bytes.Contains(out, []byte("--- SKIP")) {
		t.Skip("skipped in its namespaces")
	}
	return false
}

func run(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// openTUN makes a TUN device that lives as long as the file, or longer if persistent.
func openTUN(t *testing.T, name string, persistent bool) *os.File {
	t.Helper()
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var req struct {
		name  [unix.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}
	copy(req.name[:], name)
	req.flags = unix.IFF_TUN | unix.IFF_NO_PI
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TUNSETIFF, uintptr(unsafe.Pointer(&req))); e != 0 {
		t.Fatal(e)
	}
	if persistent {
		if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "tun")
	t.Cleanup(func() { f.Close() })
	return f
}

// neighbour makes a network namespace at the other end of a veth pair: the
// machine is 192.0.2.2 and 2001:db8:1::2 and has its default routes there. It
// returns a function that runs commands in it and one that runs Go code in it.
func neighbour(t *testing.T) (command func(args ...string) string, inside func(func())) {
	t.Helper()
	holder := exec.Command("sleep", "120")
	holder.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNET, Pdeathsig: unix.SIGKILL}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { holder.Process.Kill(); holder.Wait() })
	pid := holder.Process.Pid
	own, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	var other netns.NsHandle
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if other, err = netns.GetFromPid(pid); err == nil && !other.Equal(own) {
			break
		}
		if time.Now().After(end) {
			t.Fatal("no neighbour namespace")
		}
		other.Close()
	}
	command = func(args ...string) string {
		t.Helper()
		return run(t, append([]string{"nsenter", "-t", itoa(pid), "-n", "--"}, args...)...)
	}
	run(t, "ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1", "netns", itoa(pid))
	// No link-local addresses: they would change the listing when they stop being tentative.
	run(t, "ip", "link", "set", "lan0", "addrgenmode", "none")
	run(t, "ip", "addr", "add", "192.0.2.2/24", "dev", "lan0")
	run(t, "ip", "addr", "add", "2001:db8:1::2/64", "dev", "lan0", "nodad")
	run(t, "ip", "link", "set", "lan0", "up")
	command("ip", "link", "set", "lo", "up")
	command("ip", "addr", "add", "192.0.2.1/24", "dev", "lan1")
	command("ip", "addr", "add", "2001:db8:1::1/64", "dev", "lan1", "nodad")
	command("ip", "link", "set", "lan1", "up")
	run(t, "ip", "route", "add", "default", "via", "192.0.2.1")
	run(t, "ip", "route", "add", "default", "via", "2001:db8:1::1")
	// The carrier and what follows from it come a moment later, and would look
	// like changes to tests that compare listings.
	waitFor(t, "lan0 settled", func() bool {
		before := listing(t)
		time.Sleep(50 * time.Millisecond)
		return strings.Contains(run(t, "ip", "link", "show", "lan0"), "state UP") && !strings.Contains(before, "linkdown") && listing(t) == before
	})
	inside = func(f func()) {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		if err := netns.Set(other); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := netns.Set(own); err != nil {
				t.Fatal(err)
			}
		}()
		f()
	}
	return command, inside
}

// echo answers UDP datagrams at an address of the calling thread's namespace.
func echo(t *testing.T, addr string) {
	t.Helper()
	c, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 2048)
		for {
			n, from, err := c.ReadFrom(b)
			if err != nil {
				return
			}
			c.WriteTo(b[:n], from)
		}
	}()
}

// listing is all that a leftover would show in.
func listing(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	for _, args := range []string{"rule", "-6 rule", "route show table all", "-6 route show table all", "addr", "-d link"} {
		b.WriteString("# ip " + args + "\n" + run(t, append([]string{"ip"}, strings.Fields(args)...)...))
	}
	return b.String()
}
