//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"
)

// TestExclusions: an excluded /32 or /24 inside a routed /16 is honoured
// exactly, shown by the kernel's own decision and with traffic.
func TestExclusions(t *testing.T) {
	pods := words(t, "-n", "demo", "get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[*].status.podIP}")
	one, other := pods[0], pods[1]
	third := strings.Split(other, ".")[2]
	s := connect(t, "--exclude-ips", one+"/32,10.96.200.0/24", "--excludeIps", "10.96.201.7", "--exclude-ips", "www.example.test")
	for addr, inside := range map[string]bool{
		one: false, other: true, "10.96.200.0": false, "10.96.200.255": false, "10.96.199.255": true, "10.96.201.0": true,
		"10.96.201.7": false, "10.96.201.6": true, "10.96.201.8": true, "10.244." + third + ".255": true,
		"192.168.50.1": false, "172.30.0.10": false,
	} {
		got := sh(t, "ip route get "+addr)
		if strings.Contains(got, s.Device) != inside {
			t.Errorf("%s: %s, want in the tunnel: %v", addr, got, inside)
		}
	}
	// The excluded pod is as unreachable as without culvert: the laptop's router
	// rejects it. The other one answers.
	if c, err := within(t, "tcp", net.JoinHostPort(one, "9000"), 3*time.Second); err == nil {
		c.Close()
		t.Errorf("%s is excluded but reachable", one)
	}
	echo(t, dial(t, "tcp", net.JoinHostPort(other, "9000")), []byte("in"))
}

// TestExclusions6 is the same for IPv6.
func TestExclusions6(t *testing.T) {
	pods := words(t, "-n", "demo", "get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[*].status.podIPs[1].ip}")
	one, other := pods[0], pods[1]
	s := connect(t, "--exclude-ips", one+",fd00:10:96::7000/116", "--excludeIps", "fd00:10:96::42/128")
	for addr, inside := range map[string]bool{
		one: false, other: true, "fd00:10:96::7000": false, "fd00:10:96::7fff": false, "fd00:10:96::6fff": true, "fd00:10:96::8000": true,
		"fd00:10:96::42": false, "fd00:10:96::43": true, "fd00:172:30::10": false, "fd00:192:168:50::1": false,
	} {
		got := sh(t, "ip -6 route get "+addr+" 2>&1 || true")
		if strings.Contains(got, s.Device) != inside {
			t.Errorf("%s: %s, want in the tunnel: %v", addr, got, inside)
		}
	}
	if c, err := within(t, "tcp", net.JoinHostPort(one, "9000"), 3*time.Second); err == nil {
		c.Close()
		t.Errorf("%s is excluded but reachable", one)
	}
	echo(t, dial(t, "tcp", net.JoinHostPort(other, "9000")), []byte("in"))
}

// TestIncluded: an address that the cluster reaches and no range covers.
func TestIncluded(t *testing.T) {
	// An address, and a range with a hole.
	s := connect(t, "--include-ips", "172.30.0.12", "--include-ips", "172.30.1.0/24", "--exclude-ips", "172.30.1.7")
	for addr, inside := range map[string]bool{"172.30.1.6": true, "172.30.1.7": false} {
		if got := sh(t, "ip route get "+addr); strings.Contains(got, s.Device) != inside {
			t.Errorf("%s: %s, want in the tunnel: %v", addr, got, inside)
		}
	}
	if got := sh(t, "ip route get 172.30.0.12"); !strings.Contains(got, s.Device) {
		t.Errorf("an included address: %s", got)
	}
	if got := sh(t, "ip route get 172.30.0.11"); strings.Contains(got, s.Device) {
		t.Errorf("a node's address that nobody included: %s", got)
	}
	serveEcho(t, "node2", "172.30.0.12:9000")
	echo(t, dial(t, "tcp", "172.30.0.12:9000"), []byte("included"))
}

// TestNewNode: a new node's range is routed within 10 s.
func TestNewNode(t *testing.T) {
	s := connect(t)
	if got := sh(t, "ip route get 10.244.77.5"); strings.Contains(got, s.Device) {
		t.Fatalf("an address outside of all nodes' ranges is routed: %s", got)
	}
	apply(t, `{apiVersion: v1, kind: Node, metadata: {name: node77}, spec: {podCIDR: 10.244.77.0/24, podCIDRs: [10.244.77.0/24]}}`)
	eventually(t, 10*time.Second, func() error {
		if got := sh(t, "ip route get 10.244.77.5"); !strings.Contains(got, s.Device) {
			return fmt.Errorf("a new node's pod range: %s", got)
		}
		return nil
	})
}

// TestTunnelAddress: the device has its own /32 and /128 and nothing else, and
// forwards nothing.
func TestTunnelAddress(t *testing.T) {
	s := connect(t)
	for _, a := range strings.Fields(root(t, "ip -o addr show dev "+s.Device+" | awk '{print $4}'")) {
		if !strings.HasSuffix(a, "/32") && !strings.HasSuffix(a, "/128") {
			t.Errorf("%s has %s", s.Device, a)
		}
	}
	for key, want := range map[string]string{
		"net.ipv4.conf." + s.Device + ".forwarding": "0", "net.ipv4.conf." + s.Device + ".rp_filter": "1",
		"net.ipv6.conf." + s.Device + ".accept_ra": "0", "net.ipv4.conf." + s.Device + ".accept_redirects": "0",
	} {
		if got := root(t, "sysctl -n "+key); got != want {
			t.Errorf("%s is %s, want %s", key, got, want)
		}
	}
}
