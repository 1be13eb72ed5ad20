package cluster

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

const scaleManifests = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, uid: d1}
spec:
  replicas: 3
  paused: true
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web, tier: front, pod-template-hash: "1"}}
    spec:
      containers:
      - {name: main, ports: [{containerPort: 8080, name: http}, {containerPort: 53, name: dns, protocol: UDP}, {containerPort: 9090, name: metrics}]}
---
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: web-1, uid: r1, ownerReferences: [{apiVersion: apps/v1, kind: Deployment, name: web, uid: d1, controller: true}]}
spec: {replicas: 3, selector: {matchLabels: {app: web}}, template: {metadata: {labels: {app: web}}, spec: {containers: [{name: main}]}}}
---
apiVersion: v1
kind: Pod
metadata: {name: web-1-x, labels: {app: web}, ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-1, uid: r1, controller: true}]}
spec: {containers: [{name: main}]}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, uid: s1, ownerReferences: [{apiVersion: x/v1, kind: Postgres, name: pg, uid: o1, controller: true}]}
spec:
  persistentVolumeClaimRetentionPolicy: {whenScaled: Delete}
  selector: {matchLabels: {app: db}}
  template: {metadata: {labels: {app: db}}, spec: {hostNetwork: true, containers: [{name: main, ports: [{containerPort: 5432}]}]}}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {selector: {app: web}, ports: [{port: 80, targetPort: http}, {port: 81, targetPort: 8081}, {port: 82}]}
