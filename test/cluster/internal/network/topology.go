package network

import (
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"

	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Names of devices in wan.
const (
	HomeBridge = "home"   // the laptop's network
	LaptopPort = "laptop" // the far end of the laptop's cable
	lanPort    = "lan"    // the far end of the neighbour's cable
)

// BuildShared makes the namespaces wan, laptop and lan and the laptop's network.
func BuildShared(s *plan.Site) error {
	wan, err := Create(s.Netns("", plan.Wan))
	if err != nil {
		return err
	}
	defer wan.Close()
	// No duplicate address detection anywhere: an address is usable at once.
	if err := wan.Sysctl("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.bridge.bridge-nf-call-iptables=0",
		"net.bridge.bridge-nf-call-ip6tables=0"); err != nil {
		return err
	}
	if err := wan.bridge(HomeBridge, "02:00:c0:a8:32:01", plan.Home.On(plan.HomeRouter)); err != nil {
		return err
	}
	for _, a := range plan.Internet.List() {
		if err := wan.address("lo", netip.PrefixFrom(a, a.BitLen())); err != nil {
			return err
		}
	}
	for _, m := range []struct {
		name, port string
		addrs      plan.Addrs
	}{{plan.Laptop, LaptopPort, plan.LaptopAddr}, {plan.LAN, lanPort, plan.LANAddr}} {
		box, err := Create(s.Netns("", m.name))
		if err != nil {
			return err
		}
		err = plug(wan, HomeBridge, m.port, box, plan.Home.On(m.addrs), plan.HomeRouter)
		box.Close()
		if err != nil {
			return err
		}
	}
	// While the cable has faults its port is outside the bridge. The router
	// must not answer ARP there, past the faults.
	return wan.Sysctl("net.ipv4.conf." + LaptopPort + ".arp_ignore=8")
}

// BuildCluster makes a cluster's namespaces and plugs them into wan.
func BuildCluster(s *plan.Site, c *plan.Cluster) error {
	wan, err := Open(s.Netns("", plan.Wan))
	if err != nil {
		return err
	}
	defer wan.Close()
	if err := wan.bridge(c.Bridge(), "", c.LAN.On(c.Gateway)); err != nil {
		return err
	}
	for _, m := range c.Machines() {
		if err := buildMachine(s, c, wan, m); err != nil {
			return fmt.Errorf("network of %s: %w", m.Name, err)
		}
	}
	return nil
}

func buildMachine(s *plan.Site, c *plan.Cluster, wan *Namespace, m plan.Machine) error {
	box, err := Create(s.Netns(c.Name, m.Name))
	if err != nil {
		return err
	}
	defer box.Close()
	if err := plug(wan, c.Bridge(), c.Name+"-"+m.Name, box, c.LAN.On(m.Addrs), c.Gateway); err != nil {
		return err
	}
	// Pod ranges are routed between the machines of the cluster, and not in
	// wan: pods leave the cluster masqueraded.
	for _, n := range c.Nodes {
		if n.Name == m.Name {
			continue
		}
		for f, pods := range n.Pods.List() {
			if err := box.route(pods, n.Addrs.List()[f]); err != nil {
				return err
			}
		}
	}
	if !m.IsNode() { // for aggregated APIs and webhooks behind Services
		for f, services := range c.Services.List() {
			if err := box.route(services, c.Nodes[0].Addrs.List()[f]); err != nil {
				return err
			}
		}
		return nil
	}
	// br_netfilter's settings are per network namespace: without them a pod
	// answered through a Service by a pod on the same bridge skips the un-NAT.
	if err := box.Sysctl("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1", "net.bridge.bridge-nf-call-iptables=1",
		"net.bridge.bridge-nf-call-ip6tables=1", "net.ipv6.conf.default.accept_dad=0"); err != nil {
		return err
	}
	return box.Nft(nodeRules(c))
}

// OpenPods routes a cluster's pods in wan, or takes the routes away again.
func OpenPods(s *plan.Site, c *plan.Cluster, open bool) error {
	wan, err := Open(s.Netns("", plan.Wan))
	if err != nil {
		return err
	}
	defer wan.Close()
	for _, n := range c.Nodes {
		for f, pods := range n.Pods.List() {
			r := &netlink.Route{Dst: ipNet(pods), Gw: n.Addrs.List()[f].AsSlice()}
			if open {
				err = wan.RouteReplace(r)
			} else if err = wan.RouteDel(r); err != nil && isMissing(err) {
				err = nil
			}
			if err != nil {
				return fmt.Errorf("route %s in wan: %w", pods, err)
			}
		}
	}
	return nil
}

// ForgetConnections makes wan judge every connection anew.
func ForgetConnections(s *plan.Site) error {
	wan, err := Open(s.Netns("", plan.Wan))
	if err != nil {
		return err
	}
	defer wan.Close()
	_, err = wan.Run("", "conntrack", "-F")
	return err
}

// DetachCluster removes a cluster's devices and routes from wan, if wan is there.
func DetachCluster(s *plan.Site, c *plan.Cluster) error {
	wan, err := Open(s.Netns("", plan.Wan))
	if err != nil {
		return nil // then its devices are gone, too
	}
	defer wan.Close()
	names := []string{c.Bridge()}
	for _, m := range c.Machines() {
		names = append(names, c.Name+"-"+m.Name)
	}
	for _, name := range names {
		l, err := wan.LinkByName(name)
		if err != nil {
			continue
		}
		// The kernel may still be taking it away, with the namespace of its other end.
		if err := wan.LinkDel(l); err != nil && !isMissing(err) {
			return fmt.Errorf("remove %s from wan: %w", name, err)
		}
	}
	return nil
}

// plug lays a cable from a bridge in wan to a machine's eth0.
func plug(wan *Namespace, bridge, port string, box *Namespace, addrs []netip.Prefix, gateway plan.Addrs) error {
	master, err := wan.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridge, err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = port, master.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(box.fd)}
	if err := wan.LinkAdd(veth); err != nil {
		return fmt.Errorf("lay cable %s: %w", port, err)
	}
	if err := wan.Sysctl("net.ipv6.conf." + port + ".disable_ipv6=1"); err != nil {
		return err
	}
	if err := wan.up(port); err != nil {
		return err
	}
	if err := box.up("eth0"); err != nil {
		return err
	}
	for _, a := range addrs {
		if err := box.address("eth0", a); err != nil {
			return err
		}
	}
	for f, zero := range []string{"0.0.0.0/0", "::/0"} {
		if err := box.route(netip.MustParsePrefix(zero), gateway.List()[f]); err != nil {
			return err
		}
	}
	return nil
}

func (n *Namespace) bridge(name, mac string, addrs []netip.Prefix) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	if mac != "" { // otherwise it changes with the bridge's ports
		hw, err := net.ParseMAC(mac)
		if err != nil {
			return fmt.Errorf("address of bridge %s: %w", name, err)
		}
		attrs.HardwareAddr = hw
	}
	if err := n.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("make bridge %s: %w", name, err)
	}
	if err := n.up(name); err != nil {
		return err
	}
	for _, a := range addrs {
		if err := n.address(name, a); err != nil {
			return err
		}
	}
	return nil
}

func (n *Namespace) address(dev string, a netip.Prefix) error {
	l, err := n.LinkByName(dev)
	if err == nil {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())}}
		if a.Addr().Is6() {
			addr.Flags = 0x02 // IFA_F_NODAD: usable at once
		}
		err = n.AddrAdd(l, addr)
	}
	if err != nil {
		return fmt.Errorf("give %s the address %s: %w", dev, a, err)
	}
	return nil
}

func (n *Namespace) route(to netip.Prefix, via netip.Addr) error {
	if err := n.RouteAdd(&netlink.Route{Dst: ipNet(to), Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("route %s via %s: %w", to, via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
