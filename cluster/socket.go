package cluster

import (
	"bufio"
	"net"
	"sync"
	"time"
)

// socketBuffer is what one system call reads or writes: a super-packet that has
// become a WebSocket message, with what TLS adds to it.
const socketBuffer = 96 << 10

// socket is a TCP connection below TLS. crypto/tls writes and reads each record
// of 16 KiB by itself: for a super-packet that is four segments, and four times
// the work for whoever is at the other end. Between hold and release writes are
// gathered, and a read takes what is there.
type socket struct {
	net.Conn
	r *bufio.Reader

	mu   sync.Mutex // guards writes
	held bool
	buf  []byte
}

func newSocket(c net.Conn) *socket {
	return &socket{Conn: c, r: bufio.NewReaderSize(c, socketBuffer)}
}

// NetConn is the connection below, for who wants to know its state.
func (s *socket) NetConn() net.Conn { return s.Conn }

func (s *socket) Read(p []byte) (int, error) { return s.r.Read(p) }

func (s *socket) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.held {
		return s.Conn.Write(p)
	}
	if len(s.buf)+len(p) > socketBuffer {
		if err := s.flush(); err != nil {
			return 0, err
		}
	}
	s.buf = append(s.buf, p...)
	return len(p), nil
}

// SetWriteDeadline waits for the write under way: the deadline of an answer to a
// ping is not its own.
func (s *socket) SetWriteDeadline(t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.Conn.SetWriteDeadline(t)
}

// hold gathers what is written until release.
func (s *socket) hold() {
	s.mu.Lock()
	s.held = true
	s.mu.Unlock()
}

// release writes what was gathered; the error is that write's.
func (s *socket) release() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.held = false
	return s.flush()
}

// flush writes what was gathered; s.mu is held.
func (s *socket) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	_, err := s.Conn.Write(s.buf)
	s.buf = s.buf[:0]
	return err
}
