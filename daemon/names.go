package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/router"
)

// dnsHold is how long the DNS sockets of a session without a process stay open:
// a restarted process finds the queries in them. After that the machine's names
// must not wait any longer.
const dnsHold = 2 * time.Second

// resolver is one way of making DNS settings, with the sessions that use it.
type resolver struct {
	dns  *router.DNS
	mode string // the mode in force, never auto
	stop chan struct{}
}

// sockets are where a session's forwarder listens, bound by root.
type sockets struct {
	wanted   netip.AddrPort // router.DNS.Listen
	addr     netip.AddrPort // or a spare one
	udp, tcp *os.File
}

func (s *sockets) close() {
	s.udp.Close()
	s.tcp.Close()
}

// listenAnyDNS binds a forwarder's sockets at an address, or at a spare one when
// somebody else is there.
func listenAnyDNS(wanted netip.AddrPort, spares []netip.AddrPort) (*sockets, error) {
	s, err := listenDNS(wanted)
	for i := 0; i < len(spares) && errors.Is(err, syscall.EADDRINUSE); i++ {
		if spare, spareErr := listenDNS(spares[i]); spareErr == nil {
			s, err = spare, nil
		}
	}
	if err != nil {
		return nil, err
	}
	s.wanted = wanted
	return s, nil
}

// listenDNS binds both sockets of a forwarder.
func listenDNS(addr netip.AddrPort) (*sockets, error) {
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		return nil, fmt.Errorf("listening for DNS: %w", err)
	}
	defer udp.Close()
	tcp, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return nil, fmt.Errorf("listening for DNS: %w", err)
	}
	defer tcp.Close()
	s := &sockets{addr: addr}
	if s.udp, err = udp.File(); err != nil {
		return nil, fmt.Errorf("taking the DNS socket's descriptor: %w", err)
	}
	if s.tcp, err = tcp.File(); err != nil {
		s.udp.Close()
		return nil, fmt.Errorf("taking the DNS socket's descriptor: %w", err)
	}
	return s, nil
}

// applyDNSLocked makes sockets and the OS's settings follow d.network.
func (m *machine) applyDNSLocked(ctx context.Context, d *device) error {
	want := d.network.DNS
	if want == nil {
		d.granted.DNSMode, d.granted.DNSAddr = router.DNSNone, netip.AddrPort{}
		return m.muteLocked(ctx, d)
	}
	r, err := m.resolverLocked(want.Mode)
	if err != nil {
		return dnsError(err)
	}
	if d.resolver != r {
		if err := m.muteLocked(ctx, d); err != nil {
			m.log.Warn("changing the DNS mode", "session", d.session.id, "error", err)
		}
		d.resolver = r
	}
	addr := r.dns.Listen(d.session.slot, d.granted.Tunnel)
	if d.sockets != nil && d.sockets.wanted != addr {
		d.closeSockets()
	}
	if addr.IsValid() && d.sockets == nil {
		if d.sockets, err = listenAnyDNS(addr, r.dns.Spares()); err != nil {
			return dnsError(err)
		}
	}
	if d.sockets != nil {
		addr = d.sockets.addr
	}
	d.granted.DNSMode, d.granted.DNSAddr = r.mode, addr
	d.dnsOn = d.network.Active && addr.IsValid()
	if err := m.setDNSLocked(ctx, r); err != nil {
		d.dnsOn = false
		return errors.Join(dnsError(err), m.setDNSLocked(ctx, r))
	}
	return nil
}

func dnsError(err error) error {
	e := &api.Error{}
	if errors.As(err, &e) {
		return e
	}
	return &api.Error{Code: api.CodeDNS, Message: "making the machine's DNS settings: " + err.Error(), Hint: "culvert connect --dns none connects without cluster names; culvert doctor says what is wrong"}
}

// setDNSLocked makes the OS's settings those of all sessions that use r, oldest
// first, and tells each about the others.
func (m *machine) setDNSLocked(ctx context.Context, r *resolver) error {
	var list []router.SessionDNS
	for _, d := range m.byAgeLocked() {
		if d.resolver == r && d.dnsOn {
			list = append(list, router.SessionDNS{
				Device: d.name, Ifindex: d.ifindex, Server: d.sockets.addr,
				Domains: d.network.DNS.Domains, Search: d.network.DNS.Search,
			})
		}
	}
	if r.mode == router.DNSResolvConf && len(list) > 0 && m.guard == nil {
		g, err := startGuard(m.cfg)
		if err != nil {
			return err
		}
		m.guard = g
	}
	if err := r.dns.Set(ctx, list); err != nil {
		return err
	}
	if r.mode != router.DNSResolvConf {
		return nil
	}
	if len(list) == 0 && m.guard != nil {
		m.guard.dismiss()
		m.guard = nil
	}
	for _, d := range m.devices {
		d.session.update(func() { d.session.siblingsChanged = true })
	}
	return nil
}

