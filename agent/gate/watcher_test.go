package gate

import (
	"net"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// proving is a state whose entries all lead to a, each by a port of its own. The
// later in the alphabet the newer.
func proving(t *testing.T, generation int64, a *fakeAgent, origin string, ids ...string) intercept.State {
	s := intercept.State{Generation: generation, Entries: map[string]intercept.Entry{}}
	for _, id := range ids {
		m := a.machine()
		m.ID, m.Token = id, "token of "+id
		s.Entries[id] = intercept.Entry{Kind: intercept.Exchange, Service: id, Gate: intercept.GateName,
			Holder: intercept.Holder{Since: time.Unix(int64(id[0]), 0)}, Routes: []intercept.Route{tcpRoute(t, origin, m)}}
	}
	return s
}

func (a *fakeAgent) showed(t *testing.T, want string) {
	t.Helper()
	select {
	case h := <-a.shown:
		if h.Network != intercept.Watch || h.ID != want || h.Token != "token of "+want {
			t.Errorf("a watch showed %+v, not what is of %s", h, want)
		}
	case <-time.After(5 * time.Second):
		t.Fatalf("no watch showed %s within 5 s", want)
	}
}

// neverAway fails if the machine is called away before stop.
func (g *testGate) neverAway() (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-end:
				return
			case <-time.After(time.Millisecond):
			}
			for _, r := range g.status().Routes {
				if r.Machine == intercept.Away.String() {
					g.t.Errorf("%s: the machine is away", r.Key)
					return
				}
			}
		}
	}()
	return func() { close(end); <-ended }
}

// TestWatchShows: a watch shows what one of its routes has, for as long as it has
// that, and the newest otherwise.
func TestWatchShows(t *testing.T) {
	t.Parallel()
	a := startAgent(t, nil)
	g := startGate(t, Config{}, nil)
	g.push(proving(t, 1, a, "", "b"))
	a.showed(t, "b")
	g.machineIs(intercept.Accepted)
	stop := g.neverAway()
	g.push(proving(t, 2, a, "", "a", "b", "c"))
	time.Sleep(100 * time.Millisecond)
	if n := len(a.shown); n > 0 {
		t.Errorf("%d watches more, though the first has its route yet", n)
	}
	g.push(proving(t, 3, a, "", "a", "c"))
	a.showed(t, "c")
	g.push(proving(t, 4, a, "", "c", "a"))
	g.push(proving(t, 5, a, "", "d"))
	a.showed(t, "d")
	time.Sleep(100 * time.Millisecond)
	stop()
	if n := len(a.shown); n > 0 {
		t.Errorf("%d watches more", n)
	}
}

// TestWatchUnknown: what is not good is not shown for long while there is another,
// and nobody notices.
func TestWatchUnknown(t *testing.T) {
	t.Parallel()
	a := startAgent(t, nil)
	a.bad.Store("b", true)
	a.bad.Store("c", true)
	g := startGate(t, Config{}, func(x *timing) { x.redial = 300 * time.Millisecond })
	s := proving(t, 1, a, serve(t, lines("origin")), "a", "b", "c")
	stop := g.neverAway()
	g.push(s)
	for _, id := range []string{"c", "b", "a"} {
		a.showed(t, id)
	}
	g.machineIs(intercept.Accepted)
	stop()

	// None is good: the agent is not asked more often for that, and the origin serves.
	a.bad.Store("a", true)
	a.mu.Lock()
	for _, c := range a.conns {
		c.Close()
	}
	a.mu.Unlock()
	g.machineIs(intercept.Away)
	if got := ask(t, dial(t, s.Entries["a"].Routes[0].Listen), "x"); got != "origin: x\n" {
		t.Errorf("answer %q", got)
	}
	for len(a.shown) > 0 {
		<-a.shown
	}
	time.Sleep(900 * time.Millisecond)
	if n := len(a.shown); n < 3 || n > 4*3 {
		t.Errorf("in three times redial %d watches of three routes", n)
	}
	a.bad.Clear()
	g.machineIs(intercept.Accepted)
}

// TestWatchRefused: an agent that answers Away and ends the watch is asked at the
// pace of redial.
func TestWatchRefused(t *testing.T) {
	t.Parallel()
	asked := make(chan time.Time, 1000)
	addr := serve(t, refuse(asked))
	g := startGate(t, Config{}, func(x *timing) { x.redial, x.lost = 100*time.Millisecond, 50*time.Millisecond })
	g.push(stateOf(1, tcpRoute(t, "", &intercept.Machine{Agents: []string{addr}, ID: "i1", Token: "t"})))
	g.machineIs(intercept.Away)
	time.Sleep(500 * time.Millisecond)
	if n := len(asked); n < 2 || n > 8 {
		t.Errorf("%d watches in five times redial", n)
	}
}

// refuse ends watches with Away.
func refuse(asked chan<- time.Time) func(*net.TCPConn) {
	return func(c *net.TCPConn) {
		defer c.Close()
		if _, err := intercept.ReadHeader(c); err != nil {
			return
		}
		asked <- time.Now()
		_ = intercept.WriteStatus(c, intercept.Away)
	}
}
