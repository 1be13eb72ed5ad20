//go:build e2e

package e2e

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// TestFailOpen: whatever takes the machine away, traffic finds the origin within
// 3 s and comes back with the machine. Only requests on connections that were
// open to it can fail.
func TestFailOpen(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	local := alice.serve(t, "127.0.0.1")
	alice.intercept(t, "exchange", "cart", "--expose", "8080:80", "--expose", "9000:echo")
	answeredBy(t, "alice", time.Second)

	signal := func(sig syscall.Signal) func(*testing.T) {
		return func(t *testing.T) { signalled(t, alice.pid(), sig) }
	}
	t.Run("cable cut", func(t *testing.T) { cableCut(t) })
	for _, c := range []struct {
		name       string
		away, back func(*testing.T)
		// itself: the session is replaced without anybody's doing.
		itself bool
	}{
		{name: "session killed", away: signal(syscall.SIGKILL), itself: true},
		{name: "session stopped", away: signal(syscall.SIGSTOP), itself: true},
		// Until the end of the whole test, not only of this part.
		{name: "local port closed", away: func(*testing.T) { local.stop() }, back: func(*testing.T) { local = alice.serve(t, "127.0.0.1") }},
	} {
		t.Run(c.name, func(t *testing.T) {
			url := "http://" + cartPort(t, 80) + "/who"
			fresh := startLoad(t, "node1", url, time.Minute, "--keepalive=false")
			kept := startLoad(t, "node2", url, time.Minute)
			time.Sleep(time.Second)
			c.away(t)
			gone := time.Now()
			back := gone
			if c.itself {
				time.Sleep(1500 * time.Millisecond)
			} else {
				time.Sleep(2 * time.Second)
				c.back(t)
				back = time.Now()
			}
			answeredBy(t, "alice", 25*time.Second)
			time.Sleep(500 * time.Millisecond)
			got := fresh.stop(t)
			if c.itself {
				// It may be back before anybody had to ask the origin.
				replaced(t, got, gone)
			} else {
				got.taken(t, "away", "cart-*", gone, failOpen)
				got.taken(t, "back", "alice", back, failOpen)
			}
			got.onlyOpen(t, gone)
			kept.stop(t).onlyOpen(t, gone)
			waitState(t, netlab.Alice, api.Connected, 20*time.Second)
		})
	}
	t.Run("local port closed, refuse", func(t *testing.T) {
		alice.intercept(t, "exchange", "shelf", "--expose", "8080:80", "--on-local-refused", "refuse")
		shelfBy(t, "alice", 3*time.Second)
		local.stop()
		for _, client := range clients {
			begun := time.Now()
			name, _, err := whoAnswers(client, "http", "shelf.shop:80")
			if err == nil {
				t.Errorf("%s answers although it should be refused", name)
			} else if time.Since(begun) > 4*time.Second {
				t.Errorf("refused only after %v: %v", time.Since(begun), err)
			}
		}
		// As the other Service's developer wants it.
		served(t, "http", cartPort(t, 80), "cart-*")
		served(t, "tcp", cartPort(t, 7000), "cart-*")
		local = alice.serve(t, "127.0.0.1")
		shelfBy(t, "alice", time.Second)
	})
}

// signalled sends a process a signal and waits until it runs no more.
func signalled(t *testing.T, pid int, sig syscall.Signal) {
	t.Helper()
	if err := syscall.Kill(pid, sig); err != nil {
		t.Fatal(err)
	}
	stands(t, pid)
}

// stands waits until a process has ended, or was stopped: one of many threads goes
// on for a while after it was told, on a busy machine.
func stands(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil || strings.Contains(string(status), "State:\tT") || strings.Contains(string(status), "State:\tZ") {
			return
		}
	}
	t.Fatalf("the process %d goes on", pid)
}

