package machine

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// Enter replaces this process by a command in a network namespace. It keeps
// the host's file system but for a resolv.conf of its own and a /sys that
// shows the namespace's devices. It returns only on an error.
func Enter(netns, group, resolv, bin string, command []string) error {
	if err := JoinProcesses(group); err != nil { // so that the tear-down finds it
		return err
	}
	runtime.LockOSThread()
	if err := setNetns(netns); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make a mount namespace: %w", err)
	}
	m := &mounter{}
	m.mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	m.mount(resolv, "/etc/resolv.conf", "", unix.MS_BIND, "")
	if m.err != nil {
		return m.err
	}
	if err := renewSys(); err != nil {
		return err
	}
	return become(command, bin)
}

// renewSys mounts a new /sys, which shows this network namespace's devices,
// and keeps the cgroup mounts below it.
func renewSys() error {
	groups, err := unix.OpenTree(unix.AT_FDCWD, cgroupRoot, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("pick up %s: %w", cgroupRoot, err)
	}
	defer unix.Close(groups)
	if err := unix.Mount("sysfs", "/sys", "sysfs", 0, ""); err != nil {
		return fmt.Errorf("mount /sys: %w", err)
	}
	if err := unix.MoveMount(groups, "", unix.AT_FDCWD, cgroupRoot, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("put back %s: %w", cgroupRoot, err)
	}
	return nil
}

// EnterInside replaces this process by a command in all of a machine's
// namespaces. Entering a PID namespace needs a fork, which nsenter does.
func EnterInside(s *Spec, command []string) error {
	pid := Alive(s)
	if pid == 0 {
		return fmt.Errorf("machine %s does not run", s.Name)
	}
	if err := JoinProcesses(s.Group); err != nil {
		return err
	}
	path := "PATH=" + s.Bin + ":/usr/sbin:/usr/bin:/sbin:/bin"
	return become(append([]string{
		"nsenter", "-t", strconv.Itoa(pid), "-m", "-u", "-i", "-n", "-p", "-C", "env", path,
	}, command...), "")
}

// Command prepares a command inside a machine, for callers that wait for it.
func Command(self string, s *Spec, command ...string) *exec.Cmd {
	return exec.Command(self, append([]string{"machine", "exec", s.Path(), "--"}, command...)...)
}

// become is exec(2), with bin first in PATH.
func become(command []string, bin string) error {
	if bin != "" {
		if err := os.Setenv("PATH", bin+":"+os.Getenv("PATH")); err != nil {
			return fmt.Errorf("set PATH: %w", err)
		}
	}
	path, err := exec.LookPath(command[0])
	if err != nil {
		return fmt.Errorf("find the command: %w", err)
	}
	if err := syscall.Exec(path, command, os.Environ()); err != nil {
		return fmt.Errorf("run %s: %w", path, err)
	}
	return nil
}
