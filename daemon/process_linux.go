package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"golang.org/x/sys/unix"
)

// linkGrace is how long a process may live on after it closed its link.
const linkGrace = 2 * time.Second

// process is one run of the session binary, as the user.
type process struct {
	pid    int
	link   *link.Conn
	cmd    *exec.Cmd
	output *os.File      // read end of its stdout and stderr
	copied chan struct{} // closed when output is read to its end
	gone   chan struct{} // closed when the session knows of its end
	hung   atomic.Bool   // it was killed because it did not answer

	mu     sync.Mutex
	reaped bool // its number may be another process's
}

// startProcess starts the session binary as the session's user.
func (v *supervisor) startProcess(s *session) (*process, error) {
	binary, err := checkBinary(v.cfg.SessionBinary)
	if err != nil {
		return nil, err
	}
	if s.account.UID == 0 {
		return nil, errRootSession
	}
	conn, theirs, err := link.Pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	read, write, err := os.Pipe()
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("making a pipe for the session's output: %w", err)
	}
	defer write.Close()

	cmd := exec.Command(binary, "session")
	cmd.Env = s.env
	cmd.Dir = homeOrRoot(s.account.Home)
	cmd.Stdout, cmd.Stderr = write, write
	cmd.ExtraFiles = []*os.File{theirs} // descriptor 3
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Credential: &syscall.Credential{Uid: uint32(s.account.UID), Gid: uint32(s.account.GID), Groups: s.account.Groups},
	}
	err = startUnprivileged(cmd)
	if err != nil && cmd.Dir != "/" {
		// The home may be one that the user himself cannot enter.
		again := exec.Command(binary, "session")
		again.Env, again.Dir, again.Stdout, again.Stderr = cmd.Env, "/", write, write
		again.ExtraFiles, again.SysProcAttr = cmd.ExtraFiles, cmd.SysProcAttr
		cmd, err = again, startUnprivileged(again)
	}
	if err != nil {
		conn.Close()
		read.Close()
		return nil, fmt.Errorf("starting %s as uid %d: %w", binary, s.account.UID, err)
	}
	p := &process{pid: cmd.Process.Pid, link: conn, cmd: cmd, output: read, copied: make(chan struct{}), gone: make(chan struct{})}
	s.handlers(conn)
	var out io.Writer = s.output
	if v.cfg.Debug {
		out = io.MultiWriter(s.output, os.Stderr)
	}
	go func() {
		defer close(p.copied)
		io.Copy(out, read)
	}()
	return p, nil
}

// startUnprivileged starts cmd with no_new_privs, which is a property of the
// thread that forks (prctl(2)): a thread of its own does it and is thrown away.
func startUnprivileged(cmd *exec.Cmd) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			result <- fmt.Errorf("setting no_new_privs: %w", err)
			return
		}
		result <- cmd.Start()
	}()
	return <-result
}

// closeOnExec keeps what the daemon itself inherited, from a careless shell
// perhaps, out of the hands of its sessions.
func closeOnExec() { unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC) }

// serve serves the process's link until the process has ended, and returns how
// it did. What the process left running in its process group is killed.
func (p *process) serve() error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	served := make(chan struct{})
	go func() {
		defer close(served)
		p.link.Run(ctx)
	}()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		// Not reaped yet, so that the process group's number is still its own.
		for unix.Waitid(unix.P_PID, p.pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
	}()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		p.watch(ctx)
	}()
	select {
	case <-ended:
		// Its last words are still in the socket: read them to the end.
		select {
		case <-served:
		case <-time.After(linkGrace):
			p.link.Close()
		}
	case <-served:
		select {
		case <-ended:
		case <-time.After(linkGrace):
		}
	}
	p.kill()
	<-ended
	cancel()
	<-watched
	err := p.reap()
	<-served
	select {
	case <-p.copied:
	case <-time.After(linkGrace): // a child that left the group holds the pipe
	}
	p.output.Close()
	<-p.copied
	return err
}

const (
	// aliveEvery is how often a process is asked whether it lives.
	aliveEvery = 2 * time.Second
	// hungAfter is how long a process may leave that unanswered. A session that
	// is stopped holds the machine's names and routes: its user notices at once.
	hungAfter = 6 * time.Second
	// firstAnswer is the same for a process that has just been started, which on
	// a machine under load may be a while away from its first line.
	firstAnswer = 30 * time.Second
)

// watch kills a process that lives but does not answer, so that another one
// takes over. The answer "no such method" is as good as any. A process that a
// debugger holds (ptrace(2)) is left alone.
func (p *process) watch(ctx context.Context) {
	answered, limit := time.Now(), firstAnswer
	for {
		ask, cancel := context.WithTimeout(ctx, limit-time.Since(answered))
		_, err := p.link.Call(ask, link.MethodAlive, nil, nil)
		cancel()
		if ctx.Err() != nil {
			return
		}
		var said *api.Error
		switch {
		case err == nil || errors.As(err, &said):
			answered, limit = time.Now(), hungAfter
		case errors.Is(err, link.ErrClosed):
			return // and serve has noticed
		case p.traced():
			answered = time.Now()
		case time.Since(answered) >= limit:
			p.hung.Store(true)
			p.kill()
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(aliveEvery):
		}
	}
}

// traced: a debugger is attached, proc_pid_status(5).
func (p *process) traced() bool {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	return err == nil && !strings.Contains(string(status), "\nTracerPid:\t0\n")
}

// howEnded says how the process ended, in words for a user.
func (p *process) howEnded(err error) string {
	if p.hung.Load() {
		return fmt.Sprintf("killed, since it had not answered for %v", hungAfter)
	}
	return exitText(err)
}

// kill kills the process and its group. It is harmless after their end.
func (p *process) kill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.reaped {
		unix.Kill(-p.pid, unix.SIGKILL)
	}
}

// reap takes the ended process's status, which gives its number back: from then
// on nobody kills by it.
func (p *process) reap() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.reaped = true
	return p.cmd.Wait()
}

func exitText(err error) string {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "exit status 0"
	case errors.As(err, &exit):
		return exit.ProcessState.String()
	}
	return err.Error()
}

// homeOrRoot is the working directory: a session must not keep a directory of
// root's busy, and exec plugins expect to be at home.
func homeOrRoot(home string) string {
	if st, err := os.Stat(home); home == "" || err != nil || !st.IsDir() {
		return "/"
	}
	return home
}

var errRootSession = &api.Error{
	Code:    api.CodeDenied,
	Message: "a session runs kubeconfig exec plugins and never runs as root (uid 0)",
	Hint:    "run `culvert connect` as an ordinary user in the group culvert (`sudo culvert connect` runs it as the user who called sudo)",
}
