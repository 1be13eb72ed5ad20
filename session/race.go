package session

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/wire/carrier"
)

const (
	// tryEvery is how often a new attempt begins while others wait: a packet that
	// was lost in a dead network comes again only seconds later, a new attempt is
	// through at once. After hurryFor it is watchEvery, after watchFor lastPause:
	// nobody watches any more.
	tryEvery, hurryFor   = 300 * time.Millisecond, 5 * time.Minute
	watchEvery, watchFor = time.Second, time.Hour
	// tryTime bounds an attempt, and dialTime the first of a race, for an API
	// server that is slow and not away. So eight are under way at most.
	tryTime = 2 * time.Second
	// raceTime is how long a race without an answer goes on before the loop above
	// looks around.
	raceTime = 6 * time.Second
)

// attempt is how one ended.
type attempt struct {
	conn  net.Conn
	name  string // of the carrier
	agent *cluster.Agent
	err   error
}

// race dials the agent, in overlapping attempts, until one succeeds or the API
// server gives an answer other than silence. The agent is asked for at each
// attempt, since a search may find another one meanwhile; hurry begins one at
// once. An attempt is a connection only: introductions are the winner's, because
// the agent keeps the stream that was introduced last.
func (s *Session) race(ctx context.Context, every time.Duration) (attempt, error) {
	ctx, cancel := context.WithTimeout(ctx, max(raceTime, 2*every))
	ended := make(chan attempt)
	running := 0
	defer func() {
		cancel()
		go func(n int) { // the others end soon, now that ctx is done
			for range n {
				if a := <-ended; a.conn != nil {
					a.conn.Close()
				}
			}
		}(running)
	}()
	begin := func(limit time.Duration) {
		agent := s.knownAgent()
		if agent == nil {
			return
		}
		running++
		go func() {
			ctx, cancel := context.WithTimeout(ctx, limit)
			defer cancel()
			ended <- s.try(ctx, agent)
		}()
		// The machine's part; without it an attempt takes up to a second longer.
		if err := s.conn.Notify(link.MethodRedial, nil); err != nil {
			s.log.Debug("telling the daemon of a redial", "err", err)
		}
	}
	begin(dialTime)
	next := time.NewTicker(every)
	defer next.Stop()
	last := errors.New("no answer")
	for {
		select {
		case <-ctx.Done():
			return attempt{}, fmt.Errorf("dialling the agent for %v: %w", raceTime, last)
		case <-next.C:
			begin(tryTime)
		case <-s.hurry:
			begin(tryTime)
		case a := <-ended:
			running--
			if a.err == nil {
				return a, nil
			}
			if last = a.err; answered(a.err) {
				return attempt{}, a.err
			}
		}
	}
}

// pace is how often to try after a time without a carrier.
func pace(away time.Duration) time.Duration {
	switch {
	case away < hurryFor:
		return tryEvery
	case away < watchFor:
		return watchEvery
	}
	return lastPause
}

// try makes one connection. The API server's addresses are excluded before: its
// name may lead elsewhere now.
func (s *Session) try(ctx context.Context, agent *cluster.Agent) attempt {
	a := attempt{agent: agent}
	if a.err = s.excludeServer(ctx); a.err != nil {
		return a
	}
	dialer := s.cluster.PortForward(agent, carrier.ControlPort)
	a.conn, a.err = dialer.Dial(ctx)
	a.name = dialer.Name()
	return a
}

// answered tells an error that somebody sent from one that only says that
// nothing came back.
func answered(err error) bool {
	var e *api.Error
	if !errors.As(err, &e) {
		return !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, context.Canceled)
	}
	return e.Code != api.CodeUnreachable && e.Code != api.CodeTimeout
}

// findAgent asks the API server for the agent, waits until it is ready, and
// makes it again if somebody has deleted it.
func (s *Session) findAgent(ctx context.Context) error {
	findCtx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	if err := s.excludeServer(findCtx); err != nil {
		return err
	}
	name := s.recall().Agent
	agent, err := s.cluster.WaitAgent(findCtx, name, func(step string) {
		s.status.update(func(st *api.Session) {
			st.State, st.Cause = api.Reconnecting, "waiting for the agent: "+step
		})
	})
	var e *api.Error
	if errors.As(err, &e) && e.Code == api.CodeNotFound {
		// Somebody deleted the Deployment: make it again, it is ours.
		s.log.Info("the agent is gone; making it again", "deployment", name)
		startCtx, cancel := context.WithTimeout(ctx, defaultTimeout)
		defer cancel()
		agent, err = s.cluster.EnsureAgent(startCtx, s.agentSpec(), func(string) {})
	}
	if err != nil {
		return err
	}
	s.setAgent(agent)
	return nil
}

func (s *Session) knownAgent() *cluster.Agent {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.agent
}

// setAgent notes the agent. An introduction to another one is given up: a pod that
// is on its way out may still take connections, and never answer.
func (s *Session) setAgent(a *cluster.Agent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.agent != nil && s.agent.UID != a.UID && s.introducing != nil {
		s.introducing()
	}
	s.agent = a
}
