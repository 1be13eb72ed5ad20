package gate

import (
	"context"
	"errors"
	"net"
	"slices"
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
}

func newWatcher(g *Gate, agents []string) *watcher {
	w := &watcher{gate: g, agents: slices.Clone(agents)}
	w.ctx, w.stop = context.WithCancel(g.life)
	return w
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
	heard := time.Now()
	lost := false
	for w.ctx.Err() == nil {
		dialled := time.Now()
		if at, ok := w.listen(); ok {
			heard, lost = at, false
			continue // at once, for the first time
		}
		if w.ctx.Err() != nil {
			return
		}
		w.set(intercept.Away)
		if !lost && time.Since(heard) > w.gate.times.lost {
			// Not by TCP_USER_TIMEOUT, which would also end a connection whose program
			// stands at a breakpoint and reads nothing.
			lost = true
			w.gate.resetAgent(w)
		}
		sleep(w.ctx, time.Until(dialled.Add(w.gate.times.redial)))
	}
}

// listen follows one watch to its end, and tells when it said something last, if
// it did.
func (w *watcher) listen() (heard time.Time, ok bool) {
	c, err := w.dial(w.ctx)
	if err != nil {
		return heard, false
	}
	defer c.Close()
	defer context.AfterFunc(w.ctx, func() { c.Close() })()
	_ = c.SetDeadline(time.Now().Add(w.gate.times.silent)) // fails when it is closed, and so does what follows
	if err := intercept.WriteHeader(c, intercept.Header{Network: intercept.Watch}); err != nil {
		return heard, false
	}
	for {
		s, err := intercept.ReadStatus(c)
		if err != nil {
			if ne, is := err.(net.Error); is && ne.Timeout() {
				w.set(intercept.Away)
			}
			return heard, ok
		}
		heard, ok = time.Now(), true
		if s != intercept.Accepted && s != intercept.Leaving {
			s = intercept.Away
		}
		w.set(s)
		_ = c.SetDeadline(heard.Add(w.gate.times.silent))
	}
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
func (g *Gate) dialMachine(sp *spec, h intercept.Header) (*net.TCPConn, error) {
	end := time.Now().Add(g.times.detour)
	c, err := sp.watch.dial(g.life)
	if err != nil {
		return nil, err
	}
	h.ID, h.Token = sp.Machine.ID, sp.Machine.Token
	status, err := introduce(c, h, min(g.times.status, time.Until(end)))
	switch {
	case err != nil:
	case status == intercept.Accepted:
		return c, nil
	case status == intercept.Refused && sp.Machine.OnRefused == intercept.RefusedToClient:
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
