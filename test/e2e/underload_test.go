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
			url, d := "http://"+cartPort(t, 80)+"/who", 10*time.Second
			loads := []*loading{
				startLoad(t, "node1", url, d),
				startLoad(t, "node2", url, d, "--post", "--rate", "100"),
				startLoad(t, "node2", url, d, "--keepalive=false"),
			}
			time.Sleep(1500 * time.Millisecond)
			begun := time.Now()
			alice.intercept(t, "exchange", "cart", "--expose", "8080:80")
			started := time.Now()
			time.Sleep(1500 * time.Millisecond)
			alice.leave(t, "cart")
			left := time.Now()
			for _, l := range loads {
				got := l.wait(t)
				got.none(t)
				if l == loads[2] { // the others may still use what was open
					got.taken(t, "exchange, from the command", "alice", begun, 15*time.Second)
					got.taken(t, "exchange, from its end", "alice", started, time.Second)
					got.taken(t, "leave", "cart-*", left, time.Second)
					if n := len(got.Answers["alice"]); n < 100 {
						t.Errorf("the machine answered only %d", n)
					}
				}
			}
			served(t, "http", cartPort(t, 80), "cart-*")
		})
	}
}
