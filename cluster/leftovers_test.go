package cluster

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// fleetOf fills namespace demo: session "dead" wrote its last heartbeat two hours
// ago, "none" has no Lease, "live" has one.
func fleetOf(t *testing.T) (*fleetAPI, *Cluster) {
	server, c := newFleetAPI(t)
	now := time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)
	long := metav1.NewTime(now.Add(-5 * time.Hour))
	object := func(name, session string, annotations ...string) metav1.ObjectMeta {
		m := metav1.ObjectMeta{Name: name, Namespace: "demo", CreationTimestamp: long, Labels: map[string]string{}, Annotations: map[string]string{}}
		if session != "" {
			m.Labels = map[string]string{LabelManagedBy: "culvert", LabelSession: session}
		}
		for i := 0; i < len(annotations); i += 2 {
			m.Annotations[annotations[i]] = annotations[i+1]
		}
		return m
	}
	server.date = now.Add(-2 * time.Hour)
	if err := c.Heartbeat(t.Context(), "demo", "dead", "eve", "", nil); err != nil {
		t.Fatal(err)
	}
	server.date = now
	if err := c.Heartbeat(t.Context(), "demo", "live", "dev", "", nil); err != nil {
		t.Fatal(err)
	}
	held := func(session string) string {
		return fmt.Sprintf(`{"version":1,"session":%q,"user":"eve","since":"2031-02-02T00:00:00Z"}`, session)
	}
	agent := func(name, session string, annotations ...string) *appsv1.Deployment {
		d := &appsv1.Deployment{ObjectMeta: object(name, session, annotations...)}
		d.Labels[LabelName] = agentApp
		return d
	}
	for _, session := range []string{"dead", "none", "live"} {
		server.put(&corev1.Service{ObjectMeta: object("held-"+session, "", AnnotationIntercept, held(session))})
		server.put(&corev1.Service{ObjectMeta: object("origin-"+session, session)})
		server.put(&networkingv1.NetworkPolicy{ObjectMeta: object("policy-"+session, session)})
		server.put(&networkingv1.Ingress{ObjectMeta: object("ingress-"+session, session)})
		server.put(agent("agent-"+session, session, AnnotationHeartbeat, HeartbeatLease))
		server.put(agent("quiet-"+session, session))
		server.put(&appsv1.StatefulSet{ObjectMeta: object("set-"+session, "", AnnotationScaled, held(session))})
	}
	server.put(&corev1.Service{ObjectMeta: object("broken", "", AnnotationIntercept, "{")})
	server.put(&corev1.Service{ObjectMeta: object("plain", "")})
	server.put(&appsv1.Deployment{ObjectMeta: object("plain", "")})
	young := object("young", "none")
	young.CreationTimestamp = metav1.NewTime(now.Add(-30 * time.Second))
	server.put(&corev1.Service{ObjectMeta: young})
	udp := object("udp", "none")
	udp.OwnerReferences = []metav1.OwnerReference{{Kind: "Deployment", Name: "quiet-none"}}
	server.put(&corev1.Service{ObjectMeta: udp})
	copied := object("copied", "", AnnotationScaled, held("dead"))
	copied.OwnerReferences = udp.OwnerReferences
	server.put(&appsv1.ReplicaSet{ObjectMeta: copied})
	return server, c
}

func (s *fleetAPI) gatesOf(name string, owner types.UID) {
	own := GateSpec{Name: name}.ownLabels(owner)
	long := metav1.NewTime(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC))
	m := metav1.ObjectMeta{Name: name, Namespace: "demo", Labels: own, CreationTimestamp: long}
	s.put(&appsv1.Deployment{ObjectMeta: *m.DeepCopy()})
	s.put(&policyv1.PodDisruptionBudget{ObjectMeta: *m.DeepCopy()})
}

func textsOf(left []Leftover) (texts []string) {
	for _, l := range left {
		texts = append(texts, fmt.Sprintf("%s %s/%s of %s", l.Action, l.Kind, l.Name, l.Session))
	}
	slices.Sort(texts)
	return texts
}

