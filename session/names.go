package session

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"

	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/dns"
)

// names answers the machine's questions for names of the cluster: the forwarder
// of package dns on the sockets that the daemon bound.
type names struct {
	session *Session

	// mu guards everything below.
	mu        sync.Mutex
	forwarder *dns.Forwarder
	domain    string           // cluster domain
	machine   []netip.AddrPort // the machine's own resolvers
	split     bool             // the OS splits names itself: machine is not asked
	siblings  []link.Sibling
	cancel    context.CancelFunc
	done      chan struct{}
}

// defaultDomain is what nearly every cluster uses; the agent's resolv.conf or
// --cluster-domain say otherwise.
const defaultDomain = "cluster.local"

// agentSays takes the cluster domain from the agent's resolv.conf, unless the
// user gave one, and returns what it settled on.
func (n *names) agentSays(resolvConf, asked string) string {
	_, _, domain := dns.ParseResolvConf(resolvConf)
	if asked != "" {
		domain = asked
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if domain == "" {
		domain = n.domain
	}
	if domain == "" {
		domain = defaultDomain
	}
	n.domain = strings.ToLower(strings.Trim(domain, "."))
	return n.domain
}

// get makes the forwarder when it is first needed.
func (n *names) get() *dns.Forwarder {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.forwarder == nil {
		n.forwarder = n.newLocked()
	}
	return n.forwarder
}

// newLocked makes a forwarder; one serves one set of sockets.
func (n *names) newLocked() *dns.Forwarder {
	s := n.session
	if n.domain == "" {
		n.domain = s.recall().Domain
	}
	if n.domain == "" {
		n.domain = defaultDomain
	}
	services := s.cluster.Services()
	f := dns.New(dns.Config{
		Context: s.cluster.Context(), Namespace: s.cluster.Namespace(), ClusterDomain: n.domain,
		Cluster: s.network.agentServers(), Machine: n.servers(), Names: services,
		Namespaces: services.Namespaces, Ranges: s.network.prefixes, Log: s.log,
	})
	f.SetSiblings(siblings(n.siblings))
	return f
}

// settings is what the OS shall ask of us.
func (n *names) settings() *link.DNS {
	f := n.get()
	f.SetCluster(n.clusterDomain(), n.session.cluster.Namespace(), n.session.network.agentServers())
	domains, search := f.Domains()
	return &link.DNS{Mode: n.session.options.DNS, ClusterDomain: n.clusterDomain(), Domains: domains, Search: search}
}

func (n *names) clusterDomain() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.domain
}

// search is what completes short names, as in the cluster's own pods.
func (n *names) search() []string {
	_, search := n.get().Domains()
	return search
}

// serve answers on new sockets, when there are some; the old ones are closed.
func (n *names) serve(udp, tcp *os.File, granted link.Granted) error {
	if udp == nil && tcp == nil {
		return nil
	}
	var packets []net.PacketConn
	var listeners []net.Listener
	if udp != nil {
		c, err := net.FilePacketConn(udp)
		udp.Close()
		if err != nil {
			return fmt.Errorf("taking the DNS socket (UDP) over from the daemon: %w", err)
		}
		packets = append(packets, c)
	}
	if tcp != nil {
		l, err := net.FileListener(tcp)
		tcp.Close()
		if err != nil {
			return fmt.Errorf("taking the DNS socket (TCP) over from the daemon: %w", err)
		}
		listeners = append(listeners, l)
	}
	n.close()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	n.mu.Lock()
	if n.machine == nil {
		n.machine = n.session.start.MachineDNS
	}
	n.split = granted.DNSMode != "resolvconf"
	f := n.newLocked()
	n.forwarder, n.cancel, n.done = f, cancel, done
	n.mu.Unlock()
	go func() {
		defer close(done)
		if err := f.Run(ctx, packets, listeners); err != nil && ctx.Err() == nil {
			n.session.log.Error("answering names", "err", err)
		}
	}()
	return nil
}

// close stops answering and waits.
func (n *names) close() {
	n.mu.Lock()
	cancel, done := n.cancel, n.done
	n.cancel, n.done = nil, nil
	n.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

func (n *names) setSiblings(list []link.Sibling) {
	n.mu.Lock()
	n.siblings = list
	f := n.forwarder
	n.mu.Unlock()
	if f != nil {
		f.SetSiblings(siblings(list))
	}
}

// setMachine follows the machine's own resolvers: another network has others.
func (n *names) setMachine(servers []netip.AddrPort) {
	n.mu.Lock()
	n.machine = servers
	f, ask := n.forwarder, n.servers()
	n.mu.Unlock()
	if f != nil {
		f.SetMachine(ask)
	}
}

// servers are whom the forwarder asks for names that are not the cluster's: nil
// where the OS does not send it any.
func (n *names) servers() []netip.AddrPort {
	if n.split {
		return nil
	}
	if n.machine == nil {
		return []netip.AddrPort{} // none known: SERVFAIL, not "no such name"
	}
	return n.machine
}

func siblings(list []link.Sibling) []dns.Sibling {
	out := make([]dns.Sibling, 0, len(list))
	for _, l := range list {
		out = append(out, dns.Sibling{Context: l.Context, Domains: l.Domains, Addr: l.Addr})
	}
	return out
}
