package carrier

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// pingEvery is how often an idle stream is pinged: often enough that the
	// shortest idle limits of load balancers (60 s) never pass.
	pingEvery = 5 * time.Second
	// askEvery is how often a stream is pinged that owes us an answer, and for
	// doubtFor after a Doubt.
	askEvery = time.Second
	doubtFor = 5 * time.Second
	// deadAfter is how long the other end may be silent after we sent something,
	// data or a ping, before the stream counts as lost. TCP itself would take 15
	// minutes. Silence alone is not enough, see watch: on a slow link a ping waits
	// behind the data before it. Four retransmissions of a lost segment fit in.
	deadAfter = 3 * time.Second
	// lostAfter is how long it may be silent while the path acknowledges a backlog
	// of what we send, with our pings somewhere in it.
	lostAfter = 10 * time.Second
	// backlog, in bytes, is more than the pings alone make.
	backlog = 4 << 10
	// readBuffer holds eight frames of the longest size: what one read brings.
	readBuffer = 512 << 10
	// writeChunk is what is gathered into one Write. 256 KiB amortise the three
	// writes per frame of SPDY; another writer (a handshake) waits for one chunk
	// at most.
	writeChunk = 256 << 10
	// closeGrace is how long an ending stream tries to tell the other end why.
	closeGrace = 250 * time.Millisecond
)

// Why a stream ended.
var (
	ErrSilent   = errors.New("the other end was silent")
	ErrReplaced = errors.New("replaced by another stream")

	errMoved = errors.New("the sender goes on in another stream")
)

// ClosedError is the reason that the other end gave for ending a stream.
type ClosedError struct{ Reason string }

func (e *ClosedError) Error() string { return "closed by the other end: " + e.Reason }

// Dialer is one way to the agent: port-forward, later others. The net.Conn it
// makes need not know deadlines, but its Close must release blocked reads and
// writes.
type Dialer interface {
	// Name is what status shows, e.g. "port-forward (WebSocket)".
	Name() string
	Dial(ctx context.Context) (net.Conn, error)
}

// Stream is one introduced byte stream between a session and its agent, made by
// Dial or Accept. Attach it to a Bind, which reads and writes it. All methods
// may be called at any time from any goroutine.
type Stream struct {
	c       net.Conn
	started time.Time

	in      frameReader // of the one goroutine that reads
	drained atomic.Bool // the other end sends nothing more here

	wmu   sync.Mutex // guards writes to c
	out   []byte
	moved bool // we send nothing more here

	once   sync.Once
	done   chan struct{}
	err    error     // set before done is closed, as is
	ended  time.Time // when it was
	reason string
	wg     sync.WaitGroup

	pongs chan uint64   // capacity 1: the newest ping to answer
	pings chan struct{} // capacity 1: send one now
	beat  chan struct{} // capacity 1: liveness was changed

	ping, dead atomic.Int64 // durations
	// Moments on the clock of started; 0: none.
	waiting    atomic.Int64 // since when one read has blocked
	asked      atomic.Int64 // when the first thing was sent after the last that came
	doubt      atomic.Int64 // of the last Doubt
	pinged     atomic.Int64 // of the last ping
	rtt        atomic.Int64
	sent, rcvd atomic.Uint64
}

func newStream(c net.Conn) *Stream {
	s := &Stream{
		c: c, started: time.Now(), in: frameReader{src: c}, done: make(chan struct{}),
		pongs: make(chan uint64, 1), pings: make(chan struct{}, 1), beat: make(chan struct{}, 1),
	}
	s.ping.Store(int64(pingEvery))
	s.dead.Store(int64(deadAfter))
	return s
}

// start starts the goroutines of an introduced stream.
func (s *Stream) start() {
	s.wg.Add(2)
	go s.watch()
	go s.answer()
}

// Done is closed when the stream has ended; Err says why.
func (s *Stream) Done() <-chan struct{} { return s.done }

// Err is why the stream ended, nil while it lives.
func (s *Stream) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

// Close ends the stream and its connection and waits. It is idempotent.
func (s *Stream) Close() { s.CloseFor("") }

// CloseFor is Close, with a reason that the other end is told if it listens.
func (s *Stream) CloseFor(reason string) {
	s.end(net.ErrClosed, reason)
	s.wg.Wait()
}

// RTT is the last in-band round trip, 0 before the first.
func (s *Stream) RTT() time.Duration { return time.Duration(s.rtt.Load()) }

// Sent and Received count bytes with their frames' headers.
func (s *Stream) Sent() uint64     { return s.sent.Load() }
func (s *Stream) Received() uint64 { return s.rcvd.Load() }

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

