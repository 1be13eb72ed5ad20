//go:build e2e

package e2e

import (
	"testing"
	"time"
)

// TestStartAndStopUnderLoad: nobody notices that an exchange starts, and that it
// ends: not those who keep their connections, nor those who send what must not be
// sent twice, nor those who connect each time.
func TestStartAndStopUnderLoad(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	for _, gatesRun := range []bool{false, true} {
		name := map[bool]string{false: "no gates", true: "gates run"}[gatesRun]
		t.Run(name, func(t *testing.T) {
			if gatesRun {
				alice.intercept(t, "exchange", "shelf", "--expose", "8080:80")
			}
			url, most := "http://"+cartPort(t, 80)+"/who", time.Minute
			loads := []*loading{
				startLoad(t, "node1", url, most),
				startLoad(t, "node2", url, most, "--post", "--rate", "100"),
				startLoad(t, "node2", url, most, "--keepalive=false"),
			}
			time.Sleep(time.Second)
			begun := time.Now()
			alice.intercept(t, "exchange", "cart", "--expose", "8080:80")
			started := time.Now()
			eventuallyServed(t, cartPort(t, 80), "alice", 2*time.Second) // nodes may take a second
			// What was open before never comes to the machine; this does, and is
			// drained at the end.
			through := []*loading{
				startLoad(t, "node1", url, most, "--rate", "100"),
				startLoad(t, "node2", url, most, "--post", "--rate", "100"),
			}
			time.Sleep(time.Second)
			leaving := time.Now()
			alice.leave(t, "cart") // returns when there is nothing left of it
			t.Logf("culvert leave: %v", time.Since(leaving).Round(10*time.Millisecond))
			time.Sleep(300 * time.Millisecond)
			for _, l := range loads {
				got := l.stop(t)
				got.none(t)
				if l != loads[2] { // these may still use what was open
					continue
				}
				got.taken(t, "exchange, from the command", "alice", begun, 15*time.Second)
				got.taken(t, "exchange, from its end", "alice", started, time.Second)
				if n := len(got.Answers["alice"]); n < 50 {
					t.Errorf("the machine answered only %d", n)
				}
				if last, _ := got.last("alice"); last.Sub(leaving) > 3*time.Second {
					t.Errorf("the machine answered until %v after the end was asked for", last.Sub(leaving))
				}
			}
			for _, l := range through {
				got := l.stop(t)
				got.none(t)
				if len(got.Answers["alice"]) == 0 || len(got.Answers) == 1 {
					t.Errorf("not led to the machine and back: %v", got.Answers)
				}
			}
			served(t, "http", cartPort(t, 80), "cart-*")
		})
	}
}
