package render

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

func site() *plan.Site {
	return &plan.Site{Prefix: "p", State: "/s", Bin: "/b", Self: "/x/testcluster", ProxyMode: "nftables"}
}

func TestNodes(t *testing.T) {
	for _, c := range plan.All() {
		for i, n := range c.Nodes {
			m, err := Node(site(), c, n)
			if err != nil {
				t.Fatal(err)
			}
			var cni struct {
				Plugins []struct {
					Type        string
					HairpinMode bool
					IPAM        struct{ Ranges [][]struct{ Subnet string } }
				}
			}
			if err := json.Unmarshal([]byte(m.Files["etc/cni/net.d/10-bridge.conflist"]), &cni); err != nil {
				t.Fatal(err)
			}
			if got := cni.Plugins[0]; got.HairpinMode != (i == 0) || len(got.IPAM.Ranges) != 2 || got.IPAM.Ranges[1][0].Subnet != n.Pods.V6.String() {
				t.Errorf("%s %s: %+v", c.Name, n.Name, got)
			}
			if f := m.Files["etc/kubernetes/kubelet.yaml"]; !strings.Contains(f, `clusterDomain: "`+c.Domain+`"`) {
				t.Errorf("no cluster domain in\n%s", f)
			}
			if f := m.Files["etc/kubernetes/kube-proxy.yaml"]; !strings.Contains(f, `mode: "nftables"`) {
				t.Errorf("no proxy mode in\n%s", f)
			}
		}
	}
}

func TestControlPlane(t *testing.T) {
	m := ControlPlane(site(), plan.All()[0])
	if len(m.Processes) != 4 {
		t.Fatalf("%d processes", len(m.Processes))
	}
	if !slices.Contains(m.Processes[1].Args, "--service-cluster-ip-range=10.96.0.0/16,fd00:10:96::/112") {
		t.Errorf("no dual-stack Service range: %q", m.Processes[1].Args)
	}
}

func TestWan(t *testing.T) {
	m, err := Wan(site())
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`answer "{{ .Name }} 30 IN A 198.51.100.80"`, "IN AAAA fd00:172:31::10", "rcode NXDOMAIN"} {
		if !strings.Contains(m.Files["etc/coredns/Corefile"], want) {
			t.Errorf("no %q in\n%s", want, m.Files["etc/coredns/Corefile"])
		}
	}
}

func TestManifests(t *testing.T) {
	for _, c := range plan.All() {
		for _, f := range []string{"base.yaml", "demo.yaml", "rbac.yaml", "nodes.yaml"} {
			text, err := Manifest(site(), c, f)
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(text, "<no value>") || strings.Contains(text, "{{") {
				t.Errorf("%s is not rendered:\n%s", f, text)
			}
			if c.Small == strings.Contains(text, "namespace: dev") && f != "base.yaml" && f != "nodes.yaml" {
				t.Errorf("%s of %s: namespace dev is wrong", f, c.Name)
			}
		}
	}
}
