package rig

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"
)

// Process is this program in another role. It ends when its standard input does,
// so none outlives the program that started it.
type Process struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// PID is the process's id.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Close ends the process and waits for it.
func (p *Process) Close() {
	if p == nil {
		return
	}
	p.stdin.Close()
	timer := time.AfterFunc(5*time.Second, func() { _ = p.cmd.Process.Kill() })
	defer timer.Stop()
	_ = p.cmd.Wait()
}

// CPU is the time in seconds that the process with this id has used so far, user
// and system (USER_HZ is 100 on Linux, see proc(5)); 0 if there is none.
func CPU(pid int) float64 {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	f := strings.Fields(rest)
	user, _ := strconv.ParseFloat(f[11], 64)
	system, _ := strconv.ParseFloat(f[12], 64)
	return (user + system) / 100
}

// Resident is a process's VmRSS in MB of a million bytes; 0 if there is none.
func Resident(pid int) float64 {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for l := range strings.Lines(string(b)) {
		if f := strings.Fields(l); len(f) >= 2 && f[0] == "VmRSS:" {
			kb, _ := strconv.ParseFloat(f[1], 64)
			return kb * 1024 / 1e6
		}
	}
	return 0
}
