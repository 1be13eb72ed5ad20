package carrier

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/conn"
)

// message is one that looks like WireGuard's, of n bytes, with a number in it.
func message(number uint32, n int) []byte {
	m := bytes.Repeat([]byte{byte(number)}, n)
	binary.LittleEndian.PutUint32(m, 4)
	binary.LittleEndian.PutUint32(m[4:], number)
	return m
}

// wires are a session's and an agent's Bind over loopback, with a relay between
// their UDP sockets that can be cut.
type wires struct {
	session, agent   *Bind
	dSession, dAgent *Datagrams
	secret           []byte
	relay            *relay
	fromAgent        []conn.ReceiveFunc // of the session
	fromSession      []conn.ReceiveFunc // of the agent
}

// relay passes datagrams between one client and a server.
type relay struct {
	c      *net.UDPConn
	server netip.AddrPort
	mu     sync.Mutex
	client netip.AddrPort
	cut    bool
	passed [2]int // to the server, to the client
}

func newRelay(t *testing.T, server netip.AddrPort) *relay {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{c: c, server: server}
	t.Cleanup(func() { c.Close() })
	go func() {
		buf := make([]byte, 65536)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			r.mu.Lock()
			to, i := r.server, 0
			if from == r.server {
				to, i = r.client, 1
			} else {
				r.client = from
			}
			cut := r.cut
			if !cut {
				r.passed[i]++
			}
			r.mu.Unlock()
			if !cut && to.IsValid() {
				_, _ = c.WriteToUDPAddrPort(buf[:n], to)
			}
		}
	}()
	return r
}

func (r *relay) addr() netip.AddrPort { return r.c.LocalAddr().(*net.UDPAddr).AddrPort() }

func (r *relay) setCut(cut bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cut = cut
}

func newWires(t *testing.T) *wires {
	t.Helper()
	w := &wires{secret: NewSecret()}
	var err error
	if w.dSession, err = ListenDatagrams(false, netip.MustParseAddrPort("127.0.0.1:0")); err != nil {
		t.Fatal(err)
	}
	if w.dAgent, err = ListenDatagrams(true, netip.MustParseAddrPort("127.0.0.1:0")); err != nil {
		t.Fatal(err)
	}
	w.session = NewBind(BindConfig{Datagrams: w.dSession})
	w.agent = NewBind(BindConfig{Datagrams: w.dAgent})
	if w.fromAgent, _, err = w.session.Open(0); err != nil {
		t.Fatal(err)
	}
	if w.fromSession, _, err = w.agent.Open(0); err != nil {
		t.Fatal(err)
	}
	s, a := pair(t, false)
	w.session.Attach(s)
	w.agent.Attach(a)
	w.dAgent.Answer(w.secret)
	w.relay = newRelay(t, w.dAgent.LocalAddr())
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { w.dSession.Run(ctx, nil) })
	running.Go(func() { w.dAgent.Run(ctx, nil) })
	t.Cleanup(func() {
		cancel()
		w.session.Shutdown()
		w.agent.Shutdown()
		running.Wait()
		s.Close()
		a.Close()
	})
	return w
}

// got collects what a Bind receives, by the way it came.
type got struct {
	mu    sync.Mutex
	times map[uint32]int
	ways  []int
	wrong string
}

func collect(t *testing.T, fns []conn.ReceiveFunc) *got {
	t.Helper()
	g := &got{times: map[uint32]int{}, ways: make([]int, len(fns))}
	for way, f := range fns {
		go func() {
			msgs, sizes, eps := make([][]byte, conn.IdealBatchSize), make([]int, conn.IdealBatchSize), make([]conn.Endpoint, conn.IdealBatchSize)
			for i := range msgs {
				msgs[i] = make([]byte, 65535)
			}
			for {
				n, err := f(msgs, sizes, eps)
				if err != nil {
					return
				}
				g.mu.Lock()
				for i, m := range msgs[:n] {
					m = m[:sizes[i]]
					number := binary.LittleEndian.Uint32(m[4:])
					if m[0] == 4 && !bytes.Equal(m, message(number, len(m))) {
						g.wrong = "a message came out changed"
					}
					g.times[number]++
					g.ways[way]++
				}
				g.mu.Unlock()
			}
		}()
	}
	return g
}

func (g *got) all(from, n uint32) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := from; i < from+n; i++ {
		if g.times[i] == 0 {
			return false
		}
	}
	return true
}

// count is how many came by the streams, and by UDP.
func (g *got) count() []int {
	g.mu.Lock()
	defer g.mu.Unlock()
	udp := len(g.ways) - 1
	streams := 0
	for _, n := range g.ways[:udp] {
		streams += n
	}
	return []int{streams, g.ways[udp]}
}

