package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/bench/rig"
	"github.com/culvert-dev/culvert/test/netlab"
)

// lab is the test cluster with the laptop, on which a culvertd runs.
type lab struct {
	*netlab.Machine
	config, image string
	admin         string // kubeconfig of the cluster's admin
	laptop        *rig.Namespace
	inside        pod // reached through the tunnel
	outside       pod // kept out of the tunnel: the direct way while a session is up
	carrier       string
	connectTook   time.Duration // of the latest connect, until the first byte from a Service by name
}

// pod is one of demo's Deployment echo.
type pod struct{ name, ip string }

func (p pod) addr(port int) string { return fmt.Sprintf("%s:%d", p.ip, port) }

func newLab() (l *lab, err error) {
	m, err := netlab.New()
	if err != nil {
		return nil, err
	}
	l = &lab{Machine: m}
	defer func() {
		if err != nil {
			l.close(false)
			l = nil
		}
	}()
	cmd := m.ClusterCommand("up")
	cmd.Stdout, cmd.Stderr = io.Discard, os.Stderr
	if err := cmd.Run(); err != nil {
		return l, fmt.Errorf("testcluster up: %w", err)
	}
	if l.image, err = m.LoadImage(); err != nil {
		return l, err
	}
	if l.config, err = m.Kubeconfig("", "developer"); err != nil {
		return l, err
	}
	// Pods are reachable throughout: by UDP, and for the direct way.
	if err := l.link("--reset", "--pods", "on"); err != nil {
		return l, err
	}
	if err := m.StartDaemon(); err != nil {
		return l, err
	}
	if l.laptop, err = rig.OpenNamespace("/run/netns/" + netlab.Lab() + "-laptop"); err != nil {
		return l, err
	}
	r := m.Kubectl("", nil, "-n", "demo", "get", "pods", "-l", "app=echo", "-o", `jsonpath={range .items[*]}{.metadata.name} {.status.podIP}{"\n"}{end}`)
	var pods []pod
	for line := range strings.Lines(r.Stdout) {
		if f := strings.Fields(line); len(f) == 2 {
			pods = append(pods, pod{f[0], f[1]})
		}
	}
	if len(pods) < 2 {
		return l, fmt.Errorf("finding two echo pods: %v", r)
	}
	l.inside, l.outside = pods[0], pods[1]
	return l, nil
}

// close ends the daemon and takes the cluster down.
func (l *lab) close(keep bool) {
	if l == nil {
		return
	}
	l.disconnect()
	if l.laptop != nil {
		l.laptop.Close()
	}
	_ = l.link("--reset", "--congestion", "default")
	if err := l.Close(); err != nil { // the daemon first: it gives back the laptop's names
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
	if !keep {
		l.Cluster("down", "--all")
	}
}

func (l *lab) link(args ...string) error {
	if r := l.Cluster(append([]string{"link"}, args...)...); r.Code != 0 {
		return fmt.Errorf("testcluster link %v: %v", args, r)
	}
	return nil
}

// command prepares a program on the laptop, as root.
func (l *lab) command(name string, args ...string) *exec.Cmd { return l.laptop.Command(name, args...) }

// connect makes the session one over this carrier, unless it is that already, with
// more flags of `culvert connect`. The pod that is reached directly stays out of
// the tunnel.
func (l *lab) connect(carrier string, flags ...string) error {
	if l.carrier == carrier {
		return nil
	}
	l.disconnect()
	begun := time.Now()
	const script = `culvert connect "$@" >/dev/null && exec curl -sS --max-time 10 -o /dev/null http://echo.demo/healthz`
	args := []string{"-c", script, "sh", "--kubeconfig", l.config, "--image", l.image, "--carrier", carrier, "--exclude-ips", l.outside.ip}
	r := l.Run(netlab.Alice, "/bin/sh", append(args, flags...)...)
	if r.Code != 0 {
		line, _, _ := strings.Cut(strings.TrimSpace(r.Stderr), "\n")
		l.Culvert(netlab.Alice, "disconnect")
		return fmt.Errorf("culvert connect --carrier %s: %s", carrier, line)
	}
	l.connectTook, l.carrier = time.Since(begun), carrier
	return nil
}

func (l *lab) disconnect() {
	if l.carrier != "" {
		l.Culvert(netlab.Alice, "disconnect")
		l.carrier = ""
	}
}

// sessionPID is the process id of the one session.
func (l *lab) sessionPID() (int, error) {
	r := l.Culvert(netlab.Alice, "status", "-o", "json")
	var sessions []api.Session
	if err := json.Unmarshal([]byte(r.Stdout), &sessions); err != nil || len(sessions) != 1 {
		return 0, fmt.Errorf("status: %v", r)
	}
	return sessions[0].PID, nil
}

// processes are the process ids of session and agent. The host's PID namespace
// holds all others.
func (l *lab) processes() (session, agent int, err error) {
	if session, err = l.sessionPID(); err != nil {
		return 0, 0, err
	}
	agent = processOf("culvert-agent", nil)
	if agent == 0 {
		return 0, 0, errors.New("no culvert-agent process on this machine")
	}
	return session, agent, nil
}

// processOf finds a program of this lab's machines: others may have the same. Of
// several, the one that ok likes; 0 if there is none.
func processOf(program string, ok func(pid int) bool) int {
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		b, _ := os.ReadFile(p)
		args := strings.Split(string(b), "\x00")
		// The lab's name begins the names of its machines' control groups.
		group, _ := os.ReadFile(filepath.Join(filepath.Dir(p), "cgroup"))
		if filepath.Base(args[0]) != program || len(args) > 1 && args[1] == "health" || !strings.Contains(string(group), "/"+netlab.Lab()+"-") {
			continue
		}
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(p)))
		if ok == nil || ok(pid) {
			return pid
		}
	}
	return 0
}

// namespaceOf opens the network namespace of an echo pod.
func namespaceOf(p pod) (*rig.Namespace, error) {
	pid := processOf("testapp", func(pid int) bool {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/net/fib_trie", pid))
		return strings.Contains(string(b), "|-- "+p.ip+"\n") && strings.Contains(string(b), "/32 host LOCAL")
	})
	if pid == 0 {
		return nil, fmt.Errorf("no testapp process of pod %s on this machine", p.name)
	}
	return rig.OpenNamespace(fmt.Sprintf("/proc/%d/ns/net", pid))
}

// forward runs kubectl port-forward again and again until stopped: a reset from
// the pod's side makes all of it exit.
func (l *lab) forward(websockets string, p pod, base int) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		for ctx.Err() == nil {
			cmd := l.Command(ctx, netlab.Alice, l.Repo+"/test/cluster/bin/kubectl", "--kubeconfig", l.config, "-n", "demo", "port-forward", "pod/"+p.name,
				fmt.Sprintf("%d:9000", base), fmt.Sprintf("%d:9002", base+2), fmt.Sprintf("%d:9003", base+3))
			cmd.Env = append(cmd.Env, "KUBECTL_PORT_FORWARD_WEBSOCKETS="+websockets)
			_ = cmd.Run()
		}
	})
	return func() {
		cancel()
		running.Wait()
	}
}
