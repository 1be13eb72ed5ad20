package session

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// waitEvery is how often --wait looks whether another's intercept has ended.
const waitEvery = time.Second

// start begins one intercept and returns when traffic comes.
func (x *intercepts) start(ctx context.Context, req api.InterceptRequest, say func(string)) (*api.Intercept, error) {
	expose, err := cluster.ParseExpose(req.Expose)
	if err != nil {
		return nil, err
	}
	if err := checkMesh(req); err != nil {
		return nil, err
	}
	if req.Kind == api.KindExpose {
		return x.startExposed(ctx, req, expose, say)
	}
	for end := time.Now().Add(req.Wait); ; {
		i, err := x.tryStart(ctx, req, expose, say)
		var held *cluster.Held
		if !errors.As(err, &held) {
			return i, err
		}
		gone, why := x.gone(ctx, x.session.namespaceOf(req), held.Holder)
		switch {
		case gone:
			say(fmt.Sprintf("taking over from %s, %s", firstNonEmpty(held.Holder.User, held.Holder.Session), why))
			if err := x.takeOver(ctx, req, held); err != nil {
				return nil, err
			}
			continue
		case time.Now().After(end):
			return nil, held.Err
		}
		say("waiting: " + held.Err.Message)
		select {
		case <-time.After(waitEvery):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// gone tells whether a holder will not come back, and how that is known.
func (x *intercepts) gone(ctx context.Context, namespace string, h intercept.Holder) (bool, string) {
	s := x.session
	if h.Origin != "" && h.Origin == s.start.Origin {
		// Of the same user and daemon: that one knows.
		var ids []string
		if _, err := s.conn.Call(ctx, link.MethodSessions, nil, &ids); err == nil && !slices.Contains(ids, h.Session) {
			return true, "whose session on this machine is over"
		}
	}
	last, ok, err := s.cluster.SeenSession(ctx, namespace, h.Session)
	switch {
	case err != nil:
		return false, ""
	case !ok:
		return true, "of whose session nothing is left"
	case s.cluster.Now().Sub(last) > cluster.GoneAfter:
		return true, fmt.Sprintf("who was last seen %s", last.Local().Format("2006-01-02 15:04:05"))
	}
	return false, ""
}

func (x *intercepts) takeOver(ctx context.Context, req api.InterceptRequest, held *cluster.Held) error {
	x.changing.Lock()
	defer x.changing.Unlock()
	return x.session.cluster.Undo(ctx, cluster.UndoSpec{Namespace: held.Namespace, Key: held.Key, Session: held.Holder.Session, Dead: true})
}

// tryStart plans and starts one.
func (x *intercepts) tryStart(ctx context.Context, req api.InterceptRequest, expose []cluster.Expose, say func(string)) (*api.Intercept, error) {
	i, err := x.startLocked(ctx, req, expose, say)
	if err != nil {
		return nil, err
	}
	if req.External || req.Host != "" {
		say("waiting for the address that the cluster gives it")
		at, err := i.live.Address(ctx)
		if err != nil {
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTime)
			defer cancel()
			return nil, errors.Join(err, x.stop(undo, i, time.Second, false, func(string) {}), x.endHeartbeats(undo, []*intercepted{i}))
		}
		x.mu.Lock()
		i.at = at
		x.mu.Unlock()
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	view := x.viewLocked(i)
	return &view, nil
}

// ready is the agent, when traffic could come by way of it now.
func (s *Session) ready() (*cluster.Agent, error) {
	agent := s.knownAgent()
	if st := s.status.get(); agent == nil || st.State != api.Connected {
		return nil, &api.Error{Code: api.CodeAgent, Message: fmt.Sprintf("the session is %s: no traffic could come to this machine now", st.State), Hint: "culvert status"}
	}
	return agent, nil
}

// startLocked plans and starts one, and nothing else of the session meanwhile.
func (x *intercepts) startLocked(ctx context.Context, req api.InterceptRequest, expose []cluster.Expose, say func(string)) (*intercepted, error) {
	x.changing.Lock()
	defer x.changing.Unlock()
	s := x.session
	agent, err := s.ready()
	if err != nil {
		return nil, err
	}
	say("looking at " + req.Target)
	spec := s.interceptSpec(req, expose, agent)
	live, err := s.cluster.PlanIntercept(ctx, spec)
	if err != nil {
		return nil, err
	}
	if req.Kind == api.KindMesh {
		req.Mode = live.Mode() // auto is one of them by now
	}
	i := &intercepted{live: live, state: api.InterceptStarting, notes: live.Notes, saved: saved{
		ID: live.ID, Token: live.Token, Request: req, Namespace: live.Namespace(), Key: live.Key, Service: live.Service(),
	}}
	for _, p := range live.Exposed() {
		i.Ports = append(i.Ports, api.InterceptPort{Local: int(p.Local), Port: int(p.Port), Name: p.Name, Protocol: string(p.Protocol), TargetPort: p.TargetPort.String()})
	}
	for _, line := range live.Mapping() {
		say(line)
	}
	if err := x.put(ctx, i, nil); err != nil {
		return nil, errors.Join(err, x.drop(context.WithoutCancel(ctx), i))
	}
	if err := x.serve(i); err != nil {
		return nil, errors.Join(err, x.drop(context.WithoutCancel(ctx), i))
	}
	err = live.Start(ctx, s.reached, say)
	if err == nil {
		// Without a note of it the next process would undo it, or nobody would.
		if err = x.put(context.WithoutCancel(ctx), i, func() {
			i.Active, i.state, i.Since, i.notes = true, api.InterceptActive, live.Since(), live.Notes
			for k := range i.Ports {
				p := &i.Ports[k]
				p.Listening = listening(networkOf(p.Protocol), uint16(p.Local))
			}
		}); err != nil {
			err = errors.Join(err, live.Cancel())
		}
	}
	if err != nil {
		if live.Undone() {
			ctx := context.WithoutCancel(ctx)
			return nil, errors.Join(err, x.drop(ctx, i), x.endHeartbeats(ctx, []*intercepted{i}))
		}
		x.begin(i, x.undoLoop) // what is left is tried again
		return nil, err
	}
	s.reached(cluster.StepActive)
	x.begin(i, x.keep)
	return i, nil
}

// interceptSpec is what the cluster has to know of a request.
func (s *Session) interceptSpec(req api.InterceptRequest, expose []cluster.Expose, agent *cluster.Agent) cluster.InterceptSpec {
	gates := s.agentSpec()
	spec := cluster.InterceptSpec{
		Kind: req.Kind, Namespace: s.namespaceOf(req), Target: req.Target, Expose: expose, Force: req.Force,
		Holder: intercept.Holder{Session: s.id, User: gates.User, Origin: gates.Origin},
		Agent:  agent, Gates: gates, OnRefused: req.OnLocalRefused,
		External: req.External, Host: req.Host, IngressClass: req.IngressClass,
	}
	if req.Kind == api.KindExchange && req.Mode == api.ModeScale {
		spec.Kind = intercept.Scale
	}
	if req.Kind == api.KindMesh {
		spec.Match, _ = cluster.ParseMatch(req.Match) // checkMesh has read it
		spec.Mode, spec.OnGone, spec.TagResponses, spec.TLSSecret = req.Mode, req.OnGone, req.TagResponses, req.TLSSecret
	}
	return spec
}

// checkMesh refuses what of a mesh cannot be.
func checkMesh(req api.InterceptRequest) error {
	if req.Kind != api.KindMesh {
		return nil
	}
	switch req.Mode {
	case "", api.ModeAuto, api.ModeRouter, api.ModeIstio, api.ModeGateway, api.ModeManual:
	default:
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%q is no mode of mesh", req.Mode), Hint: "--mode takes auto, router, istio, gateway and manual"}
	}
	switch req.OnGone {
	case "", api.OnGoneOrigin, api.OnGoneFail:
	default:
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("--on-gone %q is unknown", req.OnGone), Hint: "it is origin or fail"}
	}
	_, err := cluster.ParseMatch(req.Match)
	return err
}

func (s *Session) namespaceOf(req api.InterceptRequest) string {
	return firstNonEmpty(req.Namespace, s.cluster.Namespace())
}

// testAt names a step at which a session process ends (kill:STEP) or stops
// (stop:STEP) itself, so that tests can see what is left then. It is read from
// the environment of whoever connected, and does nothing to a process that was
// started again.
const testAt = "CULVERT_TEST_AT"

// reached is told each step of a start or an end.
func (s *Session) reached(step string) {
	s.log.Debug("intercept", "step", step)
	how, at, _ := strings.Cut(os.Getenv(testAt), ":")
	if at != step || s.start.Restart > 0 || s.start.Revert {
		return
	}
	if signal, ok := map[string]syscall.Signal{"kill": syscall.SIGKILL, "stop": syscall.SIGSTOP}[how]; ok {
		_ = syscall.Kill(os.Getpid(), signal)
		time.Sleep(time.Second) // the kernel tells threads one by one
	}
}

func firstNonEmpty(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
