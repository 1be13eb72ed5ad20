//go:build e2e

package e2e

import (
	"fmt"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// TestBothKilled: when session and daemon die at once nobody removes the agent;
// the next connect does.
func TestBothKilled(t *testing.T) {
	agents := func() string {
		return kubectl(t, "get", "deployments", "-A", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "name")
	}
	r := lab.Culvert(netlab.Alice, "connect", "--kubeconfig", kubeconfig(t, "", "developer"), "--image", image)
	if r.Code != 0 {
		t.Fatalf("connect: %v", r)
	}
	first := status(t, netlab.Alice)[0]
	// Stopped first, so that it does not notice the daemon's death.
	if err := syscall.Kill(first.PID, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := lab.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(first.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := lab.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	if agents() == "" {
		t.Fatal("there is no agent left to be removed")
	}
	second := connect(t)
	eventually(t, 20*time.Second, func() error {
		if got, want := agents(), "deployment.apps/culvert-agent-"+second.ID; got != want {
			return fmt.Errorf("agents %q, want %q", got, want)
		}
		return nil
	})
}

// TestKilledWhileConnecting: a session that is killed while its agent starts
// leaves no agent; another process removes it before connect returns.
func TestKilledWhileConnecting(t *testing.T) {
	agents := func() string {
		return kubectl(t, "get", "deployments", "-A", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "name")
	}
	config := kubeconfig(t, "", "developer")
	ended := make(chan netlab.Result, 1)
	go func() {
		// No node is like that: the agent's pod stays pending for a moment.
		ended <- lab.Culvert(netlab.Alice, "connect", "--kubeconfig", config, "--image", image, "--node-selector", "culvert.dev/none=such")
	}()
	eventually(t, 10*time.Second, func() error {
		if agents() == "" {
			return fmt.Errorf("no agent yet")
		}
		return nil
	})
	if err := syscall.Kill(status(t, netlab.Alice)[0].PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := <-ended; r.Code != 1 {
		t.Errorf("connect: %v", r)
	}
	if left := agents(); left != "" {
		t.Errorf("left in the cluster: %s", left)
	}
}
