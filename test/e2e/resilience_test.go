//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// firstByte is how long it takes until a new connection brings a byte. Tries
// overlap, so that it measures the carrier and not a lost SYN's repetition.
func firstByte(t *testing.T, limit time.Duration) time.Duration {
	t.Helper()
	begun := time.Now()
	to := net.JoinHostPort(podIPs(t)[0], "9000")
	works := make(chan time.Duration, 1)
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(limit); ; {
		select {
		case took := <-works:
			return took
		case <-end:
			t.Fatalf("no new connection within %v\nstatus: %+v\nlogs: %v", limit, status(t, netlab.Alice), lab.Culvert(netlab.Alice, "logs"))
		case <-tick.C:
			go func() {
				c, err := within(t, "tcp", to, 2*time.Second)
				if err != nil {
					return
				}
				defer c.Close()
				if tryEcho(c, []byte("new"), 2*time.Second) == nil {
					select {
					case works <- time.Since(begun):
					default:
					}
				}
			}()
		}
	}
}

// TestShortCuts: the path falls silent for a while, with data under way. The
// carrier is back a moment after the path is, and every connection goes on. The
// API server goes by its name, so that names are asked for through the cut, too,
// and by the end of a minute the machine has forgotten where its gateway is.
func TestShortCuts(t *testing.T) {
	connectWith(t, editKubeconfig(t, "developer", "172.30.0.10:6443", "api.cluster.test:6443"), "--debug")
	for _, cut := range []time.Duration{5 * time.Second, 10 * time.Second, 60 * time.Second} {
		t.Run(cut.String(), func(t *testing.T) {
			c := dial(t, "tcp", net.JoinHostPort(podIPs(t)[0], "9000"))
			echo(t, c, []byte("first"))
			link(t, "--cut", "on")
			echoed := make(chan time.Time, 1)
			failed := make(chan error, 1)
			go func() {
				// Sent while the path is cut: the kernel repeats it ever more rarely.
				if err := tryEcho(c, []byte("through the cut"), 3*time.Minute); err != nil {
					failed <- err
					return
				}
				echoed <- time.Now()
			}()
			time.Sleep(cut)
			link(t, "--cut", "off")
			back := time.Now()
			fresh := firstByte(t, 10*time.Second)
			select {
			case at := <-echoed:
				t.Logf("after a cut of %v: a new connection after %v, the open one after %v", cut, fresh.Round(time.Millisecond), at.Sub(back).Round(time.Millisecond))
			case err := <-failed:
				t.Fatalf("the open connection did not survive: %v", err)
			}
			if fresh > 1500*time.Millisecond { // the goal is 1 s, on a machine with nothing else to do
				t.Errorf("a new connection only %v after the path was back at %v\nlogs: %v", fresh, back.UTC(), lab.Culvert(netlab.Alice, "logs"))
			}
			waitState(t, netlab.Alice, api.Connected, 10*time.Second)
		})
	}
}

// TestNetworkChanges: the laptop gets another address while connected, and its
// first one back, as when it walks from one Wi-Fi to another.
func TestNetworkChanges(t *testing.T) {
	before := connect(t)
	device := strings.Fields(root(t, "ip -o -4 addr show to 192.168.50.2"))[1]
	route := root(t, "ip -4 route show default")
	move := func(from, to string) {
		t.Helper()
		root(t, "ip addr del "+from+"/24 dev "+device+"; ip addr add "+to+"/24 dev "+device+"; ip route replace "+route)
	}
	there := false
	t.Cleanup(func() {
		if there {
			move("192.168.50.3", "192.168.50.2")
		}
	})
	alive := longLived(t)
	for i, to := range []string{"192.168.50.3", "192.168.50.2"} {
		from := []string{"192.168.50.2", "192.168.50.3"}[i]
		move(from, to)
		there = !there
		t.Logf("%s to %s: a new connection after %v", from, to, firstByte(t, 10*time.Second).Round(time.Millisecond))
		alive(10 * time.Second)
		now := waitState(t, netlab.Alice, api.Connected, 10*time.Second)
		if now.PID != before.PID || now.Carrier.Redials != before.Carrier.Redials+i+1 {
			t.Errorf("process %d, %d redials; was %d, %d", now.PID, now.Carrier.Redials, before.PID, before.Carrier.Redials)
		}
	}
	sh(t, "getent hosts echo.demo")
}

// TestSessionStopped: a session process that hangs is replaced, and neither
// names nor connections are lost for longer.
func TestSessionStopped(t *testing.T) {
	s := connect(t)
	alive := longLived(t)
	if err := syscall.Kill(s.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	eventually(t, 20*time.Second, func() error {
		if now := status(t, netlab.Alice)[0]; now.PID == s.PID || now.State != api.Connected {
			return fmt.Errorf("still process %d, %s", now.PID, now.State)
		}
		return nil
	})
	t.Logf("replaced after %v", time.Since(begun).Round(time.Millisecond))
	alive(20 * time.Second)
	now := status(t, netlab.Alice)[0]
	if now.ID != s.ID || now.Device != s.Device || now.Restarts != s.Restarts+1 {
		t.Errorf("want another process of the same session, have %+v after %+v", now, s)
	}
	sh(t, "getent hosts echo.demo")
	sh(t, "getent hosts www.example.test")
}

// TestShortFreeze: a process that was stopped for a moment, as a laptop under
// load stops them, goes on without a redial.
func TestShortFreeze(t *testing.T) {
	s := connect(t)
	alive := longLived(t)
	if err := syscall.Kill(s.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	if err := syscall.Kill(s.PID, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	alive(5 * time.Second)
	if now := status(t, netlab.Alice)[0]; now.PID != s.PID || now.State != api.Connected {
		t.Errorf("have %+v after %+v", now, s)
	}
}
