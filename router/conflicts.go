package router

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Always returns what a session must never capture, whatever the cluster's
// ranges are: nameservers, default gateways and connected prefixes. Loopback,
// link-local and multicast are the Router's own business.
func (f *Facts) Always() []api.Route {
	var res []api.Route
	seen := map[netip.Prefix]bool{}
	add := func(p netip.Prefix, source string) {
		if p = p.Masked(); p.IsValid() && !seen[p] {
			seen[p] = true
			res = append(res, api.Route{Prefix: p, Source: source})
		}
	}
	for _, s := range f.DNS {
		add(single(s.Addr().WithZone("")), "DNS server")
	}
	for _, g := range f.Gateways {
		if g.Default {
			add(single(g.Addr), "gateway "+g.Device)
		}
	}
	for _, a := range f.Addresses {
		add(a.Prefix, "connected "+a.Device)
	}
	return res
}

// Conflicts tells which of the plan's ranges collide with the machine's
// network: a local route equal to a range or inside it, a range that holds a
// nameserver, a gateway or an address of the machine, or any overlap with
// another session. A local route that is wider than the range is none: the
// longer prefix wins, and the rest of the wider one stays as it was. Neither is
// what the user's own excluded prefixes hold entirely.
//
// What lies inside an already reported network (its gateway, the machine's
// address in it) is not reported again.
func (f *Facts) Conflicts(plan []api.Route, excluded []netip.Prefix) []api.Conflict {
	var res []api.Conflict
	for _, c := range f.collisions(plan, excluded) {
		res = append(res, api.Conflict{Prefix: c.routed, Local: c.local, Flag: "--exclude-ips " + flagValue(c.prefix)})
	}
	return res
}

// Inside returns what of Conflicts is the machine's own network and no session's:
// what a session that is connected already leaves to the machine, whose networks
// come and go.
func (f *Facts) Inside(plan []api.Route, excluded []netip.Prefix) []api.Route {
	var res []api.Route
	for _, c := range f.collisions(plan, excluded) {
		if !c.session {
			res = append(res, api.Route{Prefix: c.prefix, Source: c.local})
		}
	}
	return res
}

// collision is a range of the plan and what it meets.
type collision struct {
	routed  netip.Prefix
	prefix  netip.Prefix // what both claim
	local   string       // whose it is, for people
	session bool         // another session's
}

func (f *Facts) collisions(plan []api.Route, excluded []netip.Prefix) []collision {
	var res []collision
	routes := slices.Clone(f.Routes)
	slices.SortStableFunc(routes, func(a, b LocalRoute) int { return a.Prefix.Bits() - b.Prefix.Bits() })
	for _, want := range plan {
		p := want.Prefix.Masked()
		known := slices.Clone(excluded)
		report := func(q netip.Prefix, local string) {
			if !contains(p, q) || covered(q, known) {
				return
			}
			known = append(known, q)
			res = append(res, collision{routed: p, prefix: q, local: local})
		}
		for _, r := range routes {
			report(r.Prefix, r.String())
		}
		for _, a := range f.Addresses {
			report(a.Prefix.Masked(), fmt.Sprintf("connected network %s dev %s", a.Prefix.Masked(), a.Device))
		}
		for _, s := range f.DNS {
			report(single(s.Addr().WithZone("")), "DNS server "+s.Addr().String())
		}
		for _, g := range f.Gateways {
			report(single(g.Addr.WithZone("")), fmt.Sprintf("gateway %s dev %s", g.Addr, g.Device))
		}
		for _, a := range f.Addresses {
			report(single(a.Prefix.Addr()), fmt.Sprintf("this machine's address %s dev %s", a.Prefix.Addr(), a.Device))
		}
		for _, s := range f.Sessions {
			for _, q := range s.Routes {
				q = q.Masked()
				if !p.Overlaps(q) {
					continue
				}
				common := p
				if q.Bits() > p.Bits() {
					common = q
				}
				if covered(common, excluded) || covered(common, s.Excluded) {
					continue
				}
				res = append(res, collision{routed: p, prefix: common, local: s.describe(q), session: true})
			}
		}
	}
	return res
}

// describe names a range of a session, and the session if the asker may know it.
func (s SessionRanges) describe(q netip.Prefix) string {
	if s.ID == "" {
		return fmt.Sprintf("range %s of another user's session", q)
	}
	return fmt.Sprintf("range %s of session %s (context %s)", q, s.ID, s.Context)
}

// String describes the route as `ip route` would, with what it means to the user.
func (r LocalRoute) String() string {
	var b strings.Builder
	b.WriteString("route " + r.Prefix.String())
	if r.Kind != "" {
		b.WriteString(" " + r.Kind)
	}
	if r.Device != "" {
		b.WriteString(" dev " + r.Device)
	}
	switch {
	case r.VPN != "":
		b.WriteString(" (another VPN: " + r.VPN + ")")
	case r.Connected:
		b.WriteString(" (connected network)")
	}
	return b.String()
}

// flagValue writes a single address without its length.
func flagValue(p netip.Prefix) string {
	if p.IsSingleIP() {
		return p.Addr().String()
	}
	return p.String()
}
