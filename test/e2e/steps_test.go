//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
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

// exchangeCart is an exchange of two of the cart's ports.
var exchangeCart = exchangeOn("cart")

func exchangeOn(service string) []string {
	return []string{"exchange", service, "--expose", "8080:80,9000:echo"}
}

// walker ends sessions at a step, three at once, each of which has a Service of
// its own: what comes afterwards is another for each. Then everything is as before,
// and the owner of the Services changes them, so that the next step has others to
// bring back.
type walker struct {
	recovered, reverted, restarted walk
	before                         []string
	wide                           bool
}

// walk is one of them.
type walk struct {
	developer
	service string
	address string // of its port 80
	mesh    bool   // else an exchange
	mode    string // of a mesh; empty: auto
}

// command starts the walk's intercept.
func (o *walk) command() []string {
	if o.mesh {
		command := []string{"mesh", o.service, "--expose", "8080:80", "--version-mark", "walk"}
		if o.mode != "" {
			command = append(command, "--mode", o.mode)
		}
		return command
	}
	return exchangeOn(o.service)
}

func TestSteps(t *testing.T) {
	unchangedShop(t)
	alice, next := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	next.serve(t, "127.0.0.1")
	w := &walker{
		recovered: walk{developer: alice, service: "till"},
		reverted:  walk{developer: developer{lab, netlab.Bob}, service: "rack"},
		restarted: walk{developer: next, service: "desk"},
	}
	w.open(t)
	// While somebody else intercepts in the namespace the gates are there already, and
	// stay.
	colleague := developer{next.Machine, netlab.Alice}
	t.Run("a colleague is there", func(t *testing.T) {
		colleague.intercept(t, "preview", "steady", "--expose", "8080:80")
		w.before = w.list(t)
		for _, step := range slices.Concat(startSteps, stopSteps) {
			if !slices.Contains(firstAndLast, step) {
				t.Run(step, func(t *testing.T) { w.step(t, step) })
			}
		}
	})
	nobodyLeft(t)
	w.before = w.list(t)
	for _, step := range firstAndLast {
		t.Run(step, func(t *testing.T) { w.step(t, step) })
	}
}

// TestMeshSteps is the same for a mesh of one: what differs from an exchange.
func TestMeshSteps(t *testing.T) {
	unchangedShop(t)
	alice, next := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	next.serve(t, "127.0.0.1")
	w := &walker{
		recovered: walk{developer: alice, service: "till", mesh: true},
		reverted:  walk{developer: developer{lab, netlab.Bob}, service: "rack", mesh: true},
		restarted: walk{developer: next, service: "desk", mesh: true},
	}
	w.open(t)
	w.before = w.list(t)
	for _, step := range slices.Concat(startSteps, stopSteps) {
		t.Run(step, func(t *testing.T) { w.step(t, step) })
	}
}

// open makes the Services.
func (w *walker) open(t *testing.T) {
	t.Helper()
	w.ownerChanges(t)
	t.Cleanup(func() { kubectl(t, "-n", "shop", "delete", "services", "till", "rack", "desk") })
	for _, one := range w.all() {
		one.address = clusterIP(t, one.service) + ":80"
	}
}

// firstAndLast are the steps that differ for who intercepts alone in a namespace.
var firstAndLast = []string{"gates", "policy", "entry-removed", "gates-gone", "lease-deleted"}

func (w *walker) all() []*walk { return []*walk{&w.recovered, &w.reverted, &w.restarted} }

// services makes manifests of the three of one for the cart.
func (w *walker) services(manifest string) string {
	var all []string
	for _, one := range w.all() {
		all = append(all, strings.Replace(manifest, "name: cart,", "name: "+one.service+",", 1))
	}
	return strings.Join(all, "---")
}

// ownerChanges has the owner, who forces nothing, change the selectors.
func (w *walker) ownerChanges(t *testing.T) {
	t.Helper()
	w.wide = !w.wide
	ownerApplies(t, w.services(map[bool]string{true: cartWide, false: cartNarrow}[w.wide]))
}