func TestLeftovers(t *testing.T) {
	server, c := fleetOf(t)
	for key, e := range map[string]intercept.Entry{
		"live": testEntry("culvert-gate", "live"), "dead": testEntry("culvert-gate", "dead"),
		"own": testEntry("culvert-gate-own", "dead"), "ours": testEntry("culvert-gate-ours", "live"),
	} {
		if _, err := c.ChangeGateState(t.Context(), "demo", addEntry(key, e)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"culvert-gate", "culvert-gate-own", "culvert-gate-ours"} {
		server.gatesOf(name, ownerOf(t, c))
	}
	server.gatesOf("culvert-gate-old", "older")
	left, notes, err := c.Leftovers(t.Context(), []string{"demo"}, time.Hour)
	if err != nil || len(notes) != 0 {
		t.Fatal(notes, err)
	}
	var want []string
	for _, session := range []string{"dead", "none"} {
		for _, text := range []string{
			"restore Service/held-", "delete Service/origin-", "delete NetworkPolicy/policy-", "delete Ingress/ingress-",
			"delete Deployment/agent-", "rescale StatefulSet/set-",
		} {
			want = append(want, text+session+" of "+session)
		}
	}
	want = append(want,
		"delete Lease/culvert-dead of dead",
		"delete Deployment/quiet-dead of dead", // its session is known to be gone
		"unknown Deployment/quiet-none of none",
		"restore Service/broken of ",
		"take out "+KindGateEntry+"/dead of dead", "take out "+KindGateEntry+"/own of dead",
		"delete Deployment/culvert-gate-own of ", "delete PodDisruptionBudget/culvert-gate-own of ",
		"delete Deployment/culvert-gate-old of ", "delete PodDisruptionBudget/culvert-gate-old of ",
	)
	slices.Sort(want)
	if got := textsOf(left); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	// What serves is put back before what served it goes.
	place := func(action string) int {
		return slices.IndexFunc(left, func(l Leftover) bool { return l.Action == action })
	}
	if !(place(LeftoverRestore) < place(LeftoverRescale) && place(LeftoverRescale) < place(LeftoverTakeOut) && place(LeftoverTakeOut) < place(LeftoverDelete)) {
		t.Errorf("order %v", left)
	}
	for _, l := range left {
		if l.Session == "dead" && (l.User != "eve" || l.LastSeen.IsZero()) || l.Session == "none" && !l.LastSeen.IsZero() {
			t.Errorf("%+v", l)
		}
	}
	// By another measure the dead session lives.
	left, _, err = c.Leftovers(t.Context(), []string{"demo"}, 24*time.Hour)
	if err != nil || slices.ContainsFunc(left, func(l Leftover) bool { return l.Session == "dead" }) {
		t.Errorf("%v, %v", textsOf(left), err)
	}
}

// The ConfigMap without entries is what a crash of the last one may leave.
func TestLeftoverGatesWithoutEntries(t *testing.T) {
	server, c := newFleetAPI(t)
	server.put(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo", Labels: map[string]string{LabelManagedBy: "culvert"}}})
	server.gatesOf("culvert-gate", ownerOf(t, c))
	left, _, err := c.Leftovers(t.Context(), []string{"demo"}, time.Hour)
	if err != nil || len(left) != 1 || left[0].Action != LeftoverTakeOut || left[0].Name != "" {
		t.Fatalf("%+v, %v", left, err)
	}
	if last, _, err := c.RemoveGateEntry(t.Context(), "demo", left[0].Name, ""); err != nil || !last || len(server.list("ConfigMap")) != 0 {
		t.Errorf("%v, %v", last, err)
	}
}

func TestLeftoversWithoutRights(t *testing.T) {
	server, c := fleetOf(t)
	server.denied = []string{"list ingresses"}
	if _, notes, err := c.Leftovers(t.Context(), []string{"demo"}, time.Hour); err != nil || len(notes) != 1 || !strings.Contains(notes[0], "Ingress") {
		t.Errorf("%v, %v", notes, err)
	}
	server.denied = []string{"list leases"} // nobody would be alive
	if left, _, err := c.Leftovers(t.Context(), []string{"demo"}, time.Hour); err == nil || len(left) != 0 {
		t.Errorf("%v, %v", left, err)
	}
}

func TestRemoveLeftover(t *testing.T) {
	server, c := fleetOf(t)
	left, _, err := c.Leftovers(t.Context(), []string{"demo"}, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	find := func(name string) Leftover {
		i := slices.IndexFunc(left, func(l Leftover) bool { return l.Name == name })
		if i < 0 {
			t.Fatalf("no %s", name)
		}
		return left[i]
	}
	for range 2 {
		for _, name := range []string{"origin-none", "agent-none", "policy-none", "ingress-dead"} {
			if err := c.RemoveLeftover(t.Context(), find(name)); err != nil {
				t.Error(err)
			}
		}
	}
	// Another object by the same name stays.
	other := find("policy-dead")
	other.UID = "another"
	if err := c.RemoveLeftover(t.Context(), other); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"held-dead", "set-dead", "quiet-none"} {
		if err := c.RemoveLeftover(t.Context(), find(name)); err == nil {
			t.Errorf("%s is simply deleted", name)
		}
	}
	// A machine that slept is back.
	if err := c.Heartbeat(t.Context(), "demo", "dead", "eve", "", nil); err != nil {
		t.Fatal(err)
	}
	if err := c.RemoveLeftover(t.Context(), find("origin-dead")); err == nil {
		t.Error("what a living session owns is deleted")
	}
	if got := server.list("NetworkPolicy"); !slices.Equal(got, []string{"policy-dead", "policy-live"}) {
		t.Error(got)
	}
	if got := server.list("Ingress"); !slices.Equal(got, []string{"ingress-live", "ingress-none"}) {
		t.Error(got)
	}
}
