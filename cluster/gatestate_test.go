package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

func testEntry(gate, session string, ports ...uint16) intercept.Entry {
	e := intercept.Entry{Kind: intercept.Exchange, Service: "web", Gate: gate, Holder: intercept.Holder{Session: session}}
	for _, p := range ports {
		e.Routes = append(e.Routes, intercept.Route{Listen: p, Protocol: "TCP", Port: 80})
	}
	return e
}

func addEntry(key string, e intercept.Entry) func(*intercept.State) error {
	return func(s *intercept.State) error {
		s.Entries[key] = e
		return nil
	}
}

func TestGateStateOfNothing(t *testing.T) {
	_, c := newFleetAPI(t)
	s, err := c.GateState(t.Context(), "demo")
	if err != nil || s.Generation != 0 || s.Entries == nil || len(s.Entries) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if last, _, err := c.RemoveGateEntry(t.Context(), "demo", "web", ""); err != nil || !last {
		t.Errorf("last %v, %v", last, err)
	}
}

// TestGateStateOfTheLast: what is left when the last entry goes is newer than what
// gates have, or they would go on with what they know and end late.
func TestGateStateOfTheLast(t *testing.T) {
	_, c := newFleetAPI(t)
	s, err := c.ChangeGateState(t.Context(), "demo", addEntry("web", testEntry("culvert-gate", "s1", 20001)))
	if err != nil {
		t.Fatal(err)
	}
	last, rest, err := c.RemoveGateEntry(t.Context(), "demo", "web", "")
	if err != nil || !last || len(rest.Entries) != 0 || rest.Generation <= s.Generation {
		t.Errorf("last %v, %+v after generation %d, %v", last, rest, s.Generation, err)
	}
}

// TestGateStateOver: gates are told that a session is dead by who knows it, and by
// nobody else.
func TestGateStateOver(t *testing.T) {
	_, c := newFleetAPI(t)
	for _, dead := range []bool{true, false} {
		if _, err := c.ChangeGateState(t.Context(), "demo", addEntry("web", testEntry("culvert-gate", "s1", 20001))); err != nil {
			t.Fatal(err)
		}
		if err := c.markDraining(t.Context(), UndoSpec{Namespace: "demo", Key: "web", Dead: dead}, "s1", true); err != nil {
			t.Fatal(err)
		}
		if s, err := c.GateState(t.Context(), "demo"); err != nil || !s.Entries["web"].Draining || s.Entries["web"].Over != dead {
			t.Errorf("dead %v: %+v, %v", dead, s, err)
		}
	}
}

func TestGateStateChanges(t *testing.T) {
	server, c := newFleetAPI(t)
	s, err := c.ChangeGateState(t.Context(), "demo", addEntry("web", testEntry("culvert-gate", "s1", 20001)))
	if err != nil || s.Generation != 1 {
		t.Fatalf("%+v, %v", s, err)
	}
	// The same again writes nothing.
	before := server.writes
	s, err = c.ChangeGateState(t.Context(), "demo", addEntry("web", testEntry("culvert-gate", "s1", 20001)))
	if err != nil || s.Generation != 1 || server.writes != before {
		t.Errorf("%+v, %v, %d writes", s, err, server.writes-before)
	}
	// A change inside of a slice is one.
	s, err = c.ChangeGateState(t.Context(), "demo", func(s *intercept.State) error {
		s.Entries["web"].Routes[0].Listen = 20002
		return nil
	})
	if err != nil || s.Generation != 2 {
		t.Errorf("%+v, %v", s, err)
	}
	refusal := &api.Error{Code: api.CodeExists, Message: "no"}
	if _, err = c.ChangeGateState(t.Context(), "demo", func(*intercept.State) error { return refusal }); !errors.Is(err, refusal) {
		t.Error(err)
	}
	read, err := c.GateState(t.Context(), "demo")
	if err != nil || read.Generation != 2 || read.Entries["web"].Routes[0].Listen != 20002 {
		t.Errorf("%+v, %v", read, err)
	}
}

// A colleague's newer version writes more into his entry than this one knows.
func TestGateStateKeepsWhatItDoesNotKnow(t *testing.T) {
	server, c := newFleetAPI(t)
	const theirs = `{"kind":"exchange","gate":"culvert-gate","mesh":{"header":"x"}}`
	server.put(&corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo", Labels: map[string]string{LabelManagedBy: "culvert"}},
		Data:       map[string]string{"generation": "7", "theirs.json": theirs, "other": "kept"},
	})
	if _, err := c.ChangeGateState(t.Context(), "demo", addEntry("web", testEntry("culvert-gate", "s1"))); err != nil {
		t.Fatal(err)
	}
	if _, _, err := c.RemoveGateEntry(t.Context(), "demo", "web", ""); err != nil {
		t.Fatal(err)
	}
	m, err := c.client.ConfigMaps("demo").Get(t.Context(), "culvert-gate", metav1.GetOptions{})
	if err != nil || m.Data["theirs.json"] != theirs || m.Data["other"] != "kept" || m.Data["generation"] != "9" || len(m.Data) != 3 {
		t.Errorf("%v, %v", m.Data, err)
	}
}

func TestGateStateRefuses(t *testing.T) {
	server, c := newFleetAPI(t)
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo"}}
	server.put(m)
	var e *api.Error
	if _, err := c.GateState(t.Context(), "demo"); !errors.As(err, &e) || e.Code != api.CodeExists {
		t.Errorf("somebody else's ConfigMap: %v", err)
	}
	if _, _, err := c.RemoveGateEntry(t.Context(), "demo", "web", ""); err == nil || len(server.list("ConfigMap")) != 1 {
		t.Errorf("somebody else's ConfigMap: %v", err)
	}
	m.Labels = map[string]string{LabelManagedBy: "culvert"}
	m.Data = map[string]string{"generation": "x"}
	server.put(m)
	if _, err := c.GateState(t.Context(), "demo"); err == nil {
		t.Error("a generation that is no number is accepted")
	}
	// One entry that somebody spoilt is not the others' end.
	m.Data = map[string]string{"generation": "3", "web.json": "{"}
	server.put(m)
	s, err := c.ChangeGateState(t.Context(), "demo", addEntry("api", testEntry("culvert-gate", "s1", 20002)))
	if err != nil || len(s.Entries) != 1 {
		t.Errorf("beside a spoilt entry: %+v, %v", s, err)
	}
	if m, err := c.client.ConfigMaps("demo").Get(t.Context(), "culvert-gate", metav1.GetOptions{}); err != nil || m.Data["web.json"] != "{" {
		t.Errorf("the spoilt entry: %v, %v", m, err)
	}
	m.Data = nil
	server.put(m)
	_, err = c.ChangeGateState(t.Context(), "demo", func(s *intercept.State) error {
		for i := range 1000 {
			s.Entries[fmt.Sprint(i)] = intercept.Entry{Service: strings.Repeat("x", 1000)}
		}
		return nil
	})
	if !errors.As(err, &e) || e.Code != api.CodeNamespace || !strings.Contains(e.Hint, "clean") {
		t.Errorf("more than fits: %v", err)
	}
}

func TestGateStateManyWriters(t *testing.T) {
	server, _ := newFleetAPI(t)
	manyWriters(t, func() *Cluster { return server.open(t) }, "demo")
}

