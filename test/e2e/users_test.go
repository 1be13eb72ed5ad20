//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// TestOneNamespace: a user who may use the namespace demo only gets that one,
// and is told what was not visible.
func TestOneNamespace(t *testing.T) {
	s := connectAs(t, netlab.Alice, "", "limited")
	if s.Namespace != "demo" || len(s.Notes) == 0 {
		t.Errorf("want the namespace demo and notes about what was not visible: %+v", s)
	}
	echo(t, dial(t, "tcp", podIPs(t)[0]+":9000"), []byte("mine"))
	echo(t, dial(t, "tcp", serviceIPs(t)[0]+":9000"), []byte("mine"))
	sh(t, "getent hosts echo")
	sh(t, "getent hosts echo.demo.svc.cluster.local")
}

// TestSudo: kt-connect's habit works, as the user who called sudo.
func TestSudo(t *testing.T) {
	cmd := lab.Command(background(t), netlab.Root, filepath.Join(lab.Dir, "bin/culvert"), "connect", "--kubeconfig", kubeconfig(t, "", "developer"), "--image", image)
	cmd.Env = append(cmd.Env, "SUDO_UID=4701", "SUDO_GID=4701", "SUDO_USER=alice")
	r := netlab.Run(cmd)
	t.Cleanup(func() { lab.Culvert(netlab.Alice, "disconnect") })
	if r.Code != 0 {
		t.Fatalf("sudo culvert connect: %v", r)
	}
	s := status(t, netlab.Alice)
	if len(s) != 1 || s[0].UID != netlab.Alice.UID {
		t.Fatalf("want one session of Alice: %+v", s)
	}
	if got := root(t, "ps -o uid= -p "+itoa(s[0].PID)); strings.TrimSpace(got) != "4701" {
		t.Errorf("the session process runs as %s", got)
	}
}

func itoa(i int) string { return strconv.Itoa(i) }

// TestKubectlPlugin: the same program is `kubectl culvert`.
func TestKubectlPlugin(t *testing.T) {
	bin := filepath.Join(lab.Repo, "test/cluster/bin")
	r := lab.Run(netlab.Alice, "/bin/sh", "-c", "PATH="+bin+":$PATH kubectl culvert connect --help")
	if r.Code != 0 || !strings.Contains(r.Stdout, "kubectl culvert connect") {
		t.Errorf("kubectl culvert: %v", r)
	}
}

// TestAtBoot: a session that was asked for at boot comes back when the daemon
// starts again, as its user and without his environment.
func TestAtBoot(t *testing.T) {
	connect(t, "--at-boot")
	if err := lab.StopDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := lab.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	s := waitState(t, netlab.Alice, api.Connected, 60*time.Second)
	if !s.AtBoot || s.UID != netlab.Alice.UID {
		t.Errorf("not the session of before: %+v", s)
	}
	fresh(t, 5*time.Second)
	files, _ := filepath.Glob(filepath.Join(lab.Dir, "state", "boot", "*"))
	if len(files) != 1 {
		t.Fatalf("remembered for the boot: %v", files)
	}
	if b, err := os.ReadFile(files[0]); err != nil || strings.Contains(string(b), "HOME=") {
		t.Errorf("an environment is on disk: %v %s", err, b)
	}
	if r := lab.Culvert(netlab.Alice, "disconnect"); r.Code != 0 {
		t.Fatal(r)
	}
	if files, _ := filepath.Glob(filepath.Join(lab.Dir, "state", "boot", "*")); len(files) != 0 {
		t.Errorf("still remembered after disconnect: %v", files)
	}
}

// TestDoctor: read-only, green when all is well, and naming the fault otherwise.
func TestDoctor(t *testing.T) {
	before := listMachine(t)
	r := lab.Culvert(netlab.Alice, "doctor", "--kubeconfig", kubeconfig(t, "", "developer"), "--image", image)
	if r.Code != 0 {
		t.Errorf("doctor on a healthy machine: %v", r)
	}
	r = lab.Culvert(netlab.Alice, "doctor", "--kubeconfig", kubeconfig(t, "", "nobody"), "--image", image)
	if r.Code != 1 || !strings.Contains(r.Stdout+r.Stderr, "portforward") {
		t.Errorf("doctor of a user without rights: %v", r)
	}
	if diff := compare(before, listMachine(t)); diff != "" {
		t.Errorf("doctor changed the machine:\n%s", diff)
	}
}
