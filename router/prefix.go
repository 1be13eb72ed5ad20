package router

import "net/netip"

// contains tells whether inner is outer or lies in it.
func contains(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Overlaps(inner)
}

// within tells whether p lies in one of the prefixes.
func within(p netip.Prefix, prefixes []netip.Prefix) bool {
	for _, q := range prefixes {
		if contains(q, p) {
			return true
		}
	}
	return false
}

// covered tells whether the prefixes together hold all of p.
func covered(p netip.Prefix, prefixes []netip.Prefix) bool {
	var inside []netip.Prefix
	for _, q := range prefixes {
		if contains(q, p) {
			return true
		}
		if p.Overlaps(q) {
			inside = append(inside, q)
		}
	}
	// Every level keeps only the prefixes in its half, so this visits at most
	// the bits of an address for each of them.
	if len(inside) == 0 {
		return false
	}
	low, high := halves(p)
	return covered(low, inside) && covered(high, inside)
}

// halves splits a prefix shorter than an address.
func halves(p netip.Prefix) (low, high netip.Prefix) {
	bits := p.Bits() + 1
	b := p.Masked().Addr().AsSlice()
	low = netip.PrefixFrom(p.Masked().Addr(), bits)
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	addr, _ := netip.AddrFromSlice(b)
	return low, netip.PrefixFrom(addr, bits)
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }
