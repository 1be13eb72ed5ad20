//go:build unix

package session

import (
	"net"
	"syscall"
)

// receive gives each datagram of a connected socket to got, until an error of
// either. A buffer is in use only while there is a datagram.
func receive(socket *net.UDPConn, got func([]byte) error) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var rerr error
	step := func(fd uintptr) bool {
		buf := buffers.Get().(*[64 << 10]byte)
		defer buffers.Put(buf)
		var n int
		n, rerr = syscall.Read(int(fd), buf[:])
		switch rerr {
		case syscall.EAGAIN:
			return false
		case nil:
			rerr = got(buf[:n])
		case syscall.EINTR:
			rerr = nil
		}
		return true
	}
	for rerr == nil {
		if err := raw.Read(step); err != nil {
			return err
		}
	}
	return rerr
}
