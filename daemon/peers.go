package daemon

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

const (
	// peerTimeout is for a session to reach its agent through the API server.
	peerTimeout = 30 * time.Second
	// maxPeers bounds what a session may list, and maxAllowed the prefixes of one
	// configuration: as many as a plan may have, each cut in pieces.
	maxPeers, maxAllowed = 256, 32768
)

func (s *server) peers(w http.ResponseWriter, r *http.Request) {
	var list []api.Peer
	if s.forward(w, r, link.MethodPeers, &list) {
		list = list[:min(len(list), maxPeers)]
		for i := range list {
			cleanPeer(&list[i])
		}
		answer(w, append([]api.Peer{}, list...)) // [], not null
	}
}

func (s *server) peerAdd(w http.ResponseWriter, r *http.Request) {
	var c api.PeerConfig
	if s.forward(w, r, link.MethodPeerAdd, &c) {
		for _, text := range []*string{&c.Name, &c.Context, &c.Agent, &c.PrivateKey, &c.PublicKey, &c.ServerKey, &c.Endpoint} {
			*text = cleanText(*text)
		}
		for i := range c.Search {
			c.Search[i] = cleanText(c.Search[i])
		}
		c.AllowedIPs = c.AllowedIPs[:min(len(c.AllowedIPs), maxAllowed)]
		answer(w, c)
	}
}

func (s *server) peerRemove(w http.ResponseWriter, r *http.Request) {
	var p api.Peer
	if s.forward(w, r, link.MethodPeerRemove, &p) {
		cleanPeer(&p)
		answer(w, p)
	}
}

func cleanPeer(p *api.Peer) {
	p.Name, p.PublicKey, p.From = cleanText(p.Name), cleanText(p.PublicKey), cleanText(p.From)
}

// forward has the session that is meant answer a request about peers. False:
// the caller was told why not.
func (s *server) forward(w http.ResponseWriter, r *http.Request, method string, into any) bool {
	who, _ := callerOf(r.Context())
	var req api.PeerRequest
	err := read(r, &req)
	var one *session
	if err == nil {
		one, err = s.sup.one(who, req.ID, req.Context)
	}
	if err == nil {
		err = one.ask(r.Context(), method, req, into)
	}
	if err != nil {
		refuse(w, err)
		return false
	}
	return true
}

// ask calls a method of the session process.
func (s *session) ask(ctx context.Context, method string, in, into any) error {
	conn := s.connection()
	if conn == nil {
		return &api.Error{Code: api.CodeAgent, Message: "the session is " + string(s.snapshot().State), Hint: "culvert status"}
	}
	ctx, cancel := context.WithTimeout(ctx, peerTimeout)
	defer cancel()
	_, err := conn.Call(ctx, method, in, into)
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return &api.Error{Code: api.CodeTimeout, Message: "the session did not answer", Hint: "culvert logs"}
	case err != nil:
		return cleanError(asAPI(err))
	}
	return nil
}
