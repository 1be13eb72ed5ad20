package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Ranges is what of the cluster shall be routed, as far as the user may see it.
type Ranges struct {
	Routes []api.Route // sorted, none inside another
	Notes  []string    // what was not visible and what follows
}

func (r Ranges) equal(o Ranges) bool {
	return slices.Equal(r.Routes, o.Routes) && slices.Equal(r.Notes, o.Notes)
}

// sources are what Ranges are made of.
type sources struct {
	serviceCIDRs, nodes, services, pods *table

	mu       sync.Mutex
	probed   []netip.Prefix
	probeErr error // why the dry run did not tell
}

func (c *Cluster) newSources() *sources {
	return &sources{serviceCIDRs: c.serviceCIDRTable(), nodes: c.nodeTable(), services: c.serviceTable(), pods: c.podTable()}
}

// Ranges asks the cluster, best source first: ServiceCIDR objects, a dry run
// that the server refuses with its range, the nodes' pod ranges, and addresses
// of Services and pods that lie in none of these. What the user may not see is
// a note, not an error. Errors are *api.Error.
func (c *Cluster) Ranges(ctx context.Context) (Ranges, error) {
	s := c.sources
	g, gctx := errgroup.WithContext(ctx)
	for _, t := range []*table{s.nodes, s.services, s.pods} {
		g.Go(func() error {
			return translate("listing "+t.what, t.refresh(gctx, c.namespace))
		})
	}
	g.Go(func() error {
		if err := s.serviceCIDRs.refresh(gctx, ""); err != nil {
			return translate("listing servicecidrs", err)
		}
		if s.has(s.serviceCIDRs) {
			return nil
		}
		probed, err := c.probeServiceRange(gctx)
		s.mu.Lock()
		s.probed, s.probeErr = probed, err
		s.mu.Unlock()
		return nil
	})
	if err := g.Wait(); err != nil {
		return Ranges{}, err
	}
	return s.ranges(c.namespace), nil
}

func (s *sources) has(t *table) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return len(t.rows) > 0
}

const (
	// settle gathers the changes of a deployment's pods into one new set of
	// routes.
	settle = 300 * time.Millisecond
	// podPoll is how often pods are looked through where the nodes' ranges hold
	// them all: a watch would bring every pod's every change for nothing.
	podPoll = 10 * time.Minute
)

// WatchRanges calls changed, from one goroutine, with every state of Ranges
// that differs from the one before, the first included, until ctx is done; then
// it returns nil. It also feeds Services. It survives restarts of the API
// server and expired credentials, quietly: the carrier notices those.
func (c *Cluster) WatchRanges(ctx context.Context, changed func(Ranges)) error {
	s := c.sources
	if s.services.visible() == unknown {
		if _, err := c.Ranges(ctx); err != nil {
			return err
		}
	}
	dirty := make(chan struct{}, 1)
	mark := func() {
		select {
		case dirty <- struct{}{}:
		default:
		}
	}
	var wg sync.WaitGroup
	for _, t := range []*table{s.serviceCIDRs, s.nodes, s.services} {
		wg.Go(func() { t.follow(ctx, c.namespace, mark) })
	}
	wg.Go(func() { c.followPods(ctx, mark) })
	defer wg.Wait()

	mark()
	var last Ranges
	for first := true; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-dirty:
		}
		if now := s.ranges(c.namespace); first || !now.equal(last) {
			changed(now)
			last, first = now, false
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(settle):
		}
	}
}

// followPods watches pods where their addresses are routed one by one, and
// looks now and then where the nodes' ranges hold them.
func (c *Cluster) followPods(ctx context.Context, changed func()) {
	s := c.sources
	for ctx.Err() == nil {
		if s.pods.visible() != nothing && !s.podsCovered() {
			s.pods.follow(ctx, c.namespace, changed)
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(podPoll):
		}
		if s.pods.refresh(ctx, c.namespace) == nil {
			changed()
		}
	}
}

// podsCovered says whether every pod that is visible is in a node's range.
func (s *sources) podsCovered() bool {
	var known []netip.Prefix
	s.nodes.each(func(_ string, r row) { known = append(known, r.prefixes...) })
	if len(known) == 0 {
		return false
	}
	index := newPrefixSet(known)
	covered := true
	s.pods.each(func(_ string, r row) {
		for _, a := range r.addrs {
			covered = covered && index.contains(a)
		}
	})
	return covered
}

