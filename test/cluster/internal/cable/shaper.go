package cable

import "time"

// shaper is one direction of the cable.
type shaper struct {
	busy time.Time // until when the sending end is taken
}

// schedule says when a frame that was sent now arrives, or that it never does.
// dice is a random number from 0 to 1.
func (s *shaper) schedule(f Faults, now time.Time, size int, dice float64) (arrival time.Time, ok bool) {
	if f.Cut || dice < f.Loss {
		return time.Time{}, false
	}
	if f.Rate == 0 {
		return now.Add(f.Delay), true
	}
	if s.busy.Before(now) {
		s.busy = now
	}
	// What waits is what the time until the sending end is free has room for. A
	// frame that finds too much before it is dropped, as by a router.
	if waiting := s.busy.Sub(now).Seconds() * f.Rate / 8; waiting > f.queue() {
		return time.Time{}, false
	}
	s.busy = s.busy.Add(time.Duration(float64(size) * 8 / f.Rate * float64(time.Second)))
	return s.busy.Add(f.Delay), true
}
