package carrier

import (
	"net/netip"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

var (
	sessionAddr = netip.MustParseAddrPort("192.0.2.1:1000")
	agentAddr   = netip.MustParseAddrPort("192.0.2.2:7534")
)

// span joins a prober and an answerer without sockets, under synctest's clock.
type span struct {
	p       *prober
	a       *answerer
	busy    bool
	delay   time.Duration
	longest int                                 // datagrams that the path takes
	drop    func(toAgent bool, d datagram) bool // nil: none
	from    netip.AddrPort                      // of the session, as the agent sees it
	mu      sync.Mutex
	pending []func()
}

func newSpan(targets ...netip.AddrPort) *span {
	s := &span{p: &prober{}, a: &answerer{}, busy: true, delay: time.Millisecond, longest: 1500, from: sessionAddr}
	s.p.setTargets(targets, probeSizes)
	return s
}

func (s *span) carry(toAgent bool, out []datagram) {
	for _, d := range out {
		if d.size > s.longest || s.drop != nil && s.drop(toAgent, d) {
			continue
		}
		time.AfterFunc(s.delay, func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.pending = append(s.pending, func() {
				if toAgent {
					s.carry(false, s.a.heard(time.Now(), s.from, d.probe))
				} else {
					s.carry(true, s.p.heard(time.Now(), agentAddr, d.probe))
				}
			})
		})
	}
}

// run lets time pass, as Datagrams.Run does.
func (s *span) run(d time.Duration) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(time.Millisecond) {
		synctest.Wait()
		s.mu.Lock()
		arrived := s.pending
		s.pending = nil
		s.mu.Unlock()
		for _, f := range arrived {
			f()
		}
		out, _ := s.p.tick(time.Now(), s.busy)
		s.carry(true, out)
	}
}

func (s *span) want(t *testing.T, when string, session, agent way, size int) {
	t.Helper()
	w, to, n := s.p.verdict(time.Now())
	if w != session || w != byStream && (to != agentAddr || n != size) {
		t.Errorf("%s: the session sends by %d to %v up to %d, want %d, %d", when, w, to, n, session, size)
	}
	w, to, n = s.a.verdict(time.Now())
	if w != agent || w != byStream && (to != s.from || n != size) {
		t.Errorf("%s: the agent sends by %d to %v up to %d, want %d, %d", when, w, to, n, agent, size)
	}
}

func TestTrust(t *testing.T) {
	full := probeSizes[0]
	within := func(name string, f func(t *testing.T)) {
		t.Run(name, func(t *testing.T) { synctest.Test(t, f) })
	}
	within("upgrade, cut, return", func(t *testing.T) {
		s := newSpan(agentAddr)
		s.want(t, "before", byStream, byStream, 0)
		s.run(10 * time.Millisecond)
		s.want(t, "after four times the delay", byUDP, byUDP, full)
		s.run(time.Minute)
		s.want(t, "a minute later", byUDP, byUDP, full)
		s.drop = func(bool, datagram) bool { return true }
		s.run(lapseMin + busyEvery + 5*time.Millisecond)
		if w, _, _ := s.p.verdict(time.Now()); w != byBoth {
			t.Errorf("the session after the cut: %d", w)
		}
		s.run(freshFor + 5*time.Millisecond - lapseMin - busyEvery)
		s.want(t, "1.5 s after the cut", byBoth, byBoth, full)
		s.run(3*time.Second + 10*time.Millisecond - freshFor)
		s.want(t, "3 s after the cut", byStream, byStream, 0)
		s.run(time.Minute)
		s.drop = nil
		s.run(downKnown + 10*time.Millisecond)
		s.want(t, "the path is back", byUDP, byUDP, full)
	})
	for _, toAgent := range []bool{true, false} {
		within("one direction is cut", func(t *testing.T) {
			s := newSpan(agentAddr)
			s.run(time.Second)
			s.drop = func(to bool, _ datagram) bool { return to == toAgent }
			s.run(freshFor + 5*time.Millisecond)
			s.want(t, "soon", byBoth, byBoth, full)
			s.run(2 * time.Second)
			s.want(t, "later", byStream, byStream, 0)
		})
	}
	within("never trusted one way", func(t *testing.T) {
		s := newSpan(agentAddr)
		s.drop = func(toAgent bool, _ datagram) bool { return !toAgent } // the agent hears, and is not heard
		s.run(time.Minute)
		s.want(t, "answers are lost", byStream, byStream, 0)
	})
	within("a lost probe costs nothing", func(t *testing.T) {
		s := newSpan(agentAddr)
		s.run(time.Second)
		n := 0
		s.drop = func(bool, datagram) bool { n++; return n%10 == 0 }
		lapsed := 0
		for range 6000 {
			s.run(10 * time.Millisecond)
			w, _, _ := s.p.verdict(time.Now())
			if w == byStream {
				t.Fatal("UDP was given up")
			}
			if w == byBoth {
				lapsed++
			}
		}
		if lapsed > 1000 {
			t.Errorf("%d of 6000 moments went both ways at a loss of 10%%", lapsed)
		}
	})
	within("shorter path", func(t *testing.T) {
		s := newSpan(agentAddr)
		s.longest = 1400
		s.run(20 * time.Millisecond)
		s.want(t, "1400", byUDP, byUDP, 1372)
		s.longest = 1500
		s.run(growEvery + time.Second)
		s.want(t, "grown", byUDP, byUDP, full)
		s.longest = 1300
		s.run(10 * time.Second)
		s.want(t, "shrunk", byUDP, byUDP, 1232)
		s.longest = 1200
		s.run(10 * time.Second)
		s.want(t, "too short", byStream, byStream, 0)
	})
	within("idle", func(t *testing.T) {
		s := newSpan(agentAddr)
		s.run(time.Second)
		s.busy = false
		sent := 0
		s.drop = func(toAgent bool, _ datagram) bool {
			if toAgent {
				sent++
			}
			return false
		}
		s.run(time.Minute)
		if sent > 13 {
			t.Errorf("%d probes in an idle minute", sent)
		}
		s.run(4 * time.Second)
		s.want(t, "idle", byBoth, byBoth, full)
		s.p.hurry(time.Now())
		s.busy = true
		s.run(10 * time.Millisecond)
		s.want(t, "busy again", byUDP, byUDP, full)
		s.run(busyEvery)
		s.want(t, "a probe later", byUDP, byUDP, full)
	})
	within("roaming", func(t *testing.T) {
		s := newSpan(agentAddr)
		s.run(time.Second)
		s.from = netip.MustParseAddrPort("198.51.100.7:99")
		s.p.doubt(time.Now())
		s.run(3 * time.Millisecond)
		if w, to, _ := s.a.verdict(time.Now()); w != byBoth || to != s.from {
			t.Errorf("after the first probe from elsewhere: %d to %v", w, to)
		}
		s.run(busyEvery + 10*time.Millisecond)
		s.want(t, "moved", byUDP, byUDP, full)
	})
	within("out of reach", func(t *testing.T) {
		s := newSpan(agentAddr)
		sent := 0
		s.drop = func(bool, datagram) bool { sent++; return true }
		s.run(time.Hour)
		if sent > 3*(3600/int(downMost/time.Second)+10) {
			t.Errorf("%d probes in an hour in vain", sent)
		}
	})
	within("of several targets, the one that answers", func(t *testing.T) {
		s := newSpan(netip.MustParseAddrPort("203.0.113.1:1"), agentAddr)
		s.drop = func(toAgent bool, d datagram) bool { return toAgent && d.to != agentAddr }
		s.run(10 * time.Millisecond)
		s.want(t, "second", byUDP, byUDP, full)
		s.p.setTargets([]netip.AddrPort{agentAddr}, probeSizes)
		s.want(t, "the other is gone", byUDP, byUDP, full)
		s.p.setTargets(nil, nil)
		s.run(time.Second)
		if w, _, _ := s.p.verdict(time.Now()); w != byStream {
			t.Errorf("without targets: %d", w)
		}
	})
}

