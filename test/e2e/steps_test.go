//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// The steps of an intercept's start and of its end, in their order. A session
// that finds KIND:STEP in CULVERT_TEST_AT sends itself a signal at that step.
var (
	startSteps = []string{"lease", "entry", "origin", "gates", "policy", "push", "reach", "switch", "active"}
	stopSteps  = []string{"restore", "drain", "entry-removed", "origin-deleted", "policy-deleted", "gates-gone", "lease-deleted"}
)

// walker walks through the steps. After each of them the shop is as before, and
// its owner changes the Service, so that the next one has another one to bring back.
type walker struct {
	alice  developer
	before []string
	wide   bool
}

func TestSteps(t *testing.T) {
	unchangedShop(t)
	w := &walker{alice: aliceAt(t)}
	w.before = listNamespace(t, "shop")
	w.alice.serve(t, "127.0.0.1")
	// The last state is that in which other tests expect the Service.
	t.Cleanup(func() { ownerApplies(t, cartNarrow) })
	for _, step := range slices.Concat(startSteps, stopSteps) {
		t.Run("killed at "+step, func(t *testing.T) { w.step(t, func(t *testing.T) { w.killed(t, step) }) })
		t.Run("all killed at "+step+", recover", func(t *testing.T) { w.step(t, func(t *testing.T) { w.allKilled(t, step, true) }) })
		t.Run("all killed at "+step+", next start", func(t *testing.T) { w.step(t, func(t *testing.T) { w.allKilled(t, step, false) }) })
	}
}

// step makes one step, and wants everything as before it.
func (w *walker) step(t *testing.T, f func(*testing.T)) {
	begun := time.Now()
	t.Cleanup(func() {
		if t.Failed() { // whatever is left does not concern the next step
			lab.Culvert(netlab.Alice, "disconnect")
			w.alice.culvert("recover", "cart", "--force")
			w.alice.culvert("clean", "--older-than", "0s")
			w.before = nobodyLeft(t)
		}
	})
	f(t)
	sameNamespace(t, "shop", w.before, 30*time.Second)
	if s := status(t, netlab.Alice); len(s) != 0 {
		t.Errorf("a session is left: %+v", s)
		lab.Culvert(netlab.Alice, "disconnect")
	}
	t.Logf("as before after %v", time.Since(begun).Round(100*time.Millisecond))
	// The owner, who forces nothing, changes the selector.
	w.wide = !w.wide
	ownerApplies(t, map[bool]string{true: cartWide, false: cartNarrow}[w.wide])
	w.before = listNamespace(t, "shop")
}

// at starts a command whose session does something to itself at a step.
func (w *walker) at(what string, args ...string) (ended chan netlab.Result) {
	cmd := w.alice.command(context.Background(), args...)
	cmd.Env = append(cmd.Env, "CULVERT_TEST_AT="+what)
	ended = make(chan netlab.Result, 1)
	go func() { ended <- netlab.Run(cmd) }()
	return ended
}

var exchangeCart = []string{"exchange", "cart", "--expose", "8080:80,9000:echo"}

// begin brings the session to where the step comes next. The command that does the
// step is returned.
func (w *walker) begin(t *testing.T, what, step string) (does func() chan netlab.Result) {
	t.Helper()
	if slices.Contains(startSteps, step) {
		return func() chan netlab.Result { return w.at(what+":"+step, exchangeCart...) }
	}
	if r := <-w.at(what+":"+step, "connect"); r.Code != 0 {
		t.Fatalf("connect: %v", r)
	}
	if r := w.alice.culvert(exchangeCart...); r.Code != 0 {
		t.Fatalf("exchange: %v", r)
	}
	answeredBy(t, "alice", 2*time.Second)
	if step == "lease-deleted" { // with the session
		return func() chan netlab.Result { return w.at("", "disconnect") }
	}
	return func() chan netlab.Result { return w.at("", "leave", "cart") }
}

// killed: the process is killed at a step, and the daemon starts another.
func (w *walker) killed(t *testing.T, step string) {
	r := <-w.begin(t, "kill", step)()
	switch {
	case step == "active":
		// It is there: the other process goes on with it.
		answeredBy(t, "alice", 15*time.Second)
		eventually(t, 10*time.Second, func() error {
			if s := status(t, netlab.Alice); len(s) != 1 || s[0].Restarts != 1 {
				return fmt.Errorf("want one session that was restarted once: %+v", s)
			}
			return nil
		})
		w.alice.leave(t, "cart")
	case slices.Contains(startSteps, step):
		if r.Code != 1 {
			t.Errorf("killed at %s, and exchange says: %v", step, r)
		}
	case step != "lease-deleted":
		if s := status(t, netlab.Alice); len(s) != 1 || s[0].Restarts != 1 {
			t.Errorf("want one session that was restarted once: %+v", s)
		}
		if r := lab.Culvert(netlab.Alice, "disconnect"); r.Code != 0 {
			t.Errorf("disconnect: %v", r)
		}
	}
}

// allKilled: at a step neither session nor daemon can do anything any more.
func (w *walker) allKilled(t *testing.T, step string, recover bool) {
	ended := w.begin(t, "stop", step)()
	pid, err := w.stopped()
	if err != nil {
		t.Fatal(err)
	}
	if err := lab.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if lab.DaemonPID() == 0 {
			if err := lab.StartDaemon(); err != nil {
				t.Error(err)
			}
		}
	})
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := <-ended; r.Code != 1 {
		t.Errorf("everything was killed at %s, and the command says: %v", step, r)
	}
	served(t, "http", cartPort(t, 80), "cart-*")
	if recover {
		if r := w.alice.culvert("recover", "cart", "--force"); r.Code != 0 {
			t.Errorf("recover: %v", r)
		}
		sameOwn(t, "shop", w.before, 10*time.Second)
		served(t, "http", cartPort(t, 80), "cart-*")
	}
	if err := lab.StartDaemon(); err != nil {
		t.Fatal(err)
	}
}

// stopped waits until the session's process has stopped itself.
func (w *walker) stopped() (pid int, err error) {
	for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if pid = w.alice.pid(); pid == 0 {
			continue
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if _, rest, _ := strings.Cut(string(b), ") "); strings.HasPrefix(rest, "T") {
			return pid, nil
		}
	}
	return 0, errors.New("the session did not stop itself")
}

// TestResumed: an exchange outlives the daemon. One that starts again brings it
// back, or reverts it; in no case is the Service left in between.
func TestResumed(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.serve(t, "127.0.0.1")
	before := listNamespace(t, "shop")
	alice.intercept(t, "exchange", "cart", "--expose", "8080:80")
	load := startLoad(t, "node1", "http://"+cartPort(t, 80)+"/who", time.Minute, "--keepalive=false")
	time.Sleep(time.Second)
	if err := lab.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond) // until the session has heard of it
	killed := time.Now()
	time.Sleep(800 * time.Millisecond)
	if err := lab.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, func() error {
		if s := status(t, netlab.Alice); len(s) > 0 && s[0].State != api.Connected {
			return fmt.Errorf("the session is %s", s[0].State)
		}
		return nil
	})
	got := load.stop(t)
	got.onlyOpen(t, killed)
	if got.Gap > ms(failOpen) {
		t.Errorf("nobody answered for %v ms", got.Gap)
	}
	if s := status(t, netlab.Alice); len(s) == 1 && s[0].State == api.Connected {
		answeredBy(t, "alice", 10*time.Second)
		return
	}
	sameNamespace(t, "shop", before, 20*time.Second)
}
