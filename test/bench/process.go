package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// procs are culvert's own processes by role; the agent's is seen from the host,
// whose PID namespace holds all others.
type procs map[string]int

func processes(m *netlab.Machine) (procs, error) {
	r := m.Culvert(netlab.Alice, "status", "-o", "json")
	var sessions []api.Session
	if err := json.Unmarshal([]byte(r.Stdout), &sessions); err != nil || len(sessions) != 1 {
		return nil, fmt.Errorf("status: %v", r)
	}
	ps := procs{"session": sessions[0].PID, "daemon": m.DaemonPID()}
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	for _, p := range all {
		b, _ := os.ReadFile(p)
		arg0, _, _ := strings.Cut(string(b), "\x00")
		// Other labs on this machine have agents too; the lab's name begins the
		// names of its machines' control groups.
		group, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "cgroup"))
		if filepath.Base(arg0) == "culvert-agent" && !strings.Contains(string(b), "health") && strings.Contains(string(group), "/"+netlab.Lab()+"-") {
			ps["agent"], _ = strconv.Atoi(filepath.Base(filepath.Dir(p)))
		}
	}
	if ps["agent"] == 0 {
		return nil, fmt.Errorf("no culvert-agent process on this machine")
	}
	return ps, nil
}

// cpu is user and system time in seconds (USER_HZ is 100 on Linux, see proc(5)).
func (ps procs) cpu() map[string]float64 {
	out := map[string]float64{}
	for name, pid := range ps {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue
		}
		_, rest, _ := strings.Cut(string(b), ") ")
		f := strings.Fields(rest)
		user, _ := strconv.ParseFloat(f[11], 64)
		system, _ := strconv.ParseFloat(f[12], 64)
		out[name] = (user + system) / 100
	}
	return out
}

// resident is VmRSS in MB.
func (ps procs) resident() map[string]float64 {
	out := map[string]float64{}
	for name, pid := range ps {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			continue
		}
		for _, l := range strings.Split(string(b), "\n") {
			if f := strings.Fields(l); len(f) >= 2 && f[0] == "VmRSS:" {
				kb, _ := strconv.ParseFloat(f[1], 64)
				out[name] = kb * 1024 / 1e6
			}
		}
	}
	return out
}
