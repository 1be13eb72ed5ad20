package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// fakeGate is the control API of a gate.
type fakeGate struct {
	mu      sync.Mutex
	state   intercept.State
	failed  []string
	reached []intercept.Reached
	puts    int
	mute    bool            // says nothing of itself
	block   <-chan struct{} // nil: answers at once
}

func (g *fakeGate) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if g.block != nil {
		<-g.block
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	var answer any = g.reached
	switch r.Method + " " + r.URL.Path {
	case "PUT /v1/state":
		var s intercept.State
		if err := json.NewDecoder(r.Body).Decode(&s); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		g.puts++
		if s.Generation > g.state.Generation {
			g.state = s
		}
		fallthrough
	case "GET /v1/state":
		if g.mute && r.Method == http.MethodGet {
			http.Error(w, "no", http.StatusInternalServerError)
			return
		}
		answer = intercept.GateStatus{Generation: g.state.Generation, Failed: g.failed}
	case "POST /v1/reach":
		var req intercept.ReachRequest
		if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Key != "web" {
			http.Error(w, "there is no entry", http.StatusNotFound)
			return
		}
	default:
		http.NotFound(w, r)
		return
	}
	_ = json.NewEncoder(w).Encode(answer)
}

func (g *fakeGate) generation() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.state.Generation
}

func (g *fakeGate) times() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.puts
}

// set changes what the gate answers.
func (g *fakeGate) set(change func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	change()
}

func (s *fleetAPI) addGate(name string, isReady bool) *fakeGate {
	g := &fakeGate{}
	s.mu.Lock()
	s.gates[name] = g
	s.mu.Unlock()
	s.put(gatePod(name, "culvert-gate", "u1", isReady))
	return g
}

func TestPush(t *testing.T) {
	server, c := newFleetAPI(t)
	a, b := server.addGate("a", true), server.addGate("b", true)
	away := server.addGate("away", false)
	blocked := make(chan struct{})
	defer close(blocked)
	stuck := server.addGate("stuck", false)
	stuck.set(func() { stuck.block = blocked })
	server.put(gatePod("refusing", "culvert-gate", "u1", false)) // nothing listens
	server.put(gatePod("other", "culvert-gate-db", "u1", true))  // of another Deployment
	b.set(func() { b.state.Generation = 9 })                     // somebody was faster
	begun := time.Now()
	err := c.Push(t.Context(), "demo", "culvert-gate", &intercept.State{Generation: 5})
	if err != nil || a.generation() != 5 || b.generation() != 9 || away.generation() != 5 {
		t.Errorf("%v; %d, %d, %d", err, a.generation(), b.generation(), away.generation())
	}
	if took := time.Since(begun); took > 3*time.Second {
		t.Errorf("it waited %v for a gate that is not ready", took)
	}
}

func TestPushWaitsForReadyGates(t *testing.T) {
	server, c := newFleetAPI(t)
	a, b := server.addGate("a", true), server.addGate("b", true)
	b.set(func() { b.failed = []string{"web: port 20001: address already in use"} })
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	err := c.Push(ctx, "demo", "culvert-gate", &intercept.State{Generation: 1})
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeAgent || !strings.Contains(e.Message, "gate b: web: port 20001") {
		t.Fatal(err)
	}
	if a.times() != 1 || b.times() < 2 {
		t.Errorf("%d and %d times", a.times(), b.times())
	}
	go func() {
		time.Sleep(100 * time.Millisecond)
		b.set(func() { b.failed = nil })
	}()
	if err := c.Push(t.Context(), "demo", "culvert-gate", &intercept.State{Generation: 2}); err != nil || b.generation() != 2 {
		t.Error(err)
	}
}

