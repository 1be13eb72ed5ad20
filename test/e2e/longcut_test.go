//go:build e2e

package e2e

import (
	"net"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// TestLongCut: the path is away for longer than WireGuard's keys are good for
// (180 s), with both ends trying to speak. They agree on keys at once when it is
// back; left to themselves they ask every 5 s, and each other's questions cross.
func TestLongCut(t *testing.T) {
	connect(t, "--debug")
	c := dial(t, "tcp", net.JoinHostPort(podIPs(t)[0], "9000"))
	echo(t, c, []byte("first"))
	link(t, "--cut", "on")
	echoed := make(chan error, 1)
	go func() { echoed <- tryEcho(c, []byte("through the cut"), 10*time.Minute) }()
	time.Sleep(200 * time.Second)
	link(t, "--cut", "off")
	back := time.Now()
	fresh := firstByte(t, 20*time.Second)
	t.Logf("a new connection after %v", fresh.Round(time.Millisecond))
	if fresh > 2*time.Second {
		t.Errorf("a new connection only %v after the path was back\nlogs: %v", fresh, lab.Culvert(netlab.Alice, "logs"))
	}
	if err := <-echoed; err != nil {
		t.Errorf("the open connection: %v", err)
	}
	t.Logf("the open one after %v", time.Since(back).Round(time.Millisecond))
	waitState(t, netlab.Alice, api.Connected, 10*time.Second)
}
