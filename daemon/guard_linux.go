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
// session leader and ignores the signals that end a service. One that somebody
// kills is started again.
type guard struct {
	cfg     Config
	leaving chan struct{} // closed by dismiss
	done    chan struct{} // closed when the last process has ended
}

// watchman is one process of a guard.
type watchman struct {
	cmd  *exec.Cmd
	pipe *os.File // write end
}

const (
	// goodbye is what the daemon says to a guard that is no longer needed.
	goodbye = 'q'
	// guardAgain is the pause before a guard that ended is started again.
	guardAgain = 200 * time.Millisecond
	// guardLeaves is how long a dismissed guard may take before it is killed.
	guardLeaves = 2 * time.Second
)

func startGuard(cfg Config) (*guard, error) {
	if len(cfg.Guard) == 0 {
		return nil, errors.New("no guard program is configured")
	}
	g := &guard{cfg: cfg, leaving: make(chan struct{}), done: make(chan struct{})}
	w, err := g.start()
	if err != nil {
		return nil, err
	}
	go g.keep(w)
	return g, nil
}

func (g *guard) start() (*watchman, error) {
	read, write, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("making the guard's pipe: %w", err)
	}
	defer read.Close()
	cmd := exec.Command(g.cfg.Guard[0], g.cfg.Guard[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = read, os.Stdout, os.Stderr
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		write.Close()
		return nil, fmt.Errorf("starting the guard of the machine's names: %w", err)
	}
	return &watchman{cmd, write}, nil
}

// keep replaces a process that ends, until dismiss.
func (g *guard) keep(w *watchman) {
	defer close(g.done)
	for {
		if w != nil && !g.attend(w) {
			return
		}
		select {
		case <-g.leaving:
			return
		case <-time.After(guardAgain):
		}
		var err error
		if w, err = g.start(); err != nil {
			g.cfg.Log.Error("keeping a guard of the machine's names", "error", err)
		}
	}
}

// attend waits for a process's end and returns whether another one is needed.
func (g *guard) attend(w *watchman) bool {
	defer w.pipe.Close()
	ended := make(chan error, 1)
	go func() { ended <- w.cmd.Wait() }()
	select {
	case err := <-ended:
		g.cfg.Log.Warn("the guard of the machine's names ended and is started again", "how", exitText(err))
		return true
	case <-g.leaving:
	}
	w.pipe.Write([]byte{goodbye}) // EPIPE from a dead one
	select {
	case <-ended:
	case <-time.After(guardLeaves):
		w.cmd.Process.Kill()
		<-ended
	}
	return false
}

// dismiss ends the guard and waits for it, at most a little over guardLeaves.
func (g *guard) dismiss() {
	close(g.leaving)
	<-g.done
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
