package router

import (
	"log/slog"
	"net/netip"
)

// Modes of DNS.
const (
	DNSAuto       = "auto"
	DNSResolved   = "resolved"   // systemd-resolved: per-link servers and routing domains
	DNSResolvConf = "resolvconf" // /etc/resolv.conf names our forwarder
	DNSNone       = "none"       // nothing is changed
)

// Env says where the machine's settings are. The zero value is the real
// machine; tests point it elsewhere.
type Env struct {
	ResolvConf   string       // "": /etc/resolv.conf
	StateDir     string       // "": /var/lib/culvert, which outlives a power loss as /etc/resolv.conf does
	ResolvedConf string       // "": /run/systemd/resolve/resolv.conf
	NSSwitch     string       // "": /etc/nsswitch.conf
	BusAddress   string       // D-Bus address; "": the system bus
	Log          *slog.Logger // nil: slog.Default()
}

// SessionDNS is what the OS shall ask of one session's forwarder.
type SessionDNS struct {
	Device  string
	Ifindex int
	Server  netip.AddrPort // where the forwarder listens; see (*DNS).Listen
	Domains []string       // names and everything below them
	Search  []string       // appended to single-label names; also asked of Server
}
