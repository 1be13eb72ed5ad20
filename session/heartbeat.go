package session

import (
	"context"
	"errors"
	"time"

	"github.com/culvert-dev/culvert/cluster"
)

// heartbeatLoop tells everybody in the namespaces concerned that this session
// lives, until ctx is done. One that cannot be written is written the next time.
func (s *Session) heartbeatLoop(ctx context.Context) {
	tick := time.NewTicker(cluster.HeartbeatEvery)
	defer tick.Stop()
	for {
		for ns := range s.intercepts.namespaces() {
			if err := s.heartbeat(ctx, ns); err != nil && ctx.Err() == nil {
				s.log.Info("telling that this session lives", "namespace", ns, "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Session) heartbeat(ctx context.Context, namespace string) error {
	spec := s.agentSpec()
	return s.cluster.Heartbeat(ctx, namespace, s.id, spec.User, spec.Origin, nil)
}

// namespaces are those in which somebody may ask for this session.
func (x *intercepts) namespaces() map[string]bool {
	all := map[string]bool{}
	if x.session.recall().Heartbeat {
		all[x.session.cluster.Namespace()] = true
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, i := range x.all {
		if i.Key != "" {
			all[i.Namespace] = true
		}
	}
	return all
}

// endHeartbeats deletes the Leases in namespaces where nothing is left of those
// that ended.
func (x *intercepts) endHeartbeats(ctx context.Context, ended []*intercepted) error {
	still := x.namespaces()
	done := map[string]bool{}
	var trouble []error
	for _, i := range ended {
		if i.Key == "" || still[i.Namespace] || done[i.Namespace] {
			continue
		}
		done[i.Namespace] = true
		x.session.reached(cluster.StepLeaseDeleted)
		trouble = append(trouble, x.session.cluster.DeleteLease(ctx, i.Namespace, x.session.id))
	}
	return errors.Join(trouble...)
}
