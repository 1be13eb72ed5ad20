package router

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Local reads the machine's network and nameservers. It changes nothing and
// needs no privilege.
func Local() (*Facts, error) { return Env{}.Local() }

// Local is Local with the paths of e.
func (e Env) Local() (*Facts, error) {
	f, ours, err := network()
	if err != nil {
		return nil, err
	}
	f.DNS = e.nameservers(ours)
	return f, nil
}

// network reads all of Facts that the kernel knows, and the indices of our own devices.
func network() (*Facts, map[int]bool, error) {
	links, err := dump(netlink.LinkList)
	if err != nil {
		return nil, nil, fmt.Errorf("listing devices: %w", err)
	}
	ours := map[int]bool{}
	byIndex := map[int]netlink.Link{}
	for _, l := range links {
		byIndex[l.Attrs().Index] = l
		if deviceName.MatchString(l.Attrs().Name) {
			ours[l.Attrs().Index] = true
		}
	}
	name := func(index int) string {
		if l := byIndex[index]; l != nil {
			return l.Attrs().Name
		}
		return ""
	}
	f := &Facts{}
	for _, family := range families {
		addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, family) })
		if err != nil {
			return nil, nil, fmt.Errorf("listing addresses: %w", err)
		}
		for _, a := range addrs {
			p := prefixOf(a.IPNet, family)
			if ours[a.LinkIndex] || within(single(p.Addr()), never) {
				continue
			}
			f.Addresses = append(f.Addresses, Address{Prefix: p, Device: name(a.LinkIndex)})
		}
		routes, err := listTable(family, unix.RT_TABLE_UNSPEC)
		if err != nil {
			return nil, nil, err
		}
		for _, r := range routes {
			f.addRoute(r, family, ours, byIndex)
		}
	}
	return f, ours, nil
}

func (f *Facts) addRoute(r netlink.Route, family int, ours map[int]bool, links map[int]netlink.Link) {
	if r.Table == unix.RT_TABLE_LOCAL || ourTable(r.Table) {
		return
	}
	var kind string
	switch r.Type {
	case unix.RTN_UNICAST:
	case unix.RTN_BLACKHOLE:
		kind = "blackhole"
	case unix.RTN_UNREACHABLE:
		kind = "unreachable"
	case unix.RTN_PROHIBIT:
		kind = "prohibit"
	default:
		return
	}
	type hop struct {
		index int
		gw    net.IP
	}
	hops := []hop{{r.LinkIndex, r.Gw}}
	if via, ok := r.Via.(*netlink.Via); ok && r.Gw == nil {
		hops[0].gw = via.Addr // an IPv4 route with an IPv6 next hop
	}
	if len(r.MultiPath) > 0 {
		hops = hops[:0]
		for _, n := range r.MultiPath {
			hops = append(hops, hop{n.LinkIndex, n.Gw})
		}
	}
	if ours[hops[0].index] {
		return
	}
	p := prefixOf(r.Dst, family)
	device := func(index int) string {
		if l := links[index]; l != nil && kind == "" {
			return l.Attrs().Name
		}
		return ""
	}
	gateway := false
	for _, h := range hops {
		if addr, ok := netip.AddrFromSlice(h.gw); ok {
			gateway = true
			g := Gateway{Addr: addr.Unmap(), Device: device(h.index), Default: p.Bits() == 0}
			f.addGateway(g)
		}
	}
	if p.Bits() == 0 || within(p, never) {
		return
	}
	local := LocalRoute{
		Prefix: p, Device: device(hops[0].index), Table: r.Table, Kind: kind,
		Connected: !gateway && kind == "" && r.Protocol == unix.RTPROT_KERNEL,
	}
	if l := links[hops[0].index]; l != nil && kind == "" {
		local.VPN = vpn(l)
	}
	f.Routes = append(f.Routes, local)
}

// addGateway keeps each gateway once, as a default one if it is that in any table.
func (f *Facts) addGateway(g Gateway) {
	for i, h := range f.Gateways {
		if h.Addr == g.Addr && h.Device == g.Device {
			f.Gateways[i].Default = h.Default || g.Default
			return
		}
	}
	f.Gateways = append(f.Gateways, g)
}

// vpn names the kind of another VPN's device, or returns "". Devices that
// containers and virtual machines use too (tap, ipip, vxlan) are none.
func vpn(l netlink.Link) string {
	switch l := l.(type) {
	case *netlink.Tuntap:
		if l.Mode == netlink.TUNTAP_MODE_TUN {
			return "tun"
		}
		return ""
	}
	switch t := l.Type(); t {
	case "wireguard", "ppp", "xfrm", "vti", "vti6", "ovpn":
		return t
	}
	return ""
}
