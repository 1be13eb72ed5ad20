package session

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// maxIntercepts bounds those of one session: what is remembered of them has to
// fit beside the rest into link.MaxRemember.
const maxIntercepts = 32

// defaultDrain is how long open connections have at an intercept's end.
const defaultDrain = 30 * time.Second

// intercepts are all that lead cluster traffic to this machine by way of one
// session.
type intercepts struct {
	session *Session
	changed chan struct{} // capacity 1: the agent is another one, or the set changed
	loops   sync.WaitGroup

	// changing is held while one is started, or some are ended.
	changing sync.Mutex
	// saving and exposing are held while what there is is written down, or the agent
	// is told: several may end at once, and the newest has to come last.
	saving, exposing sync.Mutex

	// mu guards everything below.
	mu      sync.Mutex
	all     map[string]*intercepted // by id
	tasks   map[uint64]context.CancelFunc
	kept    bool // the daemon keeps that there are some
	closing bool
}

// intercepted is one of them.
type intercepted struct {
	saved
	live  *cluster.Intercept // nil: not in the cluster (expose), or not taken up again yet
	state string             // api.InterceptActive, ...
	cause string
	notes []string
	at    []string // addresses

	// Of its loop; nil: there is none.
	cancel context.CancelFunc
	done   chan struct{} // closed when it has ended
	again  chan struct{} // capacity 1: the agent may be another one
}

// name is how people call it.
func (i *intercepted) name() string {
	if i.Service != "" {
		return i.Service
	}
	return fmt.Sprint("port ", i.Ports[0].Port)
}

// means tells whether a request names it.
func (i *intercepted) means(req api.LeaveRequest) bool {
	if req.Namespace != "" && req.Namespace != i.Namespace {
		return false
	}
	if i.Request.Kind == api.KindExpose {
		return slices.ContainsFunc(i.Ports, func(p api.InterceptPort) bool { return req.Service == strconv.Itoa(p.Port) })
	}
	service := strings.TrimPrefix(strings.TrimPrefix(req.Service, "service/"), "svc/")
	return i.Service == service || i.Key == service || i.Request.Target == req.Service
}

// portsOf are the ports of an expose that a request names, and the others. Only
// their intercept has them one by one: others end as a whole.
func (i *intercepted) portsOf(req api.LeaveRequest) (left, stay []api.InterceptPort) {
	if req.All || i.Request.Kind != api.KindExpose {
		return i.Ports, nil
	}
	for _, p := range i.Ports {
		if req.Service == strconv.Itoa(p.Port) {
			left = append(left, p)
		} else {
			stay = append(stay, p)
		}
	}
	return left, stay
}

// saved is what of an intercept outlives the process: in the daemon's memory and
// in the user's journal.
type saved struct {
	ID        string               `json:"id"`
	Token     string               `json:"token"`
	Request   api.InterceptRequest `json:"request"`
	Namespace string               `json:"namespace"`
	Key       string               `json:"key,omitempty"` // in the gates' state
	Service   string               `json:"service,omitempty"`
	Ports     []api.InterceptPort  `json:"ports"`
	Since     time.Time            `json:"since"`
	// Active: it was started to its end, and nobody has begun to end it.
	Active bool `json:"active"`
}

func newIntercepts(s *Session) *intercepts {
	return &intercepts{session: s, changed: make(chan struct{}, 1),
		all: map[string]*intercepted{}, tasks: map[uint64]context.CancelFunc{}}
}

// task runs a request of the daemon's that takes a while; it can be cancelled.
func task[Request, Answer any](s *Session, do func(context.Context, Request, func(string)) (Answer, error)) link.Handler {
	return func(ctx context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var t link.Task
		var req Request
		if err := json.Unmarshal(in, &t); err != nil {
			return nil, nil, err
		}
		if err := json.Unmarshal(t.Request, &req); err != nil {
			return nil, nil, err
		}
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		x := s.intercepts
		x.mu.Lock()
		x.tasks[t.ID] = cancel
		x.mu.Unlock()
		defer func() {
			x.mu.Lock()
			delete(x.tasks, t.ID)
			x.mu.Unlock()
		}()
		answer, err := do(ctx, req, func(step string) { _ = s.conn.Notify(link.MethodStep, link.Step{ID: t.ID, Text: step}) }) // who reads it may be gone
		if err != nil {
			return nil, nil, interceptError(err)
		}
		return answer, nil, nil
	}
}

func (s *Session) handleCancel(_ context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
	var id uint64
	if err := json.Unmarshal(in, &id); err != nil {
		return nil, nil, err
	}
	s.intercepts.mu.Lock()
	defer s.intercepts.mu.Unlock()
	if cancel := s.intercepts.tasks[id]; cancel != nil {
		cancel()
	}
	return nil, nil, nil
}

func (s *Session) handleIntercepts(context.Context, json.RawMessage, []*os.File) (any, []*os.File, error) {
	return s.intercepts.list(), nil, nil
}

// interceptError is what users see of one.
func interceptError(err error) error {
	if errors.Is(err, context.Canceled) {
		return &api.Error{Code: api.CodeCanceled, Message: "cancelled; what had been begun was undone"}
	}
	return asError(err)
}

// list shows all, oldest first.
func (x *intercepts) list() []api.Intercept {
	x.mu.Lock()
	list := make([]api.Intercept, 0, len(x.all))
	for _, i := range x.all {
		list = append(list, x.viewLocked(i))
	}
	x.mu.Unlock()
	for k := range list {
		for p := range list[k].Ports {
			port := &list[k].Ports[p]
			port.Listening = listening(networkOf(port.Protocol), uint16(port.Local))
		}
	}
	slices.SortFunc(list, func(a, b api.Intercept) int {
		return cmp.Or(a.Since.Compare(b.Since), cmp.Compare(a.Service, b.Service))
	})
	return list
}

