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

	"github.com/culvert-dev/culvert/wire/queue"
)

const (
	// pingEvery is how often an idle stream is pinged at least: often enough that
	// the shortest idle limits of load balancers (60 s) never pass. An answer is
	// something sent, too, so two ends that are idle ask each other every askEvery.
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
	// ackBytes are acknowledged at once, and less after ackDelay, unless data
	// travels back meanwhile and takes the acknowledgement along: half a
	// super-packet keeps a full window moving, and who sends little and is answered
	// costs no extra write.
	ackBytes = 32 << 10
	ackDelay = 2 * time.Millisecond
	// On a path whose round trip is at least nudgeFrom, something follows each burst
	// after an eighth of it: a lone packet that is lost is repeated after 200 ms and
	// more, because there is nothing behind it whose arrival would tell (RFC 8985,
	// section 7.2).
	nudgeFrom = 20 * time.Millisecond
	// asideBytes bounds what a stream of the bulk lane has taken and not yet
	// written: as much as is inside WireGuard. Above it Send waits.
	asideBytes = 1 << 20
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

	lane  queue.Lane
	aside bool // a goroutine of its own writes, so that nobody waits for a slow carrier

	wmu     sync.Mutex // guards what follows, and writes to c
	out     []byte     // framed, to be written
	writing bool       // aside: being written, without wmu
	pushed  sync.Cond  // out or writing changed, or the stream has ended
	moved   bool       // we send nothing more here
	ackOut  uint64     // the last acknowledgement sent

	window window        // of what this end sends
	dataIn atomic.Uint64 // bytes of data frames received, to be acknowledged
	ackAt  atomic.Uint64 // ackOut, for the goroutine that reads
	acks   chan struct{} // capacity 1: acknowledge now
	late   *time.Timer   // of an acknowledgement that waits for more
	armed  atomic.Bool   // late runs
	nudge  *time.Timer   // of what follows a burst
	burst  bool          // nudge runs; wmu guards it

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
		acks: make(chan struct{}, 1),
	}
	s.pushed.L = &s.wmu
	s.ping.Store(int64(pingEvery))
	s.dead.Store(int64(deadAfter))
	return s
}

// start starts the goroutines of an introduced stream.
func (s *Stream) start() {
	s.window.start()
	s.late = time.AfterFunc(time.Hour, func() {
		s.armed.Store(false)
		s.acknowledge()
	})
	s.nudge = time.AfterFunc(time.Hour, s.follow)
	s.nudge.Stop()
	s.late.Stop()
	s.aside = s.lane == queue.Bulk
	s.wg.Add(3)
	go s.watch()
	go s.answer()
	go s.tell()
	if s.aside {
		s.wg.Add(1)
		go s.push()
	}
}

// Lane is the lane that the stream was introduced for.
func (s *Stream) Lane() queue.Lane { return s.lane }

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
		if s.late != nil {
			s.late.Stop()
			s.nudge.Stop()
		}
		go func() { // whoever holds wmu may be in a write, which only Close releases
			s.wmu.Lock()
			s.pushed.Broadcast()
			s.wmu.Unlock()
		}()
	})
}

// flush writes s.out, or has it written; s.wmu is held.
func (s *Stream) flush() error {
	if len(s.out) == 0 {
		return nil
	}
	s.asked.CompareAndSwap(0, s.now())
	if s.aside {
		s.pushed.Broadcast()
		return s.Err()
	}
	err := s.writeOut(s.out)
	s.out = s.out[:0]
	return err
}

func (s *Stream) writeOut(b []byte) error {
	n, err := s.c.Write(b)
	s.sent.Add(uint64(n))
	if err != nil {
		s.end(fmt.Errorf("writing to the carrier: %w", err), "")
	}
	return err
}

// push writes what flush left to it.
func (s *Stream) push() {
	defer s.wg.Done()
	var spare []byte
	s.wmu.Lock()
	defer s.wmu.Unlock()
	for {
		for len(s.out) == 0 && s.Err() == nil {
			s.pushed.Wait()
		}
		if s.Err() != nil {
			return
		}
		b := s.out
		s.out, s.writing = spare[:0], true
		s.wmu.Unlock()
		err := s.writeOut(b)
		s.wmu.Lock()
		s.writing = false
		s.pushed.Broadcast()
		if err != nil {
			return
		}
		if spare = b; cap(spare) > 2*asideBytes {
			spare = nil // do not keep the memory of a burst
		}
	}
}

// move says that nothing more is sent here, after what is being written.
func (s *Stream) move() {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	s.appendAck()
	s.out = appendFrame(s.out, frameMoved, nil)
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
	for written < len(msgs) {
		for s.aside && len(s.out) >= asideBytes && s.Err() == nil {
			s.pushed.Wait()
		}
		if s.moved {
			return written, errMoved
		}
		s.appendAck()
		before, n := len(s.out), written
		for n < len(msgs) && (n == written || len(s.out)+headerLen+len(msgs[n]) <= writeChunk) {
			s.out = append(appendHeader(s.out, frameData, len(msgs[n])), msgs[n]...)
			n++
		}
		s.window.wrote(len(s.out) - before)
		if err := s.flush(); err != nil {
			return written, err
		}
		if rtt := s.window.pathRTT(); rtt >= nudgeFrom && !s.burst {
			s.burst = true
			s.nudge.Reset(rtt / 8)
		}
		if written = n; written < len(msgs) && !s.aside {
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
	n, arrived := 0, 0
	defer func() { s.arrived(arrived) }()
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
			arrived += headerLen + len(body)
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
	case frameAck:
		if len(body) == 8 {
			s.window.ack(binary.BigEndian.Uint64(body))
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
