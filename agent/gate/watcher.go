package gate

import (
	"cmp"
	"context"
	"errors"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// watcher keeps a watch of one agent, whatever the number of routes to it, so
// that a new connection need not dial to learn that the machine is away.
type watcher struct {
	gate   *Gate
	agents []string
	ctx    context.Context
	stop   context.CancelFunc
	now    atomic.Int32 // an intercept.Status, 0 while nothing is known
	first  atomic.Int32 // index of the address that answered last

	// Of its goroutine.
	heard   time.Time // when the agent said something last
	unknown int       // proofs in a row that were not good

	mu     sync.Mutex
	proofs []proof  // of its routes, never empty: the first is shown
	conn   net.Conn // the watch, by that proof; nil: there is none
}

// proof is what a watch shows, to be told how the machine is.
type proof struct {
	id, token string
	since     int64 // unix nanoseconds, when the intercept began
}

func newWatcher(g *Gate, agents []string) *watcher {
	w := &watcher{gate: g, agents: slices.Clone(agents)}
	w.ctx, w.stop = context.WithCancel(g.life)
	return w
}

// prove has the watch show one of these, the newest first. One that it shows already
// is good for as long as it is among them. It owns proofs, and comes before start.
func (w *watcher) prove(proofs []proof) {
	slices.SortStableFunc(proofs, func(a, b proof) int { return cmp.Compare(b.since, a.since) })
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.proofs) > 0 {
		shown := w.proofs[0]
		if i := slices.Index(proofs, shown); i >= 0 {
			proofs = slices.Insert(slices.Delete(proofs, i, i+1), 0, shown)
		} else if w.conn != nil {
			w.conn.Close() // and listen dials anew
		}
	}
	w.proofs = proofs
}

// show introduces the watch c.
func (w *watcher) show(c net.Conn) (proof, error) {
	w.mu.Lock()
	p := w.proofs[0]
	w.conn = c
	w.mu.Unlock()
	return p, intercept.WriteHeader(c, intercept.Header{Network: intercept.Watch, ID: p.id, Token: p.token})
}

// ended tells whether a watch that showed p ended because its route did.
func (w *watcher) ended(p proof) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conn = nil
	return !slices.Contains(w.proofs, p)
}

// another has the next watch show another proof than p, if there is one that was
// not tried since one was good.
func (w *watcher) another(p proof) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.conn = nil
	w.unknown++
	if w.proofs[0] == p {
		w.proofs = append(slices.Clone(w.proofs[1:]), p)
	}
	return w.unknown%len(w.proofs) != 0
}

func (w *watcher) start() { w.gate.wg.Go(w.run) }

// status is what the agent said last, 0 if nothing is known.
func (w *watcher) status() intercept.Status { return intercept.Status(w.now.Load()) }

// usable: the machine is here, or nothing is known to the contrary.
func (w *watcher) usable() bool {
	s := w.status()
	return s == 0 || s == intercept.Accepted
}

func (w *watcher) set(s intercept.Status) {
	before := intercept.Status(w.now.Swap(int32(s)))
	if before == s {
		return
	}
	w.gate.log.Info("machine", "agents", w.agents, "status", s)
	if s == intercept.Leaving {
		w.gate.drainAgent(w)
	}
}

// run dials anew whenever the watch breaks: TCP itself would wait longer and
// longer before it asks again after a cut.
func (w *watcher) run() {
	w.heard = time.Now()
	var lost time.Time // what heard was when it was lost
	for w.ctx.Err() == nil {
		dialled := time.Now()
		if w.listen() || w.ctx.Err() != nil {
			continue // at once, for the first time
		}
		w.set(intercept.Away)
		if lost != w.heard && time.Since(w.heard) > w.gate.times.lost {
			// Not by TCP_USER_TIMEOUT, which would also end a connection whose program
			// stands at a breakpoint and reads nothing.
			lost = w.heard
			w.gate.resetAgent(w)
		}
		sleep(w.ctx, time.Until(dialled.Add(w.gate.times.redial)))
	}
}