// some tells whether there are any.
func (x *intercepts) some() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.all) > 0
}

func (x *intercepts) viewLocked(i *intercepted) api.Intercept {
	v := api.Intercept{Session: x.session.id, Kind: i.Request.Kind, Mode: i.Request.Mode, Namespace: i.Namespace, Service: i.Service,
		Ports: slices.Clone(i.Ports), Since: i.Since, State: i.state, Cause: i.cause, Addresses: slices.Clone(i.at), Notes: slices.Clone(i.notes), Match: slices.Clone(i.Request.Match)}
	if x.session.cluster != nil {
		v.Context = x.session.cluster.Context()
	}
	return v
}

// put adds or changes one, and has the daemon and the journal know before
// anything follows from it.
func (x *intercepts) put(ctx context.Context, i *intercepted, change func()) error {
	x.mu.Lock()
	if x.closing {
		x.mu.Unlock()
		return &api.Error{Code: api.CodeCanceled, Message: "the session is ending"}
	}
	if _, there := x.all[i.ID]; !there && len(x.all) >= maxIntercepts {
		x.mu.Unlock()
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%d intercepts are the most for one session", maxIntercepts), Hint: "culvert leave"}
	}
	if change != nil {
		change()
	}
	x.all[i.ID] = i
	x.mu.Unlock()
	return x.save(ctx)
}

// drop forgets one.
func (x *intercepts) drop(ctx context.Context, i *intercepted) error {
	x.mu.Lock()
	delete(x.all, i.ID)
	x.mu.Unlock()
	var trouble []error
	for _, p := range i.Ports {
		trouble = append(trouble, x.session.inbound.Remove(cluster.PortID(i.ID, p.Port, p.Protocol)))
	}
	return errors.Join(append(trouble, x.save(ctx))...)
}

// save writes what would be needed if this process, or the machine, ended now. Once
// there was something, journal and record stay until the session's end (forget): they
// tell of its agent and its Lease, too.
func (x *intercepts) save(ctx context.Context) error {
	x.saving.Lock()
	defer x.saving.Unlock()
	s := x.session
	x.mu.Lock()
	list := make([]saved, 0, len(x.all))
	for _, i := range x.all {
		list = append(list, i.saved)
	}
	kept := x.kept
	x.mu.Unlock()
	if len(list) == 0 && !kept {
		return nil
	}
	slices.SortFunc(list, func(a, b saved) int { return cmp.Compare(a.ID, b.ID) })
	if err := s.writeJournal(list); err != nil {
		return err
	}
	if err := s.remember(ctx, func(r *remembered) { r.Intercepts = list }); err != nil {
		return err
	}
	if kept {
		return nil
	}
	return x.keepRecord(ctx, true)
}

// forget ends journal and record: nothing is left in the cluster.
func (x *intercepts) forget(ctx context.Context) error {
	x.mu.Lock()
	kept := x.kept
	x.mu.Unlock()
	if !kept && x.session.start.Restart == 0 {
		return nil
	}
	if err := x.session.journal().remove(); err != nil {
		return err
	}
	return x.keepRecord(ctx, false)
}

func (x *intercepts) keepRecord(ctx context.Context, keep bool) error {
	if _, err := x.session.conn.Call(ctx, link.MethodKeep, keep, nil); err != nil {
		return fmt.Errorf("having the daemon know of intercepts: %w", err)
	}
	x.mu.Lock()
	x.kept = keep
	x.mu.Unlock()
	return nil
}

// serve leads connections of an intercept to their local ports.
func (x *intercepts) serve(i *intercepted) error {
	for _, p := range i.Ports {
		t := target{Token: i.Token, Network: networkOf(p.Protocol), Local: uint16(p.Local), ProxyProtocol: i.Request.ProxyProtocol}
		if err := x.session.inbound.Set(cluster.PortID(i.ID, p.Port, p.Protocol), t); err != nil {
			return err
		}
	}
	return nil
}

func networkOf(protocol string) string {
	if protocol == "UDP" {
		return intercept.UDP
	}
	return intercept.TCP
}

// agentIs is called when the session has met its agent, which may be another
// one, or at another address, than before.
func (x *intercepts) agentIs() {
	wake(x.changed)
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, i := range x.all {
		if i.live != nil {
			wake(i.again)
		}
	}
}

// stopAll ends all intercepts, at the session's end. What fails is tried by the
// next connect, `culvert clean`, or the daemon's next start: it stays in journal
// and record. With dead the tunnel is down: nothing that is open goes on.
func (x *intercepts) stopAll(ctx context.Context, drain time.Duration, dead bool) error {
	x.mu.Lock()
	x.closing = true
	for _, cancel := range x.tasks {
		cancel()
	}
	x.mu.Unlock()
	x.changing.Lock() // a start under way has undone itself by then
	defer x.changing.Unlock()
	x.mu.Lock()
	list := make([]*intercepted, 0, len(x.all))
	for _, i := range x.all {
		list = append(list, i)
	}
	x.mu.Unlock()
	var trouble []error
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, i := range list {
		wg.Go(func() {
			if err := x.stop(ctx, i, drain, dead, func(string) {}); err != nil {
				mu.Lock()
				trouble = append(trouble, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if err := x.endHeartbeats(ctx, list); err != nil {
		trouble = append(trouble, err)
	}
	return errors.Join(trouble...)
}
