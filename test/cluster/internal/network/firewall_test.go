package network

import (
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

func TestWanRules(t *testing.T) {
	all := plan.All()
	closed := wanRules(all, false)
	for _, want := range []string{"policy drop", `iifname "home" ip daddr 172.30.0.10 tcp dport 6443 accept`, `ip6 daddr fd00:172:31::10 tcp dport 6443 accept`} {
		if !strings.Contains(closed, want) {
			t.Errorf("no %q in\n%s", want, closed)
		}
	}
	if strings.Contains(closed, "10.244.") || strings.Contains(closed, "172.30.0.11") {
		t.Errorf("pods or nodes are let in:\n%s", closed)
	}
	open := wanRules(all[:1], true)
	if !strings.Contains(open, "{ 172.30.0.12, 10.244.2.0/24 } accept") || strings.Contains(open, "10.245") {
		t.Errorf("wrong ranges are let in:\n%s", open)
	}
	if i, j := strings.Index(open, "10.244.2.0/24"), strings.Index(open, "reject"); i > j {
		t.Error("the reject comes before the accept")
	}
}

func TestNodeRules(t *testing.T) {
	r := nodeRules(plan.All()[1])
	for _, want := range []string{"ip daddr != { 10.245.0.0/16, 10.97.0.0/16 }", "ip6 daddr fd00:10:97::/112 counter reject"} {
		if !strings.Contains(r, want) {
			t.Errorf("no %q in\n%s", want, r)
		}
	}
}
