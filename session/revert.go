package session

import (
	"context"
	"errors"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

// revertTime bounds one try to undo what a dead session left; the daemon tries
// again.
const revertTime = 2 * time.Minute

// revert undoes what an earlier session of this id left in the cluster when it
// died together with its daemon. It reports Disconnected when nothing is left.
func (s *Session) revert(ctx context.Context) error {
	err := s.revertOnce(ctx)
	s.status.update(func(st *api.Session) {
		st.State, st.Step = api.Disconnected, ""
		if err != nil {
			st.Error = asError(err)
		}
	})
	return err
}

func (s *Session) revertOnce(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, revertTime)
	defer cancel()
	s.status.step("undoing what a session left when it died")
	e, err := s.journal().read()
	if err != nil {
		return err
	}
	c, err := cluster.Open(s.options)
	if err != nil {
		return err
	}
	s.cluster = c
	if err := s.excludeServer(ctx); err != nil {
		return err
	}
	namespaces := map[string]bool{c.Namespace(): true}
	var trouble []error
	for _, i := range e.Intercepts {
		if i.Key == "" {
			continue // it was on the agent only
		}
		namespaces[i.Namespace] = true
		s.log.Info("undoing an intercept", "namespace", i.Namespace, "service", i.Service)
		trouble = append(trouble, c.Undo(ctx, cluster.UndoSpec{Namespace: i.Namespace, Key: i.Key, Session: s.id, Dead: true}))
	}
	if err := errors.Join(trouble...); err != nil {
		return err
	}
	if e.Agent != "" {
		trouble = append(trouble, c.DeleteAgent(ctx, e.Agent))
	}
	for ns := range namespaces {
		trouble = append(trouble, c.DeleteLease(ctx, ns, s.id))
	}
	if err := errors.Join(trouble...); err != nil {
		return err
	}
	return s.journal().remove()
}

// revertRun is Run for a process that only undoes.
func (s *Session) revertRun(ctx context.Context, start link.Start) error {
	s.id, s.options, s.start = start.ID, start.Options, start
	return s.revert(ctx)
}
