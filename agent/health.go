package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// stuckAfter is how long the delivery of one batch of packets, or a lock, may
// take before the agent calls itself dead. Both take microseconds.
const stuckAfter = 10 * time.Second

// notes are what is worth saying beside healthy or not.
type notes struct {
	listening atomic.Bool

	mu   sync.Mutex
	text map[string]string
}

func (n *notes) set(key, text string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.text == nil {
		n.text = map[string]string{}
	}
	n.text[key] = text
}

func (n *notes) list() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []string
	for _, key := range slices.Sorted(maps.Keys(n.text)) {
		all = append(all, key+": "+n.text[key])
	}
	return all
}

// serveWeb serves metrics and health until ctx ends.
func (a *Agent) serveWeb(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) { a.answer(w, a.alive(r.Context())) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		err := a.alive(r.Context())
		if err == nil && !a.notes.listening.Load() {
			err = errors.New("not listening for sessions")
		}
		a.answer(w, err)
	})
	a.handlePeers(mux)
	a.handleExposed(mux)
	server := &http.Server{
		Handler:           mux,
		ReadHeaderTimeout: 5 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    8 << 10,
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	err := server.Serve(l)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("serving metrics: %w", err)
}

func (a *Agent) answer(w http.ResponseWriter, err error) {
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprintln(w, err)
		return
	}
	fmt.Fprintln(w, "ok")
	for _, note := range a.notes.list() {
		fmt.Fprintln(w, note)
	}
}

// alive proves that the agent could serve packets now: that no delivery into the
// stack hangs, and that the locks which every flow takes can be had. It does not
// ask for a session: without one the agent is as healthy as ever.
func (a *Agent) alive(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, stuckAfter)
	defer cancel()
	locks := make(chan struct{})
	go func() {
		defer close(locks)
		if n := a.node(); n != nil {
			n.tcp.counts()
			n.udp.count()
			n.endpoint.Queued()
			n.stack.NICInfo()
		}
	}()
	select {
	case <-locks:
	case <-ctx.Done():
		return fmt.Errorf("a lock of the network stack was not free for %s", stuckAfter)
	}
	if n := a.node(); n != nil {
		if d := max(n.endpoint.Delivering(), n.peers.delivering()); d > stuckAfter {
			return fmt.Errorf("the network stack has been at one delivery for %s", d.Round(time.Second))
		}
	}
	return nil
}

// CheckHealth asks the agent whose MetricsAddr is addr whether it is alive, or,
// with ready, whether it takes sessions. It is for exec probes: the kubelet's own
// HTTP probes do not reach loopback.
func CheckHealth(ctx context.Context, addr string, ready bool) error {
	page := "/healthz"
	if ready {
		page = "/readyz"
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+page, nil)
	if err != nil {
		return fmt.Errorf("asking the agent at %s: %w", addr, err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // no proxy from the environment
	resp, err := client.Do(r)
	if err != nil {
		return fmt.Errorf("asking the agent at %s: %w", addr, err)
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // as much as came
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the agent is not healthy: %s", strings.TrimSpace(string(text)))
	}
	return nil
}
