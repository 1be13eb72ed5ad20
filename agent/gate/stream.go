package gate

import (
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/internal/nonblock"
)

// smallBuffer is what holds a head and a small body, in bytes. A larger head gets a
// chunk.
const smallBuffer = 8 << 10

var smallBuffers = sync.Pool{New: func() any { return new([smallBuffer]byte) }}

// stream reads and writes a TCP connection of HTTP/1. While it waits and nothing is
// buffered it holds no buffer.
type stream struct {
	conn *net.TCPConn
	raw  syscall.RawConn
	out  *nonblock.Writer
	step func(fd uintptr) bool
	look func(fd uintptr)

	// small or big is there while bytes are; buf is either's.
	small *[smallBuffer]byte
	big   *[chunk]byte
	buf   []byte
	r, w  int // buf[r:w] is not used yet

	// Of the read under way.
	n   int
	err error
}

func newStream(c *net.TCPConn) (*stream, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, err
	}
	s := &stream{conn: c, raw: raw, out: nonblock.NewWriter(raw)}
	s.step = s.readStep
	s.look = func(fd uintptr) { s.n, s.err = nonblock.Pending(fd, 1) }
	return s, nil
}

// buffered is what was read and not used.
func (s *stream) buffered() []byte { return s.buf[s.r:s.w] }

// use takes n bytes off the buffer.
func (s *stream) use(n int) {
	if s.r += n; s.r == s.w {
		s.release()
	}
}

// release gives the buffer back, with all that is in it.
func (s *stream) release() {
	if s.small != nil {
		smallBuffers.Put(s.small)
	}
	if s.big != nil {
		chunks.Put(s.big)
		largeHeads.Add(-1)
	}
	s.small, s.big, s.buf, s.r, s.w = nil, nil, nil, 0, 0
}

// maxLargeHeads is how many connections may have a head of more than smallBuffer bytes
// under way: 16 MiB altogether, which whoever sends such heads slowly cannot exceed.
const maxLargeHeads = 256

var largeHeads atomic.Int64

// errFull: the buffer has maxHeadBytes, and no more fit; or too many others have one.
var errFull = &badMessage{http.StatusRequestHeaderFieldsTooLarge, "the head has more than 64 KiB"}

// fill waits for bytes and adds them to the buffer. What was buffered may move.
func (s *stream) fill() error {
	if s.buf != nil && s.w == len(s.buf) {
		switch {
		case s.r > 0:
			copy(s.buf, s.buffered())
			s.r, s.w = 0, s.w-s.r
		case s.big != nil:
			return errFull
		case largeHeads.Add(1) > maxLargeHeads:
			largeHeads.Add(-1)
			return errFull
		default:
			s.big = chunks.Get().(*[chunk]byte)
			copy(s.big[:], s.buffered())
			smallBuffers.Put(s.small)
			s.small, s.buf = nil, s.big[:]
		}
	}
	err := s.raw.Read(s.step)
	switch {
	case err != nil:
		s.trim()
		return err
	case s.err != nil:
		s.trim()
		return os.NewSyscallError("read", s.err)
	case s.n == 0:
		s.trim()
		return io.EOF
	}
	s.w += s.n
	return nil
}

func (s *stream) readStep(fd uintptr) bool {
	if s.buf == nil {
		s.small = smallBuffers.Get().(*[smallBuffer]byte)
		s.buf = s.small[:]
	}
	s.n, s.err = nonblock.Read(fd, s.buf[s.w:])
	if s.err != syscall.EAGAIN {
		return true
	}
	s.trim()
	return false
}

// trim gives the buffer back if nothing is in it.
func (s *stream) trim() {
	if s.r == s.w {
		s.release()
	}
}

// waits tells whether the other side has neither ended nor said anything.
func (s *stream) waits() bool {
	return len(s.buffered()) == 0 && s.raw.Control(s.look) == nil && s.err == syscall.EAGAIN
}

// write writes all of b.
func (s *stream) write(b []byte) error {
	_, err := s.out.Write(b)
	return err
}

// maxHeadTime is how long a request's head may take that has begun.
const maxHeadTime = time.Minute

// errHeadTime: it took longer.
var errHeadTime = &badMessage{http.StatusRequestTimeout, "the head did not come within a minute"}

// readHead waits for a whole head, which stays buffered, and tells how long it is.
// That of a request, which has begun, must be there in time.
func (s *stream) readHead(request bool) (n int, err error) {
	limited := false
	for seen := 0; ; {
		b := s.buffered()
		// The two bytes before may be part of the end.
		if n, err = headEnd(b, seen, request); n > 0 || err != nil {
			break
		}
		seen = len(b)
		if request && !limited && len(b) > 0 {
			limited = true
			_ = s.conn.SetReadDeadline(time.Now().Add(maxHeadTime)) // fails when it is closed, and so does the read
		}
		if err = s.fill(); err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = errHeadTime
			}
			break
		}
	}
	if limited {
		_ = s.conn.SetReadDeadline(time.Time{})
	}
	return n, err
}

// discard ends the connection so that what was written last is read: its other end
// may still be sending, and a reset would overtake.
func (s *stream) discard() {
	if s.conn.CloseWrite() != nil {
		return
	}
	_ = s.conn.SetReadDeadline(time.Now().Add(maxDiscard))
	left := maxDiscarded
	_ = s.raw.Read(func(fd uintptr) bool {
		for left > 0 {
			n, err := nonblock.Discard(fd, chunk)
			if err == syscall.EAGAIN {
				return false
			}
			if err != nil || n == 0 {
				return true
			}
			left -= n
		}
		return true
	})
}

// How long and how much discard reads.
const (
	maxDiscard   = 2 * time.Second
	maxDiscarded = 16 << 20
)
