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
	"github.com/culvert-dev/culvert/wire/carrier"
)

// waitCarrier waits until Alice's session runs over the carrier, and returns it.
func waitCarrier(t *testing.T, name string, within time.Duration) api.Session {
	t.Helper()
	var s api.Session
	eventually(t, within, func() error {
		s = status(t, netlab.Alice)[0]
		if s.State != api.Connected || !strings.HasPrefix(s.Carrier.Name, name) {
			return fmt.Errorf("%s over %q, others %+v\nlogs: %v", s.State, s.Carrier.Name, s.Carrier.Others, lab.Culvert(netlab.Alice, "logs"))
		}
		return nil
	})
	return s
}

// TestCarrierChoice: a session moves to pods/proxy by itself, loses nothing on
// the way, falls back when the API server restarts, and returns.
func TestCarrierChoice(t *testing.T) {
	connect(t)
	alive := longLived(t)
	s := waitCarrier(t, "pods/proxy", 5*time.Second)
	alive(5 * time.Second)
	if other(s, "port-forward") == "" || other(s, "UDP") == "" {
		t.Errorf("why the port-forward is not in use: %+v", s.Carrier.Others)
	}
	if r := lab.Culvert(netlab.Alice, "status", "-o", "wide"); !strings.Contains(r.Stdout, "not used") || !strings.Contains(r.Stdout, "pods/proxy, round trip") {
		t.Errorf("status -o wide does not show the carriers: %v", r)
	}

	signalAPIServer(t, "KILL")
	alive(60 * time.Second)
	waitCarrier(t, "pods/proxy", 60*time.Second)
	alive(5 * time.Second)

	// Nobody else gets a stream from the agent's port, on either address, here from
	// a node; through the tunnel it is refused.
	ips := words(t, "-n", s.Agent.Namespace, "get", "pod", s.Agent.Pod, "-o", "jsonpath={.status.podIPs[*].ip}")
	for _, ip := range ips {
		addr := net.JoinHostPort(ip, fmt.Sprint(carrier.ProxyPort))
		for name, request := range map[string]string{
			"a GET":                `GET / HTTP/1.1\r\nHost: x\r\n\r\n`,
			"an upgrade, no proof": `GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: culvert\r\n\r\n` + strings.Repeat("A", 64),
		} {
			r := lab.Cluster("exec", "node2", "--", "bash", "-c", fmt.Sprintf(`exec 3<>/dev/tcp/%s/%d && printf '%s' >&3 && timeout 8 cat <&3 | tail -c +110 | wc -c`, ip, carrier.ProxyPort, request))
			if got := strings.TrimSpace(r.Stdout); r.Code != 0 || got != "0" {
				t.Errorf("%s at %s: %s bytes: %v", name, addr, got, r)
			}
		}
		if c, err := within(t, "tcp", addr, 5*time.Second); err == nil {
			c.Close()
			t.Errorf("%s can be dialled through the tunnel", addr)
		}
	}
	alive(5 * time.Second)
}

// signalAPIServer sends it a signal. One that dies is started again at once by
// the control plane.
func signalAPIServer(t *testing.T, signal string) {
	t.Helper()
	r := lab.Cluster("exec", "--inside", "cp", "--", "sh", "-c", "pgrep -x kube-apiserver || pgrep -f ^kube-apiserver")
	if r := lab.Cluster("exec", "--inside", "cp", "--", "kill", "-"+signal, strings.TrimSpace(r.Stdout)); r.Code != 0 {
		t.Fatal(r)
	}
}

// TestCarrierPinned: --carrier takes that one and no other.
func TestCarrierPinned(t *testing.T) {
	for flag, name := range map[string]string{"port-forward": "port-forward", "pods-proxy": "pods/proxy"} {
		t.Run(flag, func(t *testing.T) {
			connect(t, "--carrier", flag)
			fresh(t, 5*time.Second)
			time.Sleep(3 * time.Second)
			s := waitCarrier(t, name, time.Second)
			if len(s.Carrier.Others) != 1 || !strings.Contains(s.Carrier.Others[0].Reason, "--carrier "+flag) {
				t.Errorf("others: %+v", s.Carrier.Others)
			}
			if s.Carrier.Redials != 0 {
				t.Errorf("redialled %d times", s.Carrier.Redials)
			}
		})
	}
}

// TestNoProxyRight: without pods/proxy a session stays on the port-forward and
// says why, which is no error; pinned, connect says what is missing.
func TestNoProxyRight(t *testing.T) {
	rules := kubectl(t, "get", "clusterrole", "culvert-user", "-o", "jsonpath={.rules}")
	restore := fmt.Sprintf(`[{"op":"replace","path":"/rules","value":%s}]`, rules)
	t.Cleanup(func() { kubectl(t, "patch", "clusterrole", "culvert-user", "--type=json", "-p", restore) })
	without := strings.ReplaceAll(restore, `"pods/proxy"`, `"pods/nothing"`)
	if without == restore {
		t.Fatal("deploy/rbac does not have pods/proxy")
	}
	kubectl(t, "patch", "clusterrole", "culvert-user", "--type=json", "-p", without)
	refusal{name: "pinned", args: []string{"--carrier", "pods-proxy"}, code: 1, words: []string{"pods/proxy", "rbac", "--carrier auto"}}.check(t)

	connectAs(t, netlab.Alice, "", "limited")
	fresh(t, 5*time.Second)
	eventually(t, 10*time.Second, func() error {
		s := status(t, netlab.Alice)[0]
		if s.State != api.Connected || !strings.HasPrefix(s.Carrier.Name, "port-forward") || !strings.Contains(other(s, "pods/proxy"), "RBAC") {
			return fmt.Errorf("%s %+v", s.State, s.Carrier)
		}
		return nil
	})
}
