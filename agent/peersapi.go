package agent

import (
	"encoding/json"
	"net/http"

	"github.com/culvert-dev/culvert/wire/peer"
)

// handlePeers serves peer.Path to whoever shows the session's secret.
func (a *Agent) handlePeers(mux *http.ServeMux) {
	handle := func(pattern string, do func(p *peers, r *http.Request) error) {
		mux.HandleFunc(pattern, a.guard(func(n *node, r *http.Request) (any, error) {
			if err := do(n.peers, r); err != nil {
				return nil, err
			}
			return n.peers.state(), nil
		}))
	}
	handle("GET "+peer.Path, func(*peers, *http.Request) error { return nil })
	handle("PUT "+peer.Path+"/{name}", func(p *peers, r *http.Request) error {
		var ask peer.Ask
		if err := json.NewDecoder(r.Body).Decode(&ask); err != nil {
			return unreadable(err)
		}
		return p.add(r.PathValue("name"), ask)
	})
	handle("DELETE "+peer.Path+"/{name}", func(p *peers, r *http.Request) error { return p.remove(r.PathValue("name")) })
}
