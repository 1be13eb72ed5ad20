package session

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

// status is what the session knows of itself, and tells the daemon whenever it
// changes.
type status struct {
	conn *link.Conn

	// sendMu keeps the reports in order: a report is made and sent under it.
	sendMu sync.Mutex

	mu sync.Mutex
	st api.Session
}

// update changes the status and reports it at once: state changes are rare and
// the user watches them.
func (s *status) update(change func(*api.Session)) {
	s.mu.Lock()
	before := s.st.State
	change(&s.st)
	if s.st.State != before {
		s.st.Since = time.Now()
	}
	s.mu.Unlock()
	s.flush()
}

// flush sends the status as it is now. An error means that the daemon is gone,
// which Run notices by itself.
func (s *status) flush() {
	s.sendMu.Lock()
	defer s.sendMu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if _, err := s.conn.Call(ctx, link.MethodStatus, s.get(), nil); err != nil {
		slog.Debug("reporting the status", "err", err)
	}
}

func (s *status) get() api.Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.st
	st.Notes = slices.Clone(s.st.Notes)
	return st
}

// step reports a step of connecting.
func (s *status) step(step string) {
	s.update(func(st *api.Session) { st.State, st.Step = api.Connecting, step })
}

// trafficEvery is how often byte counts and round trip are reported while
// connected: often enough for `status --watch`, cheap enough to forget.
const trafficEvery = 5 * time.Second

// statusLoop keeps the figures of status fresh.
func (s *Session) statusLoop(ctx context.Context) {
	tick := time.NewTicker(trafficEvery)
	defer tick.Stop()
	last, at := s.carrierStatus(), time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		c, now := s.carrierStatus(), time.Now()
		over := now.Sub(at).Seconds()
		c.SentRate = uint64(float64(c.Sent-last.Sent) / over)
		c.ReceivedRate = uint64(float64(c.Received-last.Received) / over)
		last, at = c, now
		s.status.update(func(st *api.Session) { st.Carrier = c })
	}
}
