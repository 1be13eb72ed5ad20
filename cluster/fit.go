package cluster

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/culvert-dev/culvert/daemon/api"
)

// maxRoutes is how many routes are handed to the daemon, which accepts 1,024:
// some are left for --include-ips.
const maxRoutes = 960

// fit makes the routes few enough. Known ranges come before observed addresses;
// both stay exact as long as they fit. Neighbours are joined first, which loses
// nothing; then addresses are rounded up to wider and wider ranges, but never to
// one that holds an address of hosts (nodes must stay outside). The notes say
// what was rounded.
func fit(known, seen []api.Route, hosts map[netip.Addr]bool) (routes []api.Route, notes []string) {
	known, seen = tidy(known), tidy(seen)
	if len(known) > maxRoutes {
		known = join(known)
	}
	if len(known) > maxRoutes {
		n := len(known)
		known = widen(known, maxRoutes, hosts)
		notes = append(notes, fmt.Sprintf("%d ranges of nodes were joined to %d wider ones, to stay below %d routes", n, len(known), maxRoutes))
	}
	if room := maxRoutes - len(known); len(seen) > room {
		n := len(seen)
		seen = widen(seen, room, hosts)
		notes = append(notes, fmt.Sprintf("%d addresses of pods and Services were joined to %d ranges, to stay below %d routes; --include-ips with the cluster's ranges is better", n, len(seen), maxRoutes))
		if len(seen) > room {
			notes = append(notes, fmt.Sprintf("%d of these ranges are not routed", len(seen)-room))
			seen = seen[:max(0, room)]
		}
	}
	if len(known) > maxRoutes {
		notes = append(notes, fmt.Sprintf("%d ranges are not routed: more than %d", len(known)-maxRoutes, maxRoutes))
		known = known[:maxRoutes]
	}
	return tidy(append(known, seen...)), notes
}

// tidy sorts, and drops prefixes that lie inside another.
func tidy(routes []api.Route) []api.Route {
	slices.SortFunc(routes, func(a, b api.Route) int {
		return cmp.Or(a.Prefix.Addr().Compare(b.Prefix.Addr()), cmp.Compare(a.Prefix.Bits(), b.Prefix.Bits()), cmp.Compare(a.Source, b.Source))
	})
	out := routes[:0]
	for _, r := range routes {
		if n := len(out); n == 0 || !out[n-1].Prefix.Contains(r.Prefix.Addr()) {
			out = append(out, r)
		}
	}
	return out
}

// join replaces two halves of a prefix by the prefix, again and again. routes
// are tidy.
func join(routes []api.Route) []api.Route {
	var out []api.Route
	for _, r := range routes {
		out = append(out, r)
		for len(out) > 1 {
			a, b := out[len(out)-2], out[len(out)-1]
			if a.Prefix.Bits() != b.Prefix.Bits() || a.Prefix.Addr().BitLen() != b.Prefix.Addr().BitLen() {
				break
			}
			parent := netip.PrefixFrom(a.Prefix.Addr(), a.Prefix.Bits()-1).Masked()
			if !parent.Contains(b.Prefix.Addr()) || unusable(parent) != "" {
				break
			}
			out = append(out[:len(out)-2], api.Route{Prefix: parent, Source: a.Source + " and others"})
		}
	}
	return out
}

// widen rounds prefixes up until at most room are left, or until it may not go
// further. The levels are IPv4's; IPv6 ranges leave as many host bits.
func widen(routes []api.Route, room int, hosts map[netip.Addr]bool) []api.Route {
	for bits := 24; bits >= 12 && len(routes) > room; bits -= 2 {
		taken := map[netip.Prefix]bool{} // hold a node
		for a := range hosts {
			taken[roundUp(netip.PrefixFrom(a, a.BitLen()), bits)] = true
		}
		groups := map[netip.Prefix]int{}
		for _, r := range routes {
			groups[roundUp(r.Prefix, bits)]++
		}
		var out []api.Route
		for _, r := range routes {
			wide := roundUp(r.Prefix, bits)
			switch n := groups[wide]; {
			case n == 0: // already there
			case n == 1 || taken[wide]:
				out = append(out, r)
			default:
				out = append(out, api.Route{Prefix: wide, Source: r.Source + " and others"})
				groups[wide] = 0
			}
		}
		routes = out
	}
	return routes
}

// roundUp is the prefix of bits (of an IPv4 address) that holds p, or p where it
// is wider already.
func roundUp(p netip.Prefix, bits int) netip.Prefix {
	if p.Addr().Is6() {
		bits += 96
	}
	if p.Bits() <= bits {
		return p
	}
	return netip.PrefixFrom(p.Addr(), bits).Masked()
}

// prefixSet answers whether one of many prefixes holds an address, in a lookup
// per prefix length.
type prefixSet struct {
	have map[netip.Prefix]bool
	bits []int
}

func newPrefixSet(prefixes []netip.Prefix) *prefixSet {
	s := &prefixSet{have: map[netip.Prefix]bool{}}
	for _, p := range prefixes {
		s.have[p.Masked()] = true
		if !slices.Contains(s.bits, p.Bits()) {
			s.bits = append(s.bits, p.Bits())
		}
	}
	return s
}

func (s *prefixSet) contains(a netip.Addr) bool {
	for _, bits := range s.bits {
		if bits > a.BitLen() {
			continue
		}
		if s.have[netip.PrefixFrom(a, bits).Masked()] {
			return true
		}
	}
	return false
}