// replaced wants that no new connection waited longer than it takes to find the
// origin, whoever answered, and that the machine is back at the end.
func replaced(t *testing.T, got loaded, gone time.Time) {
	t.Helper()
	if got.Gap > ms(failOpen) {
		t.Errorf("nobody answered for %v ms", got.Gap)
	}
	if origin, ok := got.at("cart-*", gone); ok {
		t.Logf("the origin answers after %v", origin.Sub(gone))
		got.taken(t, "back after the origin served", "alice", origin, 25*time.Second)
	} else {
		t.Log("the origin was never asked")
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// cableCut: for 34 s nothing comes from the laptop. What was open waits for it,
// and is reset after 30 s.
func cableCut(t *testing.T) {
	url := "http://" + cartPort(t, 80) + "/who"
	hold := make(chan netlab.Result, 1)
	go func() { hold <- fromPod("node1", "hold", cartPort(t, 7000), "60") }()
	fresh := startLoad(t, "node1", url, time.Minute, "--keepalive=false")
	kept := startLoad(t, "node2", url, time.Minute)
	time.Sleep(time.Second)
	begun := time.Now()
	link(t, "--cut", "on")
	cut := time.Now()
	time.Sleep(5 * time.Second)
	got := fresh.stop(t)
	got.taken(t, "cut", "cart-*", begun, failOpen+cut.Sub(begun))
	got.onlyOpen(t, cut)
	kept.stop(t).onlyOpen(t, cut)
	// Right through: nothing that is new waits any more.
	if got.Max > 10_001 || got.P99 > ms(failOpen) {
		t.Errorf("p99 %v ms, longest %v ms", got.P99, got.Max)
	}
	fast := startLoad(t, "node2", url, 3*time.Second, "--keepalive=false").wait(t)
	fast.none(t)
	// Who waited for the machine would wait for a second at least; the rest is this
	// test's own machine, which has all nodes and clients.
	if fast.P50 > 50 || fast.P99 > 500 {
		t.Errorf("while the machine is known to be away, p50 is %v ms, p99 %v ms", fast.P50, fast.P99)
	}
	r := <-hold
	lost := time.Since(cut)
	t.Logf("the open connection ended %v after the cut: %s", lost.Round(100*time.Millisecond), strings.TrimSpace(r.Stderr))
	if r.Code == 0 || !strings.Contains(r.Stderr, "reset") || lost < 28*time.Second || lost > 36*time.Second {
		t.Errorf("an open connection, %v after the cut: %v", lost, r)
	}
	comeBack := startLoad(t, "node2", url, time.Minute, "--keepalive=false")
	time.Sleep(500 * time.Millisecond)
	begun = time.Now()
	link(t, "--cut", "off")
	answeredBy(t, "alice", 10*time.Second)
	back := comeBack.stop(t)
	// Not one of the requests fails meanwhile, so a busy machine may take its time.
	back.taken(t, "back", "alice", begun, 6*time.Second)
	back.none(t)
	waitState(t, netlab.Alice, api.Connected, 10*time.Second)
}

// TestShortCut: what is open lives through a cut of 8 s.
func TestShortCut(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	alice.intercept(t, "exchange", "cart", "--expose", "9000:echo,9001:dgram")
	hold := make(chan netlab.Result, 1)
	go func() { hold <- fromPod("node2", "hold", cartPort(t, 7000), "12") }()
	time.Sleep(time.Second)
	link(t, "--cut", "on")
	time.Sleep(4 * time.Second)
	// Datagrams have no connection: they go to the origin.
	eventually(t, 3*time.Second, func() error {
		name, _, err := whoAnswers("node1", "udp", cartPort(t, 7001))
		if err == nil && !serves(name, "cart-*") {
			err = fmt.Errorf("%s answers datagrams", name)
		}
		return err
	})
	time.Sleep(time.Second)
	link(t, "--cut", "off")
	if r := <-hold; r.Code != 0 {
		t.Errorf("a connection that was open: %v", r)
	} else {
		t.Log(strings.TrimSpace(r.Stdout))
	}
}
