package agent

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/netstack"
	"github.com/culvert-dev/culvert/wire/peer"
)

// peers are the standard WireGuard peers of a node: a second WireGuard device,
// at a UDP port of the pod, and a second interface of the node's stack. So the
// same forwarders serve them within the same bounds. Nothing leads from one peer
// to another or to the session: the stack forwards no packet, and flows to any
// address of theirs are refused.
type peers struct {
	node *node
	link atomic.Pointer[peerLink] // nil while there is no peer

	mu     sync.Mutex // also held while the device comes and goes
	last   tcpip.NICID
	byName map[string]*member
	closed bool
}

// member is one peer.
type member struct {
	name  string
	key   wire.Key
	addrs []netip.Addr
	added time.Time
}

// peerLink is what there is while there is a peer. It does not change.
type peerLink struct {
	nic      tcpip.NICID
	ranges   []netip.Prefix
	own      []netip.Addr // the agent's addresses in ranges
	mtu      int
	endpoint *netstack.Endpoint
	hub      *wire.Hub
	stopDNS  func()
}

// contains tells whether addr is in the peers' ranges.
func (p *peers) contains(addr netip.Addr) bool {
	n := p.link.Load()
	return n != nil && slices.ContainsFunc(n.ranges, func(r netip.Prefix) bool { return r.Contains(addr) })
}

// owns tells whether addr is the agent's own among its peers.
func (p *peers) owns(addr netip.Addr) bool {
	n := p.link.Load()
	return n != nil && slices.Contains(n.own, addr)
}

// delivering is as netstack.Endpoint.Delivering.
func (p *peers) delivering() time.Duration {
	if n := p.link.Load(); n != nil {
		return n.endpoint.Delivering()
	}
	return 0
}

// nicOf is the interface behind which addr is.
func (n *node) nicOf(addr netip.Addr) tcpip.NICID {
	if link := n.peers.link.Load(); link != nil && n.peers.contains(addr) {
		return link.nic
	}
	return netstack.NIC
}

// add makes a peer; the first one opens the port. Its errors are *peer.Refusal.
func (p *peers) add(name string, ask peer.Ask) error {
	if err := peer.CheckName(name); err != nil {
		return &peer.Refusal{Status: 400, Reason: fmt.Sprintf("peer name %q: %v", name, err)}
	}
	key, err := wire.ParseKey(ask.PublicKey)
	if err != nil || key.IsZero() {
		return &peer.Refusal{Status: 400, Reason: fmt.Sprintf("public key %q is not one of WireGuard", ask.PublicKey)}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed || p.node.agent.cfg.PeerPort < 0:
		return &peer.Refusal{Status: 409, Reason: "this agent takes no peers"}
	case p.byName[name] != nil:
		return &peer.Refusal{Status: 409, Reason: fmt.Sprintf("there is a peer %q already", name)}
	case len(p.byName) >= peer.Max:
		return &peer.Refusal{Status: 409, Reason: fmt.Sprintf("there are %d peers already, and no more are possible", len(p.byName))}
	}
	for _, m := range p.byName {
		if m.key == key {
			return &peer.Refusal{Status: 409, Reason: fmt.Sprintf("the public key %s is that of peer %q", key, m.name)}
		}
	}
	link := p.link.Load()
	if link == nil {
		if err := p.node.checkRanges(ask.Ranges); err != nil {
			return &peer.Refusal{Status: 400, Reason: err.Error()}
		}
		if link, err = p.open(ask.Ranges); err != nil {
			p.node.agent.log.Warn("opening the port for peers", "error", err)
			return &peer.Refusal{Status: 500, Reason: err.Error()}
		}
	}
	m := &member{name: name, key: key, addrs: p.free(link), added: time.Now()}
	if err := link.hub.Add(key, m.addrs); err != nil {
		if len(p.byName) == 0 {
			p.shut()
		}
		return &peer.Refusal{Status: 400, Reason: err.Error()}
	}
	if p.byName == nil {
		p.byName = map[string]*member{}
	}
	p.byName[name] = m
	p.node.agent.log.Info("peer added", "name", name, "addresses", m.addrs)
	return nil
}

// remove ends a peer and its flows; the last one closes the port.
func (p *peers) remove(name string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	m, link := p.byName[name], p.link.Load()
	if m == nil || link == nil {
		return &peer.Refusal{Status: 404, Reason: fmt.Sprintf("there is no peer %q", name)}
	}
	if _, err := link.hub.Remove(m.key); err != nil {
		return &peer.Refusal{Status: 500, Reason: err.Error()}
	}
	for _, a := range m.addrs {
		p.node.tcp.leave(tcpip.AddrFromSlice(a.AsSlice()))
		p.node.udp.leave(tcpip.AddrFromSlice(a.AsSlice()))
	}
	delete(p.byName, name)
	if len(p.byName) == 0 {
		p.shut()
	}
	p.node.agent.log.Info("peer removed", "name", name)
	return nil
}

