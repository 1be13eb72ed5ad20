package agent

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/culvert-dev/culvert/wire/peer"
)

// maxAsk bounds the body of a request about a peer, in bytes.
const maxAsk = 4 << 10

// handlePeers serves peer.Path to whoever shows the session's secret.
func (a *Agent) handlePeers(mux *http.ServeMux) {
	handle := func(pattern string, do func(p *peers, r *http.Request) error) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			p, err := a.authorized(r)
			if err == nil {
				r.Body = http.MaxBytesReader(w, r.Body, maxAsk)
				err = do(p, r)
			}
			if err != nil {
				refuse(w, err)
				return
			}
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(p.state()) // who asked has gone away
		})
	}
	handle("GET "+peer.Path, func(*peers, *http.Request) error { return nil })
	handle("PUT "+peer.Path+"/{name}", func(p *peers, r *http.Request) error {
		var ask peer.Ask
		if err := json.NewDecoder(r.Body).Decode(&ask); err != nil {
			return &peer.Refusal{Status: http.StatusBadRequest, Reason: "reading the request: " + err.Error()}
		}
		return p.add(r.PathValue("name"), ask)
	})
	handle("DELETE "+peer.Path+"/{name}", func(p *peers, r *http.Request) error { return p.remove(r.PathValue("name")) })
}

// authorized is the peers of the session that asks.
func (a *Agent) authorized(r *http.Request) (*peers, error) {
	a.mu.Lock()
	o := a.owner
	a.mu.Unlock()
	secret, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if o == nil || !ok || subtle.ConstantTimeCompare([]byte(secret), []byte(o.secret)) != 1 {
		return nil, &peer.Refusal{Status: http.StatusUnauthorized, Reason: "only the session of this agent may ask"}
	}
	return o.node.peers, nil
}

func refuse(w http.ResponseWriter, err error) {
	var r *peer.Refusal
	if !errors.As(err, &r) {
		r = &peer.Refusal{Status: http.StatusInternalServerError, Reason: err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(r.Status)
	_ = json.NewEncoder(w).Encode(r) // who asked has gone away
}