---
apiVersion: v1
kind: Service
metadata: {name: db}
spec: {selector: {app: db}, ports: [{port: 5432}]}
---
apiVersion: v1
kind: Service
metadata: {name: nothing}
spec: {selector: {app: nothing}, ports: [{port: 5432}]}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: hpa}
spec: {scaleTargetRef: {kind: Deployment, name: web}, maxReplicas: 9}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: pdb}
spec: {selector: {matchLabels: {tier: front}}}
`

func TestScalePlan(t *testing.T) {
	_, c := newShelf(t, scaleManifests)
	for _, target := range []string{"deploy/web", "svc/web", "pod/web-1-x", "web"} {
		p, err := c.PlanScale(t.Context(), "a", target, []Expose{{Local: 18080, Remote: "http"}, {Local: 9090}, {Local: 5353, Remote: "53", Protocol: corev1.ProtocolUDP}}, false)
		if err != nil {
			t.Errorf("%s: %v", target, err)
			continue
		}
		if p.Kind != "Deployment" || p.Name != "web" || p.Namespace != "a" || p.Replicas != 3 || p.UID != "d1" || !slices.Equal(p.Budgets, []string{"pdb"}) {
			t.Errorf("%s: %s %+v", target, p, *p)
		}
		if want := map[string]string{"app": "web", "tier": "front"}; !reflect.DeepEqual(p.PodLabels, want) {
			t.Errorf("labels %v", p.PodLabels)
		}
		if got := fmt.Sprint(p.Ports); got != "[8080/TCP (http) 53/UDP (dns) 9090/TCP (metrics) 8081/TCP 82/TCP]" {
			t.Error(got)
		}
		var locals []uint16
		for _, port := range p.Ports {
			locals = append(locals, port.Local)
		}
		if !slices.Equal(locals, []uint16{18080, 5353, 9090, 0, 0}) {
			t.Error(locals)
		}
		if !strings.HasPrefix(p.Notes[0], "this mode replaces the pods of Deployment a/web and cannot fail open") {
			t.Error(p.Notes[0])
		}
		notes := strings.Join(p.Notes, "\n")
		for _, want := range []string{"not served meanwhile: 8081/TCP, 82/TCP", "is paused", "HorizontalPodAutoscaler hpa is inactive", "PodDisruptionBudget pdb does not keep"} {
			if !strings.Contains(notes, want) {
				t.Errorf("%q is not in %s", want, notes)
			}
		}
	}
	p, err := c.PlanScale(t.Context(), "a", "svc/db", []Expose{{Local: 15432}}, true)
	if err != nil {
		t.Fatal(err)
	}
	notes := strings.Join(p.Notes, "\n")
	for _, want := range []string{"db-0 and so on", "volumes of its pods are deleted", "addresses of their nodes", "belongs to Postgres pg"} {
		if !strings.Contains(notes, want) {
			t.Errorf("%q is not in %s", want, notes)
		}
	}
	if p.Replicas != 1 || p.Ports[0].Local != 15432 {
		t.Errorf("%+v", *p)
	}
}

func TestScaleExpose(t *testing.T) {
	tcp := func(number uint16, name string) ScalePort {
		return ScalePort{Number: number, Name: name, Protocol: corev1.ProtocolTCP}
	}
	two := []ScalePort{tcp(80, "http"), tcp(443, "https"), {Number: 53, Name: "dns", Protocol: corev1.ProtocolUDP}}
	for _, x := range []struct {
		ports  []ScalePort
		expose []Expose
		want   string // LOCAL>PORT ..., or part of the error
	}{
		{two, []Expose{{Local: 8080, Remote: "80"}}, "8080>80/TCP (http)"},
		{two, []Expose{{Local: 8080, Remote: "http"}, {Local: 8443, Remote: "443"}}, "8080>80/TCP (http) 8443>443/TCP (https)"},
		{two, []Expose{{Local: 443}}, "443>443/TCP (https)"},
		{two, []Expose{{Local: 5353, Protocol: corev1.ProtocolUDP}}, "5353>53/UDP (dns)"},
		{two[:1], []Expose{{Local: 8080}}, "8080>80/TCP (http)"},
		{two, []Expose{{Local: 8080, Remote: "8081"}}, "8080>8081/TCP"},
		{nil, []Expose{{Local: 8080}}, "8080>8080/TCP"},
		{two, nil, "no port of this machine is exposed"},
		{two, []Expose{{Local: 8080}}, "which port of"},
		{two, []Expose{{Local: 8080, Remote: "grpc"}}, `no port "grpc"`},
		{two, []Expose{{Local: 8080, Remote: "dns"}}, "is UDP, not TCP"},
		{two, []Expose{{Local: 8080, Remote: "80"}, {Local: 8081, Remote: "http"}}, "exposed twice, by local ports 8080 and 8081"},
	} {
		p := &ScalePlan{Kind: "Deployment", Namespace: "a", Name: "web", Ports: slices.Clone(x.ports)}
		err := p.expose(x.expose)
		var got []string
		for _, port := range p.Ports {
			if port.Local != 0 {
				got = append(got, fmt.Sprintf("%d>%s", port.Local, port))
			}
		}
		if err != nil {
			if !strings.Contains(err.Error(), x.want) {
				t.Errorf("%+v: %v, want %q", x.expose, err, x.want)
			}
		} else if strings.Join(got, " ") != x.want {
			t.Errorf("%+v: %q, want %q", x.expose, got, x.want)
		}
	}
}

func TestScaleRefused(t *testing.T) {
	for name, x := range map[string]struct {
		target, code, message string
		change                func(*shelf)
	}{
		"owned":       {"rs/web-1", api.CodeUsage, "use deployment/web", nil},
		"nobody's":    {"svc/nothing", api.CodeNotFound, "selects the pods of no", nil},
		"volumes":     {"sts/db", api.CodeDenied, "deletes the volumes", nil},
		"missing":     {"deploy/webb", api.CodeNotFound, "did you mean deployment/web?", nil},
		"twice":       {"deploy/web", api.CodeExists, "by me, since", annotate(`{"version":1,"session":"s","user":"me","since":"2026-01-02T03:04:05Z"}`)},
		"unreadable":  {"deploy/web", api.CodeExists, "are replaced already", annotate(`?`)},
		"culvert's":   {"deploy/web", api.CodeDenied, "culvert's own", func(s *shelf) { deployment(s).Labels = map[string]string{LabelManagedBy: "culvert"} }},
		"a bare pod":  {"pod/web-1-x", api.CodeUnsupported, "belongs to no workload", func(s *shelf) { s.objects[resources["Pod"]+"web-1-x"].SetOwnerReferences(nil) }},
		"kube-system": {"deploy/web", api.CodeDenied, "--force", func(s *shelf) { deployment(s).Namespace = "kube-system" }},
		"several": {"svc/web", api.CodeUsage, "deployment/other", func(s *shelf) {
			o := deployment(s).DeepCopy()
			o.Name, o.UID = "other", "d2"
			s.objects[resources["Deployment"]+"other"] = o
		}},
		"forbidden": {"deploy/web", api.CodeForbidden, "deployments", func(s *shelf) { s.forbidden = "deployments" }},
	} {
		t.Run(name, func(t *testing.T) {
			s, c := newShelf(t, scaleManifests)
			if x.change != nil {
				x.change(s)
			}
			_, err := c.PlanScale(t.Context(), "a", x.target, []Expose{{Local: 8080}}, false)
			if e, ok := err.(*api.Error); !ok || e.Code != x.code || !strings.Contains(e.Error(), x.message) {
				t.Errorf("%v", err)
			}
		})
	}
	// Without the right to see autoscalers and budgets the plan says so.
	s, c := newShelf(t, scaleManifests)
	for resource, want := range map[string]string{"horizontalpodautoscalers": "horizontalpodautoscalers", "poddisruptionbudgets": "poddisruptionbudgets"} {
		s.forbidden = resource
		p, err := c.PlanScale(t.Context(), "a", "deploy/web", []Expose{{Local: 8080}}, false)
		if err != nil || !strings.Contains(strings.Join(p.Notes, "\n"), "you may not list "+want) {
			t.Errorf("%v, %v", p, err)
		}
	}
}

func deployment(s *shelf) *appsv1.Deployment {
	return s.objects[resources["Deployment"]+"web"].(*appsv1.Deployment)
}

func annotate(record string) func(*shelf) {
	return func(s *shelf) { deployment(s).Annotations = map[string]string{AnnotationScaled: record} }
}

// scaleServer has one Deployment and takes merge patches.
type scaleServer struct {
	mu        sync.Mutex
	object    map[string]any // nil: deleted
	version   int
	conflicts int                  // patches to refuse, with a change by another in between
	between   func(map[string]any) // that change
	lost      int                  // the patch that is answered with an error after it took effect
	patches   []map[string]any
}

func newScaleServer(t *testing.T, manifest string) (*scaleServer, *Cluster) {
	s := &scaleServer{version: 1, lost: -1}
	if err := json.Unmarshal([]byte(manifest), &s.object); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(s)
	t.Cleanup(server.Close)
	return s, &Cluster{namespace: "a", client: unlimited(t, server.URL)}
}

func (s *scaleServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fail := func(code int, reason string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":%q,"code":%d,"message":%[1]q}`, reason, code)
	}
	w.Header().Set("Content-Type", "application/json")
	switch {
	case strings.HasSuffix(r.URL.Path, "/replicasets"):
		fmt.Fprint(w, `{"kind":"ReplicaSetList","apiVersion":"apps/v1","items":[]}`)
		return
	case s.object == nil:
		fail(404, "NotFound")
		return
	case r.Method == http.MethodPatch:
		b, _ := io.ReadAll(r.Body)
		var patch map[string]any
		_ = json.Unmarshal(b, &patch)
		meta := patch["metadata"].(map[string]any)
		if s.conflicts > 0 {
			s.conflicts--
			s.version++
			if s.between != nil {
				s.between(s.object)
			}
		}
		if meta["resourceVersion"] != fmt.Sprint(s.version) {
			fail(409, "Conflict")
			return
		}
		delete(meta, "resourceVersion")
		s.patches = append(s.patches, patch)
		s.object = merged(s.object, patch).(map[string]any)
		s.version++
		if _, ok := patch["spec"]; ok { // as the server's bookkeeping has it
			s.object["metadata"].(map[string]any)["managedFields"] = []any{replicasOwner("culvert")}
		}
		if len(s.patches)-1 == s.lost {
			fail(500, "InternalError")
			return
		}
	}
	s.object["metadata"].(map[string]any)["resourceVersion"] = fmt.Sprint(s.version)
	_ = json.NewEncoder(w).Encode(s.object)
}