func TestPushToNobody(t *testing.T) {
	server, c := newFleetAPI(t)
	if err := c.Push(t.Context(), "demo", "culvert-gate", &intercept.State{Generation: 1}); err != nil {
		t.Error(err)
	}
	if _, err := c.Reach(t.Context(), "demo", "culvert-gate", intercept.ReachRequest{Key: "web"}); err == nil {
		t.Error("nobody reached it")
	}
	if all, err := c.GateStatuses(t.Context(), "demo", "culvert-gate"); err != nil || len(all) != 0 {
		t.Errorf("%v, %v", all, err)
	}
	server.put(gatePod("refusing", "culvert-gate", "u1", true))
	if _, err := c.GateStatuses(t.Context(), "demo", "culvert-gate"); err == nil {
		t.Error("a gate that refuses is well")
	}
}

func TestGateStatusesAndReach(t *testing.T) {
	server, c := newFleetAPI(t)
	a, b := server.addGate("a", true), server.addGate("b", true)
	a.set(func() { a.state.Generation = 4 })
	all, err := c.GateStatuses(t.Context(), "demo", "culvert-gate")
	if err != nil || len(all) != 2 || all["a"].Generation != 4 {
		t.Errorf("%v, %v", all, err)
	}
	a.set(func() { a.reached = []intercept.Reached{{Port: 90, Error: "refused"}, {Port: 80}, {Port: 70}} })
	b.set(func() { b.reached = []intercept.Reached{{Port: 90}, {Port: 80, Error: "timeout"}, {Port: 70}} })
	got, err := c.Reach(t.Context(), "demo", "culvert-gate", intercept.ReachRequest{Key: "web"})
	if want := []intercept.Reached{{Port: 70}, {Port: 80, Error: "timeout"}, {Port: 90, Error: "refused"}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := c.Reach(t.Context(), "demo", "culvert-gate", intercept.ReachRequest{Key: "typo"}); err == nil || !strings.Contains(err.Error(), "there is no entry") {
		t.Error(err)
	}
}

// until fails the test when what does not come true.
func until(t *testing.T, what string, is func() bool) {
	t.Helper()
	for range 500 {
		if is() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal(what)
}

func TestKeepGates(t *testing.T) {
	server, c := newFleetAPI(t)
	if _, err := c.ChangeGateState(t.Context(), "demo", addEntry("web", testEntry("culvert-gate", "s1"))); err != nil {
		t.Fatal(err)
	}
	d := &appsv1.Deployment{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo"}}
	server.put(d)
	a := server.addGate("a", false)
	ctx, cancel := context.WithCancel(t.Context())
	gone, done := make(chan string, 10), make(chan error, 1)
	go func() { done <- c.KeepGates(ctx, "demo", "culvert-gate", func(what string) { gone <- what }) }()

	server.put(gatePod("a", "culvert-gate", "u1", true))
	until(t, "a gate that became ready was not told", func() bool { return a.generation() == 1 })
	b := server.addGate("b", true)
	until(t, "a new gate was not told", func() bool { return b.generation() == 1 })
	if a.times() != 1 {
		t.Errorf("a gate that knew it was told %d times", a.times())
	}
	// The state changed, and whoever did it died before he pushed it.
	if _, err := c.ChangeGateState(t.Context(), "demo", addEntry("db", testEntry("culvert-gate", "s2"))); err != nil {
		t.Fatal(err)
	}
	until(t, "a change was not told", func() bool { return a.generation() == 2 && b.generation() == 2 })

	if len(gone) != 0 {
		t.Fatal(<-gone)
	}
	server.remove(d)
	if what := <-gone; !strings.Contains(what, "Deployment culvert-gate") {
		t.Error(what)
	}
	server.put(d)
	server.remove(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo", UID: types.UID("x")}})
	if what := <-gone; !strings.Contains(what, "ConfigMap culvert-gate") {
		t.Error(what)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if len(gone) != 0 {
		t.Errorf("told twice: %s", <-gone)
	}
}

// What went before anybody watched is told, too.
func TestKeepGatesThatAreGone(t *testing.T) {
	_, c := newFleetAPI(t)
	ctx, cancel := context.WithCancel(t.Context())
	gone, done := make(chan string, 10), make(chan error, 1)
	go func() { done <- c.KeepGates(ctx, "demo", "culvert-gate", func(what string) { gone <- what }) }()
	for range 2 {
		<-gone
	}
	cancel()
	<-done
}