func eventually(t testing.TB, what string, f func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

// batch are n messages, numbered from first on, of lengths that change.
func batch(first uint32, n int) (msgs [][]byte) {
	for i := range uint32(n) {
		size := 1452
		switch i % 9 {
		case 4:
			size = 96
		case 7:
			size = 700 + int(i)
		}
		msgs = append(msgs, message(first+i, size))
	}
	return msgs
}

// TestDatagrams: messages go by the stream, by UDP once it answers, by the
// stream again when UDP is cut, and by UDP when it is back. None is lost but
// what was under way, and none changed.
func TestDatagrams(t *testing.T) {
	w := newWires(t)
	up, down := collect(t, w.fromSession), collect(t, w.fromAgent)
	send := func(b *Bind, first uint32, n int) {
		t.Helper()
		for _, m := range [][][]byte{batch(first, n/2), batch(first+uint32(n/2), n-n/2)} {
			if err := b.Send(m, &b.ep); err != nil {
				t.Fatal(err)
			}
		}
	}
	both := func(first uint32) {
		t.Helper()
		send(w.session, first, 40)
		send(w.agent, first, 40)
		eventually(t, "all messages", func() bool { return up.all(first, 40) && down.all(first, 40) })
	}
	both(0)
	if up.count()[1] != 0 || down.count()[1] != 0 {
		t.Fatalf("by UDP before it answered: %v, %v", up.count(), down.count())
	}

	alone := func() bool { return w.dSession.State().Alone && w.dAgent.State().Alone }
	w.dSession.Probe(w.secret, []netip.AddrPort{w.relay.addr()})
	eventually(t, "UDP", alone)
	before := []int{up.count()[0], down.count()[0]}
	both(1000)
	if up.count()[0] != before[0] || down.count()[0] != before[1] || up.count()[1] < 40 || down.count()[1] < 40 {
		t.Errorf("while UDP is trusted: by the stream and by UDP %v, %v", up.count(), down.count())
	}
	if n := w.dSession.MaxPacket(1420); n != 1420 {
		t.Errorf("packets of %d fit", n)
	}

	// A handshake goes both ways, what is too long by the stream.
	before = up.count()
	handshake := message(2000, 148)
	handshake[0] = 1
	if err := w.session.Send([][]byte{handshake}, &w.session.ep); err != nil {
		t.Fatal(err)
	}
	long := message(2001, 60000)
	if err := w.session.Send([][]byte{message(2002, 1452), long, message(2003, 200)}, &w.session.ep); err != nil {
		t.Fatal(err)
	}
	eventually(t, "long ones", func() bool { return up.all(2001, 3) })
	eventually(t, "the handshake both ways", func() bool {
		return up.count()[0] == before[0]+2 && up.count()[1] == before[1]+3
	})

	for end := time.Now().Add(2 * busyEvery); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		send(w.session, 2500, 2)
	}
	w.relay.setCut(true)
	cut := time.Now()
	eventually(t, "both ways", func() bool {
		send(w.session, 3000, 2)
		return !w.dSession.State().Alone && !w.dAgent.State().Alone
	})
	t.Logf("both ways %v after the cut", time.Since(cut))
	both(4000) // at least by the stream
	eventually(t, "the stream alone", func() bool { return !w.dSession.State().Up && !w.dAgent.State().Up })
	if took := time.Since(cut); took > 3*time.Second+200*time.Millisecond {
		t.Errorf("the stream alone only after %v", took)
	}
	if w.dSession.MaxPacket(1420) != 0 || w.dAgent.MaxPacket(1420) != 0 {
		t.Error("packets are still to be split")
	}
	both(5000)
	w.relay.setCut(false)
	eventually(t, "UDP again", alone)
	both(6000)
	if up.wrong != "" || down.wrong != "" {
		t.Error(up.wrong, down.wrong)
	}
}

// TestDatagramsStranger: the agent says nothing to who does not know the secret,
// and WireGuard sees nothing of him.
func TestDatagramsStranger(t *testing.T) {
	w := newWires(t)
	up := collect(t, w.fromSession)
	collect(t, w.fromAgent)
	w.dSession.Probe(w.secret, []netip.AddrPort{w.relay.addr()})
	eventually(t, "UDP", func() bool { return w.dAgent.State().Alone })

	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(w.dAgent.LocalAddr()))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	keys := newProbeKeys(w.secret)
	replayed := keys.seal(fromSession, probe{size: 1452, seq: 1})
	for name, b := range map[string][]byte{
		"nothing": {}, "garbage": []byte("hello"), "of WireGuard": message(1, 200), "a handshake": append([]byte{1, 0, 0, 0}, make([]byte, 144)...),
		"another secret's": newProbeKeys(NewSecret()).seal(fromSession, probe{size: 1452, seq: 1 << 50}),
		"an agent's":       keys.seal(fromAgent, probe{size: 1452, seq: 1 << 50, answer: 1}),
		"a repetition":     replayed,
		"a long one":       keys.seal(fromSession, probe{size: 9000, seq: 1 << 50}),
	} {
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		if n, err := c.Read(make([]byte, 9000)); err == nil {
			t.Errorf("%s was answered with %d bytes", name, n)
		}
	}
	// All but the empty one and the two that were sealed with the secret.
	eventually(t, "strangers to be counted", func() bool { return w.dAgent.Stats().Strange == 5 })
	if n := up.count(); n[1] != 0 {
		t.Errorf("WireGuard saw %d datagrams of a stranger", n[1])
	}
	if !w.dAgent.State().Alone {
		t.Error("a stranger has changed the agent's mind")
	}

	// One who knows the secret moves the agent to him, and gets no more than he sent.
	roamed := keys.seal(fromSession, probe{size: 300, seq: 1 << 51})
	if _, err := c.Write(roamed); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	n, err := c.Read(make([]byte, 9000))
	if err != nil || n != len(roamed) {
		t.Errorf("answer of %d bytes to %d: %v", n, len(roamed), err)
	}

	// A new secret: the old one means nothing any more.
	w.dAgent.Answer(NewSecret())
	if w.dAgent.State().Up {
		t.Error("trusted with a new secret")
	}
	if _, err := c.Write(keys.seal(fromSession, probe{size: 300, seq: 1 << 52})); err != nil {
		t.Fatal(err)
	}
	c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Read(make([]byte, 9000)); err == nil {
		t.Errorf("the old secret was answered with %d bytes", n)
	}
}

