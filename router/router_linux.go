package router

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// congestion is asked for on our routes: the tunnel shows a flow no loss but
	// a growing queue, which BBR answers and loss-based control does not.
	congestion = "bbr"

	// rtoMin in milliseconds. The carrier's own recovery takes a round trip or
	// two; the usual 200 ms would time out and retransmit into a reliable stream.
	rtoMin = 400

	// ipv6MinMTU: RFC 8200 section 5.
	ipv6MinMTU = 1280
)

var families = []int{netlink.FAMILY_V4, netlink.FAMILY_V6}

// never is what no route of ours leads away, whatever was asked for.
var never = []netip.Prefix{
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/4"),
	netip.MustParsePrefix("255.255.255.255/32"),
	netip.MustParsePrefix("::1/128"),
	netip.MustParsePrefix("fe80::/10"),
	netip.MustParsePrefix("ff00::/8"),
}

// Set makes the machine match c; nil removes everything of this slot but the
// device itself. It compares with what the kernel has, adds before it deletes
// (an excluded address is never captured in between), tries everything, and
// joins the errors; calling it again with the same c retries what is missing
// and otherwise changes nothing. The device must exist unless c is nil.
func (r *Router) Set(c *Config) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.notes = nil
	if c == nil {
		r.congestion = ""
		return r.clearLocked()
	}
	link, err := netlink.LinkByName(r.device)
	if err != nil {
		return fmt.Errorf("finding device %s: %w", r.device, err)
	}
	var errs []error
	if link.Attrs().Flags&net.FlagUp == 0 {
		// Without IPv6 this fails, and then there is no link-local address to prevent.
		_ = netlink.LinkSetIP6AddrGenMode(link, nl6AddrGenNone)
		if err := netlink.LinkSetUp(link); err != nil {
			errs = append(errs, fmt.Errorf("bringing device %s up: %w", r.device, err))
		}
	}
	for _, family := range families {
		w, err := r.wanted(c, family, link)
		errs = append(errs, err)
		if family == netlink.FAMILY_V6 && len(w.addresses)+len(w.routes) > 0 && ipv6Disabled(r.device) {
			r.notes = append(r.notes, "IPv6 is disabled on this machine: the cluster's IPv6 ranges are not routed")
			continue
		}
		errs = append(errs, r.apply(w)...)
	}
	return errors.Join(errs...)
}

// Close removes all of this slot but the device, like Set(nil).
func (r *Router) Close() error { return r.Set(nil) }

// nl6AddrGenNone is IN6_ADDR_GEN_MODE_NONE: no link-local address by itself.
const nl6AddrGenNone = 1

func ipv6Disabled(device string) bool {
	b, err := os.ReadFile("/proc/sys/net/ipv6/conf/" + device + "/disable_ipv6")
	return err != nil || strings.TrimSpace(string(b)) != "0"
}

// wanted is one family's part of a Config.
type wanted struct {
	family    int
	link      netlink.Link
	addresses []netip.Prefix
	routes    map[netip.Prefix]netlink.Route
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}

// wanted turns c into routes of one family; what it leaves out it reports.
func (r *Router) wanted(c *Config, family int, link netlink.Link) (wanted, error) {
	w := wanted{family: family, link: link, routes: map[netip.Prefix]netlink.Route{}}
	var errs []error
	var src net.IP
	for _, p := range c.Addresses {
		if !p.IsValid() || familyOf(p.Addr()) != family {
			continue
		}
		if !p.IsSingleIP() {
			// A routed subnet on the device would put its routes in the main table.
			errs = append(errs, fmt.Errorf("address %s of device %s: only a /32 or /128 may be there", p, r.device))
			continue
		}
		if src == nil {
			src = p.Addr().AsSlice()
		}
		w.addresses = append(w.addresses, p)
	}
	for _, p := range c.Routes {
		if !p.IsValid() || familyOf(p.Addr()) != family {
			continue
		}
		p = p.Masked()
		if within(p, never) {
			errs = append(errs, fmt.Errorf("route %s: loopback, link-local and multicast are never routed to a cluster", p))
			continue
		}
		route := netlink.Route{
			Family: family, Table: Table(r.slot), Type: unix.RTN_UNICAST, Protocol: Protocol,
			Scope: netlink.SCOPE_LINK, LinkIndex: link.Attrs().Index, Dst: ipNet(p), Src: src,
			// RtoMin has no effect unless locked. MTULock must stay off: netlink
			// would write a second RTAX_LOCK, of which the kernel keeps the last.
			RtoMin: rtoMin, RtoMinLock: true, Congctl: congestion,
		}
		if r.noCongestion {
			route.Congctl = ""
		}
		if family == netlink.FAMILY_V6 {
			route.Scope = netlink.SCOPE_UNIVERSE // the kernel knows no other in IPv6
		}
		if c.MTU > 0 {
			route.MTU, route.AdvMSS = c.MTU, c.MTU-40
			if family == netlink.FAMILY_V6 {
				route.MTU = max(c.MTU, ipv6MinMTU)
				route.AdvMSS = route.MTU - 60
			}
		}
		w.routes[p] = route
	}
	if len(w.routes) == 0 {
		return w, errors.Join(errs...)
	}
	excluded := slices.Clone(c.Excluded)
	for _, p := range never {
		if slices.ContainsFunc(c.Routes, p.Overlaps) {
			excluded = append(excluded, p)
		}
	}
	for _, p := range excluded {
		if !p.IsValid() || familyOf(p.Addr()) != family {
			continue
		}
		p = p.Masked()
		w.routes[p] = netlink.Route{
			Family: family, Table: Table(r.slot), Type: unix.RTN_THROW, Protocol: Protocol, Dst: ipNet(p),
		}
	}
	return w, errors.Join(errs...)
}

// apply makes one family match w.
func (r *Router) apply(w wanted) (errs []error) {
	staleAddrs, err := r.addAddresses(w)
	errs = append(errs, err)

	have, err := listTable(w.family, Table(r.slot))
	if err != nil {
		return append(errs, err)
	}
	missing := diff(w.routes, have)
	// Throws first: what is excluded must be so before its range is routed.
	for _, typ := range []int{unix.RTN_THROW, unix.RTN_UNICAST} {
		for p, route := range missing {
			if route.Type == typ {
				if err := r.replaceLocked(route); err != nil {
					errs = append(errs, fmt.Errorf("adding route %s to table %d: %w", p, route.Table, err))
				}
			}
		}
	}
	errs = append(errs, r.setRule(w.family, len(w.routes) > 0))

	// Read back: what the kernel has now decides what is stale and what it accepted.
	have, err = listTable(w.family, Table(r.slot))
	if err != nil {
		return append(errs, err)
	}
	if len(w.routes) > 0 {
		r.acceptedLocked(have)
	}
	for _, typ := range []int{unix.RTN_UNICAST, unix.RTN_THROW} {
		for _, route := range have {
			p := prefixOf(route.Dst, w.family)
			want, ok := w.routes[p]
			if ok && same(want, route) || (route.Type == unix.RTN_THROW) != (typ == unix.RTN_THROW) {
				continue
			}
			if ok && len(diff(map[netip.Prefix]netlink.Route{p: want}, have)) > 0 {
				continue // replacing it went wrong: the old one is better than none
			}
			if err := deleteRoute(route); err != nil {
				errs = append(errs, fmt.Errorf("deleting route %s from table %d: %w", p, route.Table, err))
			}
		}
	}
	for _, a := range staleAddrs {
		if err := netlink.AddrDel(w.link, &a); err != nil && !gone(err) {
			errs = append(errs, fmt.Errorf("deleting address %s from %s: %w", a.IPNet, r.device, err))
		}
	}
	return errs
}

