// Command demo shows culvert's main job on the test cluster: a laptop that
// reaches the API server only joins the cluster, what it then reaches, and a
// Service that comes to it. It leaves everything running, to be explored by hand;
// `make demo-down` ends it.
package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// dir holds the laptop's files between `make demo` and `make demo-down`.
const dir = "/var/lib/culvert-demo"

func main() {
	err := errors.New("usage: demo up | demo down")
	if len(os.Args) == 2 && os.Args[1] == "up" {
		err = up()
	} else if len(os.Args) == 2 && os.Args[1] == "down" {
		err = down()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func up() error {
	if os.Getuid() != 0 {
		return errors.New("the demo makes network namespaces and a cluster: run `sudo make demo`")
	}
	if err := endDaemon(); err != nil { // of an earlier demo
		return err
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	m, err := netlab.NewAt(dir)
	if err != nil {
		return err
	}
	say("A real Kubernetes cluster, and a laptop that reaches its API server only")
	if err := show(m.ClusterCommand("up")); err != nil {
		return err
	}
	image, err := m.LoadImage()
	if err != nil {
		return err
	}
	config, err := m.Kubeconfig("", "developer")
	if err != nil {
		return err
	}
	if err := m.StartDaemon(); err != nil {
		return err
	}
	if err := os.WriteFile(pidFile(), []byte(strconv.Itoa(m.DaemonPID())), 0o644); err != nil {
		return err
	}
	laptop, err := writeLaptop(m, config)
	if err != nil {
		return err
	}

	pod := field(m, "get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[0].status.podIP}")
	service := field(m, "get", "service", "echo", "-o", "jsonpath={.spec.clusterIP}")
	say("Before: the pod is out of reach")
	if err := typed(laptop, "curl -sS --max-time 3 http://"+pod+":8080/healthz"); err == nil {
		return errors.New("the laptop reaches a pod without culvert; this shows nothing")
	}
	say("Connect, as the ordinary user alice")
	if err := typed(laptop, "culvert connect --image "+image); err != nil {
		return fmt.Errorf("%w\nthe daemon's log: %s", err, m.DaemonLog())
	}
	say("After: every program reaches the cluster")
	for _, line := range []string{
		"curl -sS http://" + pod + ":8080/healthz                     # a pod IP",
		"curl -sS http://" + service + "/healthz                           # a Service IP",
		"curl -sS http://echo.demo.svc.cluster.local/healthz      # a cluster name",
		"curl -sS http://echo/healthz                             # the short one",
		"dig +short @10.96.0.10 kubernetes.default.svc.cluster.local   # UDP, to the cluster's own DNS",
		"ping -c 2 " + pod,
		"curl -sS -o /dev/null -w '%{http_code}\\n' http://www.example.test/   # and the machine's own names as before",
		"culvert status",
	} {
		if err := typed(laptop, line); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
	}
	if err := exchange(laptop); err != nil {
		return fmt.Errorf("%w\nthe daemon's log: %s", err, m.DaemonLog())
	}
	rel, err := filepath.Rel(m.Repo, laptop)
	if err != nil {
		rel = laptop
	}
	say("It is still running; explore by hand")
	fmt.Printf(`  %[1]s                        a shell of alice on the laptop
  %[1]s culvert status -o wide   what is routed, and why
  %[1]s culvert ping svc/echo
  %[1]s kubectl get pods -o wide
  %[1]s culvert exchange echo --expose 3000:80   # then start a program at port 3000
  %[1]s culvert disconnect
  bin/testcluster link --delay 40ms --loss 1%%   a worse cable; --reset mends it
  make demo-down                    ends everything
`, rel)
	return nil
}

// exchange shows the other way: what the cluster sends to a Service comes to a
// program on the laptop, and goes to its pods again when that ends.
func exchange(laptop string) error {
	say("The other way: a Service's traffic comes to a program on the laptop, until that ends")
	program := exec.Command(laptop, "testapp", "serve", "--name", "a-program-on-the-laptop", "--http", "127.0.0.1:3000")
	if err := program.Start(); err != nil {
		return err
	}
	end := func() {
		_ = program.Process.Kill()
		_ = program.Wait()
	}
	defer end()
	if err := typed(laptop, "culvert exchange echo --expose 3000:80"); err != nil {
		return fmt.Errorf("culvert exchange: %w", err)
	}
	time.Sleep(time.Second) // until every node knows
	who := "curl -sS http://echo/who"
	if err := typed(laptop, who+" | grep laptop          # whoever in the cluster asks for echo, gets this"); err != nil {
		return fmt.Errorf("%s: the program on the laptop was not asked", who)
	}
	end()
	for _, line := range []string{
		who + " | grep -v laptop       # the program has ended: the Service's pods answer",
		"culvert list",
		"culvert leave echo",
	} {
		if err := typed(laptop, line); err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
	}
	return nil
}

func down() error {
	if err := endDaemon(); err != nil {
		return err
	}
	repo, err := netlab.Repo()
	if err != nil {
		return err
	}
	os.Remove(filepath.Join(repo, "bin", "laptop"))
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return show((&netlab.Machine{Repo: repo}).ClusterCommand("down", "--all"))
}

func pidFile() string { return filepath.Join(dir, "culvertd.pid") }

// endDaemon ends the daemon of an earlier demo, if it is still that process.
func endDaemon() error {
	b, err := os.ReadFile(pidFile())
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return fmt.Errorf("reading %s: %w", pidFile(), err)
	}
	exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if strings.HasPrefix(exe, dir) {
		if err := syscall.Kill(pid, syscall.SIGTERM); err != nil {
			return err
		}
		for range 300 {
			if syscall.Kill(pid, 0) != nil {
				break
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	return os.Remove(pidFile())
}

// writeLaptop makes bin/laptop: what follows it runs as alice on the laptop.
func writeLaptop(m *netlab.Machine, config string) (string, error) {
	path := filepath.Join(m.Repo, "bin", "laptop")
	var b strings.Builder
	b.WriteString("#!/bin/sh\n# alice on the demo's laptop: laptop CMD..., or a shell\n[ $# -gt 0 ] || set -- /bin/bash --norc\nexec")
	for _, a := range m.Enter(netlab.Alice) {
		if strings.HasPrefix(a, "PATH=") {
			a += ":" + filepath.Join(m.Repo, "test", "cluster", "bin")
		}
		fmt.Fprintf(&b, " '%s'", strings.ReplaceAll(a, "'", `'\''`))
	}
	fmt.Fprintf(&b, " 'KUBECONFIG=%s' TERM=\"$TERM\" 'PS1=alice@laptop$ ' \"$@\"\n", config)
	return path, os.WriteFile(path, []byte(b.String()), 0o755)
}

func field(m *netlab.Machine, args ...string) string {
	return strings.TrimSpace(m.Kubectl("", nil, append([]string{"-n", "demo"}, args...)...).Stdout)
}

func say(text string) { fmt.Printf("\n== %s\n", text) }

// typed shows a line as if alice had typed it, and runs it.
func typed(laptop, line string) error {
	fmt.Println("alice@laptop$", line)
	return show(exec.Command(laptop, "/bin/bash", "-c", line))
}

func show(cmd *exec.Cmd) error {
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	err := cmd.Run()
	fmt.Println()
	return err
}
