package session

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

// staleTime bounds the look for what a crash left: it is a courtesy.
const staleTime = 30 * time.Second

// removeStale deletes the agents of sessions that died along with their daemon,
// when nobody was left to do it, and returns how many there were.
func (s *Session) removeStale(ctx context.Context) int {
	ctx, cancel := context.WithTimeout(ctx, staleTime)
	defer cancel()
	removed, err := s.cluster.RemoveStale(ctx, s.agentSpec(), func(ctx context.Context) (ids []string, err error) {
		_, err = s.conn.Call(ctx, link.MethodSessions, nil, &ids)
		return ids, err
	})
	if len(removed) > 0 {
		s.log.Info("removed agents that a crash left", "deployments", strings.Join(removed, " "))
	}
	if err != nil && ctx.Err() == nil {
		s.log.Warn("removing agents that a crash left", "err", err)
	}
	return len(removed)
}

// preflight asks whether the agent may be made; when the namespace has no room
// for it, what a crash left goes first.
func (s *Session) preflight(ctx context.Context, spec cluster.AgentSpec) error {
	err := s.cluster.Preflight(ctx, spec)
	var e *api.Error
	if errors.As(err, &e) && e.Code == api.CodeNamespace && s.removeStale(ctx) > 0 {
		return s.cluster.Preflight(ctx, spec)
	}
	return err
}
