package session

import (
	"crypto/rand"
	"fmt"
	"net/netip"
	"slices"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/peer"
)

// Ranges for the addresses of standard peers. 198.18.0.0/15 is for benchmarks
// (RFC 2544) and in nobody's network; the private ones are for clusters that
// route it. Unique local addresses: RFC 4193 section 3.1.
var (
	peerPools4 = []netip.Prefix{
		netip.MustParsePrefix("198.18.0.0/15"), netip.MustParsePrefix("10.0.0.0/8"),
		netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
	}
	peerPools6 = []netip.Prefix{netip.MustParsePrefix("fd00::/8")}
)

// Sizes of the ranges: peer.Max, the agent, the first and the last address.
const peerBits4, peerBits6 = 28, 64

var _ [1<<(32-peerBits4) - peer.Max - 3]struct{} // there is room

// peerDraws is how many random ranges are tried in a pool before it counts as
// full.
const peerDraws = 256

// pickPeerRanges draws a range of each family that overlaps nothing of busy.
func pickPeerRanges(busy []netip.Prefix) ([]netip.Prefix, error) {
	var picked []netip.Prefix
	for _, family := range []struct {
		pools []netip.Prefix
		bits  int
	}{{peerPools4, peerBits4}, {peerPools6, peerBits6}} {
		p, ok := drawRange(family.pools, family.bits, busy)
		if !ok {
			return nil, &api.Error{Code: api.CodeConflict,
				Message: fmt.Sprintf("no range is left for addresses of peers: the cluster's ranges fill all of %v", family.pools), Hint: "culvert status -o wide"}
		}
		picked = append(picked, p)
	}
	return picked, nil
}

func drawRange(pools []netip.Prefix, bits int, busy []netip.Prefix) (netip.Prefix, bool) {
	for _, pool := range pools {
		for range peerDraws {
			b := pool.Addr().AsSlice()
			var r [16]byte
			rand.Read(r[:]) // never fails (crypto/rand)
			for i := range b {
				// The pool's bits stay.
				mask := byte(0xff >> min(8, max(0, pool.Bits()-8*i)))
				b[i] = b[i]&^mask | r[i]&mask
			}
			a, _ := netip.AddrFromSlice(b)
			p := netip.PrefixFrom(a, bits).Masked()
			if !slices.ContainsFunc(busy, p.Overlaps) {
				return p, true
			}
		}
	}
	return netip.Prefix{}, false
}

// cut is what of the prefixes is left without the holes, each address once, in
// order.
func cut(prefixes, holes []netip.Prefix) []netip.Prefix {
	var left []netip.Prefix
	for _, p := range prefixes {
		pieces := []netip.Prefix{p.Masked()}
		for _, h := range holes {
			var smaller []netip.Prefix
			for _, piece := range pieces {
				smaller = append(smaller, without(piece, h)...)
			}
			pieces = smaller
		}
		left = append(left, pieces...)
	}
	slices.SortFunc(left, func(a, b netip.Prefix) int {
		if c := a.Addr().Compare(b.Addr()); c != 0 {
			return c
		}
		return a.Bits() - b.Bits() // the wider one first
	})
	var once []netip.Prefix
	for _, p := range left {
		if n := len(once); n == 0 || !once[n-1].Overlaps(p) {
			once = append(once, p)
		}
	}
	return once
}

// without halves p until hole is a piece of its own, and returns the others.
func without(p, hole netip.Prefix) []netip.Prefix {
	switch {
	case !p.Overlaps(hole):
		return []netip.Prefix{p}
	case hole.Bits() <= p.Bits():
		return nil
	}
	low := netip.PrefixFrom(p.Addr(), p.Bits()+1)
	b := p.Addr().AsSlice()
	b[p.Bits()/8] |= 0x80 >> (p.Bits() % 8)
	a, _ := netip.AddrFromSlice(b)
	return append(without(low, hole), without(netip.PrefixFrom(a, p.Bits()+1), hole)...)
}