// addAddresses adds the missing ones and returns those that are too many, to be
// deleted last: deleting the last address would take routes along.
func (r *Router) addAddresses(w wanted) (stale []netlink.Addr, err error) {
	have, err := netlink.AddrList(w.link, w.family)
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil, fmt.Errorf("listing addresses of %s: %w", r.device, err)
	}
	present := map[netip.Prefix]bool{}
	for _, a := range have {
		p := prefixOf(a.IPNet, w.family)
		if present[p] = slices.Contains(w.addresses, p); !present[p] {
			stale = append(stale, a)
		}
	}
	var errs []error
	for _, p := range w.addresses {
		if present[p] {
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NOPREFIXROUTE}
		if w.family == netlink.FAMILY_V6 {
			a.Flags |= unix.IFA_F_NODAD // nobody else can have it, and a tentative address is no source
		}
		if err := netlink.AddrReplace(w.link, a); err != nil {
			errs = append(errs, fmt.Errorf("adding address %s to %s: %w", p, r.device, err))
		}
	}
	return stale, errors.Join(errs...)
}

// replaceLocked adds a route, without congestion control where the kernel does not know it.
func (r *Router) replaceLocked(route netlink.Route) error {
	if r.noCongestion {
		route.Congctl = ""
	}
	err := netlink.RouteReplace(&route)
	if err == nil || route.Congctl == "" {
		return err
	}
	// ENOENT or, from the metrics' parser, EINVAL: no such congestion control.
	if !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return err
	}
	route.Congctl = ""
	if err := netlink.RouteReplace(&route); err != nil {
		return err
	}
	r.noCongestion = true
	return nil
}

// acceptedLocked reads which congestion control the kernel keeps on our routes.
func (r *Router) acceptedLocked(have []netlink.Route) {
	for _, route := range have {
		if route.Type == unix.RTN_UNICAST {
			r.congestion = route.Congctl
			r.noCongestion = r.noCongestion || route.Congctl == ""
			return
		}
	}
}

// setRule adds or removes the rule of this slot in one family.
func (r *Router) setRule(family int, want bool) error {
	rules, err := listRules(family)
	if err != nil {
		return err
	}
	var errs []error
	found := false
	var stale []netlink.Rule
	for _, rule := range rules {
		if rule.Table != Table(r.slot) {
			continue
		}
		if want && !found && plain(rule) {
			found = true
			continue
		}
		stale = append(stale, rule)
	}
	if want && !found {
		rule := netlink.NewRule()
		rule.Family, rule.Priority, rule.Table, rule.Protocol = family, RulePriority, Table(r.slot), Protocol
		if err := netlink.RuleAdd(rule); err != nil && !errors.Is(err, unix.EEXIST) {
			errs = append(errs, fmt.Errorf("adding rule %d for table %d: %w", RulePriority, Table(r.slot), err))
		}
	}
	for _, rule := range stale {
		if err := deleteRule(rule); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// plain tells whether a rule of our table is just as we make it.
func plain(rule netlink.Rule) bool {
	return rule.Priority == RulePriority && !rule.Invert && rule.Src == nil && rule.Dst == nil && rule.Mark == 0 &&
		rule.IifName == "" && rule.OifName == "" && rule.UIDRange == nil && rule.IPProto == 0 && rule.Tos == 0 &&
		rule.Dport == nil && rule.Sport == nil && rule.SuppressPrefixlen < 0
}

// clearLocked removes rules first, so that nothing looks into a half-empty table.
func (r *Router) clearLocked() error {
	var errs []error
	link, err := netlink.LinkByName(r.device)
	if err != nil && !errors.As(err, new(netlink.LinkNotFoundError)) {
		errs = append(errs, fmt.Errorf("finding device %s: %w", r.device, err))
	}
	for _, family := range families {
		errs = append(errs, r.setRule(family, false))
		routes, err := listTable(family, Table(r.slot))
		errs = append(errs, err)
		for _, route := range routes {
			if err := deleteRoute(route); err != nil {
				errs = append(errs, fmt.Errorf("deleting route %v from table %d: %w", route.Dst, route.Table, err))
			}
		}
		if link == nil {
			continue
		}
		stale, err := r.addAddresses(wanted{family: family, link: link})
		errs = append(errs, err)
		for _, a := range stale {
			if err := netlink.AddrDel(link, &a); err != nil && !gone(err) {
				errs = append(errs, fmt.Errorf("deleting address %s from %s: %w", a.IPNet, r.device, err))
			}
		}
	}
	return errors.Join(errs...)
}
