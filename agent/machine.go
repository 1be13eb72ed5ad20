package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// machine knows whether the session answers, by a watch through the tunnel: so a
// connection from the cluster is told at once that the machine is away. There is
// a watch only while somebody needs it, and a while longer: an agent whose session
// has no intercepts sends nothing.
type machine struct {
	node *node
	lost func()        // called when it has been away for so long that connections end
	kick chan struct{} // capacity 1: the watch shall be dialled anew

	mu      sync.Mutex
	status  intercept.Status   // Accepted, Away, or 0: not known
	change  chan struct{}      // closed when status becomes another
	here    context.Context    // ends when it goes away
	goAway  context.CancelFunc // ends here
	needs   int
	watch   context.CancelFunc // ends the watch; nil: there is none
	turn    int                // counts watches
	silent  *time.Timer        // fires when no beat has come in time
	forgive *time.Timer        // fires when it has been away for too long
	unused  *time.Timer        // fires when nobody has needed it for long
}

func newMachine(n *node, lost func()) *machine {
	m := &machine{node: n, lost: lost, kick: make(chan struct{}, 1), change: make(chan struct{})}
	m.here, m.goAway = context.WithCancel(n.ctx)
	stopped := func(f func()) *time.Timer {
		t := time.AfterFunc(time.Hour, f)
		t.Stop()
		return t
	}
	m.silent = stopped(func() { m.set(intercept.Away) })
	m.forgive = stopped(m.giveUp)
	m.unused = stopped(m.rest)
	return m
}

// need has the machine watched until as many calls of release. It must not be
// called after the node's close has begun to wait.
func (m *machine) need() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.needs++
	m.unused.Stop()
	if m.watch != nil || m.node.ctx.Err() != nil {
		return
	}
	var ctx context.Context
	ctx, m.watch = context.WithCancel(m.node.ctx)
	m.turn++
	turn := m.turn
	m.silent.Reset(m.node.agent.times.silent)
	m.node.spawn(func() { m.run(ctx, turn) })
}

func (m *machine) release() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.needs--; m.needs == 0 {
		m.unused.Reset(m.node.agent.times.unused)
	}
}

// rest ends the watch when nobody needs it.
func (m *machine) rest() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.needs > 0 || m.watch == nil {
		return
	}
	m.watch()
	m.watch = nil
	m.setLocked(0)
	m.silent.Stop()
}

// close stops the timers; the watch ends with the node.
func (m *machine) close() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.goAway()
	for _, t := range []*time.Timer{m.silent, m.forgive, m.unused} {
		t.Stop()
	}
}

// now is what is known, and a channel that is closed when that changes.
func (m *machine) now() (intercept.Status, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status, m.change
}

// present is a context that ends when the machine goes away; it has ended if it
// is.
func (m *machine) present() context.Context {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.here
}

// again has the watch dialled anew, at once: the path is another one, or who is at
// its end.
func (m *machine) again() {
	select {
	case m.kick <- struct{}{}:
	default:
	}
}

func (m *machine) set(s intercept.Status) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.watch != nil {
		m.setLocked(s)
	}
}

func (m *machine) setLocked(s intercept.Status) {
	if s == m.status || m.node.ctx.Err() != nil {
		return
	}
	if s != 0 {
		m.node.agent.log.Info("the session's machine", "status", s.String())
	}
	m.status = s
	close(m.change)
	m.change = make(chan struct{})
	if s == intercept.Away {
		m.goAway()
		m.forgive.Reset(m.node.agent.times.lost)
		return
	}
	m.forgive.Stop()
	if m.here.Err() != nil {
		m.here, m.goAway = context.WithCancel(m.node.ctx)
	}
}

// giveUp is when a machine has been away for too long.
func (m *machine) giveUp() {
	if s, _ := m.now(); s == intercept.Away {
		m.lost()
	}
}

// heard notes a beat of one watch.
func (m *machine) heard(turn int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.watch == nil || turn != m.turn {
		return
	}
	m.setLocked(intercept.Accepted)
	m.silent.Reset(m.node.agent.times.silent)
}

// run watches. When a watch breaks the next is dialled at once, never mind what TCP
// makes of the old one: after a cut it would wait for seconds to send again.
func (m *machine) run(ctx context.Context, turn int) {
	for ctx.Err() == nil {
		begun := time.Now()
		err := m.watchOnce(ctx, turn)
		if ctx.Err() != nil {
			return
		}
		m.node.agent.log.Debug("watching the session", "error", err)
		if errors.Is(err, errRefused) { // it answers, and has no intercepts
			m.set(intercept.Away)
		}
		select {
		case <-ctx.Done():
		case <-m.kick:
		case <-time.After(time.Until(begun.Add(intercept.BeatEvery))):
		}
	}
}

// watchOnce listens to one watch until it breaks.
func (m *machine) watchOnce(ctx context.Context, turn int) error {
	select {
	case <-m.kick: // this one is as new as can be
	default:
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-m.kick:
			m.again() // for run, which shall not wait
			cancel()
		case <-ctx.Done():
		}
	}()
	dial, stopDial := context.WithTimeout(ctx, m.node.agent.times.watchDial)
	defer stopDial()
	ep, wq, err := m.node.dialEndpoint(dial, intercept.Port)
	if err != nil {
		return err
	}
	defer ep.Close()
	defer ep.Abort()
	stop := context.AfterFunc(ctx, ep.Abort)
	defer stop()
	c := gonet.NewTCPConn(wq, ep)
	if err := intercept.WriteHeader(c, intercept.Header{Network: intercept.Watch}); err != nil {
		return fmt.Errorf("asking for a watch: %w", err)
	}
	for {
		_ = c.SetReadDeadline(time.Now().Add(m.node.agent.times.silent))
		s, err := intercept.ReadStatus(c)
		switch {
		case err != nil:
			return fmt.Errorf("waiting for a beat: %w", err)
		case s != intercept.Accepted:
			return fmt.Errorf("a beat says %v", s)
		}
		m.heard(turn)
	}
}

// ask leads h to the session. With Accepted the connection is there, and its
// bytes follow; every other status is its end.
func (m *machine) ask(h intercept.Header) (*sessionConn, intercept.Status) {
	times := m.node.agent.times
	ctx, cancel := context.WithTimeout(m.present(), times.answer)
	defer cancel()
	dial, cancel := context.WithTimeout(ctx, times.sessionDial)
	defer cancel()
	ep, wq, err := m.node.dialEndpoint(dial, intercept.Port)
	if err != nil {
		return nil, intercept.Away
	}
	c := &sessionConn{TCPConn: gonet.NewTCPConn(wq, ep), ep: ep, wq: wq}
	stop := context.AfterFunc(ctx, ep.Abort)
	err = intercept.WriteHeader(c, h)
	var s intercept.Status
	if err == nil {
		s, err = intercept.ReadStatus(c)
	}
	if !stop() || err != nil {
		s = intercept.Away
	}
	if s != intercept.Accepted {
		ep.Abort()
		ep.Close()
		return nil, s
	}
	return c, s
}
