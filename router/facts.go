package router

import (
	"net/netip"
)

// Facts is what the machine's network looks like without culvert: our own
// devices and tables are not in it.
type Facts struct {
	Gateways  []Gateway        // of default routes, and other routes' next hops
	DNS       []netip.AddrPort // nameservers, without loopback ones
	Addresses []Address        // the machine's own, without loopback and link-local
	Routes    []LocalRoute     // of all tables but "local", without default routes, link-local and multicast
	Sessions  []SessionRanges  // other culvert sessions' ranges; the caller adds them
}

// Gateway is a router next to the machine.
type Gateway struct {
	Addr    netip.Addr
	Device  string
	Default bool // of a default route
}

// Address is one address of the machine and the prefix it is in.
type Address struct {
	Prefix netip.Prefix // not masked: the address and its length
	Device string
}

// LocalRoute is a route of the machine.
type LocalRoute struct {
	Prefix    netip.Prefix
	Device    string
	Table     int
	Connected bool   // no gateway: the neighbours are on the link
	VPN       string // what kind of other VPN the device is, or ""
	Kind      string // "" for a usual route; "blackhole", "unreachable", "prohibit"
}

// SessionRanges is what another session of culvert routes.
type SessionRanges struct {
	ID       string // "": of another user, who stays unnamed
	Context  string
	Routes   []netip.Prefix
	Excluded []netip.Prefix
}
