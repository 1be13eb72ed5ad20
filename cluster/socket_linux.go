package cluster

import (
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// userTimeout is how long sent data may stay unacknowledged before the kernel
// gives the connection up (tcp(7)): a dead path is noticed long before the
// kernel's own 15 minutes, and a carrier has something to redial for.
const userTimeout = 20 * time.Second

// socketOptions prepares a carrier's socket. BBR keeps the path's queue short
// and its rate up under loss; where the kernel has it not, or does not allow it
// here (net.ipv4.tcp_allowed_congestion_control), the default stays. TCP_NODELAY
// is Go's default.
func socketOptions(_, _ string, conn syscall.RawConn) error {
	return conn.Control(func(fd uintptr) {
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
		_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "bbr")
	})
}
