package carrier

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// overhead is what WireGuard adds to a packet: 16 bytes of header and 16 of
	// authenticator. It pads to padding bytes, but not beyond the MTU.
	overhead, padding = 32, 16
	// answerWithin is how long traffic may flow without anything coming back until
	// a probe asks why.
	answerWithin = 250 * time.Millisecond
	// maxTargets bounds the addresses that a session tries: a probe of each length
	// goes to each of them.
	maxTargets = 16
)

// Datagrams is the UDP way between a session and its agent, beside the streams
// of a Bind and better than they are where it works: no head-of-line blocking,
// no second congestion control. Nothing is sent there but WireGuard's messages
// and the probes that find out whether they arrive (see probe.go); while they do
// not, all goes by the stream. Make one with ListenDatagrams, give it to a Bind
// and run it. All methods may be called at any time from any goroutine.
type Datagrams struct {
	sock  *socket
	own   byte // kind of our probes
	other byte
	kick  chan struct{} // capacity 1: the state has changed, or a probe is wanted
	epoch time.Time

	// What the sender reads for each batch.
	way    atomic.Uint32
	risen  atomic.Pointer[chan struct{}] // closed when UDP begins to be used
	size   atomic.Int32
	peer   atomic.Pointer[netip.AddrPort]
	pinned atomic.Bool
	// Moments since epoch.
	used, came, asked atomic.Int64

	sent, sentPkts, rcvd, rcvdPkts, strange, refused atomic.Uint64

	mu     sync.Mutex
	keys   *probeKeys // nil: nobody to probe or to answer
	trust  trust
	prober *prober // trust, if we are the session
}

// DatagramStats counts what went by UDP: WireGuard messages and their bytes.
type DatagramStats struct {
	Sent, Received               uint64 // bytes
	SentPackets, ReceivedPackets uint64
	Strange                      uint64 // datagrams that were neither the peer's nor an authentic probe
	Refused                      uint64 // messages that the machine would not send
}

// ListenDatagrams opens the UDP socket of a session, at any port, or of an
// agent, at addr. Nothing is sent before Probe or Answer.
func ListenDatagrams(agent bool, addr netip.AddrPort) (*Datagrams, error) {
	var local *net.UDPAddr
	if addr.IsValid() {
		local = net.UDPAddrFromAddrPort(addr)
	}
	c, err := net.ListenUDP("udp", local)
	if err != nil {
		return nil, fmt.Errorf("opening a UDP socket: %w", err)
	}
	sock, err := newSocket(c)
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("opening a UDP socket: %w", err)
	}
	d := &Datagrams{sock: sock, own: fromSession, other: fromAgent, kick: make(chan struct{}, 1), epoch: time.Now().Add(-time.Hour)}
	d.prober = &prober{}
	d.trust = d.prober
	risen := make(chan struct{})
	d.risen.Store(&risen)
	if agent {
		d.own, d.other = fromAgent, fromSession
		d.prober, d.trust = nil, &answerer{}
	}
	return d, nil
}

// Answer makes an agent answer the probes of who knows secret, and forget who
// knew another one.
func (d *Datagrams) Answer(secret []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.keys, d.trust = newProbeKeys(secret), &answerer{}
	d.decide(time.Now())
}

// Probe makes a session probe the targets until one answers that knows secret,
// and from then on that one. None: it stops. The same again changes nothing.
func (d *Datagrams) Probe(secret []byte, targets []netip.AddrPort) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(targets) > maxTargets {
		targets = targets[:maxTargets]
	}
	keys := newProbeKeys(secret)
	if d.keys == nil || string(d.keys.session) != string(keys.session) {
		d.keys = keys
		d.prober.setTargets(nil, nil)
	}
	d.prober.setTargets(targets, probeSizes)
	d.decide(time.Now())
	d.wake()
}

// Pin keeps a session's messages off the stream: those that UDP does not take
// are lost.
func (d *Datagrams) Pin() { d.pinned.Store(true) }

// Doubt probes at once, and until the answer messages go both ways: the network
// has changed, or the machine has slept.
func (d *Datagrams) Doubt() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.prober != nil {
		d.prober.doubt(time.Now())
		d.decide(time.Now())
		d.wake()
	}
}

