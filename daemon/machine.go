package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/router"
	"github.com/culvert-dev/culvert/tun"
)

const (
	// maxExcludeAddrs bounds the API server and proxy addresses of a session.
	maxExcludeAddrs = 256
	// maxAppeared bounds the notes about networks that appeared inside a range.
	maxAppeared = 8
	// redialEvery bounds how often a session may have neighbours asked.
	redialEvery = 100 * time.Millisecond
	// minMTU is IPv6's least (RFC 8200, section 5).
	minMTU, maxMTU = 1280, 65535
)

// machine is what the sessions have of the machine: devices, routes and the
// OS's DNS settings. Its mutex is held while the kernel is told things, so that
// two sessions can neither take the same range nor undo each other's settings;
// each such change takes milliseconds.
type machine struct {
	cfg Config
	log *slog.Logger

	mu        sync.Mutex
	devices   map[string]*device   // by session id
	resolvers map[string]*resolver // by requested mode
	guard     *guard               // while /etc/resolv.conf is ours
}

// device is one session's share of the machine.
type device struct {
	session *session
	name    string
	router  *router.Router
	exclude []netip.Addr // API server and proxies

	redialled time.Time // when next hops were asked last

	tun      *os.File // nil until configured
	ifindex  int
	network  link.Network
	granted  link.Granted
	resolver *resolver
	sockets  *sockets
	dnsOn    bool            // the OS's settings name this session
	sent     map[string]bool // which descriptors this process has
	hold     *time.Timer     // until the sockets of a dead process are closed
}

func newMachine(cfg Config) *machine {
	return &machine{
		cfg:       cfg,
		log:       cfg.Log.With("part", "machine"),
		devices:   make(map[string]*device),
		resolvers: make(map[string]*resolver),
	}
}

// configure makes the machine as a session wants it, or changes nothing and
// says why not. The files belong to the machine.
func (m *machine) configure(ctx context.Context, s *session, n link.Network) (link.Granted, []*os.File, error) {
	if err := m.validate(n); err != nil {
		return link.Granted{}, nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	// Asked under mu: whoever ends the session changes its inputs first and then
	// takes its names and routes away under mu.
	if next(s.inputs()) == api.Disconnecting {
		return link.Granted{}, nil, &api.Error{Code: api.CodeCanceled, Message: "the session is being disconnected"}
	}
	d := m.deviceLocked(s)
	facts, err := m.factsFor(s)
	if err != nil {
		return link.Granted{}, nil, err
	}
	if err := m.collidesLocked(d, n, facts); err != nil {
		return link.Granted{}, nil, err
	}
	fresh := d.tun == nil
	if fresh {
		if err := m.createLocked(d, n, facts); err != nil {
			return link.Granted{}, nil, err
		}
	}
	before := d.network
	d.network = n
	if err := m.applyLocked(ctx, d, facts); err != nil {
		d.network = before
		if fresh {
			m.destroyLocked(ctx, d)
		} else if back := m.applyLocked(ctx, d, facts); back != nil {
			m.log.Error("going back to the previous network", "session", s.id, "error", back)
		}
		return link.Granted{}, nil, err
	}
	if d.hold != nil {
		d.hold.Stop()
		d.hold = nil
	}
	m.viewLocked(d, facts)
	granted, files := d.handover()
	return granted, files, nil
}

// validate checks what can be checked without knowing the machine.
func (m *machine) validate(n link.Network) error {
	usage := func(format string, args ...any) error {
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf(format, args...)}
	}
	switch {
	case n.Identity == "" || len(n.Identity) > 256 || cleanText(n.Identity) != n.Identity:
		return usage("the cluster's identity is empty, too long or not printable")
	case len(n.Context) > 512 || cleanText(n.Context) != n.Context:
		return usage("the context's name is too long or not printable")
	case n.MTU < minMTU || n.MTU > maxMTU:
		return usage("MTU %d is not between %d and %d", n.MTU, minMTU, maxMTU)
	}
	for _, r := range slices.Concat(n.Plan, n.Excluded) {
		if len(r.Source) > 256 || cleanText(r.Source) != r.Source {
			return usage("the source of %v is too long or not printable", r.Prefix)
		}
	}
	var domains []string
	if n.DNS != nil {
		switch n.DNS.Mode {
		case "", router.DNSAuto, router.DNSResolved, router.DNSResolvConf, router.DNSNone:
		default:
			return usage("DNS mode %.32q is none of auto, resolved, resolvconf, none", n.DNS.Mode)
		}
		if len(n.DNS.ClusterDomain) > 253 || cleanText(n.DNS.ClusterDomain) != n.DNS.ClusterDomain {
			return usage("the cluster's domain is too long or not printable")
		}
		domains = slices.Concat(n.DNS.Domains, n.DNS.Search)
	}
	if err := router.ValidateExcluded(n.Excluded); err != nil {
		return err
	}
	return router.Validate(n.Plan, domains, m.cfg.Policy)
}

