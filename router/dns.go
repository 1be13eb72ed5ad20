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

func (e Env) withDefaults() Env {
	def := func(s *string, value string) {
		if *s == "" {
			*s = value
		}
	}
	def(&e.ResolvConf, "/etc/resolv.conf")
	def(&e.StateDir, "/var/lib/culvert")
	def(&e.ResolvedConf, "/run/systemd/resolve/resolv.conf")
	def(&e.NSSwitch, "/etc/nsswitch.conf")
	if e.Log == nil {
		e.Log = slog.Default()
	}
	return e
}

// SessionDNS is what the OS shall ask of one session's forwarder.
type SessionDNS struct {
	Device  string
	Ifindex int
	Server  netip.AddrPort // where the forwarder listens; see (*DNS).Listen
	Domains []string       // names and everything below them
	Search  []string       // appended to single-label names; also asked of Server
}

// loopback is the address at which a slot's forwarder answers in mode
// resolvconf: 53 is DNS, 83 an "S"; nothing else that we know is there, and
// 127.0.0.53 is systemd-resolved's.
func loopback(slot int) netip.Addr { return netip.AddrFrom4([4]byte{127, 53, 83, byte(1 + slot)}) }

// loopbacks holds the loopback address of every slot.
var loopbacks = netip.MustParsePrefix("127.53.83.0/24")
