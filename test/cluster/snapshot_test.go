//go:build cluster

package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// snapshot lists what a test site with that prefix and state directory has on
// this machine, and all of the host's own network.
func snapshot(t *testing.T, prefix, state string) []string {
	t.Helper()
	var found []string
	for _, pattern := range []string{
		"/run/netns/" + prefix + "-*", "/etc/netns/" + prefix + "-*", "/sys/fs/cgroup/*/" + prefix + "-*", state,
	} {
		names, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		found = append(found, names...)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, state) || strings.Contains(line, "/"+prefix+"-") {
			found = append(found, "mount "+line)
		}
	}
	found = append(found, processes(prefix, state)...)
	for _, command := range []string{"ip -o link", "ip -o addr", "ip route show table all", "ip -6 route show table all", "ip rule", "nft list ruleset"} {
		out, err := exec.Command("sh", "-c", command).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v: %s", command, err, out)
		}
		for line := range strings.Lines(string(out)) {
			found = append(found, command+": "+strings.TrimSpace(line))
		}
	}
	slices.Sort(found)
	return found
}

// processes lists the processes in the site's control groups, and those that name its state.
func processes(prefix, state string) []string {
	var found []string
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		groups, _ := os.ReadFile(filepath.Join(dir, "cgroup"))
		line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		if strings.Contains(string(groups), "/"+prefix+"-") || strings.Contains(string(line), state) {
			found = append(found, fmt.Sprintf("process %s %q", filepath.Base(dir), line))
		}
	}
	return found
}

// difference tells what is in one sorted listing only.
func difference(before, after []string) []string {
	var d []string
	for _, l := range before {
		if !slices.Contains(after, l) {
			d = append(d, "- "+l)
		}
	}
	for _, l := range after {
		if !slices.Contains(before, l) {
			d = append(d, "+ "+l)
		}
	}
	return d
}
