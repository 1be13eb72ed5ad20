package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"reflect"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

const (
	// defaultTimeout is Options.Timeout's default; the session keeps it, the
	// daemon only steps in timeoutGrace later, when the session did not.
	defaultTimeout = 60 * time.Second
	timeoutGrace   = 5 * time.Second

	// disconnectTimeout is what a session process has to clean up in the cluster
	// before it is killed; stopTimeout when the daemon itself ends.
	disconnectTimeout = 60 * time.Second
	stopTimeout       = 10 * time.Second

	// A process that died is started again after minBackoff, doubled up to
	// maxBackoff each time until one was connected again.
	minBackoff = 100 * time.Millisecond
	maxBackoff = 5 * time.Second
)

// session is one connected cluster: what the user wants, the process that does
// it, and the state that follows. Its run goroutine is the only one that starts
// processes and undoes things; all others change inputs and wake it.
type session struct {
	id      string
	slot    int
	started time.Time
	account account
	options api.Options
	env     []string
	atBoot  bool
	byRoot  bool
	revert  bool // it undoes what an earlier session left, and connects to nothing

	sup    *supervisor
	log    *slog.Logger
	output *ring
	wake   chan struct{} // one token: something changed
	hurry  chan struct{} // closed when the daemon ends: undo within stopTimeout
	done   chan struct{} // closed when nothing is left

	asking sync.Mutex // held while the process has the machine changed: one wish at a time

	mu         sync.Mutex
	in         inputs
	state      api.State
	since      time.Time
	said       api.Session // what the process said last, cleaned
	network    networkView
	err        *api.Error // why it ended, or ends
	cause      string     // why there is no process
	proc       *process   // nil: none
	restarts   int
	backoff    time.Duration
	remembered json.RawMessage
	steps      steps
	reverted   bool // the process said that it is done
	published  api.Session

	// What the process is to be told at the next turn of run.
	siblingsChanged, dnsChanged bool
}

// networkView is what status shows of the machine's side.
type networkView struct {
	device    string
	addresses []addressPrefix
	routes    []api.Route
	excluded  []api.Route
	dns       api.DNSStatus
	notes     []string
}

// run keeps the session until nothing of it is left.
func (s *session) run() {
	defer close(s.done)
	timeout := s.options.Timeout
	if timeout <= 0 {
		timeout = defaultTimeout
	}
	deadline := time.NewTimer(timeout + timeoutGrace)
	defer deadline.Stop()
	var retry <-chan time.Time
	for {
		switch state := next(s.inputs()); {
		case s.enter(state):
			continue // the effects changed inputs
		case state == api.Disconnected:
			return
		}
		s.tell()
		if retry == nil && s.idle() {
			retry = time.After(s.delay())
		}
		select {
		case <-s.wake:
		case <-retry:
			retry = nil
			s.start()
		case <-deadline.C:
			if !s.inputs().established {
				s.fail(&api.Error{Code: api.CodeTimeout, Message: fmt.Sprintf("not connected within %v", timeout), Hint: "culvert logs"})
			}
		}
	}
}

// enter makes state the session's and performs what that takes. It returns
// whether inputs were changed by that.
func (s *session) enter(state api.State) bool {
	s.mu.Lock()
	old := s.state
	if old == state {
		s.mu.Unlock()
		s.publish()
		return false
	}
	s.state, s.since = state, time.Now()
	in, cause, err := s.in, s.causeLocked(), s.err
	s.mu.Unlock()
	s.log.Info("session state", "from", old, "to", state, "cause", cause, "error", err,
		"alive", in.alive, "reported", in.reported, "established", in.established)
	s.publish()

	switch state {
	case api.Connected:
		s.sup.connected(s)
	case api.Disconnecting:
		s.undo()
		s.update(func() { s.in.undone = true })
		return true
	case api.Disconnected:
		s.sup.ended(s)
	}
	return false
}

// undo gives names back first (the forwarder is about to go), lets the process
// clean up in the cluster, and then takes away routes and device. When there is
// no process, because it died and another was not started yet, but one left a
// note of what it made, another is started to take it away.
func (s *session) undo() {
	ctx := context.Background()
	s.sup.machine.mute(ctx, s.id)

	s.mu.Lock()
	orphans := s.proc == nil && s.remembered != nil && s.in.reported != api.Disconnected
	s.mu.Unlock()
	if orphans {
		s.start()
	}
	s.mu.Lock()
	p, leaving := s.proc, s.in.reported == api.Disconnected
	s.mu.Unlock()
	if p != nil {
		ctx, cancel := context.WithTimeout(ctx, disconnectTimeout)
		go func() {
			select {
			case <-s.hurry:
				select {
				case <-time.After(stopTimeout):
					cancel()
				case <-ctx.Done():
				}
			case <-ctx.Done():
			}
		}()
		if !leaving {
			if _, err := p.link.Call(ctx, link.MethodDisconnect, nil, nil); err != nil {
				s.log.Warn("session did not confirm its end", "error", err)
			}
		}
		select {
		case <-p.gone:
		case <-ctx.Done():
			s.log.Warn("killing session process that did not end", "pid", p.pid)
			p.kill()
			<-p.gone
		}
		cancel()
	}
	if err := s.sup.machine.remove(context.Background(), s.id); err != nil {
		s.log.Error("undoing the session's network", "error", err)
	}
}

// start starts a process. It runs on the run goroutine only.
func (s *session) start() {
	p, err := s.sup.startProcess(s)
	s.mu.Lock()
	if err != nil {
		s.backoffLocked()
		s.cause = err.Error()
		s.mu.Unlock()
		s.log.Error("starting session process", "error", err)
		if !s.inputs().established {
			s.fail(asAPI(err))
		}
		s.wakeUp()
		return
	}
	s.proc, s.cause = p, ""
	s.in.alive, s.in.reported = true, ""
	restarts := s.restarts
	s.mu.Unlock()
	s.log.Info("session process started", "pid", p.pid, "restarts", restarts)
	go s.attend(p)
	s.wakeUp()
}

