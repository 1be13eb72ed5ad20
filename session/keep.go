package session

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// begin runs the loop of an intercept, which has none at the moment.
func (x *intercepts) begin(i *intercepted, loop func(context.Context, *intercepted)) {
	ctx, cancel := context.WithCancel(context.Background())
	x.mu.Lock()
	defer x.mu.Unlock()
	i.cancel, i.done, i.again = cancel, make(chan struct{}), make(chan struct{}, 1)
	done := i.done
	x.loops.Go(func() {
		defer close(done)
		loop(ctx, i)
	})
}

// end ends the loop of an intercept and waits for it.
func (x *intercepts) end(i *intercepted) {
	x.mu.Lock()
	cancel, done := i.cancel, i.done
	x.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

// keep watches over an intercept until ctx ends or it is lost.
func (x *intercepts) keep(ctx context.Context, i *intercepted) {
	s := x.session
	for pause := firstPause; ctx.Err() == nil; pause = min(2*pause, lastPause) {
		err := x.keepOnce(ctx, i)
		var lost *cluster.Lost
		switch {
		case ctx.Err() != nil:
			return
		case errors.As(err, &lost):
			x.lose(ctx, i, lost)
			return
		case err != nil:
			s.log.Info("keeping an intercept", "service", i.Service, "err", err)
		default:
			pause = firstPause
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// keepOnce takes the intercept up again if another process began it, tells the
// gates of the agent, and stays with it until something breaks.
func (x *intercepts) keepOnce(ctx context.Context, i *intercepted) error {
	s := x.session
	agent := s.knownAgent()
	if agent == nil {
		return errors.New("the agent is not known yet")
	}
	if i.live == nil {
		live, err := s.cluster.ResumeIntercept(ctx, s.resumeSpec(i, agent))
		if err != nil {
			return err
		}
		x.mu.Lock()
		i.live = live
		x.mu.Unlock()
	}
	if err := i.live.SetAgent(ctx, agent); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	kept := make(chan error, 1)
	go func() {
		kept <- i.live.Keep(ctx, i.Request.OnConflict, func(note string) { x.note(i, note) })
	}()
	for {
		select {
		case err := <-kept:
			return err
		case <-i.again:
			if now := s.knownAgent(); now != nil && (now.UID != agent.UID || !slices.Equal(now.IPs, agent.IPs)) {
				cancel()
				<-kept
				return nil // again, with that one
			}
		}
	}
}

// resumeSpec is that of the process before this one.
func (s *Session) resumeSpec(i *intercepted, agent *cluster.Agent) cluster.ResumeSpec {
	expose, err := cluster.ParseExpose(i.Request.Expose)
	if err != nil {
		s.log.Warn("reading a remembered intercept", "err", err) // it was read once before
	}
	return cluster.ResumeSpec{InterceptSpec: s.interceptSpec(i.Request, expose, agent), Namespace: i.Namespace, Key: i.Key, ID: i.ID, Token: i.Token}
}

// note shows something of an intercept to its user.
func (x *intercepts) note(i *intercepted, note string) {
	const most = 8
	x.session.log.Info("intercept", "service", i.Service, "note", note)
	x.mu.Lock()
	defer x.mu.Unlock()
	i.notes = append(slices.DeleteFunc(slices.Clone(i.notes), func(old string) bool { return old == note }), note)
	i.notes = i.notes[max(0, len(i.notes)-most):]
}

// lose gives an intercept up that somebody else ended or changed: what is left of
// it in the cluster goes, and status shows why.
func (x *intercepts) lose(ctx context.Context, i *intercepted, lost *cluster.Lost) {
	s := x.session
	s.log.Warn("intercept lost", "service", i.Service, "why", lost.Why)
	x.mu.Lock()
	i.state, i.cause, i.Active = api.InterceptLost, lost.Why, false
	x.mu.Unlock()
	if err := x.save(ctx); err != nil { // the next process must not take it up again
		s.log.Warn("noting that an intercept is lost", "err", err)
	}
	x.undo(ctx, i)
}

// undoLoop undoes an intercept that could not be ended, or whose process died
// while it was starting.
func (x *intercepts) undoLoop(ctx context.Context, i *intercepted) {
	x.mu.Lock()
	i.state = api.InterceptStopping
	x.mu.Unlock()
	if x.undo(ctx, i) {
		if err := errors.Join(x.drop(ctx, i), x.endHeartbeats(ctx, []*intercepted{i})); err != nil {
			x.session.log.Warn("forgetting an intercept", "err", err)
		}
	}
}

// undo tries until what is in the cluster of i is gone, or ctx is done.
func (x *intercepts) undo(ctx context.Context, i *intercepted) bool {
	for pause := firstPause; ctx.Err() == nil; pause = min(2*pause, lastPause) {
		err := x.session.cluster.Undo(ctx, cluster.UndoSpec{Namespace: i.Namespace, Key: i.Key, Session: x.session.id})
		if err == nil {
			return true
		}
		x.session.log.Warn("undoing an intercept", "service", i.Service, "err", err)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
	return false
}

// leave ends those that the request means.
func (x *intercepts) leave(ctx context.Context, req api.LeaveRequest, say func(string)) ([]api.Intercept, error) {
	x.changing.Lock()
	defer x.changing.Unlock()
	x.mu.Lock()
	var ours []*intercepted
	var names []string
	for _, i := range x.all {
		names = append(names, i.name())
		if req.All || i.means(req) {
			ours = append(ours, i)
		}
	}
	x.mu.Unlock()
	if len(ours) == 0 {
		if req.All {
			return nil, nil
		}
		slices.Sort(names)
		e := &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("this session intercepts no %q", req.Service), Hint: "culvert list"}
		if len(names) > 0 {
			e.Message += fmt.Sprintf("; it has %s", strings.Join(names, ", "))
		}
		return nil, e
	}
	// All at once: each waits until every node knows that gates are out of it.
	views, trouble := make([]api.Intercept, len(ours)), make([]error, len(ours))
	var wg sync.WaitGroup
	for n, i := range ours {
		x.mu.Lock()
		views[n] = x.viewLocked(i)
		left, stay := i.portsOf(req)
		x.mu.Unlock()
		if len(stay) > 0 {
			views[n].Ports = left
			trouble[n] = x.leavePorts(ctx, i, left, stay)
			continue
		}
		wg.Go(func() { trouble[n] = x.stop(ctx, i, req.Drain, false, say) })
	}
	wg.Wait()
	var ended []api.Intercept
	for n, view := range views {
		if trouble[n] == nil {
			ended = append(ended, view)
		}
	}
	if err := x.endHeartbeats(ctx, ours); err != nil {
		x.session.log.Warn("deleting a heartbeat", "err", err)
	}
	return ended, errors.Join(trouble...)
}

// leavePorts closes some of the agent's ports that were opened together.
func (x *intercepts) leavePorts(ctx context.Context, i *intercepted, left, stay []api.InterceptPort) error {
	x.mu.Lock()
	i.Ports = stay
	x.mu.Unlock()
	trouble := []error{x.save(ctx), x.applyExposed(ctx)}
	for _, p := range left {
		trouble = append(trouble, x.session.inbound.Remove(cluster.PortID(i.ID, p.Port, p.Protocol)))
	}
	return errors.Join(trouble...)
}

// stop ends one intercept. With dead there is no tunnel any more.
func (x *intercepts) stop(ctx context.Context, i *intercepted, drain time.Duration, dead bool, say func(string)) error {
	x.end(i)
	x.mu.Lock()
	i.Active, i.state = false, api.InterceptStopping
	if drain == 0 {
		drain = i.Request.Drain
	}
	if drain == 0 {
		drain = defaultDrain
	}
	x.mu.Unlock()
	if i.Request.Kind == api.KindExpose {
		return errors.Join(x.drop(ctx, i), x.applyExposed(ctx))
	}
	if err := x.save(ctx); err != nil { // the next process must not take it up again
		x.session.log.Warn("noting that an intercept ends", "err", err)
	}
	say("ending the intercept of " + i.Service)
	err := x.session.cluster.Undo(ctx, cluster.UndoSpec{Namespace: i.Namespace, Key: i.Key, Session: x.session.id, Dead: dead, Drain: drain, Reached: x.session.reached, Say: say})
	if err != nil {
		x.begin(i, x.undoLoop)
		return err
	}
	return x.drop(ctx, i)
}
