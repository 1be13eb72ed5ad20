//go:build cluster

package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// lab is a test site of the tests' own, beside any other.
type lab struct {
	*testing.T
	program, prefix, state string
}

func newLab(t *testing.T) *lab {
	program, err := filepath.Abs("../../bin/testcluster")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(program); err != nil {
		t.Fatalf("run make build first: %v", err)
	}
	l := &lab{t, program, "tct", filepath.Join(t.TempDir(), "state")}
	l.must("down", "--all") // of a run that was killed
	before := snapshot(t, l.prefix, l.state)
	t.Cleanup(func() {
		l.must("down", "--all")
		if d := difference(before, snapshot(t, l.prefix, l.state)); len(d) > 0 {
			t.Errorf("down left or took away:\n%s", strings.Join(d, "\n"))
		}
	})
	return l
}

func (l *lab) command(args ...string) *exec.Cmd {
	return exec.Command(l.program, append([]string{"--prefix", l.prefix, "--state", l.state}, args...)...)
}

func (l *lab) run(args ...string) (string, error) {
	out, err := l.command(args...).CombinedOutput()
	return string(out), err
}

func (l *lab) must(args ...string) string {
	l.Helper()
	out, err := l.run(args...)
	if err != nil {
		l.Fatalf("testcluster %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// laptop runs a command on the laptop.
func (l *lab) laptop(args ...string) (string, error) {
	return l.run(append([]string{"exec", "laptop", "--"}, args...)...)
}

// kubectl runs kubectl on the laptop.
func (l *lab) kubectl(cluster, user string, args ...string) (string, error) {
	config := strings.TrimSpace(l.must("kubeconfig", "--name", cluster, user))
	return l.laptop(append([]string{"kubectl", "--kubeconfig", config}, args...)...)
}

func (l *lab) mustKubectl(cluster string, args ...string) string {
	l.Helper()
	out, err := l.kubectl(cluster, "admin", args...)
	if err != nil {
		l.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// killMachine kills a machine's PID 1.
func (l *lab) killMachine(dir string) {
	l.Helper()
	b, err := os.ReadFile(filepath.Join(l.state, dir, "pid"))
	if err != nil {
		l.Fatal(err)
	}
	pid, err := strconv.Atoi(string(b))
	if err != nil {
		l.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		l.Fatal(err)
	}
}

func TestClusterRuns(t *testing.T) {
	l := newLab(t)
	start := time.Now()
	l.must("up", "--name", "b", "--proxy-mode", "nftables")
	t.Logf("b was up in %v", time.Since(start))
	if out := l.must("up", "--name", "b"); !strings.Contains(out, "is up") {
		t.Errorf("a second up did something: %s", out)
	}
	start = time.Now()
	l.must("up")
	t.Logf("a was up in %v", time.Since(start))

	t.Run("both answer the laptop", func(t *testing.T) {
		for _, c := range []string{"a", "b"} {
			if out := l.mustKubectl(c, "get", "servicecidrs", "-o", "jsonpath={.items[0].spec.cidrs}"); !strings.Contains(out, "::/112") {
				t.Errorf("%s: Service ranges %s", c, out)
			}
			if out := l.mustKubectl(c, "-n", "demo", "get", "service", "echo", "-o", "jsonpath={.spec.clusterIPs}"); strings.Count(out, ",") != 1 {
				t.Errorf("%s: echo has the addresses %s", c, out)
			}
		}
		if out := l.mustKubectl("a", "-n", "demo", "get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[*].spec.nodeName}"); out != "node1 node2" && out != "node2 node1" {
			t.Errorf("echo runs on %s", out)
		}
	})
	t.Run("pods reach Services of both families by name", func(t *testing.T) {
		for c, domain := range map[string]string{"a": "cluster.local", "b": "corp.internal"} {
			for family := range 2 {
				ip := l.mustKubectl(c, "-n", "demo", "get", "service", "echo", "-o", "jsonpath={.spec.clusterIPs["+strconv.Itoa(family)+"]}")
				if family == 1 {
					ip = "[" + ip + "]"
				}
				// kube-proxy may hear of the endpoints a moment after they are there.
				for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
					if _, err := l.kubectl(c, "admin", "-n", "demo", "exec", onNode1(l, c), "--", "/testapp", "get", "--resolve", ip+":80", "http://echo/"); err == nil {
						break
					}
				}
				for range 4 { // node1 of a and b has hairpin
					l.mustKubectl(c, "-n", "demo", "exec", onNode1(l, c), "--", "/testapp", "get", "--resolve", ip+":80", "http://echo/")
				}
			}
			l.mustKubectl(c, "-n", "demo", "exec", onNode1(l, c), "--", "/testapp", "get", "http://echo.demo.svc."+domain+"/")
			l.mustKubectl(c, "-n", "demo", "exec", onNode1(l, c), "--", "/testapp", "get", "http://www.example.test/")
		}
	})
	t.Run("users", func(t *testing.T) {
		for user, want := range map[string]string{"nobody": "Forbidden", "expired": "Unauthorized"} {
			if out, err := l.kubectl("a", user, "get", "pods"); err == nil || !strings.Contains(out, want) {
				t.Errorf("%s: %v: %s", user, err, out)
			}
		}
		if out := l.must("exec", "laptop", "--", "env", "HOME="+t.TempDir(), "kubectl", "--kubeconfig",
			strings.TrimSpace(l.must("kubeconfig", "execuser")), "auth", "whoami"); !strings.Contains(out, "execuser") || !strings.Contains(out, "developers") {
			t.Errorf("execuser is\n%s", out)
		}
	})
	t.Run("exec passes the exit status", func(t *testing.T) {
		out, err := l.laptop("sh", "-c", "exit 7")
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 7 {
			t.Errorf("%v: %s", err, out)
		}
		if out, err := l.laptop("cat", "/etc/resolv.conf"); err != nil || out != "nameserver 192.168.50.1\n" {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("names outside", func(t *testing.T) {
		if out, err := l.laptop("testapp", "get", "http://go.dev/"); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if out, err := l.laptop("testapp", "lookup", "echo.demo.svc.cluster.local"); err == nil || !strings.Contains(out, "no such host") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("link", func(t *testing.T) { testLink(&lab{t, l.program, l.prefix, l.state}) })
	t.Run("components come back", func(t *testing.T) {
		l.must("exec", "--inside", "--name", "b", "cp", "--", "sh", "-c",
			"for p in /proc/[0-9]*; do case $(tr '\\0' ' ' < $p/cmdline) in kube-apiserver*) kill -9 ${p#/proc/};; esac; done")
		deadline := time.Now().Add(30 * time.Second)
		for {
			if _, err := l.kubectl("b", "admin", "get", "--raw", "/readyz"); err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("the API server did not come back")
			}
			time.Sleep(200 * time.Millisecond)
		}
	})
	t.Run("up repairs", func(t *testing.T) {
		l.killMachine("shared/wan")
		l.killMachine("b/node1")
		l.must("up", "--name", "b")
		l.mustKubectl("b", "-n", "demo", "rollout", "status", "deployment/echo", "--timeout=10s")
		l.mustKubectl("a", "get", "nodes")
	})
	t.Run("down of one leaves the other", func(t *testing.T) {
		l.must("down")
		l.mustKubectl("b", "get", "nodes")
		if _, err := os.Stat(filepath.Join(l.state, "a")); err == nil {
			t.Error("a's state is still there")
		}
	})
}

// onNode1 names the echo pod that runs on node1.
func onNode1(l *lab, cluster string) string {
	l.Helper()
	return l.mustKubectl(cluster, "-n", "demo", "get", "pods", "-l", "app=echo", "-o",
		`jsonpath={.items[?(@.spec.nodeName=="node1")].metadata.name}`)
}

// testLink changes the laptop's link while a TCP connection uses it.
func testLink(l *lab) {
	ip := l.mustKubectl("b", "-n", "demo", "get", "pods", "-o", "jsonpath={.items[0].status.podIP}")
	rtt := func() (string, error) { return l.laptop("timeout", "5", "testapp", "rtt", ip+":9000", "20") }
	for _, target := range []string{ip + ":9000", "172.31.0.11:10250", "172.31.0.10:2379"} {
		if out, err := l.laptop("timeout", "3", "testapp", "rtt", target, "1"); err == nil || !strings.Contains(out, "unreachable") && !strings.Contains(out, "no route") {
			l.Errorf("the laptop and %s: %v: %s", target, err, out)
		}
	}
	l.must("link", "--pods", "on")
	if out, err := rtt(); err != nil {
		l.Fatalf("pods on: %v: %s", err, out)
	}
	l.mustKubectl("b", "-n", "demo", "expose", "deployment", "echo", "--name", "at-node", "--type", "NodePort", "--port", "8080")
	port := l.mustKubectl("b", "-n", "demo", "get", "service", "at-node", "-o", "jsonpath={.spec.ports[0].nodePort}")
	var fetched string
	for range 20 { // kube-proxy learns of it
		var err error
		if fetched, err = l.laptop("testapp", "get", "http://172.31.0.11:"+port+"/"); err == nil {
			fetched = ""
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	if fetched != "" {
		l.Errorf("a node port: %s", fetched)
	}
	testCongestion(l, ip)
	hold := l.command("exec", "laptop", "--", "testapp", "hold", ip+":9000", "12")
	var out bytes.Buffer
	hold.Stdout, hold.Stderr = &out, &out
	if err := hold.Start(); err != nil {
		l.Fatal(err)
	}
	l.must("link", "--delay", "20ms")
	if out := l.must("exec", "laptop", "--", "ping", "-c", "3", "-i", "0.2", "172.31.0.10"); !strings.Contains(out, "min/avg/max/mdev = 4") {
		l.Errorf("a delay of 20 ms each way: %s", out)
	}
	l.must("link", "--delay", "0", "--rate", "50mbit")
	if out := l.must("exec", "laptop", "--", "testapp", "--json", "pull", ip+":9003", "2"); !strings.Contains(out, `"mbit_per_s":4`) {
		l.Errorf("a rate of 50 Mbit/s: %s", out)
	}
	l.must("link", "--rate", "0", "--loss", "30%")
	l.laptop("ping", "-c", "20", "-i", "0.02", "172.31.0.10")
	killCable(l)
	l.must("link", "--cut", "on")
	if out, err := l.laptop("ping", "-c", "1", "-W", "1", "172.31.0.10"); err == nil {
		l.Errorf("cut, and yet: %s", out)
	}
	l.must("link", "--cut", "off", "--loss", "0")
	if out := l.must("link"); !strings.HasPrefix(out, "perfect") {
		l.Errorf("the link is %s", out)
	}
	if out, err := l.laptop("testapp", "push", ip+":9002", "1"); err != nil {
		l.Errorf("push over the plain cable: %v: %s", err, out)
	}
	if err := hold.Wait(); err != nil {
		l.Errorf("the connection did not survive: %v: %s", err, out.String())
	}
	l.must("link", "--reset")
	if out, err := rtt(); err == nil {
		l.Errorf("pods off: %s", out)
	}
}

// testCongestion looks at both ends of a connection while it is open.
func testCongestion(l *lab, ip string) {
	for _, name := range []string{"cubic", "reno"} {
		l.must("link", "--congestion", name)
		hold := l.command("exec", "laptop", "--", "testapp", "hold", ip+":9000", "2")
		if err := hold.Start(); err != nil {
			l.Fatal(err)
		}
		time.Sleep(500 * time.Millisecond)
		if out := l.must("exec", "laptop", "--", "ss", "-tin", "dst", ip); !strings.Contains(out, " "+name+" ") {
			l.Errorf("the laptop's end with %s: %s", name, out)
		}
		pod := `for p in /proc/[0-9]*; do case $(tr '\0' ' ' < $p/cmdline) in "/testapp serve"*) nsenter -t ${p#/proc/} -n ss -tin sport = :9000;; esac; done`
		if out := l.must("exec", "--inside", "--name", "b", "node1", "--", "sh", "-c", pod); !strings.Contains(out, " "+name+" ") {
			l.Errorf("the pod's end with %s: %s", name, out)
		}
		if err := hold.Wait(); err != nil {
			l.Error(err)
		}
	}
	l.must("link", "--congestion", "default")
	if out := l.must("exec", "laptop", "--", "ip", "route"); strings.Contains(out, "congctl") {
		l.Errorf("the default: %s", out)
	}
}

// killCable kills the process that copies the laptop's frames; PID 1 starts it again.
func killCable(l *lab) {
	l.Helper()
	l.must("exec", "--inside", "wan", "--", "sh", "-c",
		// The quotes keep the shell from finding itself.
		`for p in /proc/[0-9]*; do case $(tr '\0' ' ' < $p/cmdline) in *"machine ca""ble"*) kill -9 ${p#/proc/};; esac; done`)
	for deadline := time.Now().Add(15 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		if _, err := l.laptop("ping", "-c", "1", "-W", "1", "172.31.0.10"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			l.Fatal("the cable did not come back")
		}
	}
}

// TestClusterKilledUp kills "up" half-way; "down" must still leave nothing.
func TestClusterKilledUp(t *testing.T) {
	l := newLab(t)
	for _, after := range []time.Duration{20, 60, 120, 400, 2500} {
		after *= time.Millisecond
		cmd := l.command("up", "--name", "b")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after)
		cmd.Process.Kill()
		cmd.Wait()
		l.must("down", "--all")
		if _, err := os.Stat(l.state); err == nil {
			t.Errorf("killed after %v: %s is still there", after, l.state)
		}
		if left := processes(l.prefix, l.state); len(left) > 0 {
			t.Errorf("killed after %v: left %q", after, left)
		}
	}
	cmd := l.command("up", "--name", "b")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(time.Second)
	cmd.Process.Kill()
	cmd.Wait()
	l.must("up", "--name", "b") // after a killed one
	l.mustKubectl("b", "get", "nodes")
}
