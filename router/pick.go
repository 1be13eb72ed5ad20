package router

import (
	"crypto/rand"
	"fmt"
	"net/netip"
	"slices"
)

var (
	// cgn is shared address space (RFC 6598). Nobody's LAN uses it, but
	// Tailscale gives its nodes addresses of it and drops others' packets from it.
	cgn = netip.MustParsePrefix("100.64.0.0/10")

	// pools4 are where tunnel addresses come from, best first. 198.18.0.0/15 is
	// for benchmarks (RFC 2544); its first half is more often used, by proxies
	// that hand out fake addresses.
	pools4 = []netip.Prefix{
		cgn,
		netip.MustParsePrefix("198.19.0.0/16"),
		netip.MustParsePrefix("198.18.0.0/16"),
		netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("172.16.0.0/12"),
		netip.MustParsePrefix("192.168.0.0/16"),
	}

	// pools6: locally assigned unique local addresses (RFC 4193 section 3.1).
	pools6 = []netip.Prefix{netip.MustParsePrefix("fd00::/8")}
)

// draws is how many random addresses are tried in a pool before it counts as full.
const draws = 256

// PickAddresses chooses a session's addresses in the tunnel: its own, the
// agent's, and those of its netstack for connections from the cluster; each
// IPv4 then IPv6. None lies in a local route or connected prefix (f), in avoid
// (the cluster's ranges), in another session's ranges, or is in taken.
func PickAddresses(f *Facts, avoid []netip.Prefix, taken []netip.Addr) (tunnel, agent, inbound []netip.Addr, err error) {
	avoid = slices.Clone(avoid)
	for _, r := range f.Routes {
		// A half of the address space is a VPN's way to say default route.
		if r.Prefix.Bits() > 1 {
			avoid = append(avoid, r.Prefix)
		}
	}
	for _, a := range f.Addresses {
		avoid = append(avoid, a.Prefix.Masked())
	}
	for _, s := range f.DNS {
		avoid = append(avoid, single(s.Addr().WithZone("")))
	}
	for _, s := range f.Sessions {
		avoid = append(avoid, s.Routes...)
	}
	four := slices.DeleteFunc(slices.Clone(pools4), func(pool netip.Prefix) bool {
		return pool == cgn && f.uses(cgn)
	})
	taken = slices.Clone(taken)
	for _, pools := range [][]netip.Prefix{four, pools6} {
		for _, list := range []*[]netip.Addr{&tunnel, &agent, &inbound} {
			addr, ok := draw(pools, avoid, taken)
			if !ok {
				return nil, nil, nil, fmt.Errorf("choosing tunnel addresses: local routes and the cluster's ranges fill all of %v", pools)
			}
			taken = append(taken, addr)
			*list = append(*list, addr)
		}
	}
	return tunnel, agent, inbound, nil
}

// uses tells whether the machine has an address or route inside p.
func (f *Facts) uses(p netip.Prefix) bool {
	for _, r := range f.Routes {
		if contains(p, r.Prefix) {
			return true
		}
	}
	for _, a := range f.Addresses {
		if p.Contains(a.Prefix.Addr()) {
			return true
		}
	}
	return false
}

// draw picks a random free address of the first pool that has one.
func draw(pools, avoid []netip.Prefix, taken []netip.Addr) (netip.Addr, bool) {
	for _, pool := range pools {
		if covered(pool, avoid) {
			continue
		}
		for range draws {
			a := random(pool)
			if last := a.AsSlice()[a.BitLen()/8-1]; last == 0 || last == 255 {
				continue // some programs take these for networks and broadcasts
			}
			if !within(single(a), avoid) && !slices.Contains(taken, a) {
				return a, true
			}
		}
	}
	return netip.Addr{}, false
}

// random returns any address of a pool.
func random(pool netip.Prefix) netip.Addr {
	b := pool.Masked().Addr().AsSlice()
	var r [16]byte
	rand.Read(r[:]) // never fails (crypto/rand)
	bits := pool.Bits()
	for i := range b {
		switch keep := bits - 8*i; {
		case keep <= 0:
			b[i] = r[i]
		case keep < 8:
			b[i] |= r[i] & (0xff >> keep)
		}
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}
