//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// other is why a carrier is not in use; empty if it is not among those.
func other(s api.Session, name string) string {
	for _, o := range s.Carrier.Others {
		if strings.HasPrefix(o.Name, name) {
			return o.Reason
		}
	}
	return ""
}

// steady echoes on one connection until it is told to stop, and then says how
// long the longest answer took.
func steady(t *testing.T) (stop func() time.Duration) {
	t.Helper()
	c := dial(t, "tcp", net.JoinHostPort(podIPs(t)[0], "9000"))
	quit, done := make(chan struct{}), make(chan error, 1)
	var worst time.Duration
	go func() {
		b := make([]byte, 20<<10)
		for i := 0; ; i++ {
			select {
			case <-quit:
				done <- nil
				return
			case <-time.After(5 * time.Millisecond):
			}
			begun := time.Now()
			if err := tryEcho(c, b, 20*time.Second); err != nil {
				done <- fmt.Errorf("echo %d: %w", i, err)
				return
			}
			worst = max(worst, time.Since(begun))
		}
	}()
	return func() time.Duration {
		t.Helper()
		close(quit)
		if err := <-done; err != nil {
			t.Fatalf("the open connection did not survive: %v\nlogs: %v", err, lab.Culvert(netlab.Alice, "logs"))
		}
		return worst
	}
}

// TestUDP: where the laptop reaches the pod, a session moves to UDP, falls back
// when that alone is cut, and returns; a connection notices a pause at most.
func TestUDP(t *testing.T) {
	link(t, "--pods", "on")
	connect(t)
	s := waitCarrier(t, "UDP", 5*time.Second)
	if other(s, "pods/proxy") == "" && other(s, "port-forward") == "" {
		t.Errorf("others: %+v", s.Carrier.Others)
	}

	// The API server hangs, and with it the stream: nobody notices.
	alive := longLived(t)
	pod := net.JoinHostPort(podIPs(t)[0], "9000")
	signalAPIServer(t, "STOP")
	t.Cleanup(func() { signalAPIServer(t, "CONT") })
	for hung := time.Now(); time.Since(hung) < 4*time.Second; {
		alive(time.Second)
		c, err := within(t, "tcp", pod, time.Second)
		if err != nil {
			t.Fatalf("a new connection without an API server: %v", err)
		}
		echo(t, c, []byte("new"))
		c.Close()
		if s := status(t, netlab.Alice)[0]; s.State != api.Connected || s.Carrier.Name != "UDP" {
			t.Errorf("without an API server: %s over %s (%s)", s.State, s.Carrier.Name, s.Cause)
		}
		time.Sleep(200 * time.Millisecond)
	}
	signalAPIServer(t, "CONT")
	for range 2 {
		stop := steady(t)
		time.Sleep(time.Second)
		eventually(t, 20*time.Second, func() error { // if the stream noticed
			if s := status(t, netlab.Alice)[0]; other(s, "pods/proxy") == "" && other(s, "port-forward") == "" {
				return fmt.Errorf("no stream: %+v", s.Carrier)
			}
			return nil
		})
		link(t, "--pods", "off")
		cut := time.Now()
		var s api.Session
		for s = status(t, netlab.Alice)[0]; s.Carrier.Name == "UDP"; s = status(t, netlab.Alice)[0] {
			if time.Since(cut) > 5*time.Second {
				t.Fatalf("still %+v", s.Carrier)
			}
		}
		t.Logf("back on %s after %v", s.Carrier.Name, time.Since(cut))
		if s.State != api.Connected || !strings.Contains(other(s, "UDP"), "no answer from") {
			t.Errorf("%s, others %+v", s.State, s.Carrier.Others)
		}
		time.Sleep(time.Second)
		worst := stop()
		t.Logf("worst echo while UDP was cut: %v", worst)
		if worst > 5*time.Second { // half a second until both ways are used, then TCP's next repetition
			t.Errorf("an echo took %v", worst)
		}
		link(t, "--pods", "on")
		waitCarrier(t, "UDP", 10*time.Second)
	}
}

// TestUDPUnreachable: nothing is lost where the laptop does not reach pods, and
// status says whom it asked. Pinned, connect fails and says so too.
func TestUDPUnreachable(t *testing.T) {
	refusal{name: "pinned", args: []string{"--carrier", "udp"}, code: 1, words: []string{"no answer from", ":7534", "--udp nodeport", "--carrier auto"}}.check(t)
	connect(t)
	fresh(t, 5*time.Second)
	eventually(t, 10*time.Second, func() error {
		s := status(t, netlab.Alice)[0]
		if reason := other(s, "UDP"); !strings.Contains(reason, "no answer from "+"10.244.") {
			return fmt.Errorf("%+v", s.Carrier)
		}
		return nil
	})
}

// TestUDPPinned: --carrier udp sends nothing by the stream.
func TestUDPPinned(t *testing.T) {
	link(t, "--pods", "on")
	connect(t, "--carrier", "udp")
	fresh(t, 5*time.Second)
	s := waitCarrier(t, "UDP", time.Second)
	if !strings.Contains(other(s, "port-forward"), "--carrier udp") {
		t.Errorf("others: %+v", s.Carrier.Others)
	}
	alive := longLived(t)
	link(t, "--pods", "off")
	waitState(t, netlab.Alice, api.Reconnecting, 6*time.Second)
	link(t, "--pods", "on")
	waitState(t, netlab.Alice, api.Connected, 6*time.Second)
	alive(10 * time.Second)
}

// TestUDPNodePort: where only the nodes are reachable, UDP goes through a Service
// that is made for the agent and goes with it.
func TestUDPNodePort(t *testing.T) {
	link(t, "--pods", "on")
	root(t, "ip route add unreachable 10.0.0.0/8 && ip -6 route add unreachable fd00:10::/32")
	t.Cleanup(func() {
		root(t, "ip route del unreachable 10.0.0.0/8 && ip -6 route del unreachable fd00:10::/32")
		eventually(t, 10*time.Second, func() error {
			if got := kubectl(t, "get", "service", "-A", "-o", "name"); strings.Contains(got, "culvert") {
				return fmt.Errorf("left behind: %s", got)
			}
			return nil
		})
	})
	connect(t, "--udp", "nodeport")
	s := waitCarrier(t, "UDP", 10*time.Second)
	fresh(t, 5*time.Second)
	alive := longLived(t)
	if got := kubectl(t, "-n", s.Agent.Namespace, "get", "service", "-o", "jsonpath={.items[?(@.spec.type==\"NodePort\")].metadata.name}"); !strings.Contains(got, "culvert-agent-") {
		t.Errorf("Services of type NodePort: %q", got)
	}
	stop := steady(t)
	time.Sleep(2 * time.Second)
	t.Logf("worst echo over the node port: %v", stop())
	alive(time.Second)
}
