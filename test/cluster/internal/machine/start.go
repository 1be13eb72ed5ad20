package machine

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Launch starts the machine of a saved spec and returns when it runs. It
// leaves the work to a process of its own, because joining control groups and
// namespaces cannot be undone.
func Launch(self string, s *Spec) error {
	os.Remove(s.PIDFile())
	var out bytes.Buffer
	cmd := exec.Command(self, "machine", "start", s.Path())
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Dir = "/"
	// It dies with us, until it has joined the groups that Kill looks in.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Run(); err != nil {
		console, _ := os.ReadFile(filepath.Join(s.LogDir(), "console.log"))
		return fmt.Errorf("start machine %s: %w\n%s%s", s.Name, err, out.Bytes(), console)
	}
	return nil
}

// Start is the first step: see the package's comment.
func Start(self string, s *Spec) error {
	if err := JoinGroups(s.Group); err != nil {
		return err
	}
	// The clone happens on this thread and so inherits its network namespace.
	runtime.LockOSThread()
	if err := setNetns(s.Netns); err != nil {
		return err
	}
	if err := os.MkdirAll(s.LogDir(), 0o755); err != nil {
		return fmt.Errorf("make the log directory: %w", err)
	}
	console, err := os.OpenFile(filepath.Join(s.LogDir(), "console.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return fmt.Errorf("open the console: %w", err)
	}
	defer console.Close()
	ready, tell, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make a pipe: %w", err)
	}
	defer ready.Close()
	cmd := exec.Command(self, "machine", "inside", s.Path())
	cmd.Env = []string{"PATH=" + s.Bin + ":/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = console, console
	cmd.ExtraFiles = []*os.File{tell}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("clone the machine: %w", err)
	}
	tell.Close()
	if b, err := io.ReadAll(ready); err != nil || string(b) != "ok" {
		return fmt.Errorf("the machine's PID 1 did not get ready: %w", cmd.Wait())
	}
	if err := os.WriteFile(s.PIDFile()+".new", []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
		return fmt.Errorf("record the machine's PID: %w", err)
	}
	return os.Rename(s.PIDFile()+".new", s.PIDFile())
}

// Alive returns the host's PID of a running machine's PID 1, or 0. A recorded
// PID counts only if that process is in the machine's control group.
func Alive(s *Spec) int {
	b, err := os.ReadFile(s.PIDFile())
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || !slices.Contains(Members(s.Group), pid) {
		return 0
	}
	return pid
}

func setNetns(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open network namespace: %w", err)
	}
	defer f.Close()
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}
