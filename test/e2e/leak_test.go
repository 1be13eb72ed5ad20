//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// usage is what a process or the agent holds.
type usage struct {
	descriptors, goroutines int
	memory                  int // resident, bytes
}

func sessionUsage(t *testing.T) usage {
	t.Helper()
	pid := status(t, netlab.Alice)[0].PID
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return usage{descriptors: len(fds), memory: resident(t, pid)}
}

// resident reads VmRSS of /proc/PID/status, in bytes.
func resident(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range strings.Split(string(b), "\n") {
		if f := strings.Fields(l); len(f) >= 2 && f[0] == "VmRSS:" {
			n, _ := strconv.Atoi(f[1])
			return n << 10
		}
	}
	t.Fatalf("no VmRSS of %d", pid)
	return 0
}

// agentUsage asks the agent's metrics, which only a port-forward reaches.
func agentUsage(t *testing.T) usage {
	t.Helper()
	s := status(t, netlab.Alice)[0]
	text := agentMetrics(t, s.Agent.Namespace, s.Agent.Pod)
	value := func(name string) int {
		for _, l := range strings.Split(text, "\n") {
			if f := strings.Fields(l); len(f) == 2 && f[0] == name {
				v, _ := strconv.ParseFloat(f[1], 64)
				return int(v)
			}
		}
		t.Fatalf("the agent has no metric %s in:\n%s", name, text)
		return 0
	}
	return usage{value("process_open_fds"), value("go_goroutines"), value("process_resident_memory_bytes")}
}

func agentMetrics(t *testing.T, namespace, pod string) string {
	t.Helper()
	r := lab.Kubectl("", nil, "-n", namespace, "exec", pod, "--", "/culvert-agent", "metrics")
	if r.Code != 0 {
		t.Fatalf("metrics of the agent: %v", r)
	}
	return r.Stdout
}

// TestThousandConnections: opened and closed, they leave no descriptor, no
// goroutine and no memory on either side.
func TestThousandConnections(t *testing.T) {
	connect(t)
	target := net.JoinHostPort(podIPs(t)[0], "9000")
	round := func() {
		var wg sync.WaitGroup
		for range 20 {
			wg.Add(1)
			go func() {
				defer wg.Done()
				for range 50 {
					c, err := within(t, "tcp", target, 10*time.Second)
					if err != nil {
						t.Error(err)
						return
					}
					if err := tryEcho(c, []byte("one of many"), 10*time.Second); err != nil {
						t.Error(err)
					}
					c.Close()
				}
			}()
		}
		wg.Wait()
	}
	round() // warms pools up
	time.Sleep(8 * time.Second)
	session, agent := sessionUsage(t), agentUsage(t)
	round()
	var s, a usage
	eventually(t, 30*time.Second, func() error {
		s, a = sessionUsage(t), agentUsage(t)
		switch {
		case s.descriptors > session.descriptors+3:
			return fmt.Errorf("session: %d descriptors, had %d", s.descriptors, session.descriptors)
		case a.descriptors > agent.descriptors+3:
			return fmt.Errorf("agent: %d descriptors, had %d", a.descriptors, agent.descriptors)
		case a.goroutines > agent.goroutines+10:
			return fmt.Errorf("agent: %d goroutines, had %d", a.goroutines, agent.goroutines)
		case s.memory > session.memory+16<<20:
			return fmt.Errorf("session: %d bytes, had %d", s.memory, session.memory)
		case a.memory > agent.memory+16<<20:
			return fmt.Errorf("agent: %d bytes, had %d", a.memory, agent.memory)
		}
		return nil
	})
	t.Logf("session %+v -> %+v, agent %+v -> %+v", session, s, agent, a)
}
