package dns

import (
	"context"
	"crypto/rand"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// loopZone is where the names of loop probes are. No context has an
	// underscore in its label, and no forwarder of ours sends such a name on.
	loopZone = "_loop." + ownTop
	// loopPause is between probes while a server is known to loop or questions
	// pile up, as a loop makes them do.
	loopPause = 30 * time.Second
)

// loops finds resolvers of the machine that ask us in turn, such as a local
// dnsmasq whose own upstream is the /etc/resolv.conf that names us. A server is
// asked for a random name; one that sends us that name is not asked any more,
// until a later probe finds it mended.
type loops struct {
	wake chan struct{} // one pending probe is enough

	mu      sync.Mutex
	pending map[string]bool // by the name asked for: has it come back to us?
}

// checkLoops asks for a probe soon.
func (f *Forwarder) checkLoops() {
	select {
	case f.loops.wake <- struct{}{}:
	default:
	}
}

// returned tells whether name is a probe's, and notes that it came back.
func (l *loops) returned(name string) bool {
	if !strings.HasSuffix(name, "."+loopZone) {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.pending[name]; ok {
		l.pending[name] = true
	}
	return true
}

// watchLoops probes at the start, when asked to, and while a server loops.
func (f *Forwarder) watchLoops(ctx context.Context) {
	f.checkLoops()
	ticker := time.NewTicker(loopPause)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.loops.wake:
		case <-ticker.C:
			f.mu.Lock()
			idle := len(f.looped) == 0 && len(f.askingMachine) < maxAsking/2
			f.mu.Unlock()
			if idle {
				continue
			}
		}
		f.probe(ctx)
	}
}

// probe asks all of the machine's resolvers and drops those that loop.
func (f *Forwarder) probe(ctx context.Context) {
	f.mu.Lock()
	var servers []netip.AddrPort
	for _, server := range f.config.Machine {
		if !f.isOwnLocked(server) {
			servers = append(servers, server)
		}
	}
	f.mu.Unlock()
	names := make([]string, len(servers))
	pending := make(map[string]bool)
	for i := range servers {
		names[i] = strings.ToLower(rand.Text()) + "." + loopZone
		pending[names[i]] = false
	}
	f.loops.mu.Lock()
	f.loops.pending = pending
	f.loops.mu.Unlock()

	var asking sync.WaitGroup
	for i, server := range servers {
		asking.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			defer cancel()
			var m dns.Msg
			m.SetQuestion(names[i]+".", dns.TypeTXT)
			if b, err := m.Pack(); err == nil {
				// The answer says nothing; whether we are asked does.
				_, _ = (&upstream{}).ask(ctx, server, b, false)
			}
		})
	}
	asking.Wait()

	var looped []netip.AddrPort
	f.loops.mu.Lock()
	for i, server := range servers {
		if pending[names[i]] {
			looped = append(looped, server)
		}
	}
	f.loops.pending = nil
	f.loops.mu.Unlock()
	f.mu.Lock()
	defer f.mu.Unlock()
	if ctx.Err() != nil || slices.Equal(f.looped, looped) {
		return
	}
	if len(looped) > 0 {
		f.log.Warn("machine's DNS servers forward to culvert and are left out", "servers", looped)
	} else {
		f.log.Info("machine's DNS servers no longer forward to culvert")
	}
	f.looped = looped
	f.applyLocked()
}
