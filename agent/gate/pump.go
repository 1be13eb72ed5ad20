package gate

import (
	"errors"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/internal/nonblock"
)

// chunk is what is moved at once, in bytes.
const chunk = 64 << 10

// chunks are buffers that are held while bytes are moved, never while one waits.
var chunks = sync.Pool{New: func() any { return new([chunk]byte) }}

// errTakeOver: the bytes that come are another's to move.
var errTakeOver = errors.New("taken over")

// pump moves bytes from one TCP connection to another. It looks at what lies in
// the one's queue, writes of it what the other takes, and only then takes that
// off the queue. So a pump that waits, for the one or the other, holds no buffer
// and no byte, and may stop at any time without loss. (splice(2), with two
// pipes for each connection, would hold up to 64 KiB in each, and show neither
// where a message begins nor when the last byte passed.)
type pump struct {
	src, dst *net.TCPConn
	in, out  syscall.RawConn

	// before is called before each wait; limit tells how much of b may be moved,
	// 0: all of it is another's; moved is called with what was. Any may be nil
	// but limit.
	before func() error
	limit  func(b []byte) int
	moved  func(b []byte)

	// Of the step under way. The steps are made once, since closures would be
	// allocated for each chunk.
	read, write, wait func(fd uintptr) bool
	buf               []byte
	n                 int
	end, full         bool
	err               error
}

func newPump(src, dst *net.TCPConn) (*pump, error) {
	p := &pump{src: src, dst: dst}
	var err error
	if p.in, err = src.SyscallConn(); err != nil {
		return nil, err
	}
	if p.out, err = dst.SyscallConn(); err != nil {
		return nil, err
	}
	p.read, p.write, p.wait = p.readStep, p.writeStep, func(fd uintptr) bool { return polled(fd, unix.POLLOUT) }
	return p, nil
}

// run moves bytes until the source's FIN, or an error of either side.
func (p *pump) run() error {
	for {
		if p.before != nil {
			if err := p.before(); err != nil {
				return err
			}
		}
		p.end, p.full, p.err = false, false, nil
		err := p.in.Read(p.read)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			// Somebody wants before to be called.
			if err := p.src.SetReadDeadline(time.Time{}); err != nil {
				return err
			}
			continue
		case err != nil:
			return err
		case p.err != nil:
			return p.err
		case p.end:
			return nil
		case p.full:
			if err := p.waitForRoom(); err != nil {
				return err
			}
		}
	}
}

func (p *pump) readStep(fd uintptr) bool {
	b := chunks.Get().(*[chunk]byte)
	defer chunks.Put(b)
	n, err := nonblock.Peek(fd, b[:])
	switch {
	case err == syscall.EAGAIN:
		return false
	case err != nil:
		p.err = os.NewSyscallError("recv", err)
		return true
	case n == 0:
		p.end = true
		return true
	}
	p.buf = b[:n]
	defer func() { p.buf = nil }()
	n = p.limit(p.buf)
	if n == 0 {
		p.err = errTakeOver
		return true
	}
	p.buf = p.buf[:n]
	if err := p.out.Write(p.write); err != nil {
		p.err = err // closed
		return true
	}
	if p.err == syscall.EAGAIN {
		p.err, p.full = nil, true
		return true
	}
	if p.err != nil {
		p.err = os.NewSyscallError("send", p.err)
		return true
	}
	for taken := 0; taken < p.n; {
		n, err := nonblock.Discard(fd, p.n-taken)
		if err != nil {
			p.err = os.NewSyscallError("recv", err)
			return true
		}
		taken += n
	}
	p.moved(p.buf[:p.n])
	return true
}

func (p *pump) writeStep(fd uintptr) bool {
	p.n, p.err = nonblock.Write(fd, p.buf)
	return true
}

// lookEvery is how often a pump that waits for room looks whether the source is
// still there: of a RST nobody else would tell it.
const lookEvery = 5 * time.Second

// waitForRoom waits until the destination takes bytes.
func (p *pump) waitForRoom() error {
	for {
		if err := p.dst.SetWriteDeadline(time.Now().Add(lookEvery)); err != nil {
			return err
		}
		err := p.out.Write(p.wait)
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return errors.Join(err, p.dst.SetWriteDeadline(time.Time{}))
		}
		gone := false
		if err := p.in.Control(func(fd uintptr) { gone = polled(fd, 0) }); err != nil {
			return err
		}
		if gone {
			return os.NewSyscallError("recv", syscall.ECONNRESET)
		}
	}
}

// polled tells whether fd has one of events, or an error.
func polled(fd uintptr, events int16) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: events}}
	for {
		n, err := unix.Poll(fds, 0)
		if err != unix.EINTR {
			return n > 0 && fds[0].Revents&(events|unix.POLLERR) != 0 || err != nil
		}
	}
}
