package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const cgroupRoot = "/sys/fs/cgroup"

// hierarchy is one mounted cgroup v1 hierarchy.
type hierarchy struct {
	dir     string // below /sys/fs/cgroup: "cpu", "systemd"
	options string // mount options: "cpu", "none,name=systemd"
}

// parseHierarchies reads the text of /proc/self/cgroup.
func parseHierarchies(text string) []hierarchy {
	var hs []hierarchy
	for line := range strings.Lines(text) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 || f[1] == "" { // the empty one is cgroup v2
			continue
		}
		if name, ok := strings.CutPrefix(f[1], "name="); ok {
			hs = append(hs, hierarchy{name, "none,name=" + name})
		} else {
			hs = append(hs, hierarchy{f[1], f[1]})
		}
	}
	return hs
}

func hierarchies() ([]hierarchy, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("list the cgroup hierarchies: %w", err)
	}
	hs := parseHierarchies(string(b))
	if !slices.ContainsFunc(hs, func(h hierarchy) bool { return h.dir == "pids" }) {
		return nil, errors.New("this machine has no cgroup v1 hierarchy pids: only cgroup v1 is supported")
	}
	return hs, nil
}

// JoinGroups moves this process into the control group of that name in every
// hierarchy, making the groups where they are missing.
func JoinGroups(group string) error {
	hs, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range hs {
		if err := join(h, group); err != nil {
			return err
		}
	}
	return nil
}

// JoinProcesses moves this process into the group that Kill looks in, and no other.
func JoinProcesses(group string) error { return join(hierarchy{dir: "pids"}, group) }

func join(h hierarchy, group string) error {
	dir := filepath.Join(cgroupRoot, h.dir, group)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make control group %s: %w", dir, err)
	}
	if h.dir == "cpuset" { // a new cpuset is empty and takes no process
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			b, err := os.ReadFile(filepath.Join(cgroupRoot, h.dir, f))
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, f), b, 0o644)
			}
			if err != nil {
				return fmt.Errorf("fill control group %s: %w", dir, err)
			}
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(os.Getpid())), 0o644); err != nil {
		return fmt.Errorf("join control group %s: %w", dir, err)
	}
	return nil
}

// Groups lists the control groups whose name begins with prefix and a dash, in any hierarchy.
func Groups(prefix string) ([]string, error) {
	found, err := filepath.Glob(filepath.Join(cgroupRoot, "*", prefix+"-*"))
	if err != nil {
		return nil, fmt.Errorf("list control groups: %w", err)
	}
	var names []string
	for _, f := range found {
		names = append(names, filepath.Base(f))
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// Members returns the processes of a group and of the groups below it.
func Members(group string) []int {
	var pids []int
	filepath.WalkDir(filepath.Join(cgroupRoot, "pids", group), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return nil // groups come and go while we look
		}
		b, _ := os.ReadFile(path)
		for _, w := range strings.Fields(string(b)) {
			if pid, err := strconv.Atoi(w); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// Kill ends every process of a group and removes the group from all hierarchies.
// A group that is not there is no error.
func Kill(group string) error {
	deadline := time.Now().Add(20 * time.Second)
	for {
		pids := Members(group)
		if len(pids) == 0 {
			break
		}
		for _, pid := range pids {
			if pid != os.Getpid() {
				syscall.Kill(pid, syscall.SIGKILL) // it may be gone already
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end the processes of %s: %v are still there", group, pids)
		}
		time.Sleep(20 * time.Millisecond)
	}
	dirs, err := filepath.Glob(filepath.Join(cgroupRoot, "*", group))
	if err != nil {
		return fmt.Errorf("find the control groups of %s: %w", group, err)
	}
	for _, dir := range dirs {
		for { // the last tasks leave a moment after they were killed
			removeTree(dir)
			if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("control group %s cannot be removed", dir)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
	return nil
}

// removeTree removes a control group and those below it, deepest first.
func removeTree(dir string) {
	var dirs []string
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, d := range slices.Backward(dirs) {
		syscall.Rmdir(d)
	}
}
