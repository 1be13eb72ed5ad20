//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// TestVersions: program, daemon and agent of one build say the same version,
// and the image's name has it too.
func TestVersions(t *testing.T) {
	var v struct {
		Client struct{ Version string }
		Daemon struct{ Version string }
	}
	r := lab.Culvert(netlab.Alice, "version", "-o", "json")
	if err := json.Unmarshal([]byte(r.Stdout), &v); err != nil || r.Code != 0 {
		t.Fatalf("version -o json: %v, %v", err, r)
	}
	s := connect(t)
	if v.Client.Version == "" || v.Daemon.Version != v.Client.Version {
		t.Errorf("the program is %q, the daemon %q", v.Client.Version, v.Daemon.Version)
	}
	if s.Agent.Version == "" || !strings.HasSuffix(image, ":"+s.Agent.Version) {
		t.Errorf("the agent says %q, its image is %s", s.Agent.Version, image)
	}
}

// TestCompletion: the scripts of three shells, and contexts completed.
func TestCompletion(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := lab.Culvert(netlab.Alice, "completion", shell); r.Code != 0 || !strings.Contains(r.Stdout, "culvert") {
			t.Errorf("completion %s: %v", shell, r)
		}
	}
	script := lab.Culvert(netlab.Alice, "completion", "bash").Stdout
	check := exec.Command("bash", "-n")
	check.Stdin = strings.NewReader(script)
	if out, err := check.CombinedOutput(); err != nil {
		t.Errorf("bash does not read its completion: %v\n%s", err, out)
	}
	r := lab.Culvert(netlab.Alice, "__complete", "connect", "--kubeconfig", kubeconfig(t, "", "developer"), "--context", "")
	if !strings.Contains(r.Stdout, "culvert-test\n") {
		t.Errorf("contexts are not completed: %v", r)
	}
}

// TestLogs: what a session did is there while it lives, goes on with -f, and
// stays after it ended.
func TestLogs(t *testing.T) {
	s := connect(t, "--debug")
	if r := lab.Culvert(netlab.Alice, "logs"); r.Code != 0 || !strings.Contains(r.Stdout, "session starts") {
		t.Errorf("logs: %v", r)
	}
	if r := lab.Culvert(netlab.Alice, "logs", "nowhere"); r.Code != 1 || !strings.Contains(r.Stderr, s.Context) {
		t.Errorf("logs of another context: %v", r)
	}
	if r := lab.Culvert(netlab.Bob, "logs"); strings.Contains(r.Stdout, "session starts") {
		t.Errorf("Bob reads Alice's log: %v", r)
	}
	follow := watching(t, "logs", "-f")
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, 10*time.Second, func() error {
		if text := follow.String(); strings.Count(text, "session starts") < 2 {
			return fmt.Errorf("logs -f does not go on with the restarted session:\n%s", text)
		}
		return nil
	})
	waitState(t, netlab.Alice, api.Connected, 10*time.Second)
	if r := lab.Culvert(netlab.Alice, "disconnect"); r.Code != 0 {
		t.Fatal(r)
	}
	if r := lab.Culvert(netlab.Alice, "logs"); r.Code != 0 || !strings.Contains(r.Stdout, "session starts") {
		t.Errorf("logs of the session that ended: %v", r)
	}
}

// output is what a running program has said so far.
type output struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

func (o *output) wait(t *testing.T, words string, within time.Duration) {
	t.Helper()
	eventually(t, within, func() error {
		if text := o.String(); !strings.Contains(text, words) {
			return fmt.Errorf("no %q in:\n%s", words, text)
		}
		return nil
	})
}

// watching runs a command of Alice's until the test ends.
func watching(t *testing.T, args ...string) *output {
	t.Helper()
	o := &output{}
	cmd := lab.Command(background(t), netlab.Alice, filepath.Join(lab.Dir, "bin/culvert"), args...)
	cmd.Stdout, cmd.Stderr = o, o
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGINT)
		_ = cmd.Wait()
	})
	return o
}

