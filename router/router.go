// Package router makes the machine's own network follow what the daemon wants:
// addresses of the TUN device, routes in a private table, the rule that selects
// the table, and the operating system's DNS settings. It also tells what the
// machine's network looks like without culvert, which cluster ranges collide
// with it, and what root lets an untrusted session ask for.
//
// Everything is given as whole desired state and compared with what the kernel
// has, so every Set is idempotent, heals what others broke, and needs no memory.
package router

import (
	"net/netip"
	"regexp"
	"strconv"
	"sync"
)

const (
	// MaxSlots bounds the sessions of one machine; a slot numbers a session's
	// device, table and loopback DNS address (127.53.83.1 to 127.53.83.250).
	MaxSlots = 250

	// TableBase is the routing table of slot 0 ("cu" in the upper bytes: no
	// distribution, VPN or CNI that we know uses it). It is below 1<<31 because
	// netlink's 32-bit table id is a signed int in many programs: iproute2's
	// older versions, Go's netlink on 32-bit machines, and scripts that print it.
	TableBase = 0x6375_0000

	// RulePriority is the preference of our one `ip rule` per session and family.
	// It is after "local" (0), before Tailscale's (5210 to 5270), wg-quick's
	// (32764, 32765) and main (32766): a cluster's range wins over the same
	// machine's wider VPN routes, and what a throw route excludes falls through
	// to those rules just as it would without culvert.
	RulePriority = 5180

	// Protocol marks our routes and rules (rtm_protocol, unassigned in
	// iproute2's rt_protos), so that a reader of `ip route` sees whose they are.
	Protocol = 199
)

// Table returns the private routing table of a slot.
func Table(slot int) int { return TableBase + slot }

// Device returns the TUN device name of a slot.
func Device(slot int) string { return "culvert" + strconv.Itoa(slot) }

var deviceName = regexp.MustCompile(`^culvert[0-9]+$`)

func ourTable(table int) bool { return table >= TableBase && table < TableBase+MaxSlots }

// Config is the whole network of one session's device.
type Config struct {
	// MTU is that of the routes in bytes, not the device's; 0 leaves it to the device.
	MTU int
	// Addresses are the device's only ones: the tunnel's own /32 and /128.
	Addresses []netip.Prefix
	// Routes lead to the device. Loopback, link-local and multicast are never
	// led there, even inside a route.
	Routes []netip.Prefix
	// Excluded prefixes fall through to the machine's own routes, exactly as
	// given: the longest prefix of Routes and Excluded wins, and Excluded wins
	// over an equal route.
	Excluded []netip.Prefix
}

// Router programs one session's device, table and rules. Its methods may be
// called from several goroutines.
type Router struct {
	slot   int
	device string

	mu         sync.Mutex
	congestion string   // what the kernel accepted for the routes; see Congestion
	notes      []string // see Notes
	// noCongestion: the kernel refused our choice; routes go without.
	noCongestion bool
}

// New returns the Router of a slot (0 to MaxSlots-1) and its device. It changes nothing.
func New(slot int, device string) *Router {
	return &Router{slot: slot, device: device}
}

// Congestion returns the TCP congestion control that the kernel accepted for
// the routes in the last Set, or "" for the machine's default.
func (r *Router) Congestion() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.congestion
}

// Notes returns what the last Set left out and why, for the session's status:
// for example IPv6, when the machine has it disabled.
func (r *Router) Notes() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.notes...)
}

// Change says what Watch saw.
type Change struct {
	// Ours: somebody removed a rule, route or address of ours or took a device
	// down; Set the wanted state again.
	Ours bool
	// Network: addresses, links or routes of the machine itself changed; read
	// Local again.
	Network bool
}
