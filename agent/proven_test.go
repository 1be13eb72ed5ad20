package agent

import (
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/expose"
	"github.com/culvert-dev/culvert/wire/intercept"
)

func TestProven(t *testing.T) {
	p := newProven[int](50 * time.Millisecond)
	for i := range maxProven + 10 {
		p.add(i)
		if !p.has(i) {
			t.Fatalf("number %d is not known", i)
		}
	}
	if n := len(p.until); n != maxProven {
		t.Errorf("%d are remembered", n)
	}
	p.add(1)
	p.drop(1)
	if p.has(1) {
		t.Error("what was dropped is known")
	}
	p.add(2)
	time.Sleep(60 * time.Millisecond)
	if p.has(2) {
		t.Error("it is known for good")
	}
	for i := range maxProven {
		p.add(1000 + i) // first in place of those that are over
	}
	for i := range maxProven {
		if !p.has(1000 + i) {
			t.Fatalf("number %d had to go for one that is over", 1000+i)
		}
	}
}

func TestProofOf(t *testing.T) {
	seen := map[proof]intercept.Header{}
	for _, h := range []intercept.Header{{ID: "a", Token: "b"}, {ID: "ab"}, {Token: "ab"}, {ID: "a", Token: "c"}, {ID: "b", Token: "a"}} {
		if other, ok := seen[proofOf(h)]; ok {
			t.Errorf("%+v is as good as %+v", h, other)
		}
		seen[proofOf(h)] = h
	}
	if proofOf(tcpHeader) != proofOf(watchHeader) {
		t.Error("the proof depends on more than id and token")
	}
}

// TestWatchProof: who shows no good token is told so, and has nobody watch the
// session.
func TestWatchProof(t *testing.T) {
	a, m := intercepted(t, Config{}, nil)
	door := a.node().door
	for _, h := range []intercept.Header{
		{Network: intercept.Watch},
		{Network: intercept.Watch, ID: "i1"},
		{Network: intercept.Watch, Token: "secret"},
		{Network: intercept.Watch, ID: "i1", Token: "wrong"},
		{Network: intercept.TCP, ID: "i1", Token: "wrong"},
	} {
		conn := gate(t, target, h)
		if s := status(t, conn); s != intercept.Unknown {
			t.Errorf("%+v: %v", h, s)
		}
		if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
			t.Errorf("%+v: then %v", h, err)
		}
	}
	if s, _ := door.machine.now(); s != 0 || m.checks.Load() != 0 || door.gates.has(target) {
		t.Errorf("the session is %v for them, was asked %d times; gates: %t", s, m.checks.Load(), door.gates.has(target))
	}
	for range 3 {
		conn := gate(t, target, watchHeader)
		for range 2 {
			if s := status(t, conn); s != intercept.Accepted {
				t.Errorf("with a good token: %v", s)
			}
		}
	}
	if n := m.checks.Load(); n != 1 {
		t.Errorf("the session was asked %d times", n)
	}
}

// TestProofIsCheckedAgain: what the session said is not for good, and one refusal
// ends it.
func TestProofIsCheckedAgain(t *testing.T) {
	a, m := intercepted(t, Config{}, func(x *timing) { x.proven = 300 * time.Millisecond })
	watch := gate(t, target, watchHeader)
	for s := time.Now(); time.Since(s) < time.Second; {
		status(t, watch) // an address is known as long as it has a watch, its token is not
	}
	if !a.node().door.gates.has(target) {
		t.Error("the gate's address is forgotten")
	}
	status(t, gate(t, target, watchHeader))
	if n := m.checks.Load(); n != 2 {
		t.Errorf("the session was asked %d times", n)
	}
	m.through(t)
	m.status.Store(int32(intercept.Unknown))
	status(t, gate(t, target, tcpHeader))
	if a.node().door.proofs.has(proofOf(tcpHeader)) {
		t.Error("what the session does not know any more is still good")
	}
}

// TestWatchAway: a watch that cannot be checked is not kept; one that was goes on.
func TestWatchAway(t *testing.T) {
	a, m := intercepted(t, Config{}, func(x *timing) { x.proven = time.Hour })
	status(t, gate(t, target, watchHeader))
	m.cut(true)
	eventually(t, "the machine is away", func() bool { s, _ := a.node().door.machine.now(); return s == intercept.Away })
	known := gate(t, target, watchHeader)
	for range 2 {
		if s := status(t, known); s != intercept.Away {
			t.Errorf("with a token that is known: %v", s)
		}
	}
	h := watchHeader
	h.ID = "i2"
	conn := gate(t, target, h)
	if s := status(t, conn); s != intercept.Away {
		t.Errorf("with another token: %v", s)
	}
	if _, err := conn.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("then %v", err)
	}
	m.cut(false)
	for s := intercept.Away; s != intercept.Accepted; {
		s = status(t, known)
	}
	if s := status(t, gate(t, target, h)); s != intercept.Accepted {
		t.Errorf("when the machine is back: %v", s)
	}
}

// TestStrangersKeepNobodyOut: other pods take all the room that there is for them,
// and gates do not notice.
func TestStrangersKeepNobodyOut(t *testing.T) {
	a, m := intercepted(t, Config{}, func(x *timing) { x.header = time.Minute })
	door := a.node().door
	watch := gate(t, target, watchHeader)
	status(t, watch)
	pod := func(n byte) netip.Addr { return netip.AddrFrom4([4]byte{127, 0, 1, n}) }
	for range 2 * maxStrangersFrom {
		knock(t, pod(1), target)
	}
	waiting := func() int {
		door.strangers.mu.Lock()
		defer door.strangers.mu.Unlock()
		return door.strangers.waiting
	}
	eventually(t, "one pod has its share", func() bool { return waiting() == maxStrangersFrom })
	// A gate that nobody knows gets in beside it, by IPv6.
	if s := status(t, gate(t, target6, watchHeader)); s != intercept.Accepted {
		t.Errorf("a new gate's watch is %v", s)
	}
	for n := byte(2); n < 2+maxStrangers/maxStrangersFrom; n++ {
		for range maxStrangersFrom {
			knock(t, pod(n), target)
		}
	}
	eventually(t, "strangers have all their room", func() bool { return waiting() == maxStrangers })
	m.through(t)
	h := watchHeader
	h.ID = "i2"
	for _, h := range []intercept.Header{watchHeader, h} {
		if s := status(t, gate(t, target, h)); s != intercept.Accepted {
			t.Errorf("a gate's watch of %s is %v", h.ID, s)
		}
	}
	for range 2 {
		if s := status(t, watch); s != intercept.Accepted {
			t.Errorf("the watch that was there is %v", s)
		}
	}
}

// TestExposedLeavesRoom: who connects to an exposed port cannot take what gates
// need.
func TestExposedLeavesRoom(t *testing.T) {
	a, m := intercepted(t, Config{MaxInbound: 4}, nil)
	st, err := exposer(a, m.c.hello.Secret).Set(t.Context(), []expose.Port{{Port: 18083, Protocol: expose.TCP, ID: "i", Token: "t"}})
	if err != nil || !st.Ports[0].Listening {
		t.Fatalf("%+v, %v", st, err)
	}
	for range 3 {
		conn, err := net.Dial("tcp", netip.AddrPortFrom(target, 18083).String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		<-m.conns
	}
	if !resets(t, 18083) {
		t.Error("the last place is taken")
	}
	m.through(t)
	if s := status(t, gate(t, target, tcpHeader)); s != intercept.Away {
		t.Errorf("one too many is %v", s)
	}
}