// ranges computes the routes from all sources.
func (s *sources) ranges(own string) Ranges {
	var known, seen []api.Route
	var notes []string
	add := func(p netip.Prefix, source string) {
		if why := unusable(p); why != "" {
			notes = append(notes, fmt.Sprintf("%s (%s) is not routed: %s", p, source, why))
			return
		}
		known = append(known, api.Route{Prefix: p, Source: source})
	}
	s.serviceCIDRs.each(func(name string, r row) {
		for _, p := range r.prefixes {
			add(p, "ServiceCIDR "+name)
		}
	})
	s.mu.Lock()
	for _, p := range s.probed {
		add(p, "Service range (dry run)")
	}
	s.mu.Unlock()
	hosts := map[netip.Addr]bool{}
	host := func(_ string, r row) {
		for _, a := range r.hosts {
			hosts[a] = true
		}
	}
	s.nodes.each(func(name string, r row) {
		host(name, r)
		for _, p := range r.prefixes {
			add(p, "node "+name)
		}
	})
	s.pods.each(host)

	prefixes := make([]netip.Prefix, 0, len(known))
	for _, r := range known {
		prefixes = append(prefixes, r.Prefix)
	}
	index := newPrefixSet(prefixes)
	observe := func(t *table, kind string) {
		t.each(func(k string, r row) {
			for _, a := range r.addrs {
				p := netip.PrefixFrom(a, a.BitLen())
				if hosts[a] || index.contains(a) || unusable(p) != "" {
					continue
				}
				seen = append(seen, api.Route{Prefix: p, Source: kind + " " + k})
			}
		})
	}
	observe(s.services, "Service")
	observe(s.pods, "pod")

	routes, fitted := fit(known, seen, hosts)
	notes = append(notes, fitted...)
	slices.Sort(notes) // maps have no order
	return Ranges{Routes: routes, Notes: append(s.notes(own), notes...)}
}

// notes says what the user may not see and what follows from it.
func (s *sources) notes(own string) []string {
	var notes []string
	s.mu.Lock()
	rangeKnown := len(s.probed) > 0
	probeErr := s.probeErr
	s.mu.Unlock()
	rangeKnown = rangeKnown || s.has(s.serviceCIDRs)
	nodesKnown := false
	s.nodes.each(func(_ string, r row) { nodesKnown = nodesKnown || len(r.prefixes) > 0 })

	if !rangeKnown {
		why := "ServiceCIDR objects are not visible"
		if probeErr != nil {
			why += fmt.Sprintf(" and the dry run did not name the range (%v)", shorten(probeErr))
		}
		notes = append(notes, why+": Services are routed one by one as they are seen; --include-ips adds their range")
	}
	switch s.services.visible() {
	case namespace:
		notes = append(notes, fmt.Sprintf("Services are visible in namespace %q only: names of the others need the form SERVICE.NAMESPACE.svc", own))
	case nothing:
		notes = append(notes, "Services are not visible: names need the form SERVICE.NAMESPACE.svc")
	}
	if nodesKnown {
		return notes
	}
	switch s.pods.visible() {
	case namespace:
		notes = append(notes, fmt.Sprintf("the pods' ranges are not visible, and pods in namespace %q only: pods of other namespaces are not routed; --include-ips adds their range", own))
	case nothing:
		notes = append(notes, "neither nodes nor pods are visible: no pod is routed; --include-ips adds their range")
	}
	return notes
}

func shorten(err error) string {
	text := err.Error()
	if first, _, cut := strings.Cut(text, "\n"); cut {
		text = first
	}
	if len(text) > 200 {
		text = text[:200] + " …"
	}
	return text
}

// unusable says why a prefix must not be routed; empty: it may. The daemon has
// the same rules and does not trust these.
func unusable(p netip.Prefix) string {
	a := p.Addr()
	switch {
	case a.Is4() && p.Bits() < 8, a.Is6() && p.Bits() < 16:
		return "too wide"
	case a.IsLoopback(), a.IsUnspecified():
		return "it is the machine's own"
	case a.IsLinkLocalUnicast(), a.IsMulticast():
		return "it is local to a link"
	}
	return ""
}
