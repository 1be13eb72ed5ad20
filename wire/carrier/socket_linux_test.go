package carrier

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// TestSocketFull: a send that finds the socket full ends, and the next one finds
// it as it was.
func TestSocketFull(t *testing.T) {
	c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort("127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := newSocket(c)
	if err != nil {
		t.Fatal(err)
	}
	to := c.LocalAddr().(*net.UDPAddr).AddrPort()
	send := s.write
	s.write = func(uintptr) bool { s.stall(); return false }
	begun := time.Now()
	ended := make(chan error, 1)
	go func() { _, err := s.send(to, [][]byte{{1}}); ended <- err }()
	select {
	case err = <-ended:
	case <-time.After(2 * silentAfter):
		t.Fatal("send waits without end")
	}
	if took := time.Since(begun); !errors.Is(err, os.ErrDeadlineExceeded) || took < silentAfter/2 {
		t.Errorf("%v after %v", err, took)
	}
	s.write = send
	if n, err := s.send(to, [][]byte{{1}}); n != 1 || err != nil {
		t.Errorf("after it: %d, %v", n, err)
	}
}
