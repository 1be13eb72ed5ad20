//go:build !linux

package carrier

import (
	"errors"
	"net"
	"net/netip"
	"os"
)

// socket is a UDP socket.
type socket struct {
	c   *net.UDPConn
	buf []byte // of the one goroutine that receives
}

func newSocket(c *net.UDPConn) (*socket, error) {
	return &socket{c: c, buf: make([]byte, 64<<10)}, nil
}

func (s *socket) probe(to netip.AddrPort, b []byte) error {
	_, err := s.c.WriteToUDPAddrPort(b, to)
	return err
}

// send sends messages and returns how many.
func (s *socket) send(to netip.AddrPort, msgs [][]byte) (int, error) {
	for i, m := range msgs {
		if _, err := s.c.WriteToUDPAddrPort(m, to); err != nil {
			return i, err
		}
	}
	return len(msgs), nil
}

// receive waits for a datagram and copies it to msgs if admit lets it in.
func (s *socket) receive(msgs [][]byte, sizes []int, admit func(netip.AddrPort, []byte) bool) (int, error) {
	n, from, err := s.c.ReadFromUDPAddrPort(s.buf)
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, net.ErrClosed) {
		return 0, net.ErrClosed
	}
	from = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	if err != nil || n > len(msgs[0]) || !admit(from, s.buf[:n]) {
		return 0, nil
	}
	sizes[0] = copy(msgs[0], s.buf[:n])
	return 1, nil
}
