package router

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// AskNextHops has the kernel ask again, now, for the link address of each next
// hop on the way to addrs that it is asking for in vain. By itself it asks once
// a second (net.ipv4.neigh.*.retrans_time_ms), which everything that waits for a
// network to come back then waits for, too. What is queued for the hop stays
// queued, and a hop that is known is left alone.
func AskNextHops(addrs []netip.Addr) error {
	type hop struct {
		addr netip.Addr
		link int
	}
	asked := map[hop]bool{}
	var failed error
	for _, a := range addrs {
		routes, err := netlink.RouteGet(a.AsSlice())
		if err != nil || len(routes) == 0 {
			continue // no way there at all: no hop to ask
		}
		h := hop{a, routes[0].LinkIndex}
		if gw, ok := netip.AddrFromSlice(routes[0].Gw); ok {
			h.addr = gw.Unmap()
		}
		if asked[h] {
			continue
		}
		asked[h] = true
		if err := ask(h.addr, h.link); err != nil {
			failed = errors.Join(failed, fmt.Errorf("asking for the neighbour %v again: %w", h.addr, err))
		}
	}
	return failed
}

// ask makes an entry that is incomplete one that nobody has asked for, and asks:
// __neigh_event_send (net/core/neighbour.c) sends its first question at once.
func ask(addr netip.Addr, link int) error {
	family := netlink.FAMILY_V4
	if addr.Is6() {
		family = netlink.FAMILY_V6
	}
	known, err := dump(func() ([]netlink.Neigh, error) { return netlink.NeighList(link, family) })
	if err != nil {
		return err
	}
	for _, n := range known {
		if a, ok := netip.AddrFromSlice(n.IP); !ok || a.Unmap() != addr || n.State != netlink.NUD_INCOMPLETE {
			continue
		}
		again := netlink.Neigh{LinkIndex: link, Family: family, IP: net.IP(addr.AsSlice()), State: netlink.NUD_NONE}
		if err := netlink.NeighSet(&again); err != nil {
			return err
		}
		again.Flags = netlink.NTF_USE
		if err := netlink.NeighSet(&again); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}
