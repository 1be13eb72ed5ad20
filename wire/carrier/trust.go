package carrier

import (
	"net/netip"
	"slices"
	"time"
)

// How long UDP is trusted. Data that comes is no evidence: nobody knows yet
// whether it is authentic.
const (
	// busyEvery is how often the session probes while messages flow, and soonEvery
	// while it misses an answer. busyFor is how long after a message.
	busyEvery = 500 * time.Millisecond
	soonEvery = 250 * time.Millisecond
	busyFor   = 3 * time.Second
	// idleEvery is often enough for a NAT's mapping (RFC 4787 REQ-5: 2 min, some
	// have 30 s), and seldom enough for a laptop's battery.
	idleEvery = 5 * time.Second
	// freshFor is how long after an answer UDP alone is used. Later, as after a
	// pause, messages go both ways until the next answer.
	freshFor = 1500 * time.Millisecond
	// A probe that is not answered within three round trips, and these bounds, has
	// messages go both ways.
	lapseMin, lapseMax = 300 * time.Millisecond, time.Second
	// silentAfter is how long a probe is unanswered when UDP is given up for the
	// stream.
	silentAfter = 2 * time.Second
	// downFirst doubles with every probe in vain, up to downKnown where UDP worked
	// within knownFor, else downMost.
	downFirst, downKnown, downMost = 500 * time.Millisecond, 2 * time.Second, 30 * time.Second
	knownFor                       = 10 * time.Minute
	// growEvery is how often longer datagrams are tried again where only shorter
	// ones went through: perhaps the long ones were lost by chance.
	growEvery = 30 * time.Second
)

// probeSizes are the lengths of datagrams that are tried, longest first. 1452
// carry a packet of 1420 bytes, and with IPv6's headers fill the 1500 of an
// Ethernet; 1372 fit the pod networks of 1400 and 1450, 1232 the 1280 that every
// IPv6 path has.
var probeSizes = []int{1452, 1372, 1232}

// way is how messages go.
type way uint32

const (
	byStream way = iota
	byBoth       // while UDP's trust lapses, or is not yet renewed after a pause
	byUDP
)

// datagram is a probe to send.
type datagram struct {
	to netip.AddrPort
	probe
}

// trust is what one end knows of UDP; moments are given to it.
type trust interface {
	// heard takes an authentic probe of the other end.
	heard(now time.Time, from netip.AddrPort, p probe) []datagram
	// tick is called when the moment has come that it returned before, or earlier.
	// busy tells that messages flow.
	tick(now time.Time, busy bool) (out []datagram, next time.Time)
	// verdict: how messages go, where to, and how long they may be.
	verdict(now time.Time) (w way, to netip.AddrPort, size int)
}

// prober is the session's end: it asks.
type prober struct {
	targets []netip.AddrPort // tried until one answers
	sizes   []int

	seq     uint64
	answer  uint64 // the newest heard
	sent    [64]sentProbe
	up      bool
	addr    netip.AddrPort // that answered
	size    int
	rtt     time.Duration
	at      time.Time // of the last answer
	asked   time.Time // of the first probe after the last answered one; zero: none
	probed  time.Time // when the last probes were sent
	grown   time.Time // when longer ones were tried
	tries   int       // rounds in vain
	dropped time.Time // when UDP was last given up; zero: never
	doubted bool      // probe at once
	busy    bool      // at the last tick
}

type sentProbe struct {
	datagram
	at       time.Time
	answered bool
}

func (p *prober) lapse() time.Duration { return min(max(3*p.rtt, lapseMin), lapseMax) }

// every is the pause before the next probe.
func (p *prober) every(now time.Time, busy bool) time.Duration {
	switch {
	case p.up && !p.asked.IsZero() && now.Sub(p.asked) > p.lapse():
		return soonEvery
	case p.up && (busy || !p.asked.IsZero()):
		return busyEvery
	case p.up:
		return idleEvery
	}
	most := downMost
	if !p.dropped.IsZero() && now.Sub(p.dropped) < knownFor {
		most = downKnown
	}
	return min(downFirst<<min(p.tries, 16), most)
}

func (p *prober) tick(now time.Time, busy bool) (out []datagram, next time.Time) {
	p.busy = busy
	if p.up && !p.asked.IsZero() && now.Sub(p.asked) >= silentAfter {
		p.up, p.dropped, p.tries, p.answer = false, now, 0, 0
	}
	if len(p.targets) == 0 {
		return nil, now.Add(time.Hour)
	}
	if p.doubted || !now.Before(p.probed.Add(p.every(now, busy))) {
		p.doubted = false
		out = p.ask(now)
	}
	next = p.probed.Add(p.every(now, busy))
	if p.up {
		// What changes the verdict meanwhile.
		moments := []time.Time{p.at.Add(freshFor)}
		if !p.asked.IsZero() {
			moments = append(moments, p.asked.Add(p.lapse()+time.Millisecond), p.asked.Add(silentAfter))
		}
		for _, m := range moments {
			if m.After(now) && m.Before(next) {
				next = m
			}
		}
	}
	return out, next
}

// ask makes a round of probes.
func (p *prober) ask(now time.Time) (out []datagram) {
	p.probed = now
	switch {
	case p.up:
		if p.size < p.sizes[0] && now.Sub(p.grown) >= growEvery {
			p.grown = now
			for _, size := range p.sizes {
				if size > p.size {
					out = append(out, p.one(now, p.addr, size))
				}
			}
		}
		out = append(out, p.one(now, p.addr, p.size))
	default:
		p.tries++
		p.grown = now
		for _, to := range p.targets {
			for _, size := range p.sizes {
				out = append(out, p.one(now, to, size))
			}
		}
	}
	if p.asked.IsZero() {
		p.asked = now
	}
	return out
}

func (p *prober) one(now time.Time, to netip.AddrPort, size int) datagram {
	p.seq++
	d := datagram{to, probe{size: size, seq: p.seq, answer: p.answer, next: idleEvery}}
	if p.busy {
		d.next = busyEvery
	}
	p.sent[p.seq%uint64(len(p.sent))] = sentProbe{datagram: d, at: now}
	return d
}

func (p *prober) heard(now time.Time, from netip.AddrPort, a probe) []datagram {
	s := &p.sent[a.seq%uint64(len(p.sent))]
	if a.seq == 0 || a.answer == 0 || s.seq != a.seq || s.answered || s.to != from || s.size != a.size || now.Sub(s.at) > silentAfter {
		return nil // not asked, too late, or from elsewhere
	}
	s.answered = true
	if p.up && from != p.addr {
		return nil
	}
	news := !p.up || a.size > p.size || p.busy && now.Sub(p.at) >= freshFor
	if !p.up || a.size > p.size {
		p.addr, p.size = from, a.size
	}
	if a.size == p.size {
		p.answer = a.answer
	}
	p.up, p.tries, p.at, p.rtt = true, 0, now, now.Sub(s.at)
	p.asked = time.Time{}
	for _, later := range p.sent {
		if later.seq > a.seq && !later.answered && later.to == from && later.size <= p.size && (p.asked.IsZero() || later.at.Before(p.asked)) {
			p.asked = later.at
		}
	}
	if !news {
		return nil
	}
	// The agent waits to learn that it is heard.
	out := p.one(now, p.addr, p.size)
	p.probed = now
	if p.asked.IsZero() {
		p.asked = now
	}
	return []datagram{out}
}

func (p *prober) verdict(now time.Time) (way, netip.AddrPort, int) {
	switch {
	case !p.up:
		return byStream, p.addr, 0
	case now.Sub(p.at) >= freshFor || !p.asked.IsZero() && now.Sub(p.asked) > p.lapse():
		return byBoth, p.addr, p.size
	}
	return byUDP, p.addr, p.size
}

// answerer is the agent's end: it answers, and trusts UDP while the session says
// that it hears the answers.
type answerer struct {
	seq     uint64 // of the newest probe
	seen    uint64 // bit n: the probe n before it was heard too
	answer  uint64 // number of the last answer
	answers [16]sentProbe
	from    netip.AddrPort // where the newest probe came from
	next    time.Duration  // when the session means to probe again

	confirmed uint64         // the newest answer that was heard
	at        time.Time      // when it was sent
	addr      netip.AddrPort // where that answer was sent
	size      int            // and its length
}

func (a *answerer) heard(now time.Time, from netip.AddrPort, p probe) []datagram {
	if p.size > probeSizes[0] || !a.fresh(p.seq) {
		return nil
	}
	if p.seq == a.seq {
		a.from, a.next = from, min(p.next, idleEvery)
		s := a.answers[p.answer%uint64(len(a.answers))]
		if p.answer != 0 && s.answer == p.answer && s.to == from && (p.answer > a.confirmed || s.size > a.size) {
			a.confirmed, a.at, a.addr, a.size = p.answer, s.at, from, s.size
		}
	}
	a.answer++
	d := datagram{from, probe{size: p.size, seq: p.seq, answer: a.answer}}
	a.answers[a.answer%uint64(len(a.answers))] = sentProbe{datagram: d, at: now}
	return []datagram{d}
}

// fresh tells a probe from a repetition, by the network or by an attacker: the
// window of RFC 4303 section 3.4.3.
func (a *answerer) fresh(seq uint64) bool {
	if seq > a.seq {
		a.seen = a.seen<<min(seq-a.seq, 64) | 1
		a.seq = seq
		return true
	}
	bit := uint64(1) << min(a.seq-seq, 64)
	if bit == 0 || a.seen&bit != 0 {
		return false
	}
	a.seen |= bit
	return true
}

func (a *answerer) tick(now time.Time, _ bool) (out []datagram, next time.Time) {
	next = now.Add(time.Hour)
	for _, m := range []time.Time{a.at.Add(freshFor), a.at.Add(a.silent())} {
		if !a.at.IsZero() && m.After(now) && m.Before(next) {
			next = m
		}
	}
	return nil, next
}

// silent is how old the newest answer may be that was heard: the probe which said
// so came one pause after it, and the next is due after another.
func (a *answerer) silent() time.Duration { return 2*a.next + silentAfter }

func (a *answerer) verdict(now time.Time) (way, netip.AddrPort, int) {
	age := now.Sub(a.at)
	switch {
	case a.confirmed == 0 || age >= a.silent():
		return byStream, a.from, 0
	case a.from != a.addr || age >= freshFor:
		return byBoth, a.from, a.size
	}
	return byUDP, a.from, a.size
}

// doubt: the network has changed.
func (p *prober) doubt(now time.Time) {
	p.doubted, p.tries = true, 0
	if p.up {
		p.at = now.Add(-freshFor)
	}
}

// hurry has a probe sent, if the last one is not just under way.
func (p *prober) hurry(now time.Time) {
	if now.Sub(p.probed) >= soonEvery {
		p.doubted = true
	}
}

// setTargets begins anew, at once, unless the one that answers is among them.
func (p *prober) setTargets(targets []netip.AddrPort, sizes []int) {
	if slices.Equal(p.targets, targets) {
		return
	}
	p.targets, p.sizes = slices.Clone(targets), sizes
	if p.up && slices.Contains(targets, p.addr) {
		return
	}
	p.up, p.answer, p.tries, p.doubted, p.dropped = false, 0, 0, true, time.Time{}
	p.asked = time.Time{}
}
