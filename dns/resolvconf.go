package dns

import (
	"net/netip"
	"strings"
)

// ParseResolvConf reads the text of a resolv.conf(5): the agent's, to learn
// which servers it relays to, its search list and the cluster domain. Servers
// that are no addresses are left out. The cluster domain is the one that the
// kubelet's three search domains end in ("demo.svc.cluster.local
// svc.cluster.local cluster.local"), and empty when they are not there, as in a
// pod with dnsPolicy Default.
func ParseResolvConf(text string) (nameservers, search []string, clusterDomain string) {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 2 || strings.ContainsAny(line[:1], "#;") {
			continue
		}
		switch fields[0] {
		case "nameserver":
			if _, err := netip.ParseAddr(fields[1]); err == nil {
				nameservers = append(nameservers, fields[1])
			}
		case "search", "domain": // the last one counts
			search = nil
			for _, domain := range fields[1:] {
				if domain = normal(domain); domain != "" {
					search = append(search, domain)
				}
			}
		}
	}
	// Three in a row are looked for, not just "svc.": a namespace may be called svc.
	for i := 0; i+2 < len(search); i++ {
		if search[i+1] == "svc."+search[i+2] && strings.HasSuffix(search[i], "."+search[i+1]) {
			return nameservers, search, search[i+2]
		}
	}
	for i := 0; i+1 < len(search); i++ {
		if search[i] == "svc."+search[i+1] {
			return nameservers, search, search[i+1]
		}
	}
	return nameservers, search, ""
}

// normal is the form in which this package compares names: lower case, no final
// dot.
func normal(name string) string {
	return strings.ToLower(strings.TrimSuffix(name, "."))
}
