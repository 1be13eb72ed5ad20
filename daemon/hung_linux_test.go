package daemon

import (
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"golang.org/x/sys/unix"
)

// A process that is stopped holds the machine's names: it is replaced.
func TestStoppedProcessIsReplaced(t *testing.T) {
	c := testDaemon(t)
	s := mustConnect(t, c, request("a", "dns=cluster.local"))
	begun := time.Now()
	if err := unix.Kill(s.PID, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	seen := false
	var now api.Session
	for end := begun.Add(hungAfter + aliveEvery + 10*time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		list, err := c.Sessions(t.Context())
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		now = list[0]
		seen = seen || strings.Contains(now.Cause, "not answered")
		if now.State == api.Connected && now.PID != s.PID {
			break
		}
	}
	if now.PID == s.PID || now.State != api.Connected || now.ID != s.ID || now.Restarts != 1 || !seen {
		t.Fatalf("after %v: %+v, cause seen %v", time.Since(begun), now, seen)
	}
	if took := time.Since(begun); took < hungAfter-aliveEvery || took > hungAfter+aliveEvery+5*time.Second {
		t.Errorf("replaced after %v", took)
	}
	if alive(s.PID) {
		t.Error("the stopped process is left")
	}
	if got, err := askUDP(now.DNS.Server, 3*time.Second); err != nil || got != strconv.Itoa(now.PID) {
		t.Errorf("names are answered by %q, %v", got, err)
	}
}
