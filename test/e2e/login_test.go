//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// plugin is an exec plugin of Alice's, in front of the one that the test cluster
// makes: it says what it was given, and fails while a file is there.
type plugin struct {
	config string // a kubeconfig that uses it
	dir    string
}

// newPlugin writes one with an interactiveMode.
func newPlugin(t *testing.T, mode string) plugin {
	t.Helper()
	config := kubeconfig(t, "", "execuser")
	text, err := os.ReadFile(config)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(lab.Home(netlab.Alice), "plugin")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chown(dir, netlab.Alice.UID, netlab.Alice.UID); err != nil {
		t.Fatal(err)
	}
	p := plugin{config: filepath.Join(dir, "config"), dir: dir}
	real := filepath.Join(filepath.Dir(config), "execuser-plugin")
	// The credential says that it is over soon, so that it is asked for again.
	p.write(t, "plugin", fmt.Sprintf(`#!/bin/sh
[ -t 0 ] && terminal=yes || terminal=no
echo "$(id -u) terminal=$terminal home=$HOME" >> '%[1]s/log'
[ ! -e '%[1]s/fail' ] || { echo "your login has expired" >&2; exit 1; }
'%[2]s' | sed 's/"status" *: *{/&"expirationTimestamp":"'"$(date -u -d '+2 seconds' +%%Y-%%m-%%dT%%H:%%M:%%SZ)"'",/'
`, dir, real), 0o755)
	changed := strings.Replace(string(text), real, filepath.Join(dir, "plugin"), 1)
	changed = strings.Replace(changed, `"interactiveMode": "Never"`, `"interactiveMode": "`+mode+`"`, 1)
	if !strings.Contains(changed, mode) {
		t.Fatalf("no interactiveMode in %s", text)
	}
	p.write(t, "config", changed, 0o644)
	return p
}

func (p plugin) write(t *testing.T, name, text string, mode os.FileMode) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}

func (p plugin) log(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.dir, "log"))
	if err != nil {
		t.Fatalf("the plugin was never run: %v", err)
	}
	return string(b)
}

// connectOnTerminal connects as somebody who sits at a terminal.
func connectOnTerminal(t *testing.T, config string) {
	t.Helper()
	t.Cleanup(func() {
		if r := lab.Culvert(netlab.Alice, "disconnect"); r.Code != 0 {
			t.Errorf("disconnect: %v", r)
		}
	})
	r := lab.Run(netlab.Alice, "script", "-qec", "culvert connect --kubeconfig "+config+" --image "+image, "/dev/null")
	if r.Code != 0 {
		t.Fatalf("connect on a terminal: %v", r)
	}
}

// TestTerminalPlugin: a plugin that must have the terminal gets it from the CLI.
// The session, which has none, runs it all the same: what the user did at the
// terminal usually lasts for a while.
func TestTerminalPlugin(t *testing.T) {
	p := newPlugin(t, "Always")
	r := lab.Culvert(netlab.Alice, "connect", "--kubeconfig", p.config, "--image", image)
	if r.Code != 1 || !strings.Contains(r.Stderr, "terminal") {
		t.Errorf("interactiveMode Always without a terminal: %v", r)
	}
	connectOnTerminal(t, p.config)
	waitState(t, netlab.Alice, api.Connected, 5*time.Second)
	fresh(t, 5*time.Second)
	for _, want := range []string{"4701 terminal=yes home=" + lab.Home(netlab.Alice), "4701 terminal=no home=" + lab.Home(netlab.Alice)} {
		if log := p.log(t); !strings.Contains(log, want) {
			t.Errorf("the plugin was not run with %q:\n%s", want, log)
		}
	}
}