// replicasOwner is an entry of managedFields.
func replicasOwner(manager string) map[string]any {
	return map[string]any{"manager": manager, "operation": "Update", "apiVersion": "apps/v1", "fieldsType": "FieldsV1", "fieldsV1": map[string]any{"f:spec": map[string]any{"f:replicas": map[string]any{}}}}
}

// merged applies a JSON merge patch (RFC 7386).
func merged(to, patch any) any {
	p, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	m, ok := to.(map[string]any)
	if !ok {
		m = map[string]any{}
	}
	for k, v := range p {
		if v == nil {
			delete(m, k)
		} else {
			m[k] = merged(m[k], v)
		}
	}
	return m
}

const scaledDeployment = `{"kind":"Deployment","apiVersion":"apps/v1","metadata":{"name":"web","namespace":"a","uid":"d1","generation":1,"managedFields":[
	{"manager":"owner","operation":"Apply","apiVersion":"apps/v1","time":"2026-01-02T03:04:05Z","fieldsType":"FieldsV1","fieldsV1":{"f:spec":{"f:replicas":{},"f:paused":{}}}}]},
	"spec":{"replicas":2,"selector":{"matchLabels":{"app":"web"}},"template":{"metadata":{"labels":{"app":"web"}},"spec":{"containers":[]}}},
	"status":{"observedGeneration":1,"readyReplicas":2}}`

