package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestGate: the role runs, the agent's exec probe asks it, and SIGTERM ends it.
func TestGate(t *testing.T) {
	dir := t.TempDir()
	for file, text := range map[string]string{
		"generation": "3\n",
		"web.json":   `{"gate": "culvert-gate", "routes": []}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	addrs := make([]string, 2)
	for i := range addrs {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addrs[i] = l.Addr().String()
		l.Close()
	}
	var stderr bytes.Buffer
	ended := make(chan int, 1)
	go func() {
		ended <- run([]string{"gate", "--state-dir", dir, "--keep-file", filepath.Join(dir, "kept"), "--control", addrs[0], "--metrics", addrs[1]}, &stderr)
	}()
	probe := func() int { return run([]string{"health", "--ready", "--metrics", addrs[1]}, new(bytes.Buffer)) }
	for end := time.Now().Add(5 * time.Second); probe() != 0; {
		if time.Now().After(end) {
			t.Fatal("the gate does not get ready")
		}
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := <-ended; code != 0 { // at once: nobody knows a way here
		t.Errorf("exit status %d: %s", code, &stderr)
	}
	if !strings.Contains(stderr.String(), "generation=3") {
		t.Errorf("log: %s", &stderr)
	}
}

// TestGateUsage: what is no flag of a gate is refused.
func TestGateUsage(t *testing.T) {
	for _, args := range [][]string{{"gate", "web"}, {"gate", "--no-such"}, {"gates"}} {
		var stderr bytes.Buffer
		if code := run(args, &stderr); code != 2 || stderr.Len() == 0 {
			t.Errorf("%q: exit status %d, %q", args, code, &stderr)
		}
	}
}
