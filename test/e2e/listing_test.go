//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// listMachine is everything of the laptop's network that culvert could change.
func listMachine(t *testing.T) []string {
	t.Helper()
	out := root(t, `
echo "== links"; ip -o link | sed 's/state .*//; s/qdisc .*//'
echo "== addresses"; ip -o addr | awk '{print $2,$3,$4}'
echo "== rules"; ip rule; ip -6 rule
echo "== routes"; ip route show table all; ip -6 route show table all | sed 's/expires [0-9]*sec//'
echo "== resolv.conf"; ls -l /etc/resolv.conf | awk '{print $1,$NF}'; cat /etc/resolv.conf
echo "== sysctl"; sysctl -a 2>/dev/null | grep -E '^net.ipv[46].(conf|ip_forward)' | grep -v -E 'stable_secret|mtu|temp_prefered_lft'
echo "== sockets"; ss -lntuH | awk '{print $1,$5}' | sort -u
echo "== nftables"; nft list ruleset`)
	return strings.Split(out, "\n")
}

// compare lists what was added (+) and removed (-), in no order.
func compare(before, after []string) string {
	var b strings.Builder
	for _, l := range after {
		if !slices.Contains(before, l) {
			fmt.Fprintln(&b, "+", l)
		}
	}
	for _, l := range before {
		if !slices.Contains(after, l) {
			fmt.Fprintln(&b, "-", l)
		}
	}
	return b.String()
}

// listCluster is every object of the cluster, in full, but for what changes by
// itself: resourceVersion, generation, EndpointSlices, Events, Leases (of nodes
// and controllers), and heartbeats in Node status.
func listCluster(t *testing.T) []string {
	t.Helper()
	var lines []string
	for _, r := range strings.Fields(kubectl(t, "api-resources", "--verbs=list", "-o", "name")) {
		switch r {
		case "events", "events.events.k8s.io", "endpointslices.discovery.k8s.io", "endpoints", "leases.coordination.k8s.io", "componentstatuses", "nodes":
			continue
		}
		var list struct {
			Items []map[string]any `json:"items"`
		}
		if err := json.Unmarshal([]byte(kubectl(t, "get", r, "-A", "-o", "json", "--show-managed-fields")), &list); err != nil {
			t.Fatal(err)
		}
		for _, o := range list.Items {
			meta := o["metadata"].(map[string]any)
			delete(meta, "resourceVersion")
			delete(meta, "generation")
			b, _ := json.Marshal(o)
			lines = append(lines, fmt.Sprintf("%s %v/%v %s", r, meta["namespace"], meta["name"], b))
		}
	}
	return lines
}

// TestNothingLeft: after disconnect neither cluster nor machine differ from
// before, compared in full.
func TestNothingLeft(t *testing.T) {
	eventually(t, 60*time.Second, func() error {
		if left := kubectl(t, "get", "pods", "-A", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "name"); left != "" {
			return fmt.Errorf("an earlier test's agent is still there: %s", left)
		}
		return nil
	})
	machine, cluster := listMachine(t), listCluster(t)
	t.Run("connected", func(t *testing.T) {
		connect(t)
		fresh(t, 5*time.Second)
		sh(t, "getent hosts echo.demo")
		if diff := compare(machine, listMachine(t)); !strings.Contains(diff, "culvert0") {
			t.Errorf("the listing does not see the session: %s", diff)
		}
	})
	if diff := compare(machine, listMachine(t)); diff != "" {
		t.Errorf("left on the machine:\n%s", diff)
	}
	var diff string
	for range 20 { // garbage collection may lag a moment behind
		if diff = compare(cluster, listCluster(t)); diff == "" {
			return
		}
		time.Sleep(500 * time.Millisecond)
	}
	t.Errorf("left in the cluster:\n%s", diff)
}
