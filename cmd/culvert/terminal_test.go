package main

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// openTerminal makes a pseudo terminal (pty(7)).
func openTerminal(t *testing.T) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { master.Close(); slave.Close() })
	return master, slave
}

// TestPluginOnTerminal: a plugin that asks the user something gets the terminal,
// and connect then shows its steps with a spinner.
func TestPluginOnTerminal(t *testing.T) {
	m := newMachine(t)
	m.daemon.lines = connecting()
	plugin := filepath.Join(m.dir, "plugin")
	script := `#!/bin/sh
printf 'Code: ' >&2
read code
echo "$code" > ` + m.dir + `/code
echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"abc"}}'
`
	if err := os.WriteFile(plugin, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	user := fmt.Sprintf("{exec: {apiVersion: client.authentication.k8s.io/v1, command: %s, interactiveMode: Always}}", plugin)
	config := m.kubeconfig(t, apiServer(t, 201, "jane").URL, user, "staging")
	for _, uid := range []int{somebody, 0} {
		os.Remove(filepath.Join(m.dir, "code"))
		master, slave := openTerminal(t)
		cmd := m.command(uid, []string{"TERM=xterm", "SUDO_UID=65534"}, "connect", "-c", config)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		slave.Close()
		timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		var screen bytes.Buffer
		buf := make([]byte, 4096)
		for typed := false; ; {
			n, err := master.Read(buf)
			screen.Write(buf[:n])
			if !typed && strings.Contains(screen.String(), "Code: ") {
				typed = true
				io.WriteString(master, "4711\n")
			}
			if err != nil {
				break
			}
		}
		cmd.Wait()
		timer.Stop()
		code, _ := os.ReadFile(filepath.Join(m.dir, "code"))
		if cmd.ProcessState.ExitCode() != 0 || string(code) != "4711\n" {
			t.Errorf("uid %d: exit code %d, the plugin read %q\n%s", uid, cmd.ProcessState.ExitCode(), code, screen.String())
		}
		if !strings.Contains(screen.String(), "✓ starting the agent (") {
			t.Errorf("uid %d: no ticked steps:\n%s", uid, screen.String())
		}
	}
}