// TestAnswererRefuses what was seen before, what is too long to be answered, and
// an echo of what was sent elsewhere.
func TestAnswererRefuses(t *testing.T) {
	now := time.Now()
	a := &answerer{}
	first := a.heard(now, sessionAddr, probe{size: 1452, seq: 5, next: time.Second})
	if len(first) != 1 || first[0].size != 1452 || first[0].seq != 5 {
		t.Fatalf("answer: %+v", first)
	}
	for name, p := range map[string]probe{
		"the same": {size: 1452, seq: 5}, "a long one": {size: 9000, seq: 6},
	} {
		if out := a.heard(now, sessionAddr, p); out != nil {
			t.Errorf("%s was answered: %+v", name, out)
		}
	}
	if out := a.heard(now, sessionAddr, probe{size: 1452, seq: 4}); len(out) != 1 {
		t.Error("a probe that was overtaken was not answered")
	}
	if out := a.heard(now, sessionAddr, probe{size: 1452, seq: 4}); len(out) != 0 {
		t.Error("a probe that was overtaken was answered twice")
	}
	elsewhere := netip.MustParseAddrPort("198.51.100.7:99")
	a.heard(now, elsewhere, probe{size: 1452, seq: 7, answer: first[0].answer})
	if w, _, _ := a.verdict(now); w != byStream {
		t.Errorf("trusted by an echo from elsewhere: %d", w)
	}
	a.heard(now, elsewhere, probe{size: 1452, seq: 8, answer: 99})
	if w, _, _ := a.verdict(now); w != byStream {
		t.Errorf("trusted by an answer that was never sent: %d", w)
	}
	a.heard(now, elsewhere, probe{size: 1452, seq: 200})
	if out := a.heard(now, elsewhere, probe{size: 1452, seq: 100}); out != nil {
		t.Error("an ancient probe was answered")
	}
}

// TestProberRefuses answers to what it did not ask.
func TestProberRefuses(t *testing.T) {
	now := time.Now()
	ask := func() (*prober, []datagram) {
		p := &prober{}
		p.setTargets([]netip.AddrPort{agentAddr}, probeSizes)
		out, _ := p.tick(now, true)
		return p, out
	}
	p, out := ask()
	if len(out) != len(probeSizes) || !slices.IsSortedFunc(out, func(a, b datagram) int { return b.size - a.size }) {
		t.Fatalf("first probes: %+v", out)
	}
	good := probe{size: 1452, seq: out[0].seq, answer: 1}
	for name, c := range map[string]struct {
		from netip.AddrPort
		p    probe
		at   time.Duration
	}{
		"elsewhere":     {sessionAddr, good, 0},
		"another size":  {agentAddr, probe{size: 1372, seq: good.seq, answer: 1}, 0},
		"another probe": {agentAddr, probe{size: 1452, seq: 77, answer: 1}, 0},
		"no number":     {agentAddr, probe{size: 1452, seq: good.seq}, 0},
		"too late":      {agentAddr, good, time.Minute},
	} {
		p, _ := ask()
		p.heard(now.Add(c.at), c.from, c.p)
		if w, _, _ := p.verdict(now.Add(c.at)); w != byStream {
			t.Errorf("%s was believed", name)
		}
	}
	if p.heard(now.Add(time.Millisecond), agentAddr, good); !p.up || p.rtt != time.Millisecond {
		t.Errorf("the answer was not believed: up %v, round trip %v", p.up, p.rtt)
	}
}
