package cluster

import (
	"context"
	"encoding/json"
	"maps"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// meshedWeb is Service web, meshed, as the member of session a knows it.
func meshedWeb(t *testing.T) (*serviceServer, *Intercept) {
	t.Helper()
	c, s := newServiceServer(t, webService())
	i := &Intercept{c: c, Key: "web", Gate: intercept.GateName, mesh: intercept.Holder{Session: "mesh-1"},
		spec: InterceptSpec{Kind: intercept.Mesh, Namespace: "demo", Holder: intercept.Holder{Session: "a"}, Agent: &Agent{Namespace: "demo"}}}
	plan, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080:80"), false)
	if err != nil {
		t.Fatal(err)
	}
	h := &exchangeHead{c: c, plan: plan}
	i.head = h
	if _, err := c.Switch(t.Context(), plan, GateSelector(i.Gate), gatePorts, i.record()); err != nil {
		t.Fatal(err)
	}
	return s, i
}

// TestMeshRecordRemoved: somebody took the annotation away and nothing else. What
// the Service selected before is still known, and the origin never selects gates.
func TestMeshRecordRemoved(t *testing.T) {
	s, i := meshedWeb(t)
	h := i.head.(*exchangeHead)
	h.plan.Record.Reapplied = []time.Time{i.c.Now().Add(-time.Minute)}
	live := s.services["web"].DeepCopy()
	delete(live.Annotations, AnnotationIntercept)
	s.services["web"] = live
	// There is no ConfigMap in this server: once the origin is made it goes no further.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err := h.changed(ctx, i, ServiceChange{Kind: Overwritten, Service: live}, "", func(string) {})
	origin := s.services[OriginName("web")]
	if origin == nil {
		t.Fatal(err)
	}
	if !maps.Equal(origin.Spec.Selector, map[string]string{"app": "web"}) || origin.Spec.Ports[0].TargetPort.IntVal != 8080 {
		t.Errorf("the origin selects %v, port %v", origin.Spec.Selector, origin.Spec.Ports[0].TargetPort)
	}
	if len(h.again) != 2 {
		t.Errorf("what was counted is forgotten: %v", h.again)
	}
}

// TestMeshReappliedByAnother: another member led the Service to the gates again, on
// top of what its owner made of it. This one goes by that from then on.
func TestMeshReappliedByAnother(t *testing.T) {
	s, i := meshedWeb(t)
	h := i.head.(*exchangeHead)
	record := *h.plan.Record
	record.Selector, record.Reapplied = map[string]string{"app": "web", "tier": "new"}, []time.Time{i.c.Now()}
	text, err := record.encode()
	if err != nil {
		t.Fatal(err)
	}
	live := s.services["web"].DeepCopy()
	live.Annotations[AnnotationIntercept] = text
	s.services["web"] = live
	s.touch(live)
	if err := h.changed(t.Context(), i, ServiceChange{Kind: Overwritten, Service: live}, "", func(string) {}); err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(h.plan.below.Spec.Selector, record.Selector) || len(h.again) != 1 {
		t.Errorf("it still goes by %v, and counted %v", h.plan.below.Spec.Selector, h.again)
	}
}

func putMesh(t *testing.T, server *fleetAPI, e intercept.Entry) {
	t.Helper()
	putMeshAt(t, server, "web", e)
}

func putMeshAt(t *testing.T, server *fleetAPI, key string, e intercept.Entry) {
	t.Helper()
	text, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	server.put(&corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: intercept.GateName, Namespace: "demo", Labels: map[string]string{LabelManagedBy: "culvert"}},
		Data:       map[string]string{generationKey: "1", key + entrySuffix: string(text)},
	})
}

// TestMeshLeftHalfway: who left a mesh, but did not come to delete his policies, does
// it the next time; others keep theirs.
func TestMeshLeftHalfway(t *testing.T) {
	server, c := newFleetAPI(t)
	putMesh(t, server, meshOf("b"))
	for _, session := range []string{"a", "b", "mesh-1"} {
		server.put(&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "of-" + session, Namespace: "demo",
			Labels: merge(PolicySpec{Service: "web"}.ownLabels("demo"), map[string]string{LabelSession: session})}})
	}
	if err := c.Undo(t.Context(), UndoSpec{Namespace: "demo", Key: "web", Session: "a"}); err != nil {
		t.Fatal(err)
	}
	if left := server.list("NetworkPolicy"); len(left) != 2 || left[0] != "of-b" || left[1] != "of-mesh-1" {
		t.Errorf("policies that are left: %v", left)
	}
}

// TestMeshOfDeletedService: its members are listed, so that nobody recovers from under
// those who live.
func TestMeshOfDeletedService(t *testing.T) {
	server, c := newFleetAPI(t)
	putMesh(t, server, meshOf("a"))
	if err := c.Heartbeat(t.Context(), "demo", "a", "u-a", "", nil); err != nil {
		t.Fatal(err)
	}
	all, err := c.List(t.Context(), "demo")
	if err != nil || len(all) != 1 || len(all[0].Members) != 1 || !all[0].Alive {
		t.Errorf("%+v, %v", all, err)
	}
}
