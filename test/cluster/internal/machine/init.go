package machine

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

// supervisor is what PID 1 does: it runs the machine's components.
type supervisor struct {
	spec    *Spec
	running map[int]*component
	due     chan *component // components to start
}

type component struct {
	Process
	begun time.Time
}

// supervise starts the components, starts each again when it ends, and reaps
// the orphans (containerd's shims are reparented to PID 1). It returns on
// SIGTERM or SIGINT.
func supervise(s *Spec) error {
	v := &supervisor{spec: s, running: map[int]*component{}, due: make(chan *component, 16)}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGCHLD, syscall.SIGTERM, syscall.SIGINT)
	for _, p := range s.Processes {
		go v.enqueue(&component{Process: p})
	}
	for {
		select {
		case c := <-v.due:
			if err := v.start(c); err != nil {
				note("%v", err)
				time.AfterFunc(time.Second, func() { v.enqueue(c) })
			}
		case sig := <-signals:
			if sig != syscall.SIGCHLD {
				return fmt.Errorf("ended by signal: %s", sig)
			}
			v.reap()
		}
	}
}

// enqueue asks for a component's start as soon as the file it needs exists.
func (v *supervisor) enqueue(c *component) {
	for c.WaitFor != "" {
		if _, err := os.Stat(c.WaitFor); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	v.due <- c
}

func (v *supervisor) start(c *component) error {
	path, err := exec.LookPath(c.Args[0])
	if err != nil {
		return fmt.Errorf("find %s: %w", c.Name, err)
	}
	log, err := os.OpenFile(filepath.Join(v.spec.LogDir(), c.Name+".log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("open the log of %s: %w", c.Name, err)
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return fmt.Errorf("start %s: %w", c.Name, err)
	}
	defer null.Close()
	// Not os/exec: its Wait would compete with reap for the exit status.
	pid, err := syscall.ForkExec(path, c.Args, &syscall.ProcAttr{
		Dir: "/", Env: os.Environ(),
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", c.Name, err)
	}
	c.begun = time.Now()
	v.running[pid] = c
	return nil
}

func (v *supervisor) reap() {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if pid <= 0 || err != nil {
			return
		}
		c := v.running[pid]
		if c == nil {
			continue
		}
		delete(v.running, pid)
		note("%s ended: exit status %d, signal %d", c.Name, status.ExitStatus(), status.Signal())
		pause := time.Second
		if time.Since(c.begun) < 2*time.Second {
			pause = 3 * time.Second
		}
		time.AfterFunc(pause, func() { v.enqueue(c) })
	}
}

// note writes to the machine's console.
func note(format string, args ...any) {
	fmt.Printf("%s "+format+"\n", append([]any{time.Now().Format(time.RFC3339)}, args...)...)
}
