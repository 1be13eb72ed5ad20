package agent

import (
	"net"
	"net/netip"
	"slices"
	"strconv"

	"github.com/culvert-dev/culvert/wire/carrier"
)

// targets decides where a flow may go. It is the one place that an intercept
// will extend, to answer in the session's stead for a Service that leads back
// to it.
type targets struct {
	tunnel    []netip.Addr // session and agent: never forwarded
	podIPs    []netip.Addr
	podPorts  []uint16     // the agent's own, on the pod's addresses
	broadcast []netip.Addr // of the pod's networks
	peers     *peers       // neither session nor peers reach a peer
}

func newTargets(cfg Config, h carrier.Hello, p *peers) *targets {
	t := &targets{
		tunnel:    slices.Concat(h.Tunnel, h.Agent, h.Inbound),
		podIPs:    cfg.PodIPs,
		broadcast: broadcastAddrs(),
		peers:     p,
	}
	for _, addr := range []string{cfg.ControlAddr, cfg.MetricsAddr} {
		if _, p, err := net.SplitHostPort(addr); err == nil {
			if port, err := strconv.ParseUint(p, 10, 16); err == nil {
				t.podPorts = append(t.podPorts, uint16(port))
			}
		}
	}
	for _, port := range []int{cfg.ProxyPort, cfg.UDPPort, cfg.InterceptPort, cfg.PeerPort} {
		if port > 0 {
			t.podPorts = append(t.podPorts, uint16(port))
		}
	}
	return t
}

// allows tells whether a flow to addr:port may be forwarded; port is 0 for ICMP.
func (t *targets) allows(addr netip.Addr, port uint16) bool {
	// An IPv4 address in IPv6 clothes is the same to the kernel's connect.
	addr = addr.Unmap()
	if forbidden(addr) || slices.Contains(t.tunnel, addr) || slices.Contains(t.broadcast, addr) || t.peers.contains(addr) {
		return false
	}
	return !slices.Contains(t.podIPs, addr) || !slices.Contains(t.podPorts, port)
}

var (
	thisNetwork = netip.MustParsePrefix("0.0.0.0/8") // RFC 1122 section 3.2.1.3; the kernel takes it for itself
	limited     = netip.MustParseAddr("255.255.255.255")
	compatible  = netip.MustParsePrefix("::/96") // RFC 4291 section 2.5.5.1, with :: and ::1
)

// forbidden are addresses that lead to the pod itself, its node's services
// (cloud metadata is link-local) or to nobody in particular.
func forbidden(addr netip.Addr) bool {
	return !addr.IsValid() || addr.IsUnspecified() || addr.IsLoopback() || addr.IsLinkLocalUnicast() ||
		addr.IsMulticast() || thisNetwork.Contains(addr) || compatible.Contains(addr) || addr == limited
}

// broadcastAddrs are the last addresses of the pod's own IPv4 networks: only
// those, since an address that ends in .255 is an ordinary pod elsewhere.
func broadcastAddrs() []netip.Addr {
	var found []netip.Addr
	addrs, _ := net.InterfaceAddrs()
	for _, a := range addrs {
		p, err := netip.ParsePrefix(a.String())
		if err != nil || !p.Addr().Is4() || p.Bits() > 30 {
			continue
		}
		last := p.Masked().Addr().As4()
		for bit := p.Bits(); bit < 32; bit++ {
			last[bit/8] |= 0x80 >> (bit % 8)
		}
		found = append(found, netip.AddrFrom4(last))
	}
	return found
}