// list is all of the namespace, culvert's own objects included, but for what
// changes while somebody else's intercept goes on.
func (w *walker) list(t *testing.T) []string {
	t.Helper()
	lines := listNamespace(t, "shop")
	for i, l := range lines {
		if fields := strings.Fields(l); strings.HasPrefix(l, "ConfigMap/culvert-gate data ") || strings.HasPrefix(l, "Lease/") && strings.Contains(l, " spec renewTime ") {
			lines[i] = strings.Join(fields[:3], " ") // that it is there
		}
	}
	return lines
}

func (w *walker) step(t *testing.T, step string) {
	begun := time.Now()
	t.Cleanup(func() {
		if t.Failed() { // whatever is left does not concern the next step
			w.tidy(t)
		}
	})
	restarted := make(chan error, 1)
	go func() { restarted <- w.restarted.killed(step) }()
	stopped, err := w.stop(step)
	if err != nil {
		t.Fatal(errors.Join(err, <-restarted))
	}
	took := []time.Duration{time.Since(begun)}
	lap := func() { took = append(took, time.Since(begun).Round(10*time.Millisecond)) }
	// Neither sessions nor daemon can do anything any more.
	if err := lab.KillWith(stopped...); err != nil {
		t.Fatal(err)
	}
	served(t, "http", w.reverted.address, "cart-*")
	lap()
	if r := w.recovered.culvert("recover", w.recovered.service, "--force"); r.Code != 0 {
		t.Errorf("recover: %v", r)
	}
	sameLines(t, w.linesOf(w.before, w.recovered), time.Second, func() []string { return w.linesOf(w.list(t), w.recovered) })
	served(t, "http", w.recovered.address, "cart-*")
	lap()
	if err := errors.Join(lab.StartDaemon(), <-restarted); err != nil {
		t.Fatal(err)
	}
	lap()
	sameLines(t, w.before, 30*time.Second, func() []string { return w.list(t) })
	lap()
	for _, one := range w.all() {
		// A process outlives the last of its objects a little.
		if err := insideOf(5*time.Second, one.nobodyHere); err != nil {
			t.Errorf("%v\n%s", err, one.Tail(20))
		}
	}
	w.ownerChanges(t)
	w.before = w.list(t)
	lap()
	t.Logf("all at the step, killed, recovered, daemon there, as before, changed by the owner: %v", took)
}

// stop has the sessions at the laptop stop themselves at a step, at about the same
// time: the daemon replaces one that is silent for 6 s.
func (w *walker) stop(step string) (pids []int, err error) {
	ways := []*walk{&w.recovered, &w.reverted}
	if err := atOnce(ways, func(_ int, one *walk) error { return one.prepare("stop", step) }); err != nil {
		return nil, err
	}
	pids = make([]int, len(ways))
	return pids, atOnce(ways, func(i int, one *walk) (err error) {
		pids[i], err = one.stopped(step)
		return err
	})
}

func atOnce(ways []*walk, f func(int, *walk) error) error {
	failed := make(chan error, len(ways))
	for i, one := range ways {
		go func() { failed <- f(i, one) }()
	}
	var all []error
	for range ways {
		all = append(all, <-failed)
	}
	return errors.Join(all...)
}

// linesOf are those of a walk's Service and its origin.
func (w *walker) linesOf(lines []string, one walk) (its []string) {
	for _, l := range lines {
		if strings.HasPrefix(l, "Service/"+one.service) {
			its = append(its, l)
		}
	}
	return its
}

// tidy makes an end of what a step left that failed.
func (w *walker) tidy(t *testing.T) {
	for _, one := range w.all() {
		if one.DaemonPID() == 0 {
			if err := one.StartDaemon(); err != nil {
				t.Error(err)
			}
		}
		one.Culvert(one.user, "disconnect")
		one.culvert("recover", one.service, "--force")
	}
	time.Sleep(5 * time.Second)
	w.ownerChanges(t)
	w.before = w.list(t)
}

// at runs a command whose session, if it begins one, does something to itself at a
// step.
func (o *walk) at(what, step string, args ...string) netlab.Result {
	cmd := o.developer.command(context.Background(), args...)
	cmd.Env = append(cmd.Env, "CULVERT_TEST_AT="+what+":"+step)
	return netlab.Run(cmd)
}