// TestDatagramsPinned: nothing goes by the stream.
func TestDatagramsPinned(t *testing.T) {
	w := newWires(t)
	w.dSession.Pin()
	up := collect(t, w.fromSession)
	collect(t, w.fromAgent)
	if err := w.session.Send(batch(0, 10), &w.session.ep); err != nil {
		t.Fatal(err)
	}
	w.dSession.Probe(w.secret, []netip.AddrPort{w.relay.addr()})
	eventually(t, "UDP", func() bool { return w.dSession.State().Up && w.dAgent.State().Up })
	if err := w.session.Send(batch(100, 10), &w.session.ep); err != nil {
		t.Fatal(err)
	}
	eventually(t, "messages by UDP", func() bool { return up.all(100, 10) })
	if n := up.count(); n[0] != 0 || n[1] != 10 {
		t.Errorf("by the stream and by UDP: %v", n)
	}
}

// TestDatagramsNoStream: without a stream UDP goes on, also with what would go
// both ways.
func TestDatagramsNoStream(t *testing.T) {
	w := newWires(t)
	up := collect(t, w.fromSession)
	collect(t, w.fromAgent)
	w.dSession.Probe(w.secret, []netip.AddrPort{w.relay.addr()})
	eventually(t, "UDP", func() bool { return w.dSession.State().Alone })
	w.session.Stream().Close()
	begun := time.Now()
	handshake := message(1, 148)
	handshake[0] = 1
	for _, m := range [][][]byte{{handshake}, batch(100, 10)} {
		if err := w.session.Send(m, &w.session.ep); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begun); took > sendWait/2 {
		t.Errorf("Send took %v", took)
	}
	eventually(t, "messages by UDP", func() bool { return up.all(100, 10) })
}

// TestDatagramsRise: what waits for a stream goes by UDP as soon as that works.
func TestDatagramsRise(t *testing.T) {
	w := newWires(t)
	w.session.hold = time.Minute
	up := collect(t, w.fromSession)
	collect(t, w.fromAgent)
	w.session.Stream().Close()
	sent := make(chan error, 1)
	go func() { sent <- w.session.Send(batch(100, 10), &w.session.ep) }()
	eventually(t, "waiting", func() bool { return w.session.out.busy.Load() == 1 })
	w.dSession.Probe(w.secret, []netip.AddrPort{w.relay.addr()})
	select {
	case err := <-sent:
		if err != nil {
			t.Fatal(err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("Send waits for a stream while UDP works")
	}
	eventually(t, "messages by UDP", func() bool { return up.all(100, 10) })
	if n := w.session.Stats().Dropped; n != 0 {
		t.Errorf("%d dropped", n)
	}
	begun := time.Now() // what was read before UDP came up, and is too long for it
	if err := w.session.Send([][]byte{message(200, 30000)}, &w.session.ep); err != nil || time.Since(begun) > sendWait/2 {
		t.Errorf("Send of a long message: %v after %v", err, time.Since(begun))
	}
}

// TestDatagramsReopen: WireGuard closes its Bind and opens it again.
func TestDatagramsReopen(t *testing.T) {
	w := newWires(t)
	if err := w.agent.Close(); err != nil {
		t.Fatal(err)
	}
	for _, f := range w.fromSession {
		if _, err := f([][]byte{make([]byte, 65535)}, make([]int, 1), make([]conn.Endpoint, 1)); err != net.ErrClosed {
			t.Errorf("receive of a closed Bind: %v", err)
		}
	}
	fns, _, err := w.agent.Open(0)
	if err != nil {
		t.Fatal(err)
	}
	up := collect(t, fns)
	collect(t, w.fromAgent)
	w.dSession.Probe(w.secret, []netip.AddrPort{w.relay.addr()})
	eventually(t, "UDP", func() bool { return w.dSession.State().Alone })
	if err := w.session.Send(batch(100, 10), &w.session.ep); err != nil {
		t.Fatal(err)
	}
	eventually(t, "messages by UDP", func() bool { return up.all(100, 10) })
}
