package netlab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// DaemonLog is where the daemon's own output goes.
func (m *Machine) DaemonLog() string { return filepath.Join(m.Dir, "run", "culvertd.log") }

func (m *Machine) daemonFlags() []string {
	return []string{"--socket", m.Socket, "--state-dir", filepath.Join(m.Dir, "state"), "--config", m.Config}
}

// StartDaemon starts culvertd as root on the laptop, as its unit would, and
// waits until its socket answers.
func (m *Machine) StartDaemon(more ...string) error { return m.StartDaemonBehind(":", more...) }

// StartDaemonBehind is StartDaemon after a shell command in the daemon's own
// mount namespace, which takes something away from it.
func (m *Machine) StartDaemonBehind(before string, more ...string) error {
	if m.daemon != nil {
		return errors.New("the daemon runs already")
	}
	log, err := os.OpenFile(m.DaemonLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	caps, err := m.unitCapabilities()
	if err != nil {
		return err
	}
	daemon := append([]string{"setpriv", "--no-new-privs", "--bounding-set", caps, "--", filepath.Join(m.Dir, "bin", "culvertd")}, append(m.daemonFlags(), more...)...)
	cmd := m.Command(context.Background(), Root, "/bin/sh", append([]string{"-c", before + ` && exec "$@"`, "sh"}, daemon...)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		log.Close()
		return err
	}
	m.daemon, m.log, m.exited = cmd, log, make(chan struct{})
	go func() {
		_ = cmd.Wait()
		log.Close()
		close(m.exited)
	}()
	for range 200 {
		if c, err := net.Dial("unix", m.Socket); err == nil {
			c.Close()
			return nil
		}
		select {
		case <-m.exited:
			m.daemon = nil
			return fmt.Errorf("culvertd ended at once:\n%s", m.Tail(20))
		case <-time.After(50 * time.Millisecond):
		}
	}
	return fmt.Errorf("culvertd does not answer on %s:\n%s", m.Socket, m.Tail(20))
}

// unitCapabilities is the unit's CapabilityBoundingSet in setpriv's words, so
// that the daemon of the tests may do no more than the installed one.
func (m *Machine) unitCapabilities() (string, error) {
	b, err := os.ReadFile(filepath.Join(m.Repo, "deploy", "systemd", "culvertd.service"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if list, ok := strings.CutPrefix(line, "CapabilityBoundingSet="); ok {
			set := "-all"
			for _, c := range strings.Fields(list) {
				set += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
			}
			return set, nil
		}
	}
	return "", errors.New("the unit has no CapabilityBoundingSet")
}

// DaemonPID is culvertd's process id: `testcluster exec` becomes the program it
// runs, so it is the one that was started.
func (m *Machine) DaemonPID() int {
	if m.daemon == nil {
		return 0
	}
	return m.daemon.Process.Pid
}

// StopDaemon ends the daemon as systemd would: SIGTERM, then wait, then what
// ExecStopPost says.
func (m *Machine) StopDaemon() error { return m.endDaemon(syscall.SIGTERM, true) }

// KillDaemon is kill -9; nothing runs after it.
func (m *Machine) KillDaemon() error { return m.endDaemon(syscall.SIGKILL, false) }

// KillWith is kill -9 of the daemon and of processes that it started, none of which
// sees another's end. (Without its parent a process that was stopped goes on: the
// kernel sends SIGCONT to orphaned process groups.)
func (m *Machine) KillWith(pids ...int) error {
	if m.daemon == nil {
		return errors.New("no daemon runs")
	}
	if err := m.daemon.Process.Signal(syscall.SIGSTOP); err != nil {
		return err
	}
	for _, pid := range pids {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			return errors.Join(fmt.Errorf("killing process %d: %w", pid, err), m.KillDaemon())
		}
	}
	return m.KillDaemon()
}

func (m *Machine) endDaemon(sig syscall.Signal, cleanup bool) error {
	if m.daemon == nil {
		return nil
	}
	if err := m.daemon.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-m.exited:
	case <-time.After(40 * time.Second):
		return fmt.Errorf("culvertd (pid %d) did not end on %v:\n%s", m.DaemonPID(), sig, m.Tail(20))
	}
	m.daemon = nil
	if cleanup {
		return m.Cleanup()
	}
	return nil
}

// Cleanup is `culvertd cleanup`, the unit's ExecStopPost.
func (m *Machine) Cleanup() error {
	r := m.Run(Root, filepath.Join(m.Dir, "bin", "culvertd"), append([]string{"cleanup"}, m.daemonFlags()...)...)
	if r.Code != 0 {
		return fmt.Errorf("culvertd cleanup: %v", r)
	}
	return nil
}

// Tail is the end of the daemon's log.
func (m *Machine) Tail(lines int) string {
	b, _ := os.ReadFile(m.DaemonLog())
	all := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Culvert runs the CLI as a user of the laptop.
func (m *Machine) Culvert(u User, args ...string) Result {
	return m.Run(u, filepath.Join(m.Dir, "bin", "culvert"), args...)
}

// ClusterCommand prepares bin/testcluster for this lab.
func (m *Machine) ClusterCommand(args ...string) *exec.Cmd {
	return exec.Command(m.Testcluster(), slices.Concat(args[:1], labFlags(), args[1:])...)
}

// Cluster runs bin/testcluster.
func (m *Machine) Cluster(args ...string) Result {
	return Run(m.ClusterCommand(args...))
}

// Kubeconfig is the path of a user's kubeconfig for a cluster ("" is the first).
func (m *Machine) Kubeconfig(cluster, user string) (string, error) {
	args := []string{"kubeconfig", user}
	if cluster != "" {
		args = append(args, "--name", cluster)
	}
	r := m.Cluster(args...)
	if r.Code != 0 {
		return "", fmt.Errorf("testcluster kubeconfig %s: %v", user, r)
	}
	return strings.TrimSpace(r.Stdout), nil
}

// Kubectl runs the cluster's own kubectl as its admin, from the host.
func (m *Machine) Kubectl(cluster string, stdin io.Reader, args ...string) Result {
	cmd, err := m.KubectlCommand(cluster, args...)
	if err != nil {
		return Result{Code: -1, Stderr: err.Error()}
	}
	cmd.Stdin = stdin
	return Run(cmd)
}

// KubectlCommand is Kubectl's, not started.
func (m *Machine) KubectlCommand(cluster string, args ...string) (*exec.Cmd, error) {
	config, err := m.Kubeconfig(cluster, "admin")
	if err != nil {
		return nil, err
	}
	exe := []string{"exec", "cp", "--", "kubectl", "--kubeconfig", config}
	if cluster != "" {
		exe = append([]string{"exec", "--name", cluster}, exe[1:]...)
	}
	return m.ClusterCommand(append(exe, args...)...), nil
}

// LoadImage gives the agent image of `make image` to the nodes of the clusters
// named (none: the first one) and returns the name that it has there.
func (m *Machine) LoadImage(clusters ...string) (string, error) {
	if len(clusters) == 0 {
		clusters = []string{""}
	}
	tar := filepath.Join(m.Repo, "dist", "culvert-agent.tar")
	for _, c := range clusters {
		args := []string{"load", tar}
		if c != "" {
			args = append(args, "--name", c)
		}
		if r := m.Cluster(args...); r.Code != 0 {
			return "", fmt.Errorf("loading %s: %v", tar, r)
		}
	}
	name, err := os.ReadFile(filepath.Join(m.Repo, "dist", "culvert-agent.name"))
	if err != nil {
		return "", fmt.Errorf("reading the image's name (run `make image` first): %w", err)
	}
	return strings.TrimSpace(string(name)), nil
}
