package session

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/wire/carrier"
)

const (
	// settle gathers the events of one change: a new Wi-Fi is a dozen of them.
	settle = 50 * time.Millisecond
	// clockEvery is how often the two clocks are compared, and slept the
	// difference that means that the machine has slept: the wall clock went on and
	// the monotonic one did not (time package, clock_gettime(2)). A clock that was
	// set looks alike, and costs one ping.
	clockEvery = time.Second
	slept      = 5 * time.Second
)

// errMoved ends a stream whose address is no longer the machine's.
var errMoved = errors.New("this machine's address has changed")

// doubtLoop watches for what breaks carriers without a word, a changed network
// and a sleep, and has the stream looked at, or redialled, at once.
func (s *Session) doubtLoop(ctx context.Context) {
	changed := make(chan struct{}, 1)
	s.loops.Go(func() {
		err := watchNetwork(ctx, func() {
			select {
			case changed <- struct{}{}:
			default:
			}
		})
		if err != nil {
			s.log.Warn("watching the machine's network", "err", err)
		}
	})
	var clock sleepClock
	began := time.Now()
	tick := time.NewTicker(clockEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			switch away := clock.slept(time.Now(), time.Since(began)); {
			case away > slept:
				s.log.Info("the machine has slept", "for", away.Round(time.Second))
				s.doubtCarrier()
			case away < -slept:
				s.log.Info("the machine's clock was set back", "by", -away.Round(time.Second))
				s.renewKey()
			}
		case <-changed:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
			select {
			case <-changed:
			default:
			}
			s.log.Debug("the machine's network has changed")
			s.doubtCarrier()
		}
	}
}

// doubtCarrier asks the streams for a sign of life, ends them if the machine has
// not their address any more, and hurries a redial under way.
func (s *Session) doubtCarrier() {
	s.mu.Lock()
	streams := []*carrier.Stream{s.stream, s.bulk}
	s.mu.Unlock()
	for _, stream := range streams {
		if stream == nil || stream.Err() != nil {
			continue
		}
		if own, err := net.InterfaceAddrs(); err == nil && !hasAddr(own, stream.LocalAddr()) {
			stream.Break(errMoved)
		} else {
			stream.Doubt()
		}
	}
	if s.datagrams != nil {
		s.datagrams.Doubt()
	}
	select {
	case s.hurry <- struct{}{}:
	default:
	}
}

// hasAddr tells whether a socket's address is among a machine's; what cannot be
// told counts as yes.
func hasAddr(own []net.Addr, of net.Addr) bool {
	tcp, ok := of.(*net.TCPAddr)
	if !ok {
		return true
	}
	addr := tcp.AddrPort().Addr().Unmap().WithZone("")
	return !addr.IsValid() || addr.IsLoopback() || slices.ContainsFunc(own, func(a net.Addr) bool {
		p, err := netip.ParsePrefix(a.String())
		return err == nil && p.Addr().Unmap() == addr
	})
}

// sleepClock compares the wall clock with the monotonic one.
type sleepClock struct {
	wall time.Time
	mono time.Duration
}

// slept is how much farther the wall clock went than the monotonic one since the
// last call.
func (c *sleepClock) slept(wall time.Time, mono time.Duration) time.Duration {
	last := *c
	c.wall, c.mono = wall.Round(0), mono // without its own monotonic reading
	if last.wall.IsZero() {
		return 0
	}
	return c.wall.Sub(last.wall) - (mono - last.mono)
}
