package gate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// serveHTTP serves until ctx ends.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	server := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    8 << 10,
	}
	stop := context.AfterFunc(ctx, func() { server.Close() })
	defer stop()
	err := server.Serve(l)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return fmt.Errorf("serving %s: %w", l.Addr(), err)
}

// controlAPI is that of intercept.GatePort.
func (g *Gate) controlAPI() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/state", func(w http.ResponseWriter, _ *http.Request) { answer(w, g.status()) })
	mux.HandleFunc("PUT /v1/state", g.handlePush)
	mux.HandleFunc("POST /v1/reach", g.handleReach)
	mux.HandleFunc("GET /v1/requests", g.handleRequests)
	return mux
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // fails when who asked is gone
}

// handlePush takes a state, if it is newer, and answers what is in force then.
func (g *Gate) handlePush(w http.ResponseWriter, r *http.Request) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxState))
	var s intercept.State
	if err == nil {
		s, err = g.parseState(b)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	g.pushMu.Lock()
	defer g.pushMu.Unlock()
	keys := s.Keys
	s.Keys = nil // nowhere but in memory
	if g.take(s) {
		// In force it is anyhow, and the ConfigMap has it soon.
		if err := g.keep(s); err != nil {
			g.log.Warn("a restarted container will not know the state", "error", err)
		}
	}
	if err := g.takeKeys(keys); err != nil {
		g.log.Warn("a TLS key is of no use", "error", err)
	}
	answer(w, g.status())
}

func (g *Gate) handleReach(w http.ResponseWriter, r *http.Request) {
	var req intercept.ReachRequest
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&req); err != nil {
		http.Error(w, "reading a request: "+err.Error(), http.StatusBadRequest)
		return
	}
	key := strings.TrimSuffix(req.Key, entrySuffix)
	g.mu.Lock()
	e, known := g.state.Entries[key]
	g.mu.Unlock()
	if !known {
		http.Error(w, fmt.Sprintf("there is no entry %q", req.Key), http.StatusNotFound)
		return
	}
	var secret *tlsKey
	if req.TLS != nil {
		var err error
		if secret, err = parseKey(*req.TLS); err != nil {
			http.Error(w, "the TLS key: "+err.Error(), http.StatusBadRequest)
			return
		}
	}
	answer(w, g.reach(r.Context(), e, secret, req.OriginOnly))
}

// maxReach is how many origins are dialled at one time.
const maxReach = 64

// reach dials the TCP origins of e; alone: not by way of their pods. Where secret ends
// TLS the origin has to show a certificate that it trusts.
func (g *Gate) reach(ctx context.Context, e intercept.Entry, secret *tlsKey, alone bool) []intercept.Reached {
	all := []intercept.Reached{}
	var routes []intercept.Route
	for _, r := range e.Routes {
		if r.Protocol == protocolTCP && r.Origin != "" {
			all = append(all, intercept.Reached{Port: r.Port, Origin: r.Origin})
			if alone {
				r.Backends = nil
			}
			routes = append(routes, r)
		}
	}
	var wg sync.WaitGroup
	turns := make(chan struct{}, maxReach)
	for i := range all {
		wg.Go(func() {
			turns <- struct{}{}
			defer func() { <-turns }()
			d := net.Dialer{Timeout: g.times.reach}
			c, err := dialOrigin(ctx, d, routes[i])
			switch {
			case err == nil && secret != nil && routes[i].HTTP == intercept.HTTPTLS:
				if err := secret.check(ctx, c); err != nil {
					all[i].Error = err.Error()
				}
				c.Close()
			case err == nil:
				c.Close()
			case errors.Is(err, syscall.ECONNREFUSED):
				all[i].Error = "refused"
			default:
				all[i].Error = err.Error()
			}
		})
	}
	wg.Wait()
	return all
}
