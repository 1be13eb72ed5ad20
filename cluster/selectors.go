package cluster

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/culvert-dev/culvert/daemon/api"
)

// ParseSelectors reads the values of --include-ips and --exclude-ips: IPs,
// CIDRs and host names of both families, each value a list with commas.
// Prefixes are masked: 10.1.2.3/16 means 10.1.0.0/16, as in every routing
// tool's flag. A malformed entry, a zone and a default route are an *api.Error
// with CodeUsage that names the entry.
func ParseSelectors(values []string) (prefixes []netip.Prefix, hosts []string, err error) {
	for _, value := range values {
		for _, entry := range strings.Split(value, ",") {
			if entry = strings.TrimSpace(entry); entry == "" {
				continue
			}
			p, host, err := parseSelector(entry)
			switch {
			case err != nil:
				return nil, nil, &api.Error{
					Code:    api.CodeUsage,
					Message: fmt.Sprintf("--include-ips/--exclude-ips: %q: %v", entry, err),
					Hint:    "give IPs, CIDRs or host names, e.g. 10.20.0.0/16,192.168.1.7,db.corp.example",
				}
			case host != "":
				hosts = append(hosts, host)
			default:
				prefixes = append(prefixes, p)
			}
		}
	}
	return prefixes, hosts, nil
}

func parseSelector(entry string) (p netip.Prefix, host string, err error) {
	if strings.Contains(entry, "/") {
		if p, err = netip.ParsePrefix(entry); err != nil {
			return p, "", fmt.Errorf("not a CIDR")
		}
		if p.Bits() == 0 {
			return p, "", fmt.Errorf("a default route is not accepted: culvert routes a cluster, not everything")
		}
		// An IPv4-mapped IPv6 prefix would match nothing that the kernel sends.
		if p.Addr().Is4In6() {
			if p.Bits() <= 96 {
				return p, "", fmt.Errorf("not a CIDR")
			}
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96)
		}
		return p.Masked(), "", nil
	}
	if a, err := netip.ParseAddr(entry); err == nil {
		if a.Zone() != "" {
			return p, "", fmt.Errorf("an address with a zone is local to one link")
		}
		if a.IsUnspecified() {
			return p, "", fmt.Errorf("the unspecified address is no host")
		}
		a = a.Unmap()
		return netip.PrefixFrom(a, a.BitLen()), "", nil
	}
	if !isHostName(entry) {
		return p, "", fmt.Errorf("neither an IP, a CIDR nor a host name")
	}
	return p, strings.TrimSuffix(strings.ToLower(entry), "."), nil
}

// isHostName is RFC 1123's rule with underscores, and with a last label that is
// not all digits, so that 10.1.2 and 10.1.2.300 are mistyped addresses.
func isHostName(s string) bool {
	s = strings.TrimSuffix(s, ".")
	if s == "" || len(s) > 253 {
		return false
	}
	labels := strings.Split(s, ".")
	for _, label := range labels {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, r := range label {
			if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_') {
				return false
			}
		}
	}
	return strings.Trim(labels[len(labels)-1], "0123456789") != ""
}
