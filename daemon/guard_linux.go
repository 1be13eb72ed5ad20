package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/router"
	"golang.org/x/sys/unix"
)

// A guard lives while /etc/resolv.conf names a forwarder of ours. It holds the
// read end of a pipe: when that ends without the daemon having said goodbye,
// the daemon is dead and the guard gives the machine its names back. It is a
// session leader and ignores the signals that end a service.
type guard struct {
	cmd  *exec.Cmd
	pipe *os.File
}

// goodbye is what the daemon says to a guard that is no longer needed.
const goodbye = 'q'

func startGuard(cfg Config) (*guard, error) {
	if len(cfg.Guard) == 0 {
		return nil, errors.New("no guard program is configured")
	}
	read, write, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("making the guard's pipe: %w", err)
	}
	defer read.Close()
	cmd := exec.Command(cfg.Guard[0], cfg.Guard[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = read, os.Stdout, os.Stderr
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		write.Close()
		return nil, fmt.Errorf("starting the guard of the machine's names: %w", err)
	}
	return &guard{cmd: cmd, pipe: write}, nil
}

// dismiss ends the guard and waits for it.
func (g *guard) dismiss() {
	g.pipe.Write([]byte{goodbye})
	g.pipe.Close()
	g.cmd.Wait()
}

// Guard is the guard's own program: it waits on stdin for the daemon's goodbye
// or death, and after a death removes what is left, unless another daemon has
// begun and done so.
func (d *Daemon) Guard(ctx context.Context, stdin io.Reader) error {
	var b [1]byte
	if n, _ := stdin.Read(b[:]); n == 1 && b[0] == goodbye {
		return nil
	}
	d.cfg.Log.Warn("culvertd died: giving the machine its names back")
	// A dying process may close the pipe a moment before it lets go of the lock.
	unlock, err := lock(ctx, d.cfg.Socket, guardWait)
	if err != nil {
		return nil // the next daemon holds it, and has cleaned up
	}
	defer unlock()
	if _, err := router.RestoreDNS(d.cfg.Router); err != nil {
		d.cfg.Log.Error("giving names back", "error", err)
	}
	return d.clean(ctx)
}

// lock makes this the only process that changes the machine for Culvert. The
// kernel releases it with the process, however that ends.
func lock(ctx context.Context, socket string, wait time.Duration) (unlock func(), err error) {
	dir := filepath.Dir(socket)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("making the lock's folder: %w", err)
	}
	path := filepath.Join(dir, "culvertd.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock: %w", err)
	}
	for deadline := time.Now().Add(wait); ; sleep(ctx, 50*time.Millisecond) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if ctx.Err() != nil || !time.Now().Before(deadline) {
			f.Close()
			return nil, &api.Error{Code: api.CodeDaemon, Message: "another culvertd is running (it holds " + path + ")", Hint: "culvert status; sudo systemctl stop culvertd"}
		}
	}
}

func supported() error {
	if os.Geteuid() != 0 {
		return &api.Error{Code: api.CodeDenied, Message: "culvertd changes routes and DNS settings and must run as root", Hint: "sudo systemctl start culvertd   (without systemd: sudo culvertd)"}
	}
	return nil
}