// collidesLocked looks for what stands against a network.
func (m *machine) collidesLocked(d *device, n link.Network, facts *router.Facts) error {
	for id, other := range m.devices {
		if id != d.session.id && other.tun != nil && other.network.Identity == n.Identity &&
			!other.session.options.InterceptOnly && !d.session.options.InterceptOnly {
			e := &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("this cluster is already connected as session %s (context %s)", id, other.network.Context)}
			if other.session.account.UID == d.session.account.UID {
				e.Hint = "culvert disconnect " + id
			} else {
				e.Message = "this cluster is already connected by another user of this machine"
			}
			return e
		}
	}
	excluded := prefixes(n.Excluded)
	for _, a := range d.exclude {
		excluded = append(excluded, host(a))
	}
	conflicts := facts.Conflicts(n.Plan, excluded)
	if d.session.inputs().established {
		// The machine's networks come and go while a session is connected: they stay
		// the machine's (config), and the session goes on with the rest.
		facts := router.Facts{Sessions: facts.Sessions}
		conflicts = facts.Conflicts(n.Plan, excluded)
	}
	if len(conflicts) == 0 {
		return nil
	}
	e := &api.Error{Code: api.CodeConflict}
	var flags []string
	for i, c := range conflicts {
		if i == 8 {
			e.Message += fmt.Sprintf("\nand %d more", len(conflicts)-i)
			break
		}
		if i > 0 {
			e.Message += "\n"
		}
		e.Message += fmt.Sprintf("cluster range %v (%s) collides with %s", c.Prefix, sourceOf(n.Plan, c.Prefix), c.Local)
		if c.Flag != "" && !slices.Contains(flags, c.Flag) {
			flags = append(flags, c.Flag)
		}
	}
	e.Hint = strings.Join(flags, " ")
	return e
}

// conflicts says what plan would collide with, for a doctor. The caller's own
// sessions are not counted: their ranges are routed already, by themselves.
func (m *machine) conflicts(who caller, plan []api.Route) ([]api.Conflict, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	facts, err := m.factsLocked(func(s *session) bool { return s.account.UID != who.UID }, who.mayUse)
	if err != nil {
		return nil, err
	}
	return facts.Conflicts(plan, nil), nil
}

// factsFor are factsLocked as a session's user may know them.
func (m *machine) factsFor(s *session) (*router.Facts, error) {
	return m.factsLocked(func(other *session) bool { return other != s }, caller{UID: s.account.UID}.mayUse)
}

// factsLocked reads the machine's network and adds the sessions that count,
// with names where the users' may be known.
func (m *machine) factsLocked(counts func(*session) bool, known func(uid int) bool) (*router.Facts, error) {
	facts, err := m.cfg.Router.Local()
	if err != nil {
		return nil, fmt.Errorf("reading the machine's network: %w", err)
	}
	for id, d := range m.devices {
		if d.tun == nil || !counts(d.session) {
			continue
		}
		r := router.SessionRanges{Routes: prefixes(d.network.Plan), Excluded: prefixes(d.network.Excluded)}
		if known(d.session.account.UID) {
			r.ID, r.Context = id, d.network.Context
		}
		facts.Sessions = append(facts.Sessions, r)
	}
	return facts, nil
}

// deviceLocked finds or notes a session's share of the machine.
func (m *machine) deviceLocked(s *session) *device {
	d := m.devices[s.id]
	if d == nil {
		name := router.Device(s.slot)
		d = &device{session: s, name: name, router: router.New(s.slot, name), sent: make(map[string]bool)}
		m.devices[s.id] = d
	}
	return d
}

