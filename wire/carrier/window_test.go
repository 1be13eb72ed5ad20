package carrier

import (
	"testing"
	"time"
)

// road is a path in simulated time: a bottleneck with a queue, and a delay.
type road struct {
	w       *window
	now     time.Time
	rate    float64       // bytes per second
	delay   time.Duration // round trip without queue
	free    time.Time     // when the bottleneck is free again
	pending []parcel      // acknowledgements on their way
	total   uint64
	worst   time.Duration // longest time that a parcel took, since it was reset
}

type parcel struct {
	total  uint64
	at, by time.Time
}

func newRoad(rate float64, delay time.Duration) *road {
	r := &road{w: &window{}, now: time.Unix(1000, 0), rate: rate, delay: delay}
	r.free = r.now
	r.w.start()
	return r
}

// run sends packets of the size for d, as many as the window and limit (bytes
// per second, 0: none) let through, and returns the bytes per second acknowledged.
func (r *road) run(d time.Duration, size int, limit float64) float64 {
	end, before := r.now.Add(d), r.w.acked
	var tokens float64
	for begun := r.now; r.now.Before(end); r.now = r.now.Add(100 * time.Microsecond) {
		for len(r.pending) > 0 && !r.pending[0].by.After(r.now) {
			r.w.ackAt(r.pending[0].total, r.now)
			if d := r.pending[0].by.Sub(r.pending[0].at); d > r.worst {
				r.worst = d
			}
			r.pending = r.pending[1:]
		}
		for {
			if limit > 0 && tokens+float64(size) > r.now.Sub(begun).Seconds()*limit {
				break
			}
			if r.w.room(0) <= 0 {
				break
			}
			tokens += float64(size)
			r.w.wroteAt(size, r.now)
			r.total += uint64(size)
			if r.free.Before(r.now) {
				r.free = r.now
			}
			r.free = r.free.Add(time.Duration(float64(size) / r.rate * 1e9))
			// Acknowledgements wait for each other, up to ackDelay.
			by := r.free.Add(r.delay).Truncate(ackDelay).Add(ackDelay)
			r.pending = append(r.pending, parcel{r.total, r.now, by})
		}
	}
	return float64(r.w.acked-before) / d.Seconds()
}

func TestWindowFillsThePath(t *testing.T) {
	for _, c := range []struct {
		rate  float64
		delay time.Duration
	}{{12.5e6, 50 * time.Millisecond}, {12.5e6, time.Millisecond}, {2.5e6, 20 * time.Millisecond}, {2.5e6, 160 * time.Millisecond}, {100e6, 5 * time.Millisecond}} {
		for _, size := range []int{1500, 20_000, 65_000} {
			r := newRoad(c.rate, c.delay)
			r.run(3*time.Second, size, 0)
			r.worst = 0
			if got := r.run(30*time.Second, size, 0); got < 0.97*c.rate {
				t.Errorf("%.3g B/s, %v, %d-byte packets: %.3g B/s only; window %d, rate %.3g, min %v", c.rate, c.delay, size, got, r.w.size, r.w.rate, r.w.minRTT)
			}
			// The window opens at once after a probe, so that what it holds is in the
			// queue for a moment.
			if most := 2*c.delay + 2*headroom + time.Duration(2*float64(size)/c.rate*1e9); r.worst > most {
				t.Errorf("%.3g B/s, %v, %d-byte packets: a packet took %v", c.rate, c.delay, size, r.worst)
			}
		}
	}
}

// TestWindowFollowsThePath: a path that becomes longer or slower is learned
// within seconds, and one that gets better at once.
func TestWindowFollowsThePath(t *testing.T) {
	r := newRoad(12.5e6, time.Millisecond)
	r.run(5*time.Second, 20_000, 0)
	for _, c := range []struct {
		rate  float64
		delay time.Duration
	}{{12.5e6, 50 * time.Millisecond}, {2.5e6, 50 * time.Millisecond}, {25e6, 150 * time.Millisecond}, {25e6, 10 * time.Millisecond}} {
		r.rate, r.delay = c.rate, c.delay
		r.run(6*time.Second, 20_000, 0)
		r.worst = 0
		if got := r.run(5*time.Second, 20_000, 0); got < 0.85*c.rate { // with a probe in these 5 s
			t.Errorf("%.3g B/s, %v: %.3g B/s only; window %d, rate %.3g, min %v", c.rate, c.delay, got, r.w.size, r.w.rate, r.w.minRTT)
		}
		if r.worst > 2*c.delay+100*time.Millisecond {
			t.Errorf("%.3g B/s, %v: a packet took %v", c.rate, c.delay, r.worst)
		}
	}
}
