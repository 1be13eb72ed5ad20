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

// longLived opens a TCP connection to an echo pod and returns a check that it
// still is the same connection and works.
func longLived(t *testing.T) func(within time.Duration) {
	t.Helper()
	c := dial(t, "tcp", net.JoinHostPort(podIPs(t)[0], "9000"))
	echo(t, c, []byte("first"))
	return func(within time.Duration) {
		t.Helper()
		begun := time.Now()
		if err := tryEcho(c, []byte("still here"), within); err != nil {
			t.Fatalf("the open connection did not survive: %v\nstatus: %+v\nlogs: %v", err, status(t, netlab.Alice), lab.Culvert(netlab.Alice, "logs"))
		}
		t.Logf("the open connection answered after %v", time.Since(begun).Round(10*time.Millisecond))
	}
}

// fresh wants that a new connection works within a time.
func fresh(t *testing.T, within time.Duration) {
	t.Helper()
	var err error
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		if err = tryFresh(t); err == nil {
			return
		}
	}
	t.Fatalf("no new connection within %v: %v\nstatus: %+v\nlogs: %v", within, err, status(t, netlab.Alice), lab.Culvert(netlab.Alice, "logs"))
}

func tryFresh(t *testing.T) error {
	c, err := within(t, "tcp", net.JoinHostPort(podIPs(t)[0], "9000"), 3*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	return tryEcho(c, []byte("new"), 3*time.Second)
}

func TestCarrierCut(t *testing.T) {
	connect(t)
	for _, cut := range []time.Duration{10 * time.Second, 60 * time.Second} {
		t.Run(cut.String(), func(t *testing.T) {
			alive := longLived(t)
			link(t, "--cut", "on")
			time.Sleep(cut)
			link(t, "--cut", "off")
			fresh(t, 30*time.Second)
			alive(120 * time.Second)
			waitState(t, netlab.Alice, api.Connected, 10*time.Second)
		})
	}
}

func TestSessionKilled(t *testing.T) {
	s := connect(t)
	alive := longLived(t)
	for range 3 {
		s = status(t, netlab.Alice)[0]
		routes := root(t, "ip route get "+podIPs(t)[0])
		if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if got := root(t, "ip route get "+podIPs(t)[0]); got != routes {
			t.Errorf("the route moved when the session died: %q, was %q", got, routes)
		}
		alive(20 * time.Second)
		fresh(t, 10*time.Second)
		after := waitState(t, netlab.Alice, api.Connected, 10*time.Second)
		if after.PID == s.PID || after.ID != s.ID || after.Device != s.Device {
			t.Errorf("want another process of the same session, have %+v after %+v", after, s)
		}
	}
	sh(t, "getent hosts echo.demo")
}

// TestDaemonKilled: after kill -9 of the daemon the machine's own network is
// whole at once, and the next start or `culvertd cleanup` leaves nothing.
func TestDaemonKilled(t *testing.T) {
	before := listMachine(t)
	for _, how := range []string{"next start", "cleanup"} {
		t.Run(how, func(t *testing.T) {
			r := lab.Culvert(netlab.Alice, "connect", "--kubeconfig", kubeconfig(t, "", "developer"), "--image", image)
			if r.Code != 0 {
				t.Fatalf("connect: %v", r)
			}
			if err := lab.KillDaemon(); err != nil {
				t.Fatal(err)
			}
			eventually(t, 2*time.Second, func() error {
				got := lab.Run(netlab.Alice, "/bin/sh", "-c", "getent ahostsv4 www.example.test | head -1 | awk '{print $1}'").Stdout
				if strings.TrimSpace(got) != "198.51.100.80" {
					return fmt.Errorf("within 2 s of kill -9, www.example.test is %q", got)
				}
				return nil
			})
			root(t, "ping -c1 -W2 192.168.50.1")
			if how == "cleanup" {
				if err := lab.Cleanup(); err != nil {
					t.Fatal(err)
				}
			}
			if how == "next start" {
				if err := lab.StartDaemon(); err != nil {
					t.Fatal(err)
				}
			}
			if diff := compare(before, listMachine(t)); diff != "" {
				t.Errorf("left on the machine:\n%s", diff)
			}
			if how == "cleanup" {
				if err := lab.StartDaemon(); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, 30*time.Second, func() error {
				if left := kubectl(t, "get", "deployments,replicasets,pods", "-A", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "name"); left != "" {
					return fmt.Errorf("left in the cluster: %s", left)
				}
				return nil
			})
		})
	}
}

func eventually(t *testing.T, within time.Duration, f func() error) {
	t.Helper()
	var err error
	for end := time.Now().Add(within); time.Now().Before(end); time.Sleep(300 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("after %v: %v", within, err)
}

// TestTwoSessions: two clusters at once, with another cluster domain; each name
// goes to its own.
func TestTwoSessions(t *testing.T) {
	a := connect(t)
	b := connectAs(t, netlab.Alice, "b", "developer")
	if a.Device == b.Device {
		t.Fatalf("both sessions use %s", a.Device)
	}
	for name, prefix := range map[string]string{
		"echo.demo.svc.cluster.local":          "10.96.",
		"echo.demo.svc.corp.internal":          "10.97.",
		"echo.demo.svc.culvert-test.culvert":   "10.96.",
		"echo.demo.svc.culvert-test-b.culvert": "10.97.",
		"www.example.test":                     "198.51.100.80",
	} {
		got := sh(t, "getent ahostsv4 "+name+" | head -1 | awk '{print $1}'")
		if !strings.HasPrefix(got, prefix) {
			t.Errorf("%s is %q, want %s…", name, got, prefix)
		}
		if strings.HasPrefix(prefix, "10.") {
			echo(t, dial(t, "tcp", got+":9000"), []byte(name))
		}
	}
	// Bob neither sees nor stops Alice's sessions.
	if got := status(t, netlab.Bob); len(got) != 0 {
		t.Errorf("Bob sees %+v", got)
	}
	if r := lab.Culvert(netlab.Bob, "disconnect", "culvert-test"); r.Code == 0 && len(status(t, netlab.Alice)) != 2 {
		t.Errorf("Bob stopped Alice's session: %v", r)
	}
	if r := lab.Culvert(netlab.Alice, "disconnect", "culvert-test"); r.Code != 0 {
		t.Fatal(r)
	}
	// The other one goes on, names included.
	got := sh(t, "getent ahostsv4 echo.demo | head -1 | awk '{print $1}'")
	if !strings.HasPrefix(got, "10.97.") {
		t.Errorf("with one session left, echo.demo is %q", got)
	}
}