// DatagramState is how UDP stands.
type DatagramState struct {
	Up      bool           // messages go by UDP, or by both while trust lapses
	Alone   bool           // by UDP alone
	Addr    netip.AddrPort // the other end, if Up
	RTT     time.Duration  // of the last answered probe; only a session knows
	Size    int            // of the longest messages, in bytes
	Tried   []netip.AddrPort
	Rounds  int       // of probes that nobody answered, since the last answer
	Dropped time.Time // when it was last given up; zero: never
}

// State is a snapshot.
func (d *Datagrams) State() DatagramState {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := time.Now()
	d.decide(now)
	w, addr, size := d.trust.verdict(now)
	st := DatagramState{Up: w != byStream, Alone: w == byUDP, Addr: addr, Size: size}
	if p := d.prober; p != nil {
		st.RTT, st.Tried, st.Rounds, st.Dropped = p.rtt, p.targets, p.tries, p.dropped
	}
	return st
}

// MaxPacket is the longest packet that goes by UDP now, when mtu is that of the
// tunnel; 0: packets of any length, they go by the stream. Longer ones are
// better split before they are encrypted, but get there.
func (d *Datagrams) MaxPacket(mtu int) int {
	if d == nil || way(d.way.Load()) == byStream {
		return 0
	}
	n := int(d.size.Load()) - overhead
	if n >= mtu {
		return mtu
	}
	return n &^ (padding - 1)
}

// Stats is a snapshot of the counters.
func (d *Datagrams) Stats() DatagramStats {
	return DatagramStats{
		Sent: d.sent.Load(), SentPackets: d.sentPkts.Load(), Received: d.rcvd.Load(), ReceivedPackets: d.rcvdPkts.Load(),
		Strange: d.strange.Load(), Refused: d.refused.Load(),
	}
}

// LocalAddr is the socket's address.
func (d *Datagrams) LocalAddr() netip.AddrPort {
	return d.sock.c.LocalAddr().(*net.UDPAddr).AddrPort()
}

// Run sends probes and lets trust lapse until ctx is done. changed, which may be
// nil, is called from its goroutine when UDP begins or ceases to be used.
func (d *Datagrams) Run(ctx context.Context, changed func(up bool)) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	up := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.kick:
		case <-timer.C:
		}
		d.mu.Lock()
		now := time.Now()
		busy := d.since(now)-max(d.used.Load(), d.came.Load()) < int64(busyFor)
		out, next := d.trust.tick(now, busy)
		if len(out) > 0 {
			d.asked.Store(d.since(now))
		}
		d.decide(now)
		d.post(out)
		d.mu.Unlock()
		timer.Reset(max(time.Until(next), time.Millisecond))
		if is := way(d.way.Load()) != byStream; is != up {
			up = is
			if changed != nil {
				changed(up)
			}
		}
	}
}

// pause releases the goroutine in receive, which finds the socket closed until
// resume.
func (d *Datagrams) pause()  { _ = d.sock.c.SetReadDeadline(time.Unix(1, 0)) }
func (d *Datagrams) resume() { _ = d.sock.c.SetReadDeadline(time.Time{}) }

// Close closes the socket, which releases whoever waits for it.
func (d *Datagrams) Close() { d.sock.c.Close() }

func (d *Datagrams) since(t time.Time) int64 { return int64(t.Sub(d.epoch)) }

func (d *Datagrams) wake() {
	select {
	case d.kick <- struct{}{}:
	default:
	}
}

// decide stores the verdict for the sender; mu is held.
func (d *Datagrams) decide(now time.Time) {
	w, to, size := d.trust.verdict(now)
	if p := d.peer.Load(); p == nil || *p != to {
		d.peer.Store(&to)
	}
	d.size.Store(int32(size))
	if was := way(d.way.Swap(uint32(w))); was == byStream && w != byStream {
		next := make(chan struct{})
		close(*d.risen.Swap(&next))
	}
}

// post sends probes; mu is held. One that the machine does not send is one that
// is not answered.
func (d *Datagrams) post(out []datagram) {
	for _, o := range out {
		b := d.keys.seal(d.own, o.probe)
		_ = d.sock.probe(o.to, b)
	}
}

// probed handles what claims to be a probe.
func (d *Datagrams) probed(from netip.AddrPort, b []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.keys == nil {
		d.strange.Add(1)
		return
	}
	p, ok := d.keys.open(d.other, b)
	if !ok {
		d.strange.Add(1)
		return
	}
	now := time.Now()
	out := d.trust.heard(now, from, p)
	d.decide(now)
	d.post(out)
	d.wake()
}

// send sends what UDP is trusted with, and returns what the stream has to carry;
// carried tells that those were copies, or too long for UDP.
func (d *Datagrams) send(msgs [][]byte) (rest [][]byte, carried bool) {
	w := way(d.way.Load())
	if w == byStream {
		if d.pinned.Load() {
			d.refused.Add(uint64(len(msgs)))
			return nil, false
		}
		return msgs, false
	}
	size, to := int(d.size.Load()), *d.peer.Load()
	fit, plain := true, true
	for _, m := range msgs {
		fit = fit && len(m) <= size
		plain = plain && isData(m)
	}
	ours, rest := msgs, msgs
	switch {
	case fit && plain && w == byUDP:
		rest = nil
	case fit && w == byBoth:
	default:
		// A handshake, on which all depends, goes both ways; and what is too long
		// was read before UDP came up.
		ours, rest = nil, nil
		for _, m := range msgs {
			if len(m) <= size {
				ours = append(ours, m)
			}
			if len(m) > size || w == byBoth || !isData(m) {
				rest = append(rest, m)
			}
		}
	}
	d.inquire()
	n, err := d.sock.send(to, ours)
	total := 0
	for _, m := range ours[:n] {
		total += len(m)
	}
	d.sent.Add(uint64(total))
	d.sentPkts.Add(uint64(n))
	if d.pinned.Load() {
		return nil, false
	}
	if err != nil && !errors.Is(err, net.ErrClosed) {
		// No route, a firewall of this machine: let the stream have it all, a probe
		// finds out whether it lasts.
		d.refused.Add(uint64(len(ours) - n))
		d.doubtSoon()
		return msgs, false
	}
	return rest, true
}

// inquire notes that messages flow, and asks when nothing comes back.
func (d *Datagrams) inquire() {
	now := d.since(time.Now())
	idle := now-d.used.Swap(now) > int64(busyFor)
	if d.prober == nil {
		return
	}
	if idle || now-d.came.Load() > int64(answerWithin) && now-d.asked.Load() > int64(answerWithin) {
		d.mu.Lock()
		d.prober.hurry(time.Now())
		d.mu.Unlock()
		d.asked.Store(now)
		d.wake()
	}
}

func (d *Datagrams) doubtSoon() {
	now := d.since(time.Now())
	if now-d.asked.Load() > int64(soonEvery) {
		d.asked.Store(now)
		d.Doubt()
	}
}

// receive waits for messages of the peer and returns all that are there, at
// least one, or net.ErrClosed. Only one goroutine may call it at a time.
func (d *Datagrams) receive(msgs [][]byte, sizes []int) (int, error) {
	for {
		n, err := d.sock.receive(msgs, sizes, d.admit)
		if n > 0 {
			total := 0
			for _, size := range sizes[:n] {
				total += size
			}
			d.came.Store(d.since(time.Now()))
			d.rcvd.Add(uint64(total))
			d.rcvdPkts.Add(uint64(n))
			return n, nil
		}
		if err != nil {
			return 0, err
		}
	}
}

// admit tells whether WireGuard shall see a datagram. Only the peer's: a
// stranger's would take room from him inside WireGuard.
func (d *Datagrams) admit(from netip.AddrPort, b []byte) bool {
	if isProbe(b) {
		d.probed(from, b)
		return false
	}
	if p := d.peer.Load(); p == nil || *p != from || len(b) == 0 {
		d.strange.Add(1)
		return false
	}
	return true
}
