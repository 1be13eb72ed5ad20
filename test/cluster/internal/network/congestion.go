package network

import (
	"fmt"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Congestion gives every unicast route of the namespace's main table that
// congestion control for TCP, "" for the namespace's own. Other tables are a VPN's,
// whose affair it is. A route may name any that the kernel has
// (RTAX_CC_ALGO), where the namespace's sysctl takes only those of
// net.ipv4.tcp_allowed_congestion_control. Open connections keep theirs.
func (n *Namespace) Congestion(name string) error {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := n.RouteListFiltered(family, &netlink.Route{Type: unix.RTN_UNICAST}, netlink.RT_FILTER_TYPE)
		if err != nil {
			return fmt.Errorf("list the routes of %s: %w", n.path, err)
		}
		for _, r := range routes {
			if r.Congctl == name || len(r.MultiPath) > 0 {
				continue
			}
			r.Congctl = name
			r.Flags &^= unix.RTNH_F_LINKDOWN | unix.RTNH_F_DEAD
			if err := n.RouteReplace(&r); err != nil {
				return fmt.Errorf("give the route %s of %s the congestion control %q: %w", r, n.path, name, err)
			}
		}
	}
	return nil
}