// mute takes a session out of the OS's settings and closes its sockets.
func (m *machine) mute(ctx context.Context, id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if d := m.devices[id]; d != nil {
		if err := m.muteLocked(ctx, d); err != nil {
			m.log.Error("giving names back", "session", id, "error", err)
		}
	}
}

func (m *machine) muteLocked(ctx context.Context, d *device) error {
	r := d.resolver
	if r == nil {
		return nil
	}
	// The settings first: nobody should ask a closed socket.
	d.dnsOn = false
	err := m.setDNSLocked(ctx, r)
	d.closeSockets()
	d.resolver = nil
	for _, other := range m.devices {
		if other.resolver == r {
			return err
		}
	}
	close(r.stop)
	delete(m.resolvers, r.mode)
	return errors.Join(err, r.dns.Close(ctx))
}

func (d *device) closeSockets() {
	if d.sockets != nil {
		d.sockets.close()
		d.sockets = nil
		delete(d.sent, "dns-udp")
		delete(d.sent, "dns-tcp")
	}
}

// resolverLocked returns the one resolver of a mode; auto is decided anew while
// no session uses what it decided last.
func (m *machine) resolverLocked(mode string) (*resolver, error) {
	if mode == "" || mode == router.DNSAuto {
		probe, err := router.NewDNS(router.DNSAuto, m.cfg.Router)
		if err != nil {
			return nil, err
		}
		m.log.Info("DNS mode chosen", "mode", probe.Mode(), "why", probe.Why())
		mode = probe.Mode()
	}
	if r := m.resolvers[mode]; r != nil {
		return r, nil
	}
	dns, err := router.NewDNS(mode, m.cfg.Router)
	if err != nil {
		return nil, err
	}
	r := &resolver{dns: dns, mode: mode, stop: make(chan struct{})}
	m.resolvers[mode] = r
	go m.watchDNS(r)
	return r, nil
}

// watchDNS tells sessions when the machine's own nameservers change.
func (m *machine) watchDNS(r *resolver) {
	for {
		select {
		case <-r.stop:
			return
		case _, ok := <-r.dns.Changes():
			if !ok {
				return
			}
			m.mu.Lock()
			for _, d := range m.devices {
				if d.resolver == r {
					d.session.update(func() { d.session.dnsChanged = true })
				}
			}
			m.mu.Unlock()
		}
	}
}

// machineDNS returns the machine's own nameservers, for a session that wants
// its names made in mode.
func (m *machine) machineDNS(id, mode string) []netip.AddrPort {
	m.mu.Lock()
	var r *resolver
	if d := m.devices[id]; d != nil {
		r = d.resolver
	}
	if r == nil {
		r = m.resolvers[router.DNSResolvConf] // then resolv.conf is ours
	}
	m.mu.Unlock()
	if r != nil {
		return r.dns.MachineDNS()
	}
	dns, err := router.NewDNS(cmp.Or(mode, router.DNSAuto), m.cfg.Router)
	if err != nil {
		m.log.Warn("finding the machine's nameservers", "error", err)
		return nil
	}
	return dns.MachineDNS()
}

// siblings lists the forwarders of the other sessions, if /etc/resolv.conf can
// name only one.
func (m *machine) siblings(id string) []link.Sibling {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := []link.Sibling{}
	for _, d := range m.byAgeLocked() {
		if d.session.id != id && d.dnsOn && d.resolver.mode == router.DNSResolvConf {
			list = append(list, link.Sibling{Context: d.network.Context, Domains: d.network.DNS.Domains, Addr: d.sockets.addr})
		}
	}
	return list
}

func (m *machine) byAgeLocked() []*device {
	list := make([]*device, 0, len(m.devices))
	for _, d := range m.devices {
		list = append(list, d)
	}
	slices.SortFunc(list, func(a, b *device) int {
		return cmp.Or(a.session.started.Compare(b.session.started), cmp.Compare(a.session.id, b.session.id))
	})
	return list
}

func interfaceIndex(name string) int {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return 0
	}
	return i.Index
}