// LocalAddr is this end's address of the connection.
func (s *Stream) LocalAddr() net.Addr { return s.c.LocalAddr() }

// Break ends the stream with err, without waiting: its owner knows that it is
// lost, for instance because the machine no longer has its address.
func (s *Stream) Break(err error) { s.end(err, "") }

// now is the clock of started, never 0.
func (s *Stream) now() int64 { return int64(max(time.Since(s.started), 1)) }

// end ends the stream without waiting; the first error stays.
func (s *Stream) end(err error, reason string) {
	s.once.Do(func() {
		s.err, s.reason, s.ended = err, reason, time.Now()
		close(s.done)
	})
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
		s.out = appendFrame(s.out[:0], typ, body[:])
		err := s.flush()
		s.wmu.Unlock()
		if err != nil {
			return
		}
	}
}

// flush writes s.out; s.wmu is held.
func (s *Stream) flush() error {
	s.asked.CompareAndSwap(0, s.now())
	n, err := s.c.Write(s.out)
	s.out = s.out[:0]
	s.sent.Add(uint64(n))
	if err != nil {
		s.end(fmt.Errorf("writing to the carrier: %w", err), "")
	}
	return err
}

// move says that nothing more is sent here, after what is being written.
func (s *Stream) move() {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.out = appendFrame(s.out[:0], frameMoved, nil)
	if s.flush() == nil {
		s.moved = true
	}
}

// write sends messages, blocking as long as the carrier pushes back, and returns
// how many. A frame that is half written when the stream ends dies with it. The
// error is errMoved if the rest belongs into another stream.
func (s *Stream) write(msgs [][]byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	written := 0
	for i, m := range msgs {
		if s.moved {
			return written, errMoved
		}
		s.out = append(appendHeader(s.out, frameData, len(m)), m...)
		last := i == len(msgs)-1
		if !last && len(s.out)+headerLen+len(msgs[i+1]) <= writeChunk {
			continue
		}
		if err := s.flush(); err != nil {
			return written, err
		}
		written = i + 1
		if !last {
			// Let a waiting handshake or pong in between.
			s.wmu.Unlock()
			s.wmu.Lock()
		}
	}
	return written, nil
}

// read waits for messages and returns all that are there, at least one. Only
// one goroutine may read at a time.
func (s *Stream) read(msgs [][]byte, sizes []int) (int, error) {
	n := 0
	for {
		for n < len(msgs) {
			typ, body, ok, err := s.in.next()
			if err != nil {
				s.end(fmt.Errorf("reading from the carrier: %w", err), "broken frame")
				return n, err
			}
			if !ok {
				break
			}
			if typ != frameData {
				if err := s.control(typ, body); err != nil {
					return n, err
				}
				continue
			}
			if len(body) > 0 && len(body) <= maxMessage && len(body) <= len(msgs[n]) {
				sizes[n] = copy(msgs[n], body)
				n++
			}
		}
		if n > 0 {
			return n, nil
		}
		select {
		case <-s.done:
			return 0, s.err
		default:
		}
		if s.drained.Load() {
			return 0, errMoved
		}
		before := s.in.w - s.in.r
		s.waiting.Store(int64(max(time.Since(s.started), 1)))
		err := s.in.fill(readBuffer)
		s.waiting.Store(0)
		if err != nil {
			s.end(fmt.Errorf("reading from the carrier: %w", err), "")
			return 0, err
		}
		s.rcvd.Add(uint64(s.in.w - s.in.r - before))
		s.asked.Store(0)
	}
}

// control handles a frame that is not data, in the goroutine that reads.
func (s *Stream) control(typ byte, body []byte) error {
	switch typ {
	case framePing:
		if len(body) != 8 {
			break
		}
		select {
		case <-s.pongs: // an older ping that was not answered yet
		default:
		}
		select {
		case s.pongs <- binary.BigEndian.Uint64(body):
		default:
		}
	case framePong:
		if len(body) != 8 {
			break
		}
		if d := time.Since(s.started) - time.Duration(binary.BigEndian.Uint64(body)); d > 0 && d < time.Hour {
			s.rtt.Store(int64(d))
		}
	case frameClose:
		err := &ClosedError{Reason: printable(body)}
		s.end(err, "")
		return err
	case frameMoved:
		s.drained.Store(true)
		return errMoved
	}
	return nil // a second introduction means nothing
}

// printable makes the other end's text safe for a terminal and a log.
func printable(b []byte) string {
	b = b[:min(len(b), maxReason)]
	out := make([]rune, 0, len(b))
	for _, r := range string(b) {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == 0xfffd {
			r = '?'
		}
		out = append(out, r)
	}
	return string(out)
}
