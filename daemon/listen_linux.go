package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"sync"
	"unsafe"

	"github.com/culvert-dev/culvert/daemon/api"
	"golang.org/x/sys/unix"
)

// maxConns bounds the open connections of one user: a CLI has one or two, and
// nobody else in the group is kept out by one who opens many.
const maxConns = 32

// maxGroups is the kernel's NGROUPS_MAX.
const maxGroups = 65536

// listener accepts connections on the socket and finds out who calls.
type listener struct {
	*net.UnixListener
	gid int // of the group that may use the daemon, -1: root only

	mu    sync.Mutex
	conns map[int]int // open ones by uid
}

// conn is a connection with its caller.
type conn struct {
	net.Conn
	caller caller
	once   sync.Once
	done   func()
}

func (c *conn) Close() error {
	c.once.Do(c.done)
	return c.Conn.Close()
}

// listen makes the socket, mode 0660, for root and the group with this id. A
// socket file that a dead daemon left is replaced; the caller holds the lock
// that says that no daemon lives.
func listen(path string, gid int) (*listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("making the socket's folder: %w", err)
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, &api.Error{Code: api.CodeDaemon, Message: "another daemon answers at " + path, Hint: "sudo systemctl status culvertd"}
	}
	st, err := os.Lstat(path)
	switch {
	case err == nil && st.Mode()&os.ModeSocket == 0:
		return nil, fmt.Errorf("%s is there and is not a socket", path)
	case err == nil:
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("removing the socket of a dead daemon: %w", err)
		}
	case !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("looking for a socket: %w", err)
	}
	// Nobody may connect before owner and mode are right.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listening on %s: %w", path, err)
	}
	if gid >= 0 {
		if err := os.Chown(path, 0, gid); err != nil {
			l.Close()
			return nil, fmt.Errorf("giving the socket to its group: %w", err)
		}
	}
	if err := os.Chmod(path, 0o660); err != nil {
		l.Close()
		return nil, fmt.Errorf("setting the socket's mode: %w", err)
	}
	return &listener{UnixListener: l, gid: gid, conns: make(map[int]int)}, nil
}

// Accept returns the next connection; one too many of a user is closed.
func (l *listener) Accept() (net.Conn, error) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		who := identify(c)
		if who.err == nil && who.UID != 0 && !who.in(l.gid) {
			who.err = &api.Error{
				Code:    api.CodeDenied,
				Message: fmt.Sprintf("uid %d is not in the group that may use culvertd (%s)", who.UID, api.Group),
				Hint:    fmt.Sprintf("sudo usermod -aG %s $USER   and then log in again", api.Group),
			}
		}
		if l.enter(who.UID) {
			return &conn{Conn: c, caller: who, done: func() { l.leave(who.UID) }}, nil
		}
		c.Close()
	}
}

func (l *listener) enter(uid int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns[uid] >= maxConns {
		return false
	}
	l.conns[uid]++
	return true
}

func (l *listener) leave(uid int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conns[uid]--; l.conns[uid] <= 0 {
		delete(l.conns, uid)
	}
}

// identify asks the kernel who connected (unix(7), SO_PEERCRED; SO_PEERGROUPS
// are his supplementary groups). Whoever cannot be identified is nobody.
func identify(c *net.UnixConn) caller {
	who := caller{UID: -1, GID: -1}
	raw, err := c.SyscallConn()
	if err != nil {
		who.err = unidentified(err)
		return who
	}
	var cred *unix.Ucred
	var groups []uint32
	ctl := raw.Control(func(fd uintptr) {
		if cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			groups, err = peerGroups(int(fd))
		}
	})
	if err = errors.Join(ctl, err); err != nil {
		who.err = unidentified(err)
		return who
	}
	return caller{UID: int(cred.Uid), GID: int(cred.Gid), Groups: groups}
}

func unidentified(err error) error {
	return &api.Error{Code: api.CodeDenied, Message: "the kernel does not say who is calling: " + err.Error()}
}

func peerGroups(fd int) ([]uint32, error) {
	for n := uint32(64); ; {
		groups := make([]uint32, n)
		size := n * 4
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&groups[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == unix.ERANGE && size/4 > n && size/4 <= maxGroups:
			n = size / 4
		case errno != 0:
			return nil, fmt.Errorf("reading the caller's groups: %w", errno)
		default:
			return groups[:size/4], nil
		}
	}
}

// withCaller keeps a connection's caller in its requests' context.
func withCaller(ctx context.Context, c net.Conn) context.Context {
	if c, ok := c.(*conn); ok {
		return context.WithValue(ctx, callerKey{}, c.caller)
	}
	return ctx
}