// TestNeedsLogin: when the credentials end while connected, device and routes
// stay, status says what to do, and the session goes on by itself afterwards.
// Open connections live through it.
func TestNeedsLogin(t *testing.T) {
	p := newPlugin(t, "Always")
	connectOnTerminal(t, p.config)
	s := waitState(t, netlab.Alice, api.Connected, 5*time.Second)
	alive := longLived(t)
	p.write(t, "fail", "", 0o644)
	if err := syscall.Kill(s.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waiting := waitState(t, netlab.Alice, api.NeedsLogin, 20*time.Second)
	if !strings.Contains(waiting.Cause, "plugin") {
		t.Errorf("the cause does not name the plugin: %q", waiting.Cause)
	}
	if got := sh(t, "ip route get "+podIPs(t)[0]); !strings.Contains(got, s.Device) || waiting.Device != s.Device {
		t.Errorf("the route is gone: %s (device %s, was %s)", got, waiting.Device, s.Device)
	}
	if got := sh(t, "getent ahostsv4 www.example.test | awk '{print $1; exit}'"); got != "198.51.100.80" {
		t.Errorf("meanwhile www.example.test is %q", got)
	}
	if r := lab.Culvert(netlab.Alice, "status"); !strings.Contains(r.Stdout, "needs login") {
		t.Errorf("status: %v", r)
	}
	if err := os.Remove(filepath.Join(p.dir, "fail")); err != nil {
		t.Fatal(err)
	}
	waitState(t, netlab.Alice, api.Connected, 20*time.Second)
	alive(30 * time.Second)
	fresh(t, 5*time.Second)
}

// TestPluginUnderTheUnit: what the unit takes from the daemon, a plugin does not
// miss: it writes its user's home and /tmp, and has no more rights than he.
func TestPluginUnderTheUnit(t *testing.T) {
	connectAs(t, netlab.Alice, "", "execuser")
	pid := status(t, netlab.Alice)[0].PID
	process, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NoNewPrivs:\t1", "CapEff:\t0000000000000000", "CapPrm:\t0000000000000000", "Uid:\t4701\t4701\t4701\t4701"} {
		if !strings.Contains(string(process), want) {
			t.Errorf("no %q in\n%s", want, process)
		}
	}
	daemon, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", lab.DaemonPID()))
	if err != nil {
		t.Fatal(err)
	}
	// The unit's, not all that root could have.
	if !strings.Contains(string(daemon), "NoNewPrivs:\t1") || strings.Contains(string(daemon), "CapBnd:\t000001ffffffffff") {
		t.Errorf("the daemon does not run under the unit's settings:\n%s", daemon)
	}
	since := fmt.Sprintf("/proc/%d", lab.DaemonPID())
	for _, path := range []string{filepath.Join(lab.Home(netlab.Alice), ".culvert-exec-plugin"), "/tmp/culvert-exec-plugin-4701"} {
		if got := root(t, "find "+path+" -user alice -newer "+since); got == "" {
			t.Errorf("the plugin wrote nothing to %s", path)
		}
	}
}

// TestTokenReplaced: the token in the kubeconfig ends, and another is written
// there, as a login does it. The carrier that is up does not care; what comes
// after it waits for the login and then goes on by itself, watches included.
func TestTokenReplaced(t *testing.T) {
	apply(t, `
apiVersion: v1
kind: ServiceAccount
metadata: {name: renewed, namespace: demo}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: renewed}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-viewer}
subjects: [{kind: ServiceAccount, name: renewed, namespace: demo}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: renewed, namespace: demo}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-user}
subjects: [{kind: ServiceAccount, name: renewed, namespace: demo}]
`)
	// A token ends when the Secret is deleted that it is bound to.
	token := func(secret string) string {
		apply(t, "{apiVersion: v1, kind: Secret, metadata: {name: "+secret+", namespace: demo}}")
		return kubectl(t, "-n", "demo", "create", "token", "renewed", "--bound-object-kind=Secret", "--bound-object-name="+secret)
	}
	text, err := os.ReadFile(kubeconfig(t, "", "developer"))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(lab.Home(netlab.Alice), "token")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(dir, "config")
	login := func(token string) {
		t.Helper()
		user := regexp.MustCompile(`"client-(certificate|key)-data": "[^"]*"`)
		first := true
		with := user.ReplaceAllStringFunc(string(text), func(string) string {
			if first {
				first = false
				return `"token": "` + token + `"`
			}
			return `"username": ""`
		})
		if err := os.WriteFile(config, []byte(with), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	login(token("renewed-1"))
	connectWith(t, config)
	alive := longLived(t)
	s := waitCarrier(t, "pods/proxy", 5*time.Second)
	kubectl(t, "-n", "demo", "delete", "secret", "renewed-1")
	time.Sleep(15 * time.Second) // longer than the API server remembers a token
	alive(time.Second)
	if now := status(t, netlab.Alice)[0]; now.State != api.Connected || now.Carrier.Redials != s.Carrier.Redials {
		t.Errorf("the carrier that was up: %+v", now)
	}
	link(t, "--cut", "on")
	waitState(t, netlab.Alice, api.Reconnecting, 10*time.Second)
	link(t, "--cut", "off")
	waiting := waitState(t, netlab.Alice, api.NeedsLogin, 20*time.Second)
	if !strings.Contains(waiting.Cause, "credentials") {
		t.Errorf("the cause does not tell: %q", waiting.Cause)
	}
	begun := time.Now()
	login(token("renewed-2"))
	now := waitState(t, netlab.Alice, api.Connected, 20*time.Second)
	t.Logf("connected %v after the login", time.Since(begun).Round(time.Millisecond))
	alive(5 * time.Second)
	if now.PID != s.PID {
		t.Errorf("process %d, was %d", now.PID, s.PID)
	}
	// A Service that appears is known, so the watches have the new token, too.
	apply(t, "{apiVersion: v1, kind: Service, metadata: {name: after-login, namespace: demo}, spec: {ports: [{port: 80}]}}")
	eventually(t, 20*time.Second, func() error {
		if r := lab.Run(netlab.Alice, "getent", "hosts", "after-login.demo"); r.Code != 0 {
			return fmt.Errorf("after-login.demo is not known: %v", r)
		}
		return nil
	})
}
