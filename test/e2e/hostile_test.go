//go:build e2e

package e2e

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/test/netlab"
)

// buildHostile makes an image of the hostile test double and loads it.
func buildHostile(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	run := func(name string, args ...string) {
		cmd := exec.Command(name, args...)
		cmd.Dir = lab.Repo
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	bin, tar := filepath.Join(dir, "hostile"), filepath.Join(dir, "hostile.tar")
	run("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", bin, "./test/e2e/hostile")
	run("go", "run", "./deploy/image", "--bin-amd64", bin, "--name", "culvert-hostile:test", "--out", tar)
	if r := lab.Cluster("load", tar); r.Code != 0 {
		t.Fatalf("loading the hostile image: %v", r)
	}
	return "docker.io/library/culvert-hostile:test"
}

// TestHostileAgent: an agent that injects packets reaches no local listener, no
// LAN host, and nothing of it is even written to the device.
func TestHostileAgent(t *testing.T) {
	hostile := buildHostile(t)
	var reached atomic.Int64
	for _, machine := range []string{"laptop", "lan"} {
		if err := netlab.In(machine, func() error {
			l, err := net.Listen("tcp4", "0.0.0.0:2222")
			if err != nil {
				return err
			}
			u, err := net.ListenPacket("udp4", "0.0.0.0:2223")
			if err != nil {
				return err
			}
			t.Cleanup(func() { l.Close(); u.Close() })
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					reached.Add(1)
					c.Close()
				}
			}()
			go func() {
				b := make([]byte, 1500)
				for {
					if _, _, err := u.ReadFrom(b); err != nil {
						return
					}
					reached.Add(1)
				}
			}()
			return nil
		}); err != nil {
			t.Fatal(err)
		}
	}
	s := connect(t, "--image", hostile)
	forged := sniff(t, s.Device, netip.MustParseAddr("10.244.99.99"))
	// Every packet that the double answers brings a round of forged ones.
	server := resolver(t)
	for range 20 {
		lab.Run(netlab.Alice, "dig", "+time=1", "+tries=1", "@"+server, "echo.demo.svc.cluster.local")
		if n := kubectl(t, "-n", s.Agent.Namespace, "logs", s.Agent.Pod); strings.Count(n, "forged packets sent") > 3 {
			break
		}
	}
	if log := kubectl(t, "-n", s.Agent.Namespace, "logs", s.Agent.Pod); !strings.Contains(log, "forged packets sent") {
		t.Fatalf("the double sent nothing, so the test shows nothing: %s", log)
	}
	time.Sleep(time.Second)
	if n := reached.Load(); n != 0 {
		t.Errorf("%d forged connections or datagrams reached a listener", n)
	}
	if n := forged.Load(); n != 0 {
		t.Errorf("%d forged packets were written to %s", n, s.Device)
	}
}

// sniff counts the packets from an address that the kernel receives on a device
// of the laptop.
func sniff(t *testing.T, device string, from netip.Addr) *atomic.Int64 {
	t.Helper()
	var fd int
	if err := lab.Inside(func() error {
		ifi, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL))); err != nil {
			return err
		}
		return errors.Join(
			unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: htons(unix.ETH_P_ALL), Ifindex: ifi.Index}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 200_000}))
	}); err != nil {
		t.Fatal(err)
	}
	var n atomic.Int64
	done, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		b := make([]byte, 64<<10)
		want := from.As4()
		for {
			select {
			case <-done:
				return
			default:
			}
			got, addr, err := unix.Recvfrom(fd, b, 0)
			if err != nil {
				continue
			}
			if l, ok := addr.(*unix.SockaddrLinklayer); ok && l.Pkttype != unix.PACKET_OUTGOING && got >= 20 && [4]byte(b[12:16]) == want {
				n.Add(1)
			}
		}
	}()
	t.Cleanup(func() { close(done); <-stopped; unix.Close(fd) })
	return &n
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }
