package carrier

import (
	"slices"
	"sync"
	"time"
)

const (
	// firstWindow is what may be unacknowledged before anything was measured: one
	// super-packet, 5 ms at 100 Mbit/s. It grows by half a round trip's worth and
	// more with every round trip, as TCP's own slow start does.
	firstWindow = 64 << 10
	// minWindow keeps a slow path going: 20 ordinary packets.
	minWindow = 32 << 10
	// maxWindow bounds what is unacknowledged, whatever was measured: 1 Gbit/s
	// over 100 ms.
	maxWindow = 16 << 20
	// What the path may hold above its own round trip, as time: at least headroom,
	// for the jitter of two schedulers and of acknowledgements that wait for each
	// other, and on a long path a quarter of the round trip, which is how the
	// window grows, and jitter.
	headroom = 15 * time.Millisecond
	jitter   = 5 * time.Millisecond
	// probeEvery is how often the window is halved for a round trip, if nothing as
	// fast as the fastest was seen meanwhile: queues run empty, and a path that has
	// become longer shows. When all is slower than the window explains, it is done
	// every probeSoon.
	probeEvery = 10 * time.Second
	probeSoon  = time.Second
	// minPeriod is the shortest time over which the rate is measured: long against
	// a scheduler's and a relay's hesitations.
	minPeriod = 100 * time.Millisecond
	// periods is how many of them the rate is the largest of. With fewer, a moment
	// in which a relay or the other end had no processor makes the window smaller,
	// hence the rate, hence the window; with more, a path that has become slower
	// keeps a queue for longer.
	periods = 4
	// maxSamples bounds the writes whose acknowledgement is timed, 32 bytes each.
	// They are spaced by a fraction of the round trip, so that they reach.
	maxSamples = 256
	// flatPeriods end the beginning, in which each period should bring more, and the
	// window may be beginGain times as large as the rate is worth.
	flatPeriods = 3
	beginGain   = 3
)

// A window says how much may be on its way in one stream: sent and not
// acknowledged. It holds the delivery rate times a little more than the shortest
// round trip, as BBR does (draft-ietf-ccwg-bbr, sections 4.5.2 and 5.3.4.3): what the
// path itself takes, and not what the queues along it would. The stream's TCP
// has its own congestion control; this one keeps the data out of its socket
// buffer, where flows are indistinguishable.
type window struct {
	mu           sync.Mutex
	sent, acked  uint64 // bytes, running totals
	size         int    // bytes
	limited      bool   // it has held something back since the last sample
	samples      [maxSamples]sample
	head, n      int
	acknowledged func() // called after each progress, without the lock

	rate   float64          // bytes per second: the largest of rates
	rates  [periods]float64 // of the last limited periods, newest first
	minRTT time.Duration    // of the path without a queue
	minAt  time.Time        // when it was last seen

	periodAt                 time.Time
	periodAcked              uint64        // acked, when it began
	periodMin                time.Duration // shortest round trip in it
	periodAll, periodLimited int           // samples in it

	// flat counts the periods in which the rate has not grown by a quarter: after
	// flatPeriods of them the stream has begun, as in BBR's Startup (section 4.3.1.2).
	flat int

	probing             bool
	probeEnd            time.Time
	probeMin, probeFrom time.Duration // shortest round trip in the probe and before it
	probes              uint64
}

// sample is the moment at which a write began.
type sample struct {
	sent    uint64 // total with this write
	at      time.Time
	limited bool // the window had held something back
	idle    bool // nothing was under way
}

// wrote accounts for n bytes, before they are written.
func (w *window) wrote(n int) { w.wroteAt(n, time.Now()) }

func (w *window) wroteAt(n int, now time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	idle := w.sent == w.acked
	w.sent += uint64(n)
	if w.n == maxSamples || w.n > 0 && now.Sub(w.samples[(w.head+w.n-1)%maxSamples].at) < w.minRTT/64 {
		return
	}
	w.samples[(w.head+w.n)%maxSamples] = sample{w.sent, now, w.limited, idle}
	w.n++
	w.limited = false
}

// ack takes the peer's running total.
func (w *window) ack(total uint64) { w.ackAt(total, time.Now()) }

func (w *window) ackAt(total uint64, now time.Time) {
	w.mu.Lock()
	if total <= w.acked || total > w.sent {
		w.mu.Unlock()
		return // old, or a lie
	}
	w.begins(int(total - w.acked))
	w.acked = total
	var last sample
	found := false
	for w.n > 0 && w.samples[w.head].sent <= total {
		last, found = w.samples[w.head], true
		w.head = (w.head + 1) % maxSamples
		w.n--
	}
	if found {
		w.learn(last, now)
	}
	progress := w.acknowledged
	w.mu.Unlock()
	if progress != nil {
		progress()
	}
}

// learn updates the window by an acknowledged sample; mu is held.
func (w *window) learn(s sample, now time.Time) {
	rtt := max(now.Sub(s.at), time.Microsecond)
	if w.minRTT == 0 || rtt <= w.minRTT {
		w.minRTT, w.minAt = rtt, now
	}
	if w.periodMin == 0 || rtt < w.periodMin {
		w.periodMin = rtt
	}
	if w.probing && (w.probeMin == 0 || rtt < w.probeMin) {
		w.probeMin = rtt
	}
	w.periodAll++
	if s.limited {
		w.periodLimited++
	}
	if w.periodAt.IsZero() || s.idle && !s.limited {
		w.begin(now)
	} else if now.Sub(w.periodAt) >= w.period() {
		w.conclude(now)
	}
	if w.probing && now.After(w.probeEnd) {
		// What half the window did not shorten is the path. Else it was our queue,
		// and the path is no longer than it was.
		if w.probeMin < w.probeFrom*7/8 {
			w.probeMin = min(w.probeMin, w.minRTT)
		}
		w.minRTT, w.minAt, w.probing = w.probeMin, now, false
		w.begin(now)
	}
	size := int(min(max(w.rate*w.explained().Seconds(), minWindow), maxWindow))
	if w.flat < flatPeriods {
		size = max(size, w.size)
	}
	if w.probing {
		size = int(min(max(w.rate*w.minRTT.Seconds(), minWindow), maxWindow)) / 2
	}
	if size > w.size || w.rate > 0 && (s.limited || w.probing) {
		w.size = size // an application that sends little does not make it smaller
	}
}

// begins makes the window of a stream that has begun larger by what was
// acknowledged, so that it doubles with each round trip as the slow start of the
// TCP below does, which would otherwise end early for want of data; mu is held.
func (w *window) begins(acked int) {
	if w.flat >= flatPeriods || !w.limited {
		return
	}
	most := 4 * firstWindow
	if w.rate > 0 {
		most = int(beginGain * w.rate * w.explained().Seconds())
	}
	w.size = max(w.size, min(w.size+acked, most, maxWindow))
}

// conclude takes the delivery rate of the period that ends, and decides whether
// the path is to be probed; mu is held. The mean over two round trips or more is
// what it takes: acknowledgements come in bursts, and the largest of many short
// samples would be that of a burst.
func (w *window) conclude(now time.Time) {
	rate := float64(w.acked-w.periodAcked) / now.Sub(w.periodAt).Seconds()
	switch {
	case w.flat >= flatPeriods: // once over, it is over
	case rate > w.rate*5/4:
		w.flat = 0
	case w.periodLimited > w.periodAll/2:
		w.flat++
	}
	before := w.periodMin
	slow := before > w.explained()*5/4
	limited := w.periodLimited > w.periodAll/2
	// Slower counts only when a queue stands, longer than the one that is meant.
	// Otherwise the application was slow, or a probe, or somebody without a
	// processor; a smaller window would make the rate smaller, and that the window.
	if rate > w.rate || limited && before > w.explained() {
		copy(w.rates[1:], w.rates[:])
		w.rates[0] = rate
		if before > 2*w.explained() {
			w.rates = [periods]float64{rate} // no hesitation: a queue, and it is ours to keep short
		}
		w.rate = slices.Max(w.rates[:])
	}
	w.begin(now)
	if since := now.Sub(w.minAt); limited && !w.probing && (since > probeEvery || slow && since > probeSoon) {
		w.probing, w.probeMin, w.probeFrom = true, 0, before
		w.probeEnd = now.Add(before + w.minRTT + headroom)
		w.probes++
	}
}

// period is over how long the rate is measured; mu is held.
func (w *window) period() time.Duration {
	if w.flat < flatPeriods {
		return max(w.minRTT, minPeriod/4)
	}
	return max(2*w.minRTT, minPeriod)
}

// begin begins a period of measurement; mu is held.
func (w *window) begin(now time.Time) {
	w.periodAt, w.periodAcked, w.periodMin, w.periodAll, w.periodLimited = now, w.acked, 0, 0, 0
}

// explained is the round trip that a full window makes; mu is held.
func (w *window) explained() time.Duration {
	return w.minRTT + max(w.minRTT/4+jitter, headroom)
}

// pathRTT is the shortest round trip, 0 when it is not known.
func (w *window) pathRTT() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.minRTT
}

// explains is explained for others.
func (w *window) explains() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.explained()
}

// room is how many bytes may still be sent, beside those that are inside
// WireGuard.
func (w *window) room(inside int) int {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := w.size - int(w.sent-w.acked) - inside
	if n <= 0 {
		w.limited = true
	}
	return n
}

// report adds what is known to st.
func (w *window) report(st *Stats) {
	w.mu.Lock()
	defer w.mu.Unlock()
	st.Window, st.Unacknowledged, st.Rate, st.MinRTT = w.size, int(w.sent-w.acked), w.rate, w.minRTT
}

// start opens the window of a new stream.
func (w *window) start() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.size = firstWindow
}

// notify has progress called after each acknowledgement.
func (w *window) notify(progress func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.acknowledged = progress
}
