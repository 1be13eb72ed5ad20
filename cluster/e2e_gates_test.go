//go:build e2e

package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// gatesNamespace is where developers may intercept; the tests leave it empty.
func gatesNamespace() string {
	return firstOf(os.Getenv("CULVERT_E2E_GATES_NAMESPACE"), "dev")
}

func TestGateStateManyWritersOnServer(t *testing.T) {
	ns := gatesNamespace()
	manyWriters(t, func() *Cluster { return as(t, "developer", ns) }, ns)
}

func TestInterceptAccessOfUsers(t *testing.T) {
	ns := gatesNamespace()
	kinds := []string{intercept.Exchange, intercept.Preview, intercept.Scale}
	checks, err := as(t, "developer", ns).InterceptRights(within(t, 20*time.Second), ns, kinds...)
	if err != nil {
		t.Fatal(err)
	}
	for _, check := range checks {
		if !check.Allowed {
			t.Errorf("the shipped roles lack %s %s", check.Verb, check.Resource)
		}
	}
	wantCode(t, as(t, "limited", "demo").InterceptAccess(within(t, 20*time.Second), "demo", kinds...), api.CodeForbidden, "deploy/rbac")
}

// The image has no gate: what is made is looked at, and what goes with what.
func TestGatesComeAndGo(t *testing.T) {
	ns := gatesNamespace()
	c := as(t, "developer", ns)
	ctx := within(t, 2*time.Minute)
	spec := GateSpec{Name: intercept.GateName, Agent: testAgent("", testImage)}
	t.Cleanup(func() {
		cleaning, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, _, err := c.RemoveGateEntry(cleaning, ns, "web", ""); err != nil {
			t.Error(err)
		}
	})
	uids := map[string]bool{}
	for round := range 2 { // the second comes while the first's are being collected
		if _, err := c.ChangeGateState(ctx, ns, addEntry("web", testEntry(intercept.GateName, "s1", 20001))); err != nil {
			t.Fatal(err)
		}
		var steps []string
		err := c.EnsureGates(ctx, ns, spec, func(step string) { steps = append(steps, step) })
		wantCode(t, err, api.CodeAgent, "the gate")
		t.Logf("round %d: %q", round, steps)
		d, err := c.client.Deployments(ns).Get(ctx, intercept.GateName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if uids[string(d.UID)] {
			t.Error("the gates of an older ConfigMap were adopted")
		}
		uids[string(d.UID)] = true
		budget, err := as(t, "admin", ns).client.PodDisruptionBudgets(ns).Get(ctx, intercept.GateName, metav1.GetOptions{})
		if err != nil || budget.Labels[LabelGateState] != d.Labels[LabelGateState] {
			t.Errorf("%+v, %v", budget.Labels, err)
		}
		pods, err := c.client.Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: LabelGateState + "=" + d.Labels[LabelGateState]})
		if err != nil || len(pods.Items) != 2 {
			t.Fatalf("%d pods, %v", len(pods.Items), err)
		}
		if a, b := pods.Items[0].Spec.NodeName, pods.Items[1].Spec.NodeName; a == b {
			t.Errorf("both on %s", a)
		}
		for _, pod := range pods.Items {
			if pod.Status.Phase != corev1.PodRunning && pod.Status.Phase != corev1.PodPending {
				t.Errorf("%s: %+v", pod.Name, pod.Status) // sysctls that a node forbids fail the pod
			}
		}
		if last, _, err := c.RemoveGateEntry(ctx, ns, "web", ""); err != nil || !last {
			t.Fatalf("last %v, %v", last, err)
		}
	}
	begun := time.Now()
	for {
		_, err := c.client.Deployments(ns).Get(ctx, intercept.GateName, metav1.GetOptions{})
		_, budgetErr := as(t, "admin", ns).client.PodDisruptionBudgets(ns).Get(ctx, intercept.GateName, metav1.GetOptions{})
		if apierrors.IsNotFound(err) && apierrors.IsNotFound(budgetErr) {
			break
		}
		if ctx.Err() != nil {
			t.Fatal("the gates did not go with their ConfigMap")
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Logf("collected after %v", time.Since(begun))
}

func TestOwnGatesAreDeleted(t *testing.T) {
	ns := gatesNamespace()
	c := as(t, "developer", ns)
	ctx := within(t, 2*time.Minute)
	spec := GateSpec{
		Name: OwnGate("headless"), Agent: testAgent("", testImage), PodLabels: map[string]string{"app": "headless"},
		Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 80}},
	}
	if _, err := c.ChangeGateState(ctx, ns, addEntry("headless", testEntry(spec.Name, "s1", 80))); err != nil {
		t.Fatal(err)
	}
	wantCode(t, c.EnsureGates(ctx, ns, spec, nil), api.CodeAgent, "the gate")
	if err := c.DeleteGates(ctx, ns, spec.Name); err != nil {
		t.Fatal(err)
	}
	pods, err := c.client.Pods(ns).List(ctx, metav1.ListOptions{LabelSelector: "app=headless"})
	if err != nil || len(pods.Items) != 0 {
		t.Errorf("%d pods, %v", len(pods.Items), err)
	}
	if last, _, err := c.RemoveGateEntry(ctx, ns, "headless", ""); err != nil || !last {
		t.Errorf("last %v, %v", last, err)
	}
}