// listen follows one watch to its end, and tells whether the next is worth a try at
// once: this one was good, or it did not show what it should.
func (w *watcher) listen() (again bool) {
	c, err := w.dial(w.ctx)
	if err != nil {
		return false
	}
	defer c.Close()
	defer context.AfterFunc(w.ctx, func() { c.Close() })()
	_ = c.SetDeadline(time.Now().Add(w.gate.times.silent)) // fails when it is closed, and so does what follows
	p, err := w.show(c)
	for err == nil {
		var s intercept.Status
		if s, err = intercept.ReadStatus(c); err != nil {
			break
		}
		w.heard = time.Now()
		switch s {
		case intercept.Unknown: // nobody is told by it how the machine is
			return w.another(p)
		case intercept.Accepted, intercept.Leaving:
			w.unknown, again = 0, true
		default:
			s, again = intercept.Away, false
		}
		w.set(s)
		_ = c.SetDeadline(w.heard.Add(w.gate.times.silent))
	}
	if ne, is := err.(net.Error); is && ne.Timeout() {
		w.set(intercept.Away)
	}
	return w.ended(p) || again
}

// agentKeepAlive finds a dead node behind an idle connection within LostAfter; of
// one that waits for acknowledgements the watcher knows.
var agentKeepAlive = net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 3}

// dial connects to the agent: to its addresses one after the other with a short
// head start each, beginning with the one that answered last, since a gate may
// have no route to one family and the first that answers is good.
func (w *watcher) dial(ctx context.Context) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, w.gate.times.dialAgent)
	defer cancel()
	type result struct {
		index int
		conn  net.Conn
		err   error
	}
	n := len(w.agents)
	first := int(w.first.Load())
	results := make(chan result, n)
	start := func(i int) {
		index := (first + i) % n
		go func() {
			d := net.Dialer{KeepAliveConfig: agentKeepAlive}
			c, err := d.DialContext(ctx, "tcp", w.agents[index])
			results <- result{index, c, err}
		}()
	}
	headStart := time.NewTicker(w.gate.times.dialAgent / 5)
	defer headStart.Stop()
	start(0)
	started, ended := 1, 0
	var err error
	for ended < n {
		select {
		case <-headStart.C:
			if started < n {
				start(started)
				started++
			}
		case r := <-results:
			ended++
			if r.err == nil {
				cancel()
				go func() { // the others' ends
					for range started - ended {
						if r := <-results; r.err == nil {
							r.conn.Close()
						}
					}
				}()
				w.first.Store(int32(r.index))
				return r.conn.(*net.TCPConn), nil
			}
			err = r.err
			if started < n {
				start(started)
				started++
			}
		}
	}
	return nil, err
}

// errRefused: nothing listens at the local port, and the client shall know.
var errRefused = errors.New("refused by the machine")

// statusError is an answer other than Accepted.
type statusError intercept.Status

func (e statusError) Error() string { return "the machine: " + intercept.Status(e).String() }

// dialMachine connects to the local program. Any error but errRefused means that
// the origin shall serve.
func (g *Gate) dialMachine(ctx context.Context, w *watcher, m *intercept.Machine, h intercept.Header) (*net.TCPConn, error) {
	end := time.Now().Add(g.times.detour)
	c, err := w.dial(ctx)
	if err != nil {
		return nil, err
	}
	h.ID, h.Token = m.ID, m.Token
	status, err := introduce(c, h, min(g.times.status, time.Until(end)))
	switch {
	case err != nil:
	case status == intercept.Accepted:
		return c, nil
	case status == intercept.Refused && m.OnRefused == intercept.RefusedToClient:
		err = errRefused
	default:
		err = statusError(status)
	}
	c.Close()
	return nil, err
}

// introduce asks the agent for a connection to the machine, by c. It reads not a
// byte more than the Status.
func introduce(c net.Conn, h intercept.Header, wait time.Duration) (intercept.Status, error) {
	_ = c.SetDeadline(time.Now().Add(wait)) // fails when it is closed, and so does what follows
	if err := intercept.WriteHeader(c, h); err != nil {
		return 0, err
	}
	s, err := intercept.ReadStatus(c)
	if err != nil {
		return 0, err
	}
	return s, c.SetDeadline(time.Time{})
}
