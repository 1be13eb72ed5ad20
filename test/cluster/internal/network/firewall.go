package network

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Filter loads wan's packet filter for the clusters that are up. With pods
// true the laptop reaches their pods and nodes, too.
func Filter(s *plan.Site, clusters []*plan.Cluster, pods bool) error {
	wan, err := Open(s.Netns("", plan.Wan))
	if err != nil {
		return err
	}
	defer wan.Close()
	return wan.Nft(wanRules(clusters, pods))
}

// wanRules renders wan's filter: the laptop reaches the API servers and nothing else.
func wanRules(clusters []*plan.Cluster, pods bool) string {
	var b strings.Builder
	b.WriteString("table inet fw\ndelete table inet fw\ntable inet fw {\n")
	b.WriteString("  chain forward {\n    type filter hook forward priority 0; policy drop;\n")
	b.WriteString("    ct state established,related accept\n")
	for _, c := range clusters {
		cp, lan := c.CP.Addrs, c.Bridge()
		fmt.Fprintf(&b, "    iifname %q oifname %q accept\n", lan, lan)
		fmt.Fprintf(&b, "    iifname %q ip daddr %s tcp dport 6443 accept\n", HomeBridge, cp.V4)
		fmt.Fprintf(&b, "    iifname %q ip6 daddr %s tcp dport 6443 accept\n", HomeBridge, cp.V6)
		fmt.Fprintf(&b, "    iifname %q ip daddr %s icmp type echo-request accept\n", HomeBridge, cp.V4)
		fmt.Fprintf(&b, "    iifname %q ip6 daddr %s icmpv6 type echo-request accept\n", HomeBridge, cp.V6)
		if !pods {
			continue
		}
		for _, n := range c.Nodes {
			fmt.Fprintf(&b, "    iifname %q ip daddr { %s, %s } accept\n", HomeBridge, n.Addrs.V4, n.Pods.V4)
			fmt.Fprintf(&b, "    iifname %q ip6 daddr { %s, %s } accept\n", HomeBridge, n.Addrs.V6, n.Pods.V6)
		}
	}
	b.WriteString("    counter reject with icmpx admin-prohibited\n  }\n}\n")
	return b.String()
}

// nodeRules renders a node's own rules, beside those of kube-proxy and the CNI.
func nodeRules(c *plan.Cluster) string {
	return fmt.Sprintf(`table inet node {
  chain leave {
    type nat hook postrouting priority srcnat + 10;
    ip saddr %[1]s ip daddr != { %[1]s, %[3]s } oifname "eth0" masquerade
    ip6 saddr %[2]s ip6 daddr != { %[2]s, %[4]s } oifname "eth0" masquerade
  }
  # A Service address that kube-proxy did not translate (it has not started
  # yet): say so at once. Let through, the SYN would leave a conntrack entry
  # without NAT, and the client would hang until its dial times out.
  chain untranslated {
    type filter hook forward priority 10;
    ip daddr %[3]s counter reject
    ip6 daddr %[4]s counter reject
  }
}
`, c.Pods.V4, c.Pods.V6, c.Services.V4, c.Services.V6)
}

// isMissing says whether an error means that the route or device is not there.
func isMissing(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV)
}
