package main

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/cluster"
)

func TestRunArguments(t *testing.T) {
	for _, x := range []struct {
		o       runOptions
		args    []string
		dash    int
		command string // empty: refused
		mounts  string
	}{
		{runOptions{from: "d"}, []string{"ls", "-l"}, 0, "ls -l", ""},
		{runOptions{from: "d", mounts: temporaryMounts}, []string{"ls"}, 0, "ls", temporaryMounts},
		{runOptions{from: "d", mounts: temporaryMounts}, []string{"/m", "ls"}, 1, "ls", "/m"},
		{runOptions{from: "d", mounts: "/m"}, []string{"ls"}, 0, "ls", "/m"},
		{runOptions{from: "d", env: []string{"A=", "B=c=d"}}, []string{"ls"}, 0, "ls", ""},
		{runOptions{from: "d", mounts: "/m"}, []string{"/n", "ls"}, 1, "", ""},
		{runOptions{from: "d"}, []string{"x", "ls"}, 1, "", ""},
		{runOptions{from: "d"}, []string{"ls"}, -1, "", ""},
		{runOptions{from: "d"}, nil, 0, "", ""},
		{runOptions{}, []string{"ls"}, 0, "", ""},
		{runOptions{from: "d", env: []string{"A"}}, []string{"ls"}, 0, "", ""},
		{runOptions{from: "d", env: []string{"=a"}}, []string{"ls"}, 0, "", ""},
	} {
		command, err := x.o.command(x.args, x.dash)
		if got := strings.Join(command, " "); got != x.command || (err == nil) != (x.command != "") {
			t.Errorf("%+v %q: %q, %v", x.o, x.args, got, err)
		}
		if err == nil && x.o.mounts != x.mounts {
			t.Errorf("%q: mounts %q, want %q", x.args, x.o.mounts, x.mounts)
		}
		if err != nil && codeOf(err) != exitUsage {
			t.Error(err)
		}
	}
}

func TestRunOverlay(t *testing.T) {
	machine := []string{"PATH=/bin", "HOME=/home/me", "A=mine", "B=b"}
	vars := []cluster.Var{
		{Name: "A", Value: "theirs"}, {Name: "PATH", Value: "/app"}, {Name: "X", Value: ""}, {Name: "NUL", Value: "\x00"},
		{Name: "KUBERNETES_SERVICE_HOST", Value: "10.96.0.1", Source: "Service kubernetes"},
		{Name: "REDIS_SERVICE_HOST", Value: "10.96.0.9", Source: "Service redis"},
	}
	env, kept := overlay(machine, vars, false)
	e := environment(env)
	if e.get("A") != "theirs" || e.get("PATH") != "/bin" || e.get("B") != "b" || e.get("REDIS_SERVICE_HOST") == "" || e.get("KUBERNETES_SERVICE_HOST") != "" {
		t.Errorf("%q", env)
	}
	if !slices.Contains(env, "X=") || !slices.Equal(kept, []string{"PATH", "NUL"}) {
		t.Errorf("%q, kept %q", env, kept)
	}
	env, kept = overlay(machine, vars, true)
	if e := environment(env); e.get("PATH") != "/app" || e.get("KUBERNETES_SERVICE_HOST") == "" || !slices.Equal(kept, []string{"NUL"}) {
		t.Errorf("%q, kept %q", env, kept)
	}
	if machine[2] != "A=mine" || len(machine) != 4 {
		t.Errorf("%q", machine)
	}
}

func TestRunExitCodes(t *testing.T) {
	none, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer none.Close()
	for script, want := range map[string]int{"exit 0": 0, "exit 7": 7, "kill -TERM $$": 128 + int(syscall.SIGTERM)} {
		a := &app{in: none}
		err := a.attend(exec.Command("sh", "-c", script))
		var code exitCode
		if got := 0; err != nil {
			if errors.As(err, &code) {
				got = int(code)
			}
			if got != want {
				t.Errorf("%s: %v", script, err)
			}
		} else if want != 0 {
			t.Errorf("%s: no error", script)
		}
	}
	for name, want := range map[string]exitCode{"no-such-command-here": exitNotFound, "/": exitNotExecutable} {
		var errs bytes.Buffer
		a := &app{in: none, err: &errs, output: "text"}
		_, err := exec.LookPath(name)
		if got := a.notRun(name, err); got != want || !strings.Contains(errs.String(), name) {
			t.Errorf("%s: %v, %s", name, got, errs.String())
		}
	}
}

// The command gets the signals that culvert gets.
func TestRunPassesSignals(t *testing.T) {
	none, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer none.Close()
	ready := filepath.Join(t.TempDir(), "ready")
	cmd := exec.Command("sh", "-c", `trap 'kill $!; exit 42' USR1; sleep 20 & : >"$0"; wait`, ready)
	done := make(chan error, 1)
	go func() { done <- (&app{in: none}).attend(cmd) }()
	for range 200 {
		if _, err := os.Stat(ready); err == nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-done:
		if err != exitCode(42) {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the command goes on")
	}
}
