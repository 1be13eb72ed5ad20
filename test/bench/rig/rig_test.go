package rig

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestMain lets the test's program play the roles.
func TestMain(m *testing.M) {
	Main()
	os.Exit(m.Run())
}

// testapp builds the test program.
func testapp(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("network namespaces and TUN devices need root")
	}
	file := filepath.Join(t.TempDir(), "testapp")
	cmd := exec.Command("go", "build", "-o", file, "./testapp")
	cmd.Dir = "../../cluster"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building testapp: %v\n%s", err, out)
	}
	return file
}

func run(t *testing.T, cmd *exec.Cmd) map[string]any {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, stderr.String())
	}
	t.Logf("%v: %s", cmd.Args[4:], stdout.String())
	var got map[string]any
	if err := json.Unmarshal(stdout.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	return got
}

func TestPlain(t *testing.T) {
	app := testapp(t)
	p, err := NewPlain(PlainConfig{Testapp: app, Profiles: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	before := CPU(p.Session.PID())
	if got := run(t, p.Command(app, "--json", "push", p.Targets[0].String()+":9002", "0.5", "2")); got["mbit_per_s"].(float64) < 1 {
		t.Error("hardly anything arrived")
	}
	if CPU(p.Session.PID()) == before {
		t.Error("the bytes went past the session")
	}
	if Resident(p.Agent.PID()) < 5 {
		t.Error("the agent has no memory")
	}
	run(t, p.Command(app, "--json", "blast", p.Targets[0].String()+":9004", "up", "1200", "20", "0.5"))
	run(t, p.Command(app, "--json", "blast", p.Targets[0].String()+":9004", "down", "1200", "20", "0.5"))
	run(t, p.Command(app, "--json", "crowd", fmt.Sprintf("%s:9000,%s:9000", p.Targets[0], p.Targets[7]), "100", "0.2"))
	run(t, p.Command(app, "--json", "crowd", fmt.Sprintf("%s:9000,%s:9000", p.Targets[0], p.Targets[7]), "100", "0.2", "busy"))
	run(t, p.Command(app, "--json", "ping", p.Targets[0].String()+":9000", "0.3"))
}

func TestPlainUDP(t *testing.T) {
	app := testapp(t)
	p, err := NewPlain(PlainConfig{Testapp: app, UDP: true})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for _, way := range []string{"push", "pull"} {
		port := map[string]string{"push": ":9002", "pull": ":9003"}[way]
		if got := run(t, p.Command(app, "--json", way, p.Targets[0].String()+port, "1", "2")); got["mbit_per_s"].(float64) < 50 {
			t.Error("hardly anything arrived")
		}
	}
}

func TestStock(t *testing.T) {
	app := testapp(t)
	p, err := NewPlain(PlainConfig{Testapp: app})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	for i, relay := range []netip.Addr{{}, p.Direct} {
		s, err := NewStock(StockConfig{Near: p.Laptop, Far: p.Pod, FarAddr: podAddr.Addr(), Number: uint8(i), Relay: relay})
		if err != nil {
			t.Fatal(err)
		}
		if got := run(t, p.Command(app, "--json", "pull", s.Addr.String()+":9003", "0.5")); got["mbit_per_s"].(float64) < 1 {
			t.Error("hardly anything arrived")
		}
		s.Close()
	}
}
