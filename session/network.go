package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

// network is what the session wants of the machine: it gathers ranges,
// selectors and server addresses, and tells the daemon the whole of it.
type network struct {
	session *Session

	// applyMu keeps the calls to the daemon in order.
	applyMu sync.Mutex

	// mu guards everything below.
	mu       sync.Mutex
	ranges   cluster.Ranges
	include  []api.Route
	exclude  []api.Route
	hosts    selectorHosts
	server   []netip.Addr
	agent    []netip.Addr // where UDP goes
	active   bool
	grant    link.Granted
	tun      *os.File
	dirty    chan struct{} // one token: something changed
	notes    []string      // what the last apply could not do
	applying bool
}

// selectorHosts are the host names among the selectors: resolved at connect and
// again from time to time.
type selectorHosts struct{ include, exclude []string }

// serverSource marks the exclusions of the API server's addresses, agentSource
// those of the agent's: packets for it go through the tunnel, or straight to it,
// but not both.
const (
	serverSource = "API server"
	agentSource  = "agent, by UDP"
)

// hostsEvery is how often host names in --include-ips and --exclude-ips are
// resolved again.
const hostsEvery = 5 * time.Minute

// readSelectors reads --include-ips and --exclude-ips; resolveHosts adds what
// their names stand for.
func (n *network) readSelectors(o api.Options) error {
	include, includeHosts, err := cluster.ParseSelectors(o.IncludeIPs)
	if err != nil {
		return err
	}
	exclude, excludeHosts, err := cluster.ParseSelectors(o.ExcludeIPs)
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.dirty = make(chan struct{}, 1)
	n.hosts = selectorHosts{includeHosts, excludeHosts}
	n.include = routes(include, "--include-ips")
	n.exclude = routes(exclude, "--exclude-ips")
	n.mu.Unlock()
	return nil
}

func routes(prefixes []netip.Prefix, source string) []api.Route {
	rs := make([]api.Route, 0, len(prefixes))
	for _, p := range prefixes {
		rs = append(rs, api.Route{Prefix: p, Source: source})
	}
	return rs
}

// resolveHosts replaces the routes that host names in selectors stand for,
// asking the machine's own resolver.
func (n *network) resolveHosts(ctx context.Context) error {
	n.mu.Lock()
	hosts := n.hosts
	n.mu.Unlock()
	find := func(names []string, flag string) ([]api.Route, error) {
		var rs []api.Route
		for _, name := range names {
			addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
			if err != nil {
				return nil, &api.Error{Code: api.CodeUsage,
					Message: fmt.Sprintf("%s %s: the name does not resolve on this machine: %v", flag, name, err),
					Hint:    "give its IP address or a CIDR instead"}
			}
			for _, a := range addrs {
				a = a.Unmap()
				rs = append(rs, api.Route{Prefix: netip.PrefixFrom(a, a.BitLen()), Source: flag + " " + name})
			}
		}
		return rs, nil
	}
	include, err := find(hosts.include, "--include-ips")
	if err != nil {
		return err
	}
	exclude, err := find(hosts.exclude, "--exclude-ips")
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	static := func(rs []api.Route, flag string) []api.Route {
		return slices.DeleteFunc(slices.Clone(rs), func(r api.Route) bool { return r.Source != flag })
	}
	n.include = append(static(n.include, "--include-ips"), include...)
	n.exclude = append(static(n.exclude, "--exclude-ips"), exclude...)
	return nil
}

// excludeServer tells the daemon at once: the addresses are about to be dialled.
func (n *network) excludeServer(ctx context.Context, addrs []netip.Addr) error {
	n.mu.Lock()
	n.server = addrs
	n.mu.Unlock()
	if _, err := n.session.conn.Call(ctx, link.MethodExclude, link.Exclude{Addrs: addrs}, nil); err != nil {
		return fmt.Errorf("excluding the API server's addresses from the routes: %w", err)
	}
	return nil
}

// excludeAgent has the next apply keep the addresses that UDP goes to out of the
// routes; applyActive is one, if there are routes.
func (n *network) excludeAgent(addrs []netip.Addr) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.agent = addrs
}

func (n *network) applyActive(ctx context.Context) error {
	n.mu.Lock()
	active := n.active
	n.mu.Unlock()
	if !active {
		return nil
	}
	return n.apply(ctx, true)
}

func (n *network) setRanges(r cluster.Ranges) {
	n.mu.Lock()
	n.ranges = r
	n.mu.Unlock()
	n.session.status.update(func(st *api.Session) { st.Notes = slices.Clone(r.Notes) })
	n.touch()
}

// touch makes the loop apply what changed.
func (n *network) touch() {
	select {
	case n.dirty <- struct{}{}:
	default:
	}
}

// activate: from the next apply on, routes and names are set.
func (n *network) activate() {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.active = true
}

// resume takes over what the last process had the daemon set up.
func (n *network) resume(asked *link.Network, granted *link.Granted) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.active = asked.Active
	n.grant = *granted
	for _, r := range asked.Plan {
		switch {
		case slices.Contains(n.include, r):
		case strings.HasPrefix(r.Source, "--include-ips "):
			n.include = append(n.include, r)
		default:
			n.ranges.Routes = append(n.ranges.Routes, r)
		}
	}
	for _, r := range asked.Excluded {
		switch {
		case strings.HasPrefix(r.Source, "--exclude-ips "):
			n.exclude = append(n.exclude, r)
		case r.Source == serverSource:
			n.server = append(n.server, r.Prefix.Addr())
		case r.Source == agentSource:
			n.agent = append(n.agent, r.Prefix.Addr())
		}
	}
}