func (s *scaleServer) replicas() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.object["spec"].(map[string]any)["replicas"].(float64)
}

func (s *scaleServer) annotation() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	a, _ := s.object["metadata"].(map[string]any)["annotations"].(map[string]any)
	text, _ := a[AnnotationScaled].(string)
	return text
}

// Each request may be the last one that took effect, its answer never seen: what
// comes next goes on there.
func TestScaleKilled(t *testing.T) {
	plan := &ScalePlan{Namespace: "a", Kind: "Deployment", Name: "web", UID: "d1", Replicas: 2}
	for last := range 4 {
		s, c := newScaleServer(t, scaledDeployment)
		s.conflicts, s.lost = 2, last
		if err := c.ScaleDown(t.Context(), plan, ScaleRecord{Session: "s"}); (err != nil) != (last == 0) {
			t.Errorf("%d: %v", last, err)
		}
		if s.replicas() != 0 || !strings.Contains(s.annotation(), `"replicas":2,"ready":2`) {
			t.Errorf("%d: replicas %v, %s", last, s.replicas(), s.annotation())
		}
		for try := range 2 {
			_, err := c.ScaleBack(t.Context(), "a", "deployment", "web", nil)
			if fails := try == 0 && (last == 1 || last == 2); (err != nil) != fails {
				t.Errorf("%d: %v", last, err)
			}
		}
		if s.replicas() != 2 || s.annotation() != "" || len(s.patches) != 3 {
			t.Errorf("%d: replicas %v, %q, %d changes", last, s.replicas(), s.annotation(), len(s.patches))
		}
		if fields := fmt.Sprint(s.object["metadata"].(map[string]any)["managedFields"]); strings.Contains(fields, "culvert") || !strings.Contains(fields, "f:replicas") {
			t.Errorf("%d: %s", last, fields)
		}
	}
}

func TestScaleTheirs(t *testing.T) {
	plan := &ScalePlan{Namespace: "a", Kind: "Deployment", Name: "web", UID: "d1", Replicas: 2}
	for name, x := range map[string]struct {
		replicas float64
		owner    string
		theirs   bool
		after    float64
	}{
		"ours":              {0, "culvert", false, 2},
		"nobody's":          {0, "", false, 2}, // somebody cleared managedFields
		"scaled up":         {1, "somebody", true, 1},
		"set to 0 by owner": {0, "somebody", true, 0},
	} {
		s, c := newScaleServer(t, scaledDeployment)
		if err := c.ScaleDown(t.Context(), plan, ScaleRecord{Session: "s"}); err != nil {
			t.Fatal(err)
		}
		s.mu.Lock()
		s.object["spec"].(map[string]any)["replicas"] = x.replicas
		meta := s.object["metadata"].(map[string]any)
		meta["managedFields"] = []any{}
		if x.owner != "" {
			meta["managedFields"] = []any{replicasOwner(x.owner)}
		}
		s.mu.Unlock()
		back, err := c.ScaleBack(t.Context(), "a", "Deployment", "web", nil)
		if err != nil || back.Theirs != x.theirs || s.replicas() != x.after || s.annotation() != "" {
			t.Errorf("%s: %+v, %v, replicas %v, %q", name, back, err, s.replicas(), s.annotation())
		}
	}
}

