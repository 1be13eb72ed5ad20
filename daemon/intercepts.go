package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

const (
	// interceptTimeout is for a session to start or end one intercept: an image is
	// pulled and pods become ready, or connections drain. Waiting for another
	// developer comes on top.
	interceptTimeout = 10 * time.Minute
	// maxWait bounds InterceptRequest.Wait and Drain.
	maxWait = 24 * time.Hour
	// maxIntercepts bounds what one session may list, maxPorts the ports of one.
	maxIntercepts, maxPorts = 256, 256
	// maxSteps bounds the steps that wait for a slow reader; more are lost, which
	// is no harm.
	maxSteps = 16
	// maxStepText bounds one, in bytes.
	maxStepText = 512
)

// steps leads what a session process says of a call's progress to who waits.
// It is guarded by the session's mu.
type steps struct {
	last    uint64
	waiting map[uint64]chan string
}

// intercept starts one and shows how it comes along. A caller who goes away
// cancels it.
func (s *server) intercept(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	var req api.InterceptRequest
	if err := read(r, &req); err != nil {
		refuse(w, err)
		return
	}
	if req.Wait < 0 || req.Wait > maxWait || req.Drain < 0 || req.Drain > maxWait || len(req.Expose) > maxPorts {
		refuse(w, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("an intercept waits and drains for at most %v and has at most %d ports", maxWait, maxPorts)})
		return
	}
	one, err := s.sup.one(who, req.ID, req.Context)
	if err != nil {
		refuse(w, err)
		return
	}
	out := newStream(w)
	var i api.Intercept
	if err := one.follow(r.Context(), link.MethodIntercept, req, &i, interceptTimeout+req.Wait, out); err != nil {
		out.end(err)
		return
	}
	cleanIntercept(&i)
	if out.line(api.Line{Intercept: &i}) == nil {
		out.end(nil)
	}
}

// leave ends intercepts of one session, or of all that the caller has.
func (s *server) leave(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	var req api.LeaveRequest
	if err := read(r, &req); err != nil {
		refuse(w, err)
		return
	}
	list := s.sup.whole(who, req.ID, req.Context)
	if len(list) == 0 {
		e := notFound(req.ID, req.Context)
		if req.Service != "" {
			e.Message += fmt.Sprintf(", so none that intercepts %q", req.Service)
			e.Hint = "culvert recover " + req.Service + " undoes what a session left that is gone"
		}
		refuse(w, e)
		return
	}
	out := newStream(w)
	var missing error
	found := false
	for _, one := range list {
		var ended []api.Intercept
		err := one.follow(r.Context(), link.MethodLeave, req, &ended, interceptTimeout+maxWait, out)
		var e *api.Error
		if errors.As(err, &e) && e.Code == api.CodeNotFound {
			missing = err // another session may have it
			continue
		}
		if err != nil {
			out.end(err)
			return
		}
		found = true
		for k := range ended[:min(len(ended), maxIntercepts)] {
			cleanIntercept(&ended[k])
			if out.line(api.Line{Intercept: &ended[k]}) != nil {
				return
			}
		}
	}
	if found {
		missing = nil
	}
	out.end(missing)
}

// intercepts lists those of all sessions of the caller; a session that does not
// answer at the moment has none to show.
func (s *server) intercepts(w http.ResponseWriter, r *http.Request) {
	who, _ := callerOf(r.Context())
	all := []api.Intercept{}
	for _, one := range s.sup.whole(who, "", "") {
		var list []api.Intercept
		if err := one.ask(r.Context(), link.MethodIntercepts, nil, &list); err != nil {
			one.log.Debug("asking for intercepts", "error", err)
			continue
		}
		for i := range list[:min(len(list), maxIntercepts)] {
			cleanIntercept(&list[i])
			all = append(all, list[i])
		}
	}
	answer(w, all)
}

// follow calls a method of the session process and writes the steps that it
// tells of to out. When ctx ends the process is told to give up, and its last
// word is waited for.
func (s *session) follow(ctx context.Context, method string, in, into any, limit time.Duration, out *stream) error {
	conn := s.connection()
	if conn == nil {
		return &api.Error{Code: api.CodeAgent, Message: "the session is " + string(s.snapshot().State), Hint: "culvert status"}
	}
	request, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encoding the request: %w", err)
	}
	told := make(chan string, maxSteps)
	s.mu.Lock()
	s.steps.last++
	id := s.steps.last
	if s.steps.waiting == nil {
		s.steps.waiting = map[uint64]chan string{}
	}
	s.steps.waiting[id] = told
	s.mu.Unlock()
	defer s.update(func() { delete(s.steps.waiting, id) })

	calling, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, err := conn.Call(calling, method, link.Task{ID: id, Request: request}, into)
		done <- err
	}()
	gone := ctx.Done()
	for {
		select {
		case step := <-told:
			if out.line(api.Line{Step: step}) != nil && gone != nil {
				conn.Notify(link.MethodCancel, id)
				gone = nil
			}
		case <-gone:
			conn.Notify(link.MethodCancel, id)
			gone = nil
		case err := <-done:
			switch {
			case errors.Is(err, context.DeadlineExceeded):
				conn.Notify(link.MethodCancel, id)
				return &api.Error{Code: api.CodeTimeout, Message: "the session did not answer", Hint: "culvert logs"}
			case errors.Is(err, link.ErrClosed):
				return &api.Error{Code: api.CodeInternal, Message: "the session process ended meanwhile; what it had begun is undone by the next one", Hint: "culvert status, culvert list"}
			case err != nil:
				return cleanError(asAPI(err))
			}
			return nil
		}
	}
}

// interceptHandlers registers what a session process says of intercepts.
func (s *session) interceptHandlers(conn *link.Conn) {
	conn.Handle(link.MethodStep, func(_ context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var step link.Step
		if err := decode(link.MethodStep, params, &step); err != nil {
			return nil, nil, err
		}
		text := cleanText(step.Text)
		s.mu.Lock()
		told := s.steps.waiting[step.ID]
		s.mu.Unlock()
		select {
		case told <- text[:min(len(text), maxStepText)]: // nil when nobody waits
		default:
		}
		return nil, nil, nil
	})
	conn.Handle(link.MethodKeep, func(_ context.Context, params json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var keep bool
		if err := decode(link.MethodKeep, params, &keep); err != nil {
			return nil, nil, err
		}
		if !keep {
			return nil, nil, s.sup.kept.remove(s.kept())
		}
		return nil, nil, s.sup.kept.save(s.kept())
	})
}

func cleanIntercept(i *api.Intercept) {
	for _, text := range []*string{&i.Session, &i.Context, &i.Kind, &i.Mode, &i.Namespace, &i.Service, &i.State, &i.Cause} {
		*text = cleanText(*text)
	}
	i.Ports = i.Ports[:min(len(i.Ports), maxPorts)]
	for k := range i.Ports {
		p := &i.Ports[k]
		p.Name, p.Protocol, p.TargetPort = cleanText(p.Name), cleanText(p.Protocol), cleanText(p.TargetPort)
	}
	for _, list := range []*[]string{&i.Addresses, &i.Notes} {
		*list = (*list)[:min(len(*list), 64)]
		for k := range *list {
			(*list)[k] = cleanText((*list)[k])
		}
	}
}