// state is what the session is told.
func (p *peers) state() peer.State {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := peer.State{Instance: p.node.agent.instance, PodIPs: p.node.agent.cfg.PodIPs}
	link := p.link.Load()
	if link == nil {
		return s
	}
	s.PublicKey, s.Port, s.DNS, s.MTU = link.hub.PublicKey().String(), int(link.hub.Port()), link.own, link.mtu
	known, err := link.hub.Peers()
	if err != nil {
		p.node.agent.log.Warn("listing peers", "error", err) // then they were never heard
	}
	for _, name := range slices.Sorted(maps.Keys(p.byName)) {
		m := p.byName[name]
		w := known[m.key]
		one := peer.Peer{Name: name, PublicKey: m.key.String(), Addresses: m.addrs, Added: m.added,
			LastHandshake: w.LastHandshake, Sent: w.Sent, Received: w.Received}
		if w.From.IsValid() {
			one.From = w.From.String()
		}
		s.Peers = append(s.Peers, one)
	}
	return s
}

// count is the number of peers.
func (p *peers) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.byName)
}

// open makes interface and WireGuard device. The first address of each range is
// the agent's own, and peers have those after it.
func (p *peers) open(ranges []netip.Prefix) (*peerLink, error) {
	n := p.node
	// A number is never used again: what an old interface had shall not find the
	// new one.
	p.last = max(p.last, netstack.NIC) + 1
	link := &peerLink{nic: p.last, ranges: ranges, mtu: podMTU(n.agent.cfg.PodIPs)}
	link.endpoint = netstack.New(netstack.Config{MTU: link.mtu})
	hub, err := wire.NewHub(wire.HubConfig{Device: link.endpoint, PrivateKey: wire.NewPrivateKey(), Port: uint16(n.agent.cfg.PeerPort), Log: n.agent.log})
	if err != nil {
		return nil, err
	}
	link.hub = hub
	if err := netstack.AddNIC(n.stack, link.nic, link.endpoint, ranges); err != nil {
		hub.Close()
		return nil, err
	}
	undo := func(err error) (*peerLink, error) {
		link.endpoint.Close()
		hub.Close()
		n.stack.RemoveNIC(link.nic)
		return nil, err
	}
	for _, r := range ranges {
		own := r.Addr().Next()
		link.own = append(link.own, own)
		if err := n.stack.AddProtocolAddress(link.nic, tcpip.ProtocolAddress{Protocol: protocolOf(own),
			AddressWithPrefix: tcpip.AddrFromSlice(own.AsSlice()).WithPrefix()}, stack.AddressProperties{}); err != nil {
			return undo(fmt.Errorf("adding address %s: %s", own, err))
		}
	}
	if link.stopDNS, err = n.dns.listen(link.nic, link.own); err != nil {
		return undo(err)
	}
	p.link.Store(link)
	return link, nil
}

// shut is the opposite of open. The endpoint goes first: it releases who waits to
// send.
func (p *peers) shut() {
	link := p.link.Load()
	if link == nil {
		return
	}
	link.endpoint.Close()
	link.stopDNS()
	link.hub.Close()
	p.node.stack.RemoveNIC(link.nic)
	p.link.Store(nil)
}

// close ends all peers for good.
func (p *peers) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.shut()
	p.byName = nil
}

// free are the addresses of the first place that no peer has, after the agent's
// own.
func (p *peers) free(link *peerLink) []netip.Addr {
	addrs := slices.Clone(link.own)
	for {
		for i := range addrs {
			addrs[i] = addrs[i].Next()
		}
		taken := false
		for _, m := range p.byName {
			taken = taken || m.addrs[0] == addrs[0]
		}
		if !taken {
			return addrs
		}
	}
}

// checkRanges refuses ranges for peers that are too small, or in which something
// is that peers or this pod need.
func (n *node) checkRanges(ranges []netip.Prefix) error {
	if len(ranges) == 0 || len(ranges) > 2 || len(ranges) == 2 && ranges[0].Addr().Is4() == ranges[1].Addr().Is4() {
		return fmt.Errorf("%d ranges for peers, where one of each family is possible", len(ranges))
	}
	busy := slices.Concat(n.targets.tunnel, n.agent.cfg.PodIPs)
	for _, s := range nameservers(n.agent.resolvConf()) {
		busy = append(busy, s.Addr())
	}
	for _, r := range ranges {
		// Max peers, the agent, and neither the first nor the last address.
		if !r.IsValid() || r != r.Masked() || r.Addr().Is4In6() || r.Addr().BitLen()-r.Bits() < 4 || forbidden(r.Addr()) {
			return fmt.Errorf("range %s is not one for peers", r)
		}
		if i := slices.IndexFunc(busy, r.Contains); i >= 0 {
			return fmt.Errorf("range %s for peers contains %s", r, busy[i])
		}
	}
	return nil
}

// podMTU is the MTU for tunnels at the pod's interface: WireGuard's messages have
// 80 bytes of headers over IPv6. IPv6 needs 1280 inside, and then fragments.
func podMTU(own []netip.Addr) int {
	mtu := 1500
	links, _ := net.Interfaces() // none found is the same as none known
	for _, l := range links {
		addrs, _ := l.Addrs()
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && slices.Contains(own, p.Addr().Unmap()) && l.MTU > 0 {
				mtu = min(mtu, l.MTU)
			}
		}
	}
	return max(mtu-80, 1280)
}