// TestWatch: the stream of states shows every one, with its step or cause.
func TestWatch(t *testing.T) {
	lines := watching(t, "status", "-w", "-o", "json")
	s := connect(t)
	lines.wait(t, `"state":"connected"`, 5*time.Second)
	link(t, "--cut", "on")
	lines.wait(t, `"state":"reconnecting"`, 60*time.Second)
	link(t, "--cut", "off")
	waitState(t, netlab.Alice, api.Connected, 30*time.Second)
	if r := lab.Culvert(netlab.Alice, "disconnect"); r.Code != 0 {
		t.Fatal(r)
	}
	lines.wait(t, `"state":"disconnected"`, 5*time.Second)
	var states []api.State
	steps := 0
	for line := range strings.Lines(lines.String()) {
		var e api.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if e.Session.ID != s.ID {
			continue
		}
		switch state := e.Session.State; {
		case state == api.Reconnecting && e.Session.Cause == "":
			t.Errorf("reconnecting without a cause: %s", line)
		case state == api.Connecting && e.Session.Step != "":
			steps++
		}
		if len(states) == 0 || states[len(states)-1] != e.Session.State {
			states = append(states, e.Session.State)
		}
	}
	if steps < 3 {
		t.Errorf("%d steps of connecting in\n%s", steps, lines)
	}
	want := []api.State{api.Connecting, api.Connected, api.Reconnecting, api.Connected, api.Disconnecting, api.Disconnected}
	if fmt.Sprint(states) != fmt.Sprint(want) {
		t.Errorf("states %v, want %v", states, want)
	}
}

// TestSecondDaemon: a second one at the same place refuses to start and leaves
// the first and its session alone.
func TestSecondDaemon(t *testing.T) {
	connect(t)
	r := lab.Run(netlab.Root, filepath.Join(lab.Dir, "bin/culvertd"), "--socket", lab.Socket, "--state-dir", filepath.Join(lab.Dir, "state"), "--config", lab.Config)
	if r.Code != 1 || !strings.Contains(r.Stderr, "already") && !strings.Contains(r.Stderr, "another") {
		t.Errorf("a second daemon: %v", r)
	}
	waitState(t, netlab.Alice, api.Connected, time.Second)
	fresh(t, 5*time.Second)
	sh(t, "getent hosts echo.demo")
}

// TestKtSpellings: a kt-connect user's command line connects as it stands.
func TestKtSpellings(t *testing.T) {
	t.Cleanup(func() { lab.Culvert(netlab.Alice, "disconnect") })
	r := lab.Culvert(netlab.Alice, "connect", "-c", kubeconfig(t, "", "developer"), "-n", "demo", "-i", image,
		"--excludeIps", "10.96.200.0/24", "--includeIps", "172.30.0.12/32", "--podQuota", "0.5c,256m",
		"--nodeSelector", "kubernetes.io/hostname=node2", "--withLabel", "team=shop", "--withAnnotation", "who=alice",
		"--podCreationTimeout", "40", "--clusterDomain", "cluster.local", "--dnsMode", "localDNS", "--mode", "tun2socks", "--shareShadow", "--skipCleanup", "-d")
	if r.Code != 0 {
		t.Fatalf("kt-connect's flags: %v", r)
	}
	for _, word := range []string{"--mode", "--shareShadow", "--skipCleanup"} {
		if !strings.Contains(r.Stderr, word) {
			t.Errorf("nothing is said of %s: %v", word, r)
		}
	}
	s := status(t, netlab.Alice)[0]
	if s.Agent.Node != "node2" {
		t.Errorf("the agent is on %q", s.Agent.Node)
	}
	if got := kubectl(t, "-n", "demo", "get", "pod", s.Agent.Pod, "-o", "jsonpath={.metadata.labels.team} {.metadata.annotations.who} {.spec.containers[0].resources.limits.memory}"); got != "shop alice 256Mi" {
		t.Errorf("label, annotation and limit are %q", got)
	}
	for addr, inside := range map[string]bool{"10.96.200.7": false, "10.96.201.7": true, "172.30.0.12": true} {
		if got := sh(t, "ip route get "+addr); strings.Contains(got, s.Device) != inside {
			t.Errorf("%s: %s, want in the tunnel: %v", addr, got, inside)
		}
	}
	fresh(t, 5*time.Second)
}
