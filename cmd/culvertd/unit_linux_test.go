package main

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

const unit = "../../deploy/systemd/culvertd.service"

// setting returns a unit's setting, which is there once.
func setting(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^`+name+`=(.*)$`).FindAllStringSubmatch(string(text), -1)
	if len(m) != 1 {
		t.Fatalf("%s is there %d times", name, len(m))
	}
	return m[0][1]
}

func build(t *testing.T, dir string) string {
	t.Helper()
	program := filepath.Join(dir, "culvertd")
	cmd := exec.Command("go", "build", "-o", program, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building culvertd: %v\n%s", err, out)
	}
	return program
}

func TestUnitVerifies(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Skip("no systemd-analyze on this machine")
	}
	dir := t.TempDir()
	program := build(t, dir)
	text, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	// The program must exist for the check, and is not installed here.
	copy := filepath.Join(dir, "culvertd.service")
	if err := os.WriteFile(copy, []byte(strings.ReplaceAll(string(text), "/usr/local/bin/culvertd", program)), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(analyze, "verify", "--man=no", copy).CombinedOutput()
	if err != nil || strings.Contains(string(out), "culvertd.service") {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	// What exec plugins would not survive.
	for _, bad := range []string{"ProtectHome", "PrivateTmp", "PrivateUsers", "PrivateDevices", "ProtectSystem", "MemoryDenyWriteExecute", "SystemCallFilter", "RestrictAddressFamilies", "DevicePolicy"} {
		if regexp.MustCompile(`(?m)^` + bad + `=`).Match(text) {
			t.Errorf("the unit has %s", bad)
		}
	}
}

// The unit's commands, run as systemd does: with its capabilities, without new
// privileges, told about readiness by a datagram, and cleaned up afterwards.
func TestUnitCommands(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	program := build(t, dir)
	ready, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	resolvConf := filepath.Join(dir, "resolv.conf")
	if err := os.WriteFile(resolvConf, []byte("nameserver 192.0.2.1\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	caps := ""
	for _, c := range strings.Fields(setting(t, "CapabilityBoundingSet")) {
		caps += ",+" + strings.ToLower(strings.TrimPrefix(c, "CAP_"))
	}
	command := func(name string) *exec.Cmd {
		args := strings.Fields(setting(t, name))
		args[0] = program
		args = append(args, "--socket", filepath.Join(dir, "culvert.sock"), "--state-dir", filepath.Join(dir, "state"), "--config", filepath.Join(dir, "none.yaml"))
		// In another network and with another /etc/resolv.conf: a culvertd that
		// really runs on this machine is none of the test's business.
		cmd := exec.Command("unshare", append([]string{"-n", "-m", "--", "sh", "-c",
			`mount --bind "$0" "$(readlink -f /etc/resolv.conf)" && exec "$@"`, resolvConf,
			"setpriv", "--no-new-privs", "--bounding-set", "-all" + caps, "--inh-caps", "-all", "--"}, args...)...)
		cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
		cmd.Stderr = os.Stderr
		return cmd
	}
	start := command("ExecStart")
	if err := start.Start(); err != nil {
		t.Fatal(err)
	}
	defer start.Process.Kill()
	ready.SetReadDeadline(time.Now().Add(10 * time.Second))
	buf := make([]byte, 4096)
	n, err := ready.Read(buf)
	if err != nil || !strings.HasPrefix(string(buf[:n]), "READY=1\n") {
		t.Fatalf("notified %q, %v", buf[:n], err)
	}
	c := api.New(filepath.Join(dir, "culvert.sock"))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	f, err := c.Facts(ctx, nil)
	if err != nil || f.TUN != "ok" {
		t.Errorf("facts under the unit's settings: %+v, %v", f, err)
	}
	if err := start.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := start.Wait(); err != nil {
		t.Errorf("ExecStart ended with %v", err)
	}
	if out, err := command("ExecStopPost").Output(); err != nil || len(out) > 0 {
		t.Errorf("ExecStopPost after an orderly end: %q, %v", out, err)
	}
	if got := setting(t, "KillMode"); got != "process" {
		t.Errorf("KillMode=%s kills the guard with the daemon", got)
	}
}

func TestUsage(t *testing.T) {
	cmd := command()
	cmd.SetArgs([]string{"--nonsense"})
	if err := cmd.Execute(); err == nil || !strings.Contains(err.Error(), "culvertd --help") {
		t.Errorf("unknown flag: %v", err)
	}
}

func TestNotRoot(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to become somebody else")
	}
	dir, err := os.MkdirTemp("", "culvertd")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	os.Chmod(dir, 0o755)
	cmd := exec.Command(build(t, dir))
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "must run as root") || !strings.Contains(string(out), "sudo") {
		t.Errorf("%v: %s", err, out)
	}
}

// A configuration that cannot be read keeps a daemon from starting; it must not
// keep the guard and the cleanup from giving the machine its names back.
func TestCleanupWithoutConfiguration(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	dir := t.TempDir()
	program := build(t, dir)
	config := filepath.Join(dir, "culvertd.yaml")
	if err := os.WriteFile(config, []byte("nonsense: [\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) (string, error) {
		args = append([]string{"-n", "-m", "--", program}, args...)
		args = append(args, "--socket", filepath.Join(dir, "culvert.sock"), "--state-dir", filepath.Join(dir, "state"), "--config", config)
		cmd := exec.Command("unshare", args...)
		cmd.Stdin = strings.NewReader("q") // the guard's goodbye
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, verb := range []string{"cleanup", "guard"} {
		if out, err := run(verb); err != nil {
			t.Errorf("culvertd %s: %v: %s", verb, err, out)
		}
	}
	if out, err := run(); err == nil || !strings.Contains(out, config) {
		t.Errorf("a daemon started: %v: %s", err, out)
	}
}