func TestHeartbeatOnServer(t *testing.T) {
	ns := gatesNamespace()
	c := as(t, "developer", ns)
	ctx := within(t, 30*time.Second)
	for range 2 {
		if err := c.Heartbeat(ctx, ns, "e2e-beat", "dev", "o", nil); err != nil {
			t.Fatal(err)
		}
	}
	last, ok, err := c.SeenSession(ctx, ns, "e2e-beat")
	if age := c.Now().Sub(last); err != nil || !ok || age < -2*time.Second || age > 5*time.Second {
		t.Errorf("%v, %v, %v", last, ok, err)
	}
	left, notes, err := c.Leftovers(ctx, []string{ns}, time.Hour)
	if err != nil || len(notes) != 0 || slices.ContainsFunc(left, func(l Leftover) bool { return l.Session == "e2e-beat" }) {
		t.Errorf("%+v, %v, %v", left, notes, err)
	}
	time.Sleep(1500 * time.Millisecond)
	left, _, err = c.Leftovers(ctx, []string{ns}, time.Second/10)
	i := slices.IndexFunc(left, func(l Leftover) bool { return l.Session == "e2e-beat" })
	if err != nil || i < 0 {
		t.Fatalf("%+v, %v", left, err)
	}
	if err := c.RemoveLeftover(ctx, left[i]); err != nil {
		t.Error(err)
	}
	if _, ok, err := c.SeenSession(ctx, ns, "e2e-beat"); ok || err != nil {
		t.Errorf("%v, %v", ok, err)
	}
}

func TestPoliciesOnServer(t *testing.T) {
	ns := gatesNamespace()
	admin, c := as(t, "admin", ns), as(t, "developer", ns)
	ctx := within(t, 30*time.Second)
	deny := readPolicies(t, `{e2e-deny: {podSelector: {}, policyTypes: [Ingress, Egress]}, e2e-web: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: cart}}}], ports: [{port: 9000, endPort: 9100}]}]}}`)
	for i := range deny {
		deny[i].Namespace = ns
		if _, err := admin.client.NetworkPolicies(ns).Create(ctx, &deny[i], metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = admin.client.NetworkPolicies(ns).Delete(context.Background(), deny[i].Name, metav1.DeleteOptions{})
		})
	}
	spec := testPolicySpec()
	var versions []string
	for range 2 {
		made, notes, err := c.EnsurePolicies(ctx, ns, spec)
		if err != nil || len(notes) != 0 || len(made) != 5 {
			t.Fatalf("%v, %v, %v", made, notes, err)
		}
		var version []string
		for _, m := range made {
			_, name, _ := strings.Cut(m, "/")
			p, err := c.client.NetworkPolicies(ns).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				t.Fatal(err)
			}
			version = append(version, p.ResourceVersion)
			t.Log(say(p))
		}
		versions = append(versions, strings.Join(version, " "))
	}
	if versions[0] != versions[1] {
		t.Error("the second time wrote what was the same")
	}
	if err := c.DeletePolicies(ctx, ns, spec.Service, ""); err != nil {
		t.Fatal(err)
	}
	all, err := c.client.NetworkPolicies(ns).List(ctx, metav1.ListOptions{LabelSelector: ofCulvert})
	if err != nil || len(all.Items) != 0 {
		t.Errorf("%d left, %v", len(all.Items), err)
	}
}

