package router

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/culvert-dev/culvert/daemon/api"
)

// DNS makes the operating system ask the sessions' forwarders for the clusters'
// names, and only for those. Its methods may be called from several goroutines.
type DNS struct {
	env    Env
	mode   string
	why    string
	driver driver
	// changes holds at most one: it only says that there is something to read.
	changes chan struct{}
}

// driver is one way to set the machine's DNS. Both methods block until the
// machine is as wanted.
type driver interface {
	set(ctx context.Context, sessions []SessionDNS) error
	close(ctx context.Context) error
}

// NewDNS decides how DNS is set: mode is auto, resolved, resolvconf or none.
// It changes nothing.
func NewDNS(mode string, env Env) (*DNS, error) {
	env = env.withDefaults()
	d := &DNS{env: env, mode: mode, why: "asked for", changes: make(chan struct{}, 1)}
	switch mode {
	case DNSAuto, "":
		d.mode, d.why = env.decide()
	case DNSResolved:
		if err := env.pingResolved(); err != nil {
			return nil, &api.Error{Code: api.CodeDNS, Message: "DNS mode resolved: " + err.Error(),
				Hint: "Start systemd-resolved, or use --dns resolvconf."}
		}
	case DNSResolvConf, DNSNone:
	default:
		return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("DNS mode %q is unknown", mode),
			Hint: "Use --dns auto, resolved, resolvconf or none."}
	}
	switch d.mode {
	case DNSResolved:
		d.driver = &resolved{bus: env.BusAddress, log: env.Log, applied: map[int]SessionDNS{}}
	case DNSResolvConf:
		d.driver = &resolvConf{file: env.file(), log: env.Log, changed: d.notify}
	}
	return d, nil
}

// decide chooses a mode for "auto", and says why.
func (e Env) decide() (mode, why string) {
	conf, err := os.ReadFile(e.ResolvConf)
	if err != nil && !os.IsNotExist(err) {
		return DNSNone, fmt.Sprintf("%s cannot be read: %v", e.ResolvConf, err)
	}
	if isOurs(conf) {
		return DNSResolvConf, fmt.Sprintf("%s is already culvert's", e.ResolvConf)
	}
	servers := parseResolvConf(conf).servers
	stub := len(servers) > 0
	for _, s := range servers {
		stub = stub && (s.String() == "127.0.0.53" || s.String() == "127.0.0.54")
	}
	nss := nssResolve(e.NSSwitch)
	if !stub && !nss {
		return DNSResolvConf, fmt.Sprintf("systemd-resolved is not this machine's resolver: %s does not name only its stub, and %s does not ask it before DNS",
			e.ResolvConf, e.NSSwitch)
	}
	if err := e.pingResolved(); err != nil {
		return DNSResolvConf, fmt.Sprintf("%v, although the machine is set up for it", err)
	}
	if stub {
		return DNSResolved, fmt.Sprintf("systemd-resolved answers on D-Bus, and %s names only its stub", e.ResolvConf)
	}
	// Changing resolv.conf instead would not help: libc asks resolved first and
	// takes its "no such name" for the answer.
	return DNSResolved, fmt.Sprintf("systemd-resolved answers on D-Bus, and %s asks it before DNS; programs that read %s themselves do not see the cluster's names",
		e.NSSwitch, e.ResolvConf)
}

// nssResolve tells whether libc asks resolved before DNS.
func nssResolve(path string) bool {
	b, err := os.ReadFile(path)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		if fields := strings.Fields(line); len(fields) > 0 && fields[0] == "hosts:" {
			resolve, dns := slices.Index(fields, "resolve"), slices.Index(fields, "dns")
			return resolve > 0 && (dns < 0 || resolve < dns)
		}
	}
	return false
}

// Mode is resolved, resolvconf or none.
func (d *DNS) Mode() string { return d.mode }

// Why says what decided the mode.
func (d *DNS) Why() string { return d.why }

// Listen says where a session's forwarder listens, given its slot and its
// addresses on the device.
func (d *DNS) Listen(slot int, tunnel []netip.Addr) netip.AddrPort {
	if d.mode == DNSResolvConf || len(tunnel) == 0 {
		// resolv.conf knows no port and no device, and outlives the device.
		return netip.AddrPortFrom(loopback(slot), 53)
	}
	return netip.AddrPortFrom(tunnel[0], 53)
}

// Spares are other addresses for a forwarder when another program, or what a
// session's user kept of his sockets, is at that of Listen.
func (d *DNS) Spares() []netip.AddrPort {
	if d.mode != DNSResolvConf {
		return nil
	}
	var res []netip.AddrPort
	for slot := 253; slot > 253-spares; slot-- {
		res = append(res, netip.AddrPortFrom(loopback(slot), 53))
	}
	return res
}

// spares is how many addresses are tried: more are in use only if somebody means
// it, or a server listens on all addresses.
const spares = 8

// Set makes the machine ask for the sessions' domains: the whole desired state,
// idempotent. In mode resolvconf the first session's forwarder gets all of the
// machine's queries, and none means that the original is put back.
func (d *DNS) Set(ctx context.Context, sessions []SessionDNS) error {
	if d.driver == nil {
		return nil
	}
	if err := d.driver.set(ctx, sessions); err != nil {
		return fmt.Errorf("setting DNS (%s): %w", d.mode, err)
	}
	return nil
}

// Close puts the machine's settings back and waits for the goroutines. It is
// idempotent; the DNS cannot be used afterwards.
func (d *DNS) Close(ctx context.Context) error {
	if d.driver == nil {
		return nil
	}
	if err := d.driver.close(ctx); err != nil {
		return fmt.Errorf("restoring DNS (%s): %w", d.mode, err)
	}
	return nil
}

// MachineDNS returns the machine's own nameservers as /etc/resolv.conf has, or
// had before culvert took it: whom a forwarder asks for all other names.
func (d *DNS) MachineDNS() []netip.AddrPort {
	var res []netip.AddrPort
	for _, a := range parseResolvConf(d.env.file().machine()).servers {
		res = append(res, netip.AddrPortFrom(a, 53))
	}
	return res
}

// Changes delivers when MachineDNS may have changed.
func (d *DNS) Changes() <-chan struct{} { return d.changes }

func (d *DNS) notify() {
	select {
	case d.changes <- struct{}{}:
	default:
	}
}

// RestoreDNS puts back an /etc/resolv.conf that a dead daemon left as its own,
// and tells whether it did. Per-link settings in systemd-resolved go with the device.
func RestoreDNS(env Env) (restored bool, err error) {
	return env.withDefaults().file().restore()
}

// nameservers returns all that answer for the machine now, without loopback
// ones and those of our own devices.
func (e Env) nameservers(ours map[int]bool) []netip.AddrPort {
	e = e.withDefaults()
	var res []netip.AddrPort
	add := func(a netip.AddrPort) {
		if a.IsValid() && !a.Addr().IsLoopback() && !a.Addr().IsUnspecified() && !slices.Contains(res, a) {
			res = append(res, a)
		}
	}
	conf := parseResolvConf(e.file().machine())
	uplink, _ := os.ReadFile(e.ResolvedConf) // not there without resolved
	for _, a := range append(conf.servers, parseResolvConf(uplink).servers...) {
		add(netip.AddrPortFrom(a, 53))
	}
	for _, s := range e.resolvedServers() {
		if !ours[s.ifindex] {
			add(s.addr)
		}
	}
	return res
}

func (e Env) file() confFile {
	return confFile{path: e.ResolvConf, saved: e.StateDir + "/resolv.conf.orig"}
}
