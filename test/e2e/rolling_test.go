//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// inControlPlane runs a shell script on the machine of the API server.
func inControlPlane(t *testing.T, script string) string {
	t.Helper()
	r := lab.Cluster("exec", "--inside", "cp", "--", "bash", "-c", script)
	if r.Code != 0 {
		t.Fatalf("%s: %v", script, r)
	}
	return strings.TrimSpace(r.Stdout)
}

// endServer sends the API server at a port a signal. The test ends when pods are
// scheduled again: a scheduler whose API server was away asks for pods again only
// after a pause of up to half a minute, and the next test would wait for it.
func endServer(t *testing.T, port int, signal string) {
	t.Helper()
	t.Cleanup(func() { awaitScheduler(t) })
	inControlPlane(t, fmt.Sprintf(`kill -%s $(pgrep -f -- ^kube-apiserver.*--secure-port=%d) || true`, signal, port))
}

// upgradeServer ends the API server at a port as an upgrade does: it is told to
// go, refuses connections from then on, serves those that it has, and is killed
// when it takes too long.
func upgradeServer(t *testing.T, port int) {
	t.Helper()
	endServer(t, port, "TERM")
	time.Sleep(3 * time.Second)
	endServer(t, port, "KILL")
}

// awaitServer waits until the API server at a port is ready.
func awaitServer(t *testing.T, port int) {
	t.Helper()
	eventually(t, time.Minute, func() error {
		r := lab.Cluster("exec", "cp", "--", "curl", "-ksSf", "--max-time", "2", fmt.Sprintf("https://172.30.0.10:%d/readyz", port))
		if r.Code != 0 {
			return fmt.Errorf("the API server at port %d: %v", port, r)
		}
		return nil
	})
}

// awaitScheduler waits until a new pod gets a node.
func awaitScheduler(t *testing.T) {
	t.Helper()
	const name = "is-scheduled"
	kubectl(t, "-n", "default", "run", name, "--image=none.invalid/none", "--restart=Never")
	defer kubectl(t, "-n", "default", "delete", "pod", name, "--wait=true", "--grace-period=0", "--force")
	eventually(t, 2*time.Minute, func() error {
		if kubectl(t, "-n", "default", "get", "pod", name, "-o", "jsonpath={.spec.nodeName}") == "" {
			return fmt.Errorf("the scheduler gives a new pod no node")
		}
		return nil
	})
}

// startSecond starts another API server like the first, at port 6444.
func startSecond(t *testing.T) {
	t.Helper()
	inControlPlane(t, `mapfile -d '' -t args < /proc/$(pgrep -f -- '^kube-apiserver.*--secure-port=6443')/cmdline
		setsid "${args[@]/--secure-port=6443/--secure-port=6444}" > /tmp/second-apiserver.log 2>&1 < /dev/null &`)
	awaitServer(t, 6444)
}

// traffic uses the tunnel without a pause, and after stop tells the longest
// times that an open connection and a question for a name took.
func traffic(t *testing.T) (stop func() (connection, name time.Duration)) {
	t.Helper()
	c := dial(t, "tcp", net.JoinHostPort(podIPs(t)[0], "9000"))
	server := net.JoinHostPort(resolver(t), "53")
	names := &net.Resolver{PreferGo: true, Dial: func(_ context.Context, network, _ string) (net.Conn, error) {
		return within(t, network, server, 5*time.Second)
	}}
	done := make(chan struct{})
	var both sync.WaitGroup
	var longest [2]time.Duration
	for i, once := range []func() error{
		func() error { return tryEcho(c, []byte("still here"), 30*time.Second) },
		func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			defer cancel()
			_, err := names.LookupHost(ctx, "echo.demo.svc.cluster.local.")
			return err
		},
	} {
		both.Go(func() {
			for {
				begun := time.Now()
				if err := once(); err != nil {
					t.Errorf("%s: %v", []string{"the open connection", "a name"}[i], err)
					return
				}
				longest[i] = max(longest[i], time.Since(begun))
				select {
				case <-done:
					return
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	end := sync.OnceFunc(func() {
		close(done)
		both.Wait()
	})
	t.Cleanup(end)
	return func() (time.Duration, time.Duration) {
		end()
		return longest[0], longest[1]
	}
}

// TestRollingRestart: two API servers behind a load balancer are restarted one
// after the other. Connections live on and names are answered.
func TestRollingRestart(t *testing.T) {
	startSecond(t)
	t.Cleanup(func() { endServer(t, 6444, "KILL") })
	b := &balancer{servers: []string{"172.30.0.10:6443", "172.30.0.10:6444"}}
	connectWith(t, b.behind(t), "--debug")
	waitCarrier(t, "", 5*time.Second)
	var longest []time.Duration
	for _, port := range []int{6443, 6444, 6443} {
		stop := traffic(t)
		upgradeServer(t, port)
		if port == 6443 { // the machine starts it again
			awaitServer(t, port)
		} else {
			startSecond(t)
		}
		connection, name := stop()
		longest = append(longest, connection, name)
		t.Logf("port %d restarted: an answer took at most %v, a name %v", port, connection.Round(time.Millisecond), name.Round(time.Millisecond))
	}
	s := waitState(t, netlab.Alice, api.Connected, 5*time.Second)
	if s.Carrier.Redials == 0 {
		t.Errorf("no carrier was on a server that was restarted: %+v", s.Carrier)
	}
	if m := slices.Max(longest); m > 2*time.Second {
		t.Errorf("a gap of %v\nlogs: %v", m, lab.Culvert(netlab.Alice, "logs"))
	}
}

// TestAPIServerRestarted: the only API server is restarted, killed or as it is
// upgraded. The session is there again as soon as the server is.
func TestAPIServerRestarted(t *testing.T) {
	connect(t)
	for name, end := range map[string]func(*testing.T, int){
		"killed": func(t *testing.T, port int) { endServer(t, port, "KILL") }, "upgraded": upgradeServer,
	} {
		t.Run(name, func(t *testing.T) {
			stop := traffic(t)
			begun := time.Now()
			end(t, 6443)
			time.Sleep(500 * time.Millisecond)
			awaitServer(t, 6443)
			up := time.Since(begun)
			fresh(t, 10*time.Second)
			connection, name := stop()
			t.Logf("the API server was back after %v; an answer took at most %v, a name %v", up.Round(time.Millisecond), connection.Round(time.Millisecond), name.Round(time.Millisecond))
			if connection > up+5*time.Second {
				t.Errorf("the open connection waited for %v", connection)
			}
			waitState(t, netlab.Alice, api.Connected, 10*time.Second)
		})
	}
}
