package dns

import (
	"crypto/sha256"
	"encoding/hex"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// maxDomains bounds what Domains returns: systemd-resolved takes 256 search and
// routing domains for a link (LINK_SEARCH_DOMAINS_MAX).
const maxDomains = 256

// maxZones bounds the reverse zones of one range: a range that is not on a
// label boundary needs up to 128, and 16 cover kubeadm's 10.96.0.0/12.
const maxZones = 16

// Domains lists what the operating system shall ask of the forwarder: routing
// are names with everything below them, search completes single labels. Both
// are in lower case without a final dot, the most important first, together at
// most 256. What an earlier owner among the siblings has is left out. The result
// changes with the namespaces, the ranges, SetCluster and SetSiblings.
func (f *Forwarder) Domains() (routing, search []string) {
	s := f.settings.Load()
	search = []string{s.namespace + ".svc." + s.domain, "svc." + s.domain, s.domain}
	add := func(domain string) {
		taken := slices.ContainsFunc(s.before, func(sib sibling) bool { return sib.covers(domain) })
		if !taken && !slices.Contains(routing, domain) && len(routing)+len(search) < maxDomains {
			routing = append(routing, domain)
		}
	}
	add(s.domain)
	add(s.label + "." + ownTop)
	add("svc")
	add("pod")
	ranges := slices.Clone(s.ranges())
	slices.SortFunc(ranges, func(a, b netip.Prefix) int { // widest first: single addresses matter least
		if a.Bits()-a.Addr().BitLen() != b.Bits()-b.Addr().BitLen() {
			return (a.Bits() - a.Addr().BitLen()) - (b.Bits() - b.Addr().BitLen())
		}
		return a.Addr().Compare(b.Addr())
	})
	single := len(ranges)
	for i, r := range ranges {
		if r.IsSingleIP() {
			single = i
			break
		}
		for _, zone := range reverseZones(r) {
			add(zone)
		}
	}
	// Sorted, so that of more than there is room for the same ones stay in.
	namespaces := slices.Sorted(slices.Values(s.namespaces()))
	if !slices.Contains(namespaces, s.namespace) {
		namespaces = append([]string{s.namespace}, namespaces...)
	}
	for _, ns := range namespaces {
		if !publicTop(ns) {
			add(ns)
		}
	}
	for _, r := range ranges[single:] {
		for _, zone := range reverseZones(r) {
			add(zone)
		}
	}
	return routing, search
}

// reverseZones lists the zones below in-addr.arpa or ip6.arpa that make up p,
// none if they would be more than maxZones.
func reverseZones(p netip.Prefix) []string {
	p = p.Masked()
	if !p.IsValid() || p.Bits() == 0 {
		return nil
	}
	step, suffix := 8, "in-addr.arpa" // bits of a label (RFC 1035, 3.5)
	if p.Addr().Is6() {
		step, suffix = 4, "ip6.arpa" // RFC 3596, 2.5
	}
	labels := (p.Bits() + step - 1) / step
	count := 1 << (labels*step - p.Bits())
	if count > maxZones {
		return nil
	}
	zones := make([]string, 0, count)
	bytes := p.Addr().AsSlice()
	for i := range count {
		var b strings.Builder
		for l := labels - 1; l >= 0; l-- {
			v := int(bytes[l*step/8])
			if step == 4 {
				v = v >> (4 * (1 - l%2)) & 0xf
			}
			if l == labels-1 {
				v += i
			}
			if step == 4 {
				b.WriteString(strconv.FormatInt(int64(v), 16))
			} else {
				b.WriteString(strconv.Itoa(v))
			}
			b.WriteByte('.')
		}
		zones = append(zones, b.String()+suffix)
	}
	return zones
}

// Label makes the DNS label of a kubeconfig context's name, as it stands in
// SVC.NS.svc.LABEL.culvert: lower case, everything but letters and digits
// becomes a dash, and a name that does not fit ends in a hash of itself.
func Label(context string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(context) {
		if r < 'a' && (r < '0' || r > '9') || r > 'z' {
			r = '-'
		}
		b.WriteRune(r)
	}
	label := strings.Trim(b.String(), "-")
	if label == "" {
		label = "context"
	}
	if len(label) > 63 { // RFC 1035, 2.3.4
		sum := sha256.Sum256([]byte(context))
		label = strings.TrimRight(label[:54], "-") + "-" + hex.EncodeToString(sum[:4])
	}
	return label
}
