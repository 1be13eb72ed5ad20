package rig

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"syscall"
)

// roleVariable holds the role of a process that this package started.
const roleVariable = "CULVERT_BENCH_ROLE"

// role is what a process is to be; one field is set.
type role struct {
	Session *sessionRole
	Agent   *agentRole
	Stock   *stockRole
	Server  *serverRole
	Proxy   *proxyRole
	Profile string `json:",omitempty"` // file for a CPU profile of its whole life
}

func (r role) name() string {
	switch {
	case r.Session != nil:
		return "session"
	case r.Agent != nil:
		return "agent"
	case r.Stock != nil:
		return "stock"
	case r.Proxy != nil:
		return "proxy"
	}
	return "server"
}

// Main does not return in a process that this package started.
func Main() {
	text := os.Getenv(roleVariable)
	if text == "" {
		return
	}
	var r role
	err := json.Unmarshal([]byte(text), &r)
	if err == nil {
		err = r.run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, r.name()+":", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run plays the role until its standard input ends, which it does with the
// process that started it.
func (r role) run() error {
	if r.Profile != "" {
		f, err := os.Create(r.Profile)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	var stop func()
	var err error
	switch {
	case r.Session != nil:
		stop, err = r.Session.start()
	case r.Agent != nil:
		stop, err = r.Agent.start()
	case r.Stock != nil:
		stop, err = r.Stock.start()
	case r.Server != nil:
		stop, err = r.Server.start()
	case r.Proxy != nil:
		stop, err = r.Proxy.start()
	default:
		err = errors.New("no role")
	}
	if err != nil {
		return err
	}
	fmt.Println(ready)
	_, _ = io.Copy(io.Discard, os.Stdin)
	stop()
	return nil
}

// ready is the line that a role prints when it serves.
const ready = "ready"

// serverRole is another program, which ends with the role.
type serverRole struct{ Command []string }

func (r *serverRole) start() (stop func(), err error) {
	// The signal comes when the thread dies that started it, not the process.
	runtime.LockOSThread()
	cmd := exec.Command(r.Command[0], r.Command[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting %s: %w", cmd, err)
	}
	return func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}, nil
}

// Serve starts a program in the namespace; it ends with the Process or with this
// program.
func (n *Namespace) Serve(command ...string) (*Process, error) {
	return n.start(role{Server: &serverRole{command}}, "")
}

// start starts a role in the namespace and waits until it is ready. With
// profiles it leaves a CPU profile in that directory.
func (n *Namespace) start(r role, profiles string) (*Process, error) {
	if profiles != "" {
		if err := os.MkdirAll(profiles, 0o755); err != nil {
			return nil, err
		}
		r.Profile = filepath.Join(profiles, r.name()+".pprof")
	}
	b, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := n.Command(exe)
	cmd.Env = append(os.Environ(), roleVariable+"="+string(b))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the role %s: %w", r.name(), err)
	}
	p := &Process{cmd: cmd, stdin: stdin}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if strings.TrimSpace(line) != ready {
		p.Close()
		return nil, fmt.Errorf("the role %s did not start: %w", r.name(), err)
	}
	return p, nil
}
