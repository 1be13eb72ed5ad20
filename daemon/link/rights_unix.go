//go:build unix

package link

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// daemonFD is where a session process finds its end of the link.
const daemonFD = 3

// sessionFiles is how many descriptors the daemon may send at once: the TUN
// device and two DNS sockets, and room for one more kind.
const sessionFiles = 4

// Pair makes a connected link: the daemon's end, and the file that becomes
// descriptor 3 of the session process. Both are close-on-exec; os/exec clears
// that for the one it passes on.
func Pair() (*Conn, *os.File, error) {
	fds, err := socketPair()
	if err != nil {
		return nil, nil, fmt.Errorf("making a socket pair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "link"), os.NewFile(uintptr(fds[1]), "link")
	sock, err := unixConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return New(sock, 0), theirs, nil
}

// FromDaemon returns the session's end of the link, which culvertd left at
// descriptor 3. The descriptor is taken away at once, so that programs that the
// session starts (kubeconfig exec plugins) do not inherit it.
func FromDaemon() (*Conn, error) {
	unix.CloseOnExec(daemonFD)
	var st unix.Stat_t
	if err := unix.Fstat(daemonFD, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return nil, errNotStarted
	}
	f := os.NewFile(daemonFD, "link")
	sock, err := unixConn(f)
	if err != nil {
		return nil, errNotStarted
	}
	return New(sock, sessionFiles), nil
}

// unixConn makes a network connection of a socket's file, which it closes.
func unixConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("using the link's socket: %w", err)
	}
	sock, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("the link is not a Unix socket")
	}
	return sock, nil
}

func rightsSpace(n int) int { return unix.CmsgSpace(4 * n) }

// receiveRights takes the descriptors out of control data. Whatever it could
// parse is returned even with an error, for the caller to close.
func receiveRights(oob []byte) (files []*os.File, err error) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("parsing control data: %w", err)
	}
	for i := range msgs {
		fds, ferr := unix.ParseUnixRights(&msgs[i])
		if ferr != nil {
			err = fmt.Errorf("parsing control data: %w", ferr)
			continue
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files, err
}

// withRights calls f with the control data that carries files. Each stays open
// until f has returned, even if another goroutine closes it meanwhile.
func withRights(files []*os.File, f func(oob []byte) error) error {
	fds := make([]int, 0, len(files))
	var nest func(int) error
	nest = func(i int) error {
		if i == len(files) {
			if len(fds) == 0 {
				return f(nil)
			}
			return f(syscall.UnixRights(fds...))
		}
		raw, err := files[i].SyscallConn()
		if err != nil {
			return fmt.Errorf("passing descriptor %s: %w", files[i].Name(), err)
		}
		var inner error
		if err := raw.Control(func(fd uintptr) {
			fds = append(fds, int(fd))
			inner = nest(i + 1)
		}); err != nil {
			return fmt.Errorf("passing descriptor %s: %w", files[i].Name(), err)
		}
		return inner
	}
	return nest(0)
}
