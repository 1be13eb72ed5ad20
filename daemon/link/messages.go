// Package link is the private protocol between culvertd and a session process
// (hidden role of the culvert binary), over the socket pair that the session
// finds as descriptor 3. Both sides call methods of the other; descriptors (the
// TUN device, bound DNS sockets) ride along. The daemon trusts nothing that
// comes over it.
package link

import (
	"encoding/json"
	"net/netip"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Methods that the session calls on the daemon.
const (
	MethodHello     = "hello"     // nil -> Start; first call of a session process
	MethodExclude   = "exclude"   // Exclude -> nil; before the session dials an API server or proxy address
	MethodConfigure = "configure" // Network -> Granted, with descriptors; whole desired state, idempotent
	MethodRemember  = "remember"  // json, at most MaxRemember bytes, kept in memory for the next process
	MethodStatus    = "status"    // api.Session -> nil; what the session knows of itself
	MethodSessions  = "sessions"  // nil -> []string; ids of all sessions of this session's user
	MethodRedial    = "redial"    // notification nil; the session tries to reach its API server again
	MethodStep      = "step"      // notification Step; what a Task of the daemon's is at
	MethodKeep      = "keep"      // bool -> nil; whether the session has changed something in its cluster that outlives it
)

// Methods that the daemon calls on the session.
const (
	MethodDisconnect = "disconnect" // nil -> nil; clean up in the cluster, then exit 0
	MethodPing       = "ping"       // api.PingRequest -> []api.PingReply
	MethodPeers      = "peers"      // api.PeerRequest -> []api.Peer
	MethodPeerAdd    = "peerAdd"    // api.PeerRequest -> api.PeerConfig
	MethodPeerRemove = "peerRemove" // api.PeerRequest -> api.Peer
	MethodIntercept  = "intercept"  // Task of api.InterceptRequest -> api.Intercept
	MethodLeave      = "leave"      // Task of api.LeaveRequest -> []api.Intercept
	MethodIntercepts = "intercepts" // nil -> []api.Intercept
	MethodCancel     = "cancel"     // notification uint64: nobody waits for that Task any more
	MethodSiblings   = "siblings"   // notification []Sibling; the other sessions' DNS forwarders, whole list
	MethodMachineDNS = "machineDNS" // notification []netip.AddrPort; Start.MachineDNS changed
	MethodAlive      = "alive"      // nil -> nil, at once; a process that does not answer is killed and replaced
)

// MaxRemember bounds what a session may keep in the daemon, in bytes.
const MaxRemember = 64 << 10

// Task is a request that takes a while: Steps come before its answer.
type Task struct {
	ID      uint64          `json:"id"`
	Request json.RawMessage `json:"request"`
}

// Step is what a Task is at.
type Step struct {
	ID   uint64 `json:"id"`
	Text string `json:"text"`
}

// Start is what a session process is told first.
type Start struct {
	ID      string      `json:"id"`
	UID     int         `json:"uid"`
	Options api.Options `json:"options"`
	// Origin is the same for all sessions of this user that this daemon, or an
	// earlier one in its place, ever started, and tells nothing about the machine.
	// Empty: the machine has no id.
	Origin string `json:"origin,omitempty"`
	// Revert: connect to nothing; undo what an earlier session of this id left in
	// the cluster when it died together with its daemon, and say Disconnected.
	Revert bool `json:"revert,omitempty"`
	// Restart counts earlier processes of this session.
	Restart int `json:"restart"`
	// Remembered is what the last process gave to MethodRemember, or null.
	Remembered json.RawMessage `json:"remembered,omitempty"`
	// Network is what the last process configured, or null: TUN and routes are
	// still there.
	Network *Network `json:"network,omitempty"`
	Granted *Granted `json:"granted,omitempty"`
	// MachineDNS is the machine's own nameservers, asked for every name that is
	// not the cluster's when the DNS mode is resolvconf.
	MachineDNS []netip.AddrPort `json:"machineDNS,omitempty"`
}

// Exclude lists addresses (API server, proxies) that must leave the machine by
// its own routes from now on. The set replaces the previous one and only grows
// the excluded set of Network.
type Exclude struct {
	Addrs []netip.Addr `json:"addrs"`
}

// Network is the whole state of the machine that a session asks for.
type Network struct {
	// Identity and Context name the cluster: a second session to the same
	// Identity is refused (api.CodeExists).
	Identity string `json:"identity"`
	Context  string `json:"context"`

	// Plan are the cluster's ranges that will be routed; checked for conflicts
	// and avoided when the tunnel addresses are chosen, at every call.
	Plan     []api.Route `json:"plan"`
	Excluded []api.Route `json:"excluded,omitempty"`
	// Active: install Plan as routes and DNS as settings. The first call has it
	// false: everything is checked, the device made, nothing routed.
	Active bool `json:"active"`
	MTU    int  `json:"mtu"`
	DNS    *DNS `json:"dns,omitempty"`
}

// DNS is what the OS shall ask of the session's forwarder.
type DNS struct {
	Mode          string   `json:"mode,omitempty"` // as api.Options.DNS
	ClusterDomain string   `json:"clusterDomain"`
	Domains       []string `json:"domains"` // names and everything below them, no leading "~" or "."
	Search        []string `json:"search,omitempty"`
}

// Granted is the daemon's answer to Network.
type Granted struct {
	Device string `json:"device"`
	// Tunnel are the session's own addresses, on the device (IPv4, IPv6).
	Tunnel []netip.Addr `json:"tunnel"`
	// Agent are the agent's addresses in the tunnel; always routed to the device.
	Agent []netip.Addr `json:"agent"`
	// Inbound are the addresses at which the session's own netstack answers the
	// cluster; never on the device.
	Inbound []netip.Addr `json:"inbound"`
	DNSMode string       `json:"dnsMode"` // resolved, resolvconf or none
	// DNSAddr is where the forwarder listens; its sockets are Files.
	DNSAddr netip.AddrPort `json:"dnsAddr"`
	// Files names the descriptors that come with this answer, in order: "tun",
	// "dns-udp", "dns-tcp". Each is sent once per session process (and again when
	// it changed); the session owns what it received.
	Files []string `json:"files,omitempty"`
}

// Sibling is another session on this machine whose names this session's
// forwarder must send to that session's one, because /etc/resolv.conf names
// only one server.
type Sibling struct {
	Context string         `json:"context"`
	Domains []string       `json:"domains"`
	Addr    netip.AddrPort `json:"addr"`
}