func TestScaleConcurrent(t *testing.T) {
	plan := &ScalePlan{Namespace: "a", Kind: "Deployment", Name: "web", UID: "d1", Replicas: 2}
	// An autoscaler changes the replicas in between: what is recorded is the last.
	s, c := newScaleServer(t, scaledDeployment)
	s.conflicts, s.between = 1, func(o map[string]any) { o["spec"].(map[string]any)["replicas"] = 5.0 }
	if err := c.ScaleDown(t.Context(), plan, ScaleRecord{Session: "s"}); err != nil || !strings.Contains(s.annotation(), `"replicas":5`) {
		t.Errorf("%v, %s", err, s.annotation())
	}
	// Another session does not take it over.
	if err := c.ScaleDown(t.Context(), plan, ScaleRecord{Session: "t"}); err == nil {
		t.Error("two sessions")
	}
	// Nor is another object of the same name meant.
	plan.UID = "d2"
	if err := c.ScaleDown(t.Context(), plan, ScaleRecord{Session: "s"}); err == nil {
		t.Error("another object")
	}
	// A workload that is gone needs nothing.
	s.mu.Lock()
	s.object = nil
	s.mu.Unlock()
	if back, err := c.ScaleBack(t.Context(), "a", "Deployment", "web", nil); err != nil || back.Record != nil {
		t.Errorf("%+v, %v", back, err)
	}
	// A conflict that does not end is an error.
	s, c = newScaleServer(t, scaledDeployment)
	s.conflicts = 1000
	plan.UID = "d1"
	if err := c.ScaleDown(t.Context(), plan, ScaleRecord{Session: "s"}); err == nil || s.annotation() != "" {
		t.Errorf("%v", err)
	}
}

func TestScaleFields(t *testing.T) {
	entry := func(manager, operation, fields string) metav1.ManagedFieldsEntry {
		return metav1.ManagedFieldsEntry{Manager: manager, Operation: metav1.ManagedFieldsOperationType(operation), APIVersion: "apps/v1", Time: &metav1.Time{Time: time.Unix(1, 0)}, FieldsType: "FieldsV1", FieldsV1: &metav1.FieldsV1{Raw: []byte(fields)}}
	}
	text := func(fields []metav1.ManagedFieldsEntry) string {
		var all []string
		for _, e := range fields {
			all = append(all, fmt.Sprintf("%s %s %s", e.Manager, e.Operation, e.FieldsV1.Raw))
		}
		return strings.Join(all, "\n")
	}
	before := []metav1.ManagedFieldsEntry{
		entry("owner", "Apply", `{"f:metadata":{"f:labels":{"f:a":{}}},"f:spec":{"f:paused":{},"f:replicas":{}}}`),
		entry("scaler", "Update", `{"f:spec":{"f:replicas":{}}}`),
		entry("other", "Update", `{"f:spec":{"f:paused":{}}}`),
	}
	saved, err := owners(before, nil, isReplicas)
	if err != nil || text(saved) != `owner Apply {"f:spec":{"f:replicas":{}}}`+"\n"+`scaler Update {"f:spec":{"f:replicas":{}}}` {
		t.Fatalf("%v\n%s", err, text(saved))
	}
	for name, x := range map[string]struct {
		now  []metav1.ManagedFieldsEntry
		want string
	}{
		"all of culvert's goes": {
			[]metav1.ManagedFieldsEntry{
				entry("owner", "Apply", `{"f:metadata":{"f:labels":{"f:a":{}}},"f:spec":{"f:paused":{}}}`), before[2],
				entry("culvert", "Update", `{"f:metadata":{"f:annotations":{".":{},"f:culvert.dev/scaled":{}}},"f:spec":{"f:replicas":{}}}`),
			},
			text([]metav1.ManagedFieldsEntry{before[0], before[2], before[1]}),
		},
		"taken meanwhile": {
			[]metav1.ManagedFieldsEntry{before[1], entry("culvert", "Update", `{"f:metadata":{"f:annotations":{".":{},"f:culvert.dev/scaled":{}}}}`)},
			text(before[1:2]),
		},
	} {
		got, err := giveBack(x.now, saved)
		if err != nil || text(got) != x.want {
			t.Errorf("%s: %v\n%s\nwant\n%s", name, err, text(got), x.want)
		}
	}
	if got, err := giveBack([]metav1.ManagedFieldsEntry{entry("culvert", "Update", `?`)}, nil); err == nil {
		t.Errorf("%v", got)
	}
}
