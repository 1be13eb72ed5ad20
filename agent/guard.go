package agent

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/culvert-dev/culvert/wire/ask"
)

// maxAsk bounds the body of a request of the session, in bytes: expose.Max ports
// take half of it.
const maxAsk = 32 << 10

// guard serves what do returns, as JSON, to whoever shows the session's secret.
func (a *Agent) guard(do func(n *node, r *http.Request) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		n, err := a.authorized(r)
		var answer any
		if err == nil {
			r.Body = http.MaxBytesReader(w, r.Body, maxAsk)
			answer, err = do(n, r)
		}
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			var refusal *ask.Refusal
			if !errors.As(err, &refusal) {
				refusal = &ask.Refusal{Status: http.StatusInternalServerError, Reason: err.Error()}
			}
			w.WriteHeader(refusal.Status)
			answer = refusal
		}
		_ = json.NewEncoder(w).Encode(answer) // who asked has gone away
	}
}

// authorized is the node of the session that asks.
func (a *Agent) authorized(r *http.Request) (*node, error) {
	a.mu.Lock()
	o := a.owner
	a.mu.Unlock()
	secret, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if o == nil || !ok || subtle.ConstantTimeCompare([]byte(secret), []byte(o.secret)) != 1 {
		return nil, &ask.Refusal{Status: http.StatusUnauthorized, Reason: "only the session of this agent may ask"}
	}
	return o.node, nil
}

// unreadable is the refusal of a body that is not what it should be.
func unreadable(err error) error {
	return &ask.Refusal{Status: http.StatusBadRequest, Reason: "reading the request: " + err.Error()}
}