// apply tells the daemon the whole state and takes what it grants. With active
// false it only checks, and prepares the device.
func (n *network) apply(ctx context.Context, active bool) error {
	n.applyMu.Lock()
	defer n.applyMu.Unlock()
	s := n.session
	n.mu.Lock()
	want := link.Network{
		Identity: s.cluster.Identity(), Context: s.cluster.Context(), MTU: mtu, Active: active && n.active,
		Plan:     slices.Concat(n.ranges.Routes, n.include),
		Excluded: slices.Clone(n.exclude),
	}
	for _, a := range n.server {
		want.Excluded = append(want.Excluded, api.Route{Prefix: netip.PrefixFrom(a, a.BitLen()), Source: serverSource})
	}
	for _, a := range n.agent {
		want.Excluded = append(want.Excluded, api.Route{Prefix: netip.PrefixFrom(a, a.BitLen()), Source: agentSource})
	}
	n.mu.Unlock()
	if want.Active {
		want.DNS = s.names.settings()
	}
	var granted link.Granted
	files, err := s.conn.Call(ctx, link.MethodConfigure, want, &granted)
	if err != nil {
		return err
	}
	named := map[string]*os.File{}
	for i, f := range files {
		if i < len(granted.Files) {
			named[granted.Files[i]] = f
		} else {
			f.Close()
		}
	}
	n.mu.Lock()
	n.grant = granted
	if f := named["tun"]; f != nil {
		n.tun = f
	}
	n.mu.Unlock()
	return s.names.serve(named["dns-udp"], named["dns-tcp"], granted)
}

// loop applies changes, gathered over a moment, until ctx is done. A change that
// the machine cannot take (a new range collides) leaves the rest as it was.
func (n *network) loop(ctx context.Context) {
	hosts := time.NewTicker(hostsEvery)
	defer hosts.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-hosts.C:
			if err := n.resolveHosts(ctx); err != nil {
				n.session.log.Warn("resolving names in selectors again", "err", err)
				continue
			}
		case <-n.dirty:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond): // a cluster's changes come in crowds
		}
		n.mu.Lock()
		active := n.active
		n.mu.Unlock()
		if !active {
			continue
		}
		err := n.apply(ctx, true)
		if ctx.Err() != nil {
			return
		}
		n.report(err)
	}
}

// report shows a change that could not be made, next to the ranges' own notes.
func (n *network) report(err error) {
	n.mu.Lock()
	notes := slices.Clone(n.ranges.Notes)
	n.mu.Unlock()
	if err != nil {
		n.session.log.Warn("applying the network", "err", err)
		note := "a change of the cluster's network could not be applied: " + err.Error()
		var e *api.Error
		if errors.As(err, &e) {
			note = "a change of the cluster's network could not be applied: " + e.Message
		}
		notes = append(notes, note)
	}
	n.session.status.update(func(st *api.Session) { st.Notes = notes })
}

func (n *network) granted() link.Granted {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.grant
}

// takeTUN hands over the device's descriptor, once.
func (n *network) takeTUN() *os.File {
	n.mu.Lock()
	defer n.mu.Unlock()
	f := n.tun
	n.tun = nil
	return f
}

// agentAddr is the agent's IPv4 address in the tunnel.
func (n *network) agentAddr() netip.Addr {
	for _, a := range n.granted().Agent {
		if a.Is4() {
			return a
		}
	}
	if a := n.granted().Agent; len(a) > 0 {
		return a[0]
	}
	return netip.Addr{}
}

// agentServers are where the agent's DNS relay answers.
func (n *network) agentServers() []netip.AddrPort {
	var servers []netip.AddrPort
	for _, a := range n.granted().Agent {
		servers = append(servers, netip.AddrPortFrom(a, 53))
	}
	return servers
}

// prefixes are the cluster's ranges: for names of addresses (PTR).
func (n *network) prefixes() []netip.Prefix {
	n.mu.Lock()
	defer n.mu.Unlock()
	ps := make([]netip.Prefix, 0, len(n.ranges.Routes))
	for _, r := range n.ranges.Routes {
		ps = append(ps, r.Prefix)
	}
	return ps
}

// routed are the prefixes that the machine's routes lead into the cluster, and
// those among them that they do not.
func (n *network) routed() (plan, excluded []netip.Prefix) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, r := range slices.Concat(n.ranges.Routes, n.include) {
		plan = append(plan, r.Prefix)
	}
	for _, r := range n.exclude {
		excluded = append(excluded, r.Prefix)
	}
	return plan, excluded
}

// busy are all prefixes and addresses that mean something to this session.
func (n *network) busy() []netip.Prefix {
	plan, excluded := n.routed()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, a := range slices.Concat(n.server, n.grant.Tunnel, n.grant.Agent, n.grant.Inbound) {
		excluded = append(excluded, netip.PrefixFrom(a, a.BitLen()))
	}
	return append(plan, excluded...)
}

// rangesLoop follows the cluster's ranges. A watch that ends is begun again.
func (s *Session) rangesLoop(ctx context.Context) {
	for ctx.Err() == nil {
		err := s.cluster.WatchRanges(ctx, s.network.setRanges)
		if ctx.Err() != nil {
			return
		}
		s.log.Warn("watching the cluster's ranges", "err", err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(lastPause):
		}
	}
}
