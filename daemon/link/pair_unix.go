//go:build unix && !linux

package link

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// socketPair takes the fork lock, because these systems cannot set
// close-on-exec in the same call.
func socketPair() ([2]int, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err == nil {
		unix.CloseOnExec(fds[0])
		unix.CloseOnExec(fds[1])
	}
	return fds, err
}