// createLocked makes the TUN device and chooses its addresses.
func (m *machine) createLocked(d *device, n link.Network, facts *router.Facts) error {
	var taken []netip.Addr
	for _, other := range m.devices {
		taken = slices.Concat(taken, other.granted.Tunnel, other.granted.Agent, other.granted.Inbound)
	}
	tunnel, agent, inbound, err := router.PickAddresses(facts, prefixes(slices.Concat(n.Plan, n.Excluded)), taken)
	if err != nil {
		return fmt.Errorf("choosing tunnel addresses: %w", err)
	}
	f, err := tun.Create(tun.Config{Name: d.name, MTU: n.MTU})
	if err != nil {
		var e *api.Error
		if errors.As(err, &e) {
			return e
		}
		return &api.Error{Code: api.CodeTUN, Message: fmt.Sprintf("making TUN device %s: %v", d.name, err), Hint: "culvert doctor"}
	}
	d.tun = f
	d.ifindex = interfaceIndex(d.name)
	d.granted = link.Granted{Device: d.name, Tunnel: tunnel, Agent: agent, Inbound: inbound}
	return nil
}

// applyLocked makes kernel and OS follow d.network.
func (m *machine) applyLocked(ctx context.Context, d *device, facts *router.Facts) error {
	if err := d.router.Set(d.config(facts)); err != nil {
		return fmt.Errorf("routing to %s: %w", d.name, err)
	}
	return m.applyDNSLocked(ctx, d)
}

// config is the routing that d.network asks for.
func (d *device) config(facts *router.Facts) *router.Config {
	c := &router.Config{MTU: d.network.MTU}
	for _, a := range d.granted.Tunnel {
		c.Addresses = append(c.Addresses, host(a))
	}
	for _, a := range d.granted.Agent {
		c.Routes = append(c.Routes, host(a))
	}
	if d.network.Active {
		c.Routes = append(c.Routes, prefixes(d.network.Plan)...)
	}
	c.Excluded = prefixes(d.excluded(facts))
	return c
}

// excluded is everything that leaves the machine by its own routes, and why.
func (d *device) excluded(facts *router.Facts) []api.Route {
	all := slices.Clone(d.network.Excluded)
	for _, a := range d.exclude {
		all = append(all, api.Route{Prefix: host(a), Source: "API server"})
	}
	all = append(all, facts.Always()...)
	return append(all, d.appeared(facts)...)
}

// appeared are the machine's networks inside a range that is routed: they were
// not there when it was connected, or configure would have refused.
func (d *device) appeared(facts *router.Facts) []api.Route {
	if !d.network.Active {
		return nil
	}
	known := prefixes(d.network.Excluded)
	for _, a := range d.exclude {
		known = append(known, host(a))
	}
	return facts.Inside(d.network.Plan, known)
}

// exclude replaces the addresses that a session is going to dial itself.
func (m *machine) exclude(s *session, addrs []netip.Addr) error {
	if len(addrs) > maxExcludeAddrs {
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%d excluded addresses are more than %d", len(addrs), maxExcludeAddrs)}
	}
	for i, a := range addrs {
		if !a.IsValid() {
			return &api.Error{Code: api.CodeUsage, Message: "an excluded address is not valid"}
		}
		addrs[i] = a.Unmap().WithZone("")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.deviceLocked(s)
	d.exclude = addrs
	if d.tun == nil {
		return nil
	}
	return m.rerouteLocked(d)
}

// redial helps a session to be through the moment the network is back: the next
// hops to its API server and to the machine's nameservers are asked again.
func (m *machine) redial(s *session) {
	m.mu.Lock()
	d := m.deviceLocked(s)
	if time.Since(d.redialled) < redialEvery {
		m.mu.Unlock()
		return
	}
	d.redialled = time.Now()
	to := slices.Clone(d.exclude)
	m.mu.Unlock()
	facts, err := m.cfg.Router.Local()
	if err != nil {
		m.log.Warn("reading the machine's network", "error", err)
		return
	}
	for _, server := range facts.DNS {
		to = append(to, server.Addr())
	}
	if err := router.AskNextHops(to); err != nil {
		m.log.Debug("asking the next hops", "session", s.id, "error", err)
	}
}

func (m *machine) rerouteLocked(d *device) error {
	facts, err := m.factsFor(d.session)
	if err != nil {
		return err
	}
	if err := d.router.Set(d.config(facts)); err != nil {
		return fmt.Errorf("routing to %s: %w", d.name, err)
	}
	m.viewLocked(d, facts)
	return nil
}

// reroute sets all routes again, after the machine's network changed or
// somebody removed something of ours.
func (m *machine) reroute() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for id, d := range m.devices {
		if d.tun == nil {
			continue
		}
		if err := m.rerouteLocked(d); err != nil {
			m.log.Error("setting routes again", "session", id, "error", err)
		}
	}
}

