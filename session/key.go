package session

import (
	"errors"
	"time"

	"github.com/culvert-dev/culvert/wire"
)

// keyAge is how old the last handshake may be at a redial: a little less than
// the 180 s after which WireGuard refuses its keys.
const keyAge = 150 * time.Second

// errClock ends a stream whose keys could not be renewed any more.
var errClock = errors.New("this machine's clock was set back")

// keyNow is the key to introduce ourselves with, and whether it is another than
// the tunnel has. Another one has the agent wait for our handshake. With the same
// one, after a time without a carrier in which keys ran out, both ends ask for a
// handshake every 5 s, no more often, and discard each other's when they cross.
func (s *Session) keyNow() (key wire.Key, renewed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.tunnel.LastHandshake()
	if s.staleKey || !last.IsZero() && time.Since(last) > keyAge {
		return wire.NewPrivateKey(), true
	}
	return s.key, false
}

// renewKey introduces the session again with another key, as a new process would.
// WireGuard's handshakes carry the time of day, and the agent takes none of a key
// that is not later than the last one (WireGuard, section 5.1): once a clock has
// been set back the tunnel would end with its keys, after three minutes, until
// the clock has caught up.
func (s *Session) renewKey() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.staleKey = true
	if s.stream != nil {
		s.stream.Break(errClock)
	}
}