// manyWriters, sessions of their own, come in, take ports and leave, all at once.
func manyWriters(t *testing.T, open func() *Cluster, namespace string) {
	const n = 20
	c := open()
	sessions := make([]*Cluster, n)
	for i := range sessions {
		sessions[i] = open()
	}
	each := func(do func(c *Cluster, key string) error) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				if err := do(sessions[i], fmt.Sprintf("svc-%d", i)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	begun := time.Now()
	each(func(c *Cluster, key string) error {
		_, err := c.ChangeGateState(ctx, namespace, func(s *intercept.State) error {
			s.Entries[key] = testEntry(intercept.GateName, key, AllocatePorts(s, intercept.GateName, 3)...)
			return nil
		})
		return err
	})
	s, err := c.GateState(ctx, namespace)
	if err != nil || s.Generation != n || len(s.Entries) != n {
		t.Fatalf("%d entries, generation %d, %v", len(s.Entries), s.Generation, err)
	}
	t.Logf("%d writers in %v", n, time.Since(begun))
	ports := map[uint16]bool{}
	for _, e := range s.Entries {
		for _, r := range e.Routes {
			ports[r.Listen] = true
		}
	}
	if len(ports) != 3*n {
		t.Errorf("%d different ports", len(ports))
	}
	var mu sync.Mutex
	lasts := 0
	each(func(c *Cluster, key string) error {
		last, left, err := c.RemoveGateEntry(ctx, namespace, key, "")
		mu.Lock()
		defer mu.Unlock()
		if last {
			lasts++
		}
		if err == nil && (left == nil || last != (len(left.Entries) == 0)) {
			t.Errorf("last %v with %v", last, left)
		}
		return err
	})
	if s, err := c.GateState(ctx, namespace); err != nil || s.Generation != 0 || lasts != 1 {
		t.Errorf("%+v, %d were last, %v", s, lasts, err)
	}
}

// Whoever comes in while the last one leaves finds his entry, in the old ConfigMap
// or a new one.
func TestGateStateLastOutMeetsFirstIn(t *testing.T) {
	for _, when := range []string{"before the deletion", "after it"} {
		server, c := newFleetAPI(t)
		if _, err := c.ChangeGateState(t.Context(), "demo", addEntry("old", testEntry("culvert-gate", "s1"))); err != nil {
			t.Fatal(err)
		}
		var once sync.Once
		server.before = func(r *http.Request) {
			trigger := r.Method == "DELETE"
			if when == "after it" {
				trigger = r.Method == "PUT" // the newcomer's, to what is gone by then
			}
			if trigger && strings.HasSuffix(r.URL.Path, "/configmaps/culvert-gate") {
				once.Do(func() {
					if when == "after it" {
						server.remove(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo"}})
						return
					}
					if _, err := c.ChangeGateState(context.Background(), "demo", addEntry("new", testEntry("culvert-gate", "s2"))); err != nil {
						t.Error(err)
					}
				})
			}
		}
		var err error
		last := true
		if when == "after it" {
			_, err = c.ChangeGateState(t.Context(), "demo", addEntry("new", testEntry("culvert-gate", "s2")))
		} else {
			last, _, err = c.RemoveGateEntry(t.Context(), "demo", "old", "")
		}
		s, readErr := c.GateState(t.Context(), "demo")
		if err != nil || readErr != nil || len(s.Entries) != 1 || s.Entries["new"].Holder.Session != "s2" {
			t.Errorf("%s: %+v, %v, %v", when, s, err, readErr)
		}
		if when != "after it" && last {
			t.Errorf("%s: it was not the last one", when)
		}
	}
}

func TestGateStateGivesUp(t *testing.T) {
	server, c := newFleetAPI(t)
	server.put(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo", Labels: map[string]string{LabelManagedBy: "culvert"},
		DeletionTimestamp: &metav1.Time{Time: time.Now()}}})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := c.ChangeGateState(ctx, "demo", addEntry("web", testEntry("culvert-gate", "s1"))); err == nil {
		t.Error("written into a ConfigMap that is being deleted")
	}
}

func TestAllocateGatePorts(t *testing.T) {
	s := &intercept.State{Entries: map[string]intercept.Entry{}}
	e := testEntry("culvert-gate", "a")
	for p := firstGatePort; p <= lastGatePort; p++ {
		if p != 20005 && p != lastGatePort {
			e.Routes = append(e.Routes, intercept.Route{Listen: uint16(p)})
		}
	}
	s.Entries["full"] = e
	s.Entries["own"] = testEntry("culvert-gate-db", "b", 20005)
	got := AllocatePorts(s, "culvert-gate", 2)
	slices.Sort(got)
	if !slices.Equal(got, []uint16{20005, lastGatePort}) {
		t.Error(got)
	}
	if got := AllocatePorts(s, "culvert-gate", 3); len(got) != 2 {
		t.Error(got)
	}
	if got := AllocatePorts(s, "culvert-gate-db", 5); len(got) != 5 || slices.Contains(got, 20005) {
		t.Error(got)
	}
}

func TestGateNames(t *testing.T) {
	long := strings.Repeat("a", 63)
	seen := map[string]bool{}
	for _, key := range []string{"db", "scale.deployment.web", "scale-deployment-web", long, long[:62] + "b", "Web"} {
		name := OwnGate(key)
		if seen[name] || len(name) > 63 || name != strings.ToLower(name) || strings.Contains(name, ".") {
			t.Errorf("%s: %s", key, name)
		}
		seen[name] = true
	}
	if OwnGate("db") != "culvert-gate-db" || intercept.Key(intercept.Scale, "deployment/web") != "scale.deployment.web" || intercept.Key(intercept.Exchange, "web") != "web" {
		t.Error(OwnGate("db"))
	}
}