// prepare brings the walk's session to where the command comes that does the step.
func (o *walk) prepare(what, step string) error {
	if !slices.Contains(stopSteps, step) {
		return nil
	}
	if r := o.at(what, step, o.command()...); r.Code != 0 {
		return fmt.Errorf("%s, exchange: %v", o.service, r)
	}
	if o.mode != "" {
		return nil // a rule, by which nobody goes here
	}
	return insideOf(5*time.Second, o.answers) // three change at once, and nodes take a second
}

// last is that command. It ends when its session or daemon does.
func (o *walk) last(what, step string) chan netlab.Result {
	args := o.command()
	if slices.Contains(stopSteps, step) {
		args = []string{"leave", o.service}
	}
	ended := make(chan netlab.Result, 1)
	go func() { ended <- o.at(what, step, args...) }()
	return ended
}

// answers: the machine does.
func (o *walk) answers() error {
	name, _, err := whoAnswers(clients[0], "http", o.address)
	if o.mesh {
		name, _, err = marked(clients[0], o.address, "VERSION:walk")
	}
	if err == nil && serves(name, "cart-*") {
		err = fmt.Errorf("%s is answered by %s", o.service, name)
	}
	return err
}

// killed: the process is killed at a step, and the daemon starts another, which
// undoes what it finds, or goes on.
func (o *walk) killed(step string) error {
	if step == "active" { // it outlives the command that fails, in a session that was there before
		if r := o.at("kill", step, "expose", "8080"); r.Code != 0 {
			return fmt.Errorf("expose: %v", r)
		}
	}
	if err := o.prepare("kill", step); err != nil {
		return err
	}
	r := <-o.last("kill", step)
	if step == "lease-deleted" {
		return nil // the session's end
	}
	if slices.Contains(startSteps, step) && r.Code != 1 {
		return fmt.Errorf("%s was killed at %s, and exchange says: %v", o.service, step, r)
	}
	if slices.Contains(startSteps, step) && step != "active" {
		return nil // the command has ended its session
	}
	if err := insideOf(10*time.Second, o.restartedOnce); err != nil {
		return fmt.Errorf("%w; %v", err, r)
	}
	if step == "active" {
		if err := insideOf(15*time.Second, o.answers); err != nil {
			return fmt.Errorf("after a restart: %w", err)
		}
	} else if err := insideOf(20*time.Second, o.nothingHere); err != nil {
		return err
	}
	if r := o.Culvert(o.user, "disconnect"); r.Code != 0 {
		return fmt.Errorf("disconnect of %s: %v", o.service, r)
	}
	return nil
}

// restartedOnce: the daemon has the only session in a second process.
func (o *walk) restartedOnce() error {
	all, err := lastJSON[[]api.Session](o.Culvert(o.user, "status", "-o", "json").Stdout)
	if err == nil && (len(all) != 1 || all[0].Restarts != 1) {
		err = fmt.Errorf("want one session of %s that was restarted once: %+v", o.service, all)
	}
	return err
}

// nobodyHere: the daemon has no session.
func (o *walk) nobodyHere() error {
	if r := o.Culvert(o.user, "status", "-o", "json"); o.pid() != 0 {
		return fmt.Errorf("a session of %s is left: %v", o.service, r)
	}
	return nil
}

// nothingHere: the session has no intercepts.
func (o *walk) nothingHere() error {
	r := o.Run(o.user, "curl", "-sS", "--unix-socket", o.Socket, "http://culvert"+api.PathIntercepts)
	all, err := lastJSON[[]api.Intercept](r.Stdout)
	if err == nil && len(all) > 0 {
		err = fmt.Errorf("intercepts are left: %+v", all)
	}
	return err
}

// insideOf is eventually for goroutines.
func insideOf(d time.Duration, f func() error) (err error) {
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if err = f(); err == nil {
			return nil
		}
	}
	return fmt.Errorf("after %v: %w", d, err)
}

// stopped: at a step the session stops itself.
func (o *walk) stopped(step string) (pid int, err error) {
	ended := o.last("stop", step)
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); {
		select {
		case r := <-ended:
			return 0, fmt.Errorf("%s did not stop at %s: %v", o.service, step, r)
		case <-time.After(50 * time.Millisecond):
		}
		if pid = o.pid(); pid == 0 {
			continue
		}
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if _, rest, _ := strings.Cut(string(b), ") "); strings.HasPrefix(rest, "T") {
			return pid, nil
		}
	}
	return 0, fmt.Errorf("%s did not stop at %s", o.service, step)
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