// watch sets routes again as the machine's network changes, until ctx ends.
func (m *machine) watch(ctx context.Context) {
	changes := make(chan struct{}, 1)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for ctx.Err() == nil {
			err := router.Watch(ctx, func(router.Change) {
				select {
				case changes <- struct{}{}:
				default:
				}
			})
			if ctx.Err() == nil {
				m.log.Warn("watching the machine's network", "error", err)
				sleep(ctx, 5*time.Second)
			}
		}
	})
	for {
		select {
		case <-ctx.Done():
			return
		case <-changes:
			// A new Wi-Fi is a burst of changes.
			sleep(ctx, 200*time.Millisecond)
			m.reroute()
		}
	}
}

// handover is what a process is told, with the descriptors that it lacks.
func (d *device) handover() (link.Granted, []*os.File) {
	granted := d.granted
	var files []*os.File
	add := func(name string, f *os.File) {
		if !d.sent[name] {
			d.sent[name] = true
			granted.Files = append(granted.Files, name)
			files = append(files, f)
		}
	}
	add("tun", d.tun)
	if d.sockets != nil {
		add("dns-udp", d.sockets.udp)
		add("dns-tcp", d.sockets.tcp)
	}
	return granted, files
}

// kept is what the last process of a session configured, or nil.
func (m *machine) kept(id string) (*link.Network, *link.Granted) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.devices[id]
	if d == nil || d.tun == nil {
		return nil, nil
	}
	network, granted := d.network, d.granted
	return &network, &granted
}

// orphaned: the session's process is gone. Device and routes stay; its DNS
// sockets stay open for dnsHold, so that queries wait for the next process.
func (m *machine) orphaned(id string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.devices[id]
	if d == nil {
		return
	}
	clear(d.sent)
	if d.sockets != nil && d.hold == nil {
		d.hold = time.AfterFunc(dnsHold, func() { m.release(id, d) })
	}
}

// release gives up the names of a session that did not come back in time.
func (m *machine) release(id string, d *device) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.devices[id] != d || d.hold == nil {
		return
	}
	d.hold = nil
	m.log.Warn("no session process for its names: giving them back until there is one", "session", id)
	m.muteLocked(context.Background(), d)
}

// remove takes away everything of a session.
func (m *machine) remove(ctx context.Context, id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	d := m.devices[id]
	if d == nil {
		return nil
	}
	err := m.destroyLocked(ctx, d)
	delete(m.devices, id)
	return err
}

// destroyLocked undoes createLocked and applyLocked; it goes on after errors.
func (m *machine) destroyLocked(ctx context.Context, d *device) error {
	if d.hold != nil {
		d.hold.Stop()
		d.hold = nil
	}
	err := m.muteLocked(ctx, d)
	if d.tun == nil {
		return err
	}
	err = errors.Join(err, d.router.Close(), d.tun.Close())
	// The device goes with its last descriptor, unless the session made it
	// persistent or handed a copy on.
	if interfaceIndex(d.name) != 0 {
		err = errors.Join(err, tun.Delete(d.name))
	}
	d.tun, d.granted, d.network, d.ifindex = nil, link.Granted{}, link.Network{}, 0
	clear(d.sent)
	return err
}

// viewLocked gives status what it shows of the machine's side.
func (m *machine) viewLocked(d *device, facts *router.Facts) {
	view := networkView{device: d.name, excluded: d.excluded(facts), notes: slices.Clone(d.router.Notes())}
	for i, r := range d.appeared(facts) {
		if i == maxAppeared {
			break
		}
		view.notes = append(view.notes, fmt.Sprintf("%v stays this machine's, though it is inside the cluster's ranges: %s", r.Prefix, r.Source))
	}
	for _, a := range d.granted.Tunnel {
		view.addresses = append(view.addresses, host(a))
	}
	if d.network.Active {
		view.routes = slices.Clone(d.network.Plan)
	}
	if d.network.DNS != nil {
		view.dns = api.DNSStatus{Mode: d.granted.DNSMode, ClusterDomain: d.network.DNS.ClusterDomain, Domains: d.network.DNS.Domains}
		if d.granted.DNSAddr.IsValid() {
			view.dns.Server = d.granted.DNSAddr.String()
		}
	}
	d.session.update(func() { d.session.network = view })
}

func prefixes(routes []api.Route) []netip.Prefix {
	out := make([]netip.Prefix, 0, len(routes))
	for _, r := range routes {
		out = append(out, r.Prefix)
	}
	return out
}

func sourceOf(plan []api.Route, p netip.Prefix) string {
	for _, r := range plan {
		if r.Prefix == p {
			return r.Source
		}
	}
	return "unknown source"
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}