// attend serves a process to its end and tells the run goroutine.
func (s *session) attend(p *process) {
	err := p.serve()
	s.sup.machine.orphaned(s.id)
	last, how := s.output.lastLine(), p.howEnded(err)
	s.mu.Lock()
	said := s.in.reported
	s.proc, s.in.alive = nil, false
	s.cause = "the session process ended: " + how
	if s.in.wanted && !s.in.failed {
		if !s.in.established {
			s.in.failed = true
			s.err = &api.Error{Code: api.CodeInternal, Message: "the session process ended before it was connected (" + how + ")", Hint: "culvert logs"}
			if last != "" {
				s.err.Message += ": " + last
			}
		}
		s.restarts++
		s.backoffLocked()
	}
	s.mu.Unlock()
	s.log.Info("session process ended", "pid", p.pid, "how", how, "reported", said)
	close(p.gone)
	s.wakeUp()
}

// end asks for the session's end; the first reason stays.
func (s *session) end(why *api.Error) {
	s.update(func() {
		s.in.wanted = false
		if s.err == nil {
			s.err = why
		}
	})
}

// fail ends the session with an error.
func (s *session) fail(err *api.Error) {
	s.update(func() {
		s.in.failed = true
		if s.err == nil {
			s.err = err
		}
	})
}

// report takes what the process says of itself.
func (s *session) report(r api.Session) {
	clean(&r)
	s.update(func() {
		s.said = r
		s.in.reported = r.State
		switch r.State {
		case api.Connected:
			s.in.established = true
			s.backoff = 0
		case api.Disconnected:
			s.reverted = s.revert && r.Error == nil
			if s.in.wanted {
				s.in.failed = true
				if s.err == nil {
					s.err = r.Error
				}
				if s.err == nil && !s.reverted {
					s.err = &api.Error{Code: api.CodeInternal, Message: "the session ended itself and did not say why", Hint: "culvert logs"}
				}
			}
		}
	})
}

// snapshot is the session as users see it.
func (s *session) snapshot() api.Session {
	s.mu.Lock()
	defer s.mu.Unlock()
	v := s.said
	v.ID, v.UID, v.User = s.id, s.account.UID, s.account.Name
	v.State, v.Since, v.Started = s.stateLocked(), s.since, s.started
	v.Restarts, v.AtBoot, v.InterceptOnly, v.Reverting = s.restarts, s.atBoot, s.options.InterceptOnly, s.revert
	v.PID = 0
	if s.proc != nil {
		v.PID = s.proc.pid
	}
	if v.Context == "" {
		v.Context = cleanText(s.options.Context)
	}
	if v.Namespace == "" {
		v.Namespace = cleanText(s.options.Namespace)
	}
	if v.State != api.Connecting {
		v.Step = ""
	}
	v.Cause = s.causeLocked()
	v.Error = nil
	if v.State == api.Disconnected || v.State == api.Disconnecting {
		v.Error = s.err
	}
	v.Device, v.Addresses = s.network.device, s.network.addresses
	v.Routes, v.Excluded = s.network.routes, s.network.excluded
	v.DNS = s.network.dns
	v.Notes = append(append([]string(nil), v.Notes...), s.network.notes...)
	return v
}

// stateLocked is the state to show: between the end of a process and the run
// goroutine's next step a session is not connected any more.
func (s *session) stateLocked() api.State {
	if s.state == api.Connected && !s.in.alive {
		return api.Reconnecting
	}
	return s.state
}

func (s *session) causeLocked() string {
	if state := s.stateLocked(); state != api.Reconnecting && state != api.NeedsLogin {
		return ""
	}
	if s.proc == nil {
		return s.cause
	}
	if s.said.Cause == "" && s.restarts > 0 {
		return "the session process was started again"
	}
	return s.said.Cause
}

// publish tells watchers if something that they would care for has changed.
func (s *session) publish() {
	now := s.snapshot()
	cmp := now
	cmp.Carrier.RTT, cmp.Carrier.Sent, cmp.Carrier.Received = 0, 0, 0
	s.mu.Lock()
	same := reflect.DeepEqual(cmp, s.published)
	s.published = cmp
	s.mu.Unlock()
	if !same {
		s.sup.publish(now)
	}
}

// tell passes on what the process should know. It blocks at most as long as the
// link's write timeout, and nobody but this session waits.
func (s *session) tell() {
	s.mu.Lock()
	p, siblings, dns := s.proc, s.siblingsChanged, s.dnsChanged
	s.siblingsChanged, s.dnsChanged = false, false
	s.mu.Unlock()
	if p == nil {
		return
	}
	if siblings {
		p.link.Notify(link.MethodSiblings, s.sup.machine.siblings(s.id))
	}
	if dns {
		p.link.Notify(link.MethodMachineDNS, s.sup.machine.machineDNS(s.id, s.options.DNS))
	}
}

func (s *session) inputs() inputs {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.in
}

// update changes inputs and wakes the run goroutine.
func (s *session) update(change func()) {
	s.mu.Lock()
	change()
	s.mu.Unlock()
	s.wakeUp()
}

func (s *session) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// idle: a process should run and none does.
func (s *session) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.proc == nil && s.in.wanted && !s.in.failed
}

func (s *session) delay() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.backoff
}

func (s *session) backoffLocked() { s.backoff = min(max(2*s.backoff, minBackoff), maxBackoff) }

// connection is the link to the running process, or nil.
func (s *session) connection() *link.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.proc == nil {
		return nil
	}
	return s.proc.link
}
