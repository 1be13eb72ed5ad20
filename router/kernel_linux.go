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

// dumps bounds the tries to list something that changes while it is listed.
const dumps = 5

// dump lists until the kernel says that the list is whole.
func dump[T any](list func() ([]T, error)) (res []T, err error) {
	for range dumps {
		if res, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return res, err
		}
	}
	return res, err
}

// listTable returns the routes of one table; unix.RT_TABLE_UNSPEC is all tables.
func listTable(family, table int) ([]netlink.Route, error) {
	routes, err := dump(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: table}, netlink.RT_FILTER_TABLE)
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil // the table does not exist (kernels with strict dumps)
	}
	if err != nil {
		return nil, fmt.Errorf("listing routes of table %d: %w", table, err)
	}
	return routes, nil
}

func listRules(family int) ([]netlink.Rule, error) {
	rules, err := dump(func() ([]netlink.Rule, error) { return netlink.RuleList(family) })
	if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil, nil // a kernel without IPv6
	}
	if err != nil {
		return nil, fmt.Errorf("listing rules: %w", err)
	}
	return rules, nil
}

func deleteRoute(route netlink.Route) error {
	// Only what identifies it: metrics that this version does not know must not
	// keep it from deleting what a newer one made.
	err := netlink.RouteDel(&netlink.Route{
		Family: route.Family, Table: route.Table, Dst: route.Dst, Type: route.Type, Priority: route.Priority,
	})
	if gone(err) {
		return nil
	}
	return err
}

func deleteRule(rule netlink.Rule) error {
	err := netlink.RuleDel(&rule)
	if err != nil && !gone(err) {
		return fmt.Errorf("deleting rule %d for table %d: %w", rule.Priority, rule.Table, err)
	}
	return nil
}

// gone tells that there was nothing to delete.
func gone(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.ENODEV)
}

// diff returns what of want the kernel does not have.
func diff(want map[netip.Prefix]netlink.Route, have []netlink.Route) map[netip.Prefix]netlink.Route {
	missing := map[netip.Prefix]netlink.Route{}
	for p, route := range want {
		if !slices.ContainsFunc(have, func(h netlink.Route) bool {
			return prefixOf(h.Dst, h.Family) == p && same(route, h)
		}) {
			missing[p] = route
		}
	}
	return missing
}

// same compares what we set on a route.
func same(want, have netlink.Route) bool {
	if want.Type != have.Type {
		return false
	}
	if want.Type == unix.RTN_THROW {
		return true
	}
	return want.LinkIndex == have.LinkIndex && want.MTU == have.MTU && want.AdvMSS == have.AdvMSS &&
		want.RtoMin == have.RtoMin && want.RtoMinLock == have.RtoMinLock && want.Congctl == have.Congctl &&
		want.Src.Equal(have.Src)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// prefixOf converts what netlink gives; nil is the default route.
func prefixOf(n *net.IPNet, family int) netip.Prefix {
	if n == nil {
		if family == netlink.FAMILY_V4 {
			return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
		}
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	addr, _ := netip.AddrFromSlice(n.IP)
	if family == netlink.FAMILY_V4 {
		addr = addr.Unmap()
	}
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(addr, bits)
}

// Congestion returns the TCP congestion control that routes of a session get on
// this machine, as far as it can be told without changing anything: the module
// may not be loaded yet.
func Congestion() string {
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control"); err == nil &&
		slices.Contains(strings.Fields(string(b)), congestion) {
		return congestion
	}
	b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
