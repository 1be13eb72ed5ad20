package carrier

import (
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// ackCounter reads how far a TCP connection's sending is. Its zero value counts
// nothing.
type ackCounter struct{ raw syscall.RawConn }

// find looks for the socket below TLS, WebSocket and SPDY.
func (a *ackCounter) find(c net.Conn) {
	for range 8 { // layers
		switch below := c.(type) {
		case *net.TCPConn:
			a.raw, _ = below.SyscallConn() // fails on a closed one, which has nothing to count
			return
		case interface{ NetConn() net.Conn }:
			c = below.NetConn()
		default:
			return
		}
	}
}

// look returns how many bytes the far end has acknowledged (tcpi_bytes_acked,
// linux/tcp.h) and how many it has not (SIOCOUTQ, tcp(7)); zeros where there is
// no socket.
func (a *ackCounter) look() (acked, waits uint64) {
	if a.raw == nil {
		return 0, 0
	}
	_ = a.raw.Control(func(fd uintptr) {
		if info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
			acked = info.Bytes_acked
		}
		if n, err := unix.IoctlGetInt(int(fd), unix.SIOCOUTQ); err == nil {
			waits = uint64(n)
		}
	})
	return acked, waits
}
