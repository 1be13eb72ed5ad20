package carrier

import (
	"encoding/binary"
	"fmt"
	"time"
)

// SetLiveness changes how often an idle stream is pinged and how long it may
// leave that unanswered. The defaults are 5 s and 3 s.
func (s *Stream) SetLiveness(ping, dead time.Duration) {
	s.ping.Store(int64(ping))
	s.dead.Store(int64(dead))
	select {
	case s.beat <- struct{}{}:
	default:
	}
}

// Doubt pings now, and each second for a while: the network has changed, or the
// machine has slept. A stream that does not answer then ends with ErrSilent.
func (s *Stream) Doubt() {
	s.doubt.Store(s.now())
	select {
	case s.pings <- struct{}{}:
	default:
	}
}

// watch ends a stream that is silent, and closes the connection of one that has
// ended. Closing is here, and not in end, because the Close of a TLS or SPDY
// connection may write and so block for a while.
//
// Silent means: we sent something, nothing at all came since, and nobody keeps
// us from reading. On a slow link answers wait behind bulk, so as long as the
// kernel's TCP works off a backlog the stream has lostAfter. A process that
// did not run for a while (a loaded machine, a sleep) blames nobody for it.
func (s *Stream) watch() {
	defer s.wg.Done()
	every := func() time.Duration { return time.Duration(s.dead.Load()) / 10 }
	tick := time.NewTicker(every())
	defer tick.Stop()
	var path ackCounter
	path.find(s.c)
	var acked uint64
	moved, looked := time.Now(), time.Now()
	for {
		select {
		case <-s.done:
			if s.reason != "" && s.wmu.TryLock() {
				if s.writing {
					s.wmu.Unlock()
					_ = s.c.Close()
					return
				}
				release := time.AfterFunc(closeGrace, func() { s.c.Close() })
				_, _ = s.c.Write(appendFrame(nil, frameClose, []byte(s.reason[:min(len(s.reason), maxReason)])))
				release.Stop()
				s.wmu.Unlock()
			}
			_ = s.c.Close()
			return
		case <-s.beat:
			tick.Reset(every())
			select {
			case s.pings <- struct{}{}: // and answer takes the new interval
			default:
			}
			continue
		case <-tick.C:
		}
		dead := time.Duration(s.dead.Load())
		if n, waits := path.look(); n != acked {
			acked = n
			if waits > backlog {
				moved = time.Now()
			}
		}
		late := time.Since(looked) > dead/2
		looked = time.Now()
		asked, waiting := s.asked.Load(), s.waiting.Load()
		if late && asked != 0 {
			s.asked.CompareAndSwap(asked, s.now())
			continue
		}
		if asked == 0 || waiting == 0 {
			continue
		}
		silent := time.Duration(s.now() - max(asked, waiting))
		if silent > dead && (time.Since(moved) > dead || silent > lostAfter) {
			s.end(fmt.Errorf("%w for %v", ErrSilent, silent.Round(time.Second/10)), "")
			continue
		}
		doubt := s.doubt.Load()
		if silent > askEvery || doubt != 0 && s.now()-doubt < int64(doubtFor) {
			if s.now()-s.pinged.Load() >= int64(min(askEvery, dead/3)) {
				select {
				case s.pings <- struct{}{}:
				default:
				}
			}
		}
	}
}

// answer writes pings and pongs: never the goroutine that reads, since two ends
// that both write before they read on would block each other.
func (s *Stream) answer() {
	defer s.wg.Done()
	timer := time.NewTimer(0) // the first ping at once, for status to show an RTT
	defer timer.Stop()
	for {
		typ, v := byte(framePing), uint64(0)
		select {
		case <-s.done:
			return
		case v = <-s.pongs:
			typ = framePong
		case <-s.pings:
		case <-timer.C:
		}
		if typ == framePing {
			timer.Reset(time.Duration(s.ping.Load()))
			v = uint64(time.Since(s.started))
			s.pinged.Store(s.now())
		}
		var body [8]byte
		binary.BigEndian.PutUint64(body[:], v)
		s.wmu.Lock()
		s.out = appendFrame(s.out, typ, body[:])
		err := s.flush()
		s.wmu.Unlock()
		if err != nil {
			return
		}
	}
}