// With an image that has gates, which CULVERT_E2E_IMAGE names and the nodes
// hold: they become ready, are told what to do, and those that come later, too.
func TestGatesAreToldOnServer(t *testing.T) {
	image := os.Getenv("CULVERT_E2E_IMAGE")
	if image == "" {
		t.Fatal("CULVERT_E2E_IMAGE is not set")
	}
	ns := gatesNamespace()
	admin, c := as(t, "admin", ns), as(t, "developer", ns)
	ctx := within(t, 2*time.Minute)
	spec := GateSpec{Name: intercept.GateName, Agent: AgentSpec{Image: image}}
	t.Cleanup(func() { _, _, _ = c.RemoveGateEntry(context.Background(), ns, "web", "") })
	entry := testEntry(intercept.GateName, "s1", 20001)
	entry.Routes[0].Origin = "192.0.2.1:80" // nobody, see RFC 5737
	_, err := c.ChangeGateState(ctx, ns, addEntry("web", entry))
	if err != nil {
		t.Fatal(err)
	}
	begun := time.Now()
	if err := c.EnsureGates(ctx, ns, spec, func(step string) { t.Log(step) }); err != nil {
		t.Fatal(err)
	}
	t.Logf("ready after %v", time.Since(begun))
	entry.Routes[0].Listen = 20002
	s, err := c.ChangeGateState(ctx, ns, addEntry("web", entry))
	if err != nil {
		t.Fatal(err)
	}
	begun = time.Now()
	if err := c.Push(ctx, ns, intercept.GateName, s); err != nil {
		t.Fatal(err)
	}
	t.Logf("pushed in %v", time.Since(begun))
	told := func() bool {
		all, err := c.GateStatuses(ctx, ns, intercept.GateName)
		n := 0
		for _, status := range all {
			if status.Generation == s.Generation && len(status.Routes) == 1 && status.Routes[0].Listen == entry.Routes[0].Listen {
				n++
			}
		}
		return err == nil && n == 2
	}
	if !told() {
		t.Error("the gates do not say what they were told")
	}
	if got, err := c.Reach(ctx, ns, intercept.GateName, intercept.ReachRequest{Key: "web"}); err != nil || len(got) != 1 || got[0].Error == "" || got[0].Error == "refused" {
		t.Errorf("%+v, %v", got, err)
	}
	keeping, stop := context.WithCancel(ctx)
	defer stop()
	gone := make(chan string, 4)
	go func() { _ = c.KeepGates(keeping, ns, intercept.GateName, func(what string) { gone <- what }) }()
	pods, err := c.runningGates(ctx, ns, intercept.GateName)
	if err != nil {
		t.Fatal(err)
	}
	if err := admin.client.Pods(ns).Delete(ctx, pods[0].Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	// Whoever changed it died before he pushed.
	entry.Routes[0].Listen = 20003
	if s, err = c.ChangeGateState(ctx, ns, addEntry("web", entry)); err != nil {
		t.Fatal(err)
	}
	begun = time.Now()
	for !told() {
		if ctx.Err() != nil {
			t.Fatal("the gates were not told")
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Logf("told after %v", time.Since(begun))
	// In time for the last one out, and the first one in while they drain.
	if last, _, err := c.RemoveGateEntry(ctx, ns, "web", ""); err != nil || !last {
		t.Fatalf("last %v, %v", last, err)
	}
	for range 2 {
		select {
		case what := <-gone:
			t.Log(what)
		case <-ctx.Done():
			t.Fatal("nobody said that the gates are gone")
		}
	}
	stop()
	if _, err := c.ChangeGateState(ctx, ns, addEntry("web", entry)); err != nil {
		t.Fatal(err)
	}
	begun = time.Now()
	if err := c.EnsureGates(ctx, ns, spec, func(step string) { t.Log(step) }); err != nil {
		t.Fatal(err)
	}
	t.Logf("anew after %v", time.Since(begun))
}

// TestMeshCrowdOnServer: twenty developers join one mesh at once, and leave it at once
// while others come: nobody's route is lost, and the last one leaves nothing.
func TestMeshCrowdOnServer(t *testing.T) {
	ns, ctx := gatesNamespace(), within(t, 2*time.Minute)
	plan := &ServicePlan{Namespace: ns, Name: "crowded", Ports: []PlanPort{{Port: 80, Protocol: corev1.ProtocolTCP, Local: 8080}}}
	member := func(session string) *Intercept {
		c := as(t, "developer", ns)
		mark, err := intercept.ParseCondition("header:VERSION=" + session)
		if err != nil {
			t.Fatal(err)
		}
		return &Intercept{c: c, Key: plan.Name, Gate: intercept.GateName, ID: session, Token: session, head: &exchangeHead{c: c, plan: plan}, spec: InterceptSpec{
			Kind: intercept.Mesh, Namespace: ns, Match: []intercept.Condition{mark}, Holder: intercept.Holder{Session: session},
			Agent: &Agent{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
		}}
	}
	join := func(i *Intercept) error {
		_, err := i.c.ChangeGateState(ctx, ns, i.join)
		return err
	}
	members := func(want int) {
		t.Helper()
		state, err := as(t, "developer", ns).GateState(ctx, ns)
		if err != nil {
			t.Fatal(err)
		}
		e := state.Entries[plan.Name]
		seen := map[string]bool{}
		for _, m := range e.Members {
			seen[m.Holder.Session] = true
			if len(m.Ports) != 1 || m.Ports[0].Machine.Token != m.Holder.Session {
				t.Errorf("member %+v", m)
			}
		}
		if len(seen) != want || len(e.Members) != want || want > 0 && len(e.Routes) != 1 {
			t.Errorf("%d members, %d of them different, want %d; routes %+v", len(e.Members), len(seen), want, e.Routes)
		}
	}
	t.Cleanup(func() {
		if err := as(t, "developer", ns).Undo(context.Background(), UndoSpec{Namespace: ns, Key: plan.Name, Dead: true}); err != nil {
			t.Error(err)
		}
	})
	var first, second []*Intercept
	for n := range 20 {
		first = append(first, member(fmt.Sprint("first", n)))
		second = append(second, member(fmt.Sprint("second", n)))
	}
	both := func(do ...func()) {
		var all sync.WaitGroup
		for _, f := range do {
			all.Go(f)
		}
		all.Wait()
	}
	joins := func(all []*Intercept) (do []func()) {
		for _, i := range all {
			do = append(do, func() {
				if err := join(i); err != nil {
					t.Errorf("%s joins: %v", i.ID, err)
				}
			})
		}
		return do
	}
	leaves := func(all []*Intercept) (do []func()) {
		for _, i := range all {
			do = append(do, func() {
				if err := i.c.Undo(ctx, UndoSpec{Namespace: ns, Key: plan.Name, Session: i.ID, Dead: true}); err != nil {
					t.Errorf("%s leaves: %v", i.ID, err)
				}
			})
		}
		return do
	}
	both(joins(first)...)
	members(20)
	if err := join(member("first7again")); err != nil {
		t.Fatal(err)
	}
	taken := member("other")
	taken.spec.Match = first[3].spec.Match
	var held *Held
	if err := join(taken); !errors.As(err, &held) || held.Holder.Session != "first3" {
		t.Errorf("the conditions of another: %v", err)
	}
	both(append(leaves(first), joins(second)...)...)
	members(21)
	both(append(leaves(second), leaves([]*Intercept{member("first7again")})...)...)
	state, err := as(t, "developer", ns).GateState(ctx, ns)
	if err != nil || len(state.Entries) != 0 {
		t.Errorf("left: %+v, %v", state, err)
	}
}
