package cluster

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

func TestGateDeploymentGolden(t *testing.T) {
	owner := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo", UID: "7e0d"}}
	spec := GateSpec{
		Name: intercept.GateName,
		Agent: AgentSpec{
			Image: "registry.example/culvert-agent:1", PullSecrets: []string{"regcred"}, NodeSelector: map[string]string{"disk": "ssd"},
			Labels: map[string]string{"team": "a", LabelGate: "forged"}, Annotations: map[string]string{"note": "x"}, PodQuota: "0.5c,512m",
		},
	}
	d, err := spec.deployment(owner)
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	for _, o := range []any{d, spec.budget(owner)} {
		text, err := yaml.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		got = append(append(got, "---\n"...), text...)
	}
	const path = "testdata/gates.yaml"
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("the Deployment changed (go test -update writes %s):\n%s", path, got)
	}
}

// Gates that stand in for pods look like them to Services, and listen where they
// did.
func TestGateSpecOfStandIns(t *testing.T) {
	owner := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo", UID: "u1"}}
	port := func(n int32) []corev1.ContainerPort { return []corev1.ContainerPort{{Name: "p", ContainerPort: n}} }
	for _, test := range []struct {
		ports []corev1.ContainerPort
		want  map[string]string
	}{
		{nil, map[string]string{"net.ipv4.ip_local_port_range": "30000 65535"}},
		{port(80), map[string]string{"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ip_local_port_range": "30000 65535"}},
		{port(8080), map[string]string{"net.ipv4.ip_local_port_range": "30000 65535"}},
		{port(50051), map[string]string{"net.ipv4.ip_local_port_range": "1024 29999"}},
	} {
		d, err := GateSpec{Name: "culvert-gate-web", Agent: AgentSpec{Image: "x:1"}, Ports: test.ports, PodLabels: map[string]string{
			"app": "web", LabelName: "web", LabelGate: "forged", "pod-template-hash": "abc", "statefulset.kubernetes.io/pod-name": "web-0",
		}}.deployment(owner)
		if err != nil {
			t.Fatal(err)
		}
		pod := d.Spec.Template
		got := map[string]string{}
		for _, s := range pod.Spec.SecurityContext.Sysctls {
			got[s.Name] = s.Value
		}
		if len(got) != len(test.want) || got["net.ipv4.ip_local_port_range"] != test.want["net.ipv4.ip_local_port_range"] {
			t.Errorf("%v: sysctls %v", test.ports, got)
		}
		if l := pod.Labels; l["app"] != "web" || l[LabelName] != "web" || l[LabelGate] != "culvert-gate-web" || l["pod-template-hash"] != "" || l["statefulset.kubernetes.io/pod-name"] != "" {
			t.Errorf("labels %v", l)
		}
		if selector, err := metav1.LabelSelectorAsSelector(d.Spec.Selector); err != nil || !selector.Matches(labels.Set(pod.Labels)) {
			t.Errorf("the Deployment does not select its pods: %v", err)
		}
		if !slices.Equal(pod.Spec.Containers[0].Ports, test.ports) {
			t.Errorf("ports %v", pod.Spec.Containers[0].Ports)
		}
	}
	for _, bad := range []GateSpec{{Name: "x"}, {Agent: AgentSpec{Image: "x"}}, {Name: "x", Agent: AgentSpec{Image: "x", PodQuota: "lots"}}} {
		var e *api.Error
		if _, err := bad.deployment(owner); !errors.As(err, &e) || e.Code != api.CodeUsage {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// controller makes ready pods for each Deployment of gates.
func (s *fleetAPI) controller(image func(*corev1.Pod)) {
	s.created = func(o runtime.Object) {
		d, ok := o.(*appsv1.Deployment)
		if !ok {
			return
		}
		for _, suffix := range []string{"-1", "-2"} {
			pod := gatePod(d.Name+suffix+d.Labels[LabelGateState], d.Name, types.UID(d.Labels[LabelGateState]), true)
			if image != nil {
				image(pod)
			}
			s.put(pod)
		}
	}
}

var testGates = GateSpec{Name: intercept.GateName, Agent: AgentSpec{Image: "x:1"}}

func ownerOf(t *testing.T, c *Cluster) types.UID {
	t.Helper()
	m, err := c.client.ConfigMaps("demo").Get(t.Context(), intercept.GateName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return m.UID
}

func TestEnsureGates(t *testing.T) {
	server, c := newFleetAPI(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var e *api.Error
	if err := c.EnsureGates(ctx, "demo", testGates, nil); !errors.As(err, &e) || e.Code != api.CodeNotFound {
		t.Fatalf("without ConfigMap: %v", err)
	}
	if _, err := c.ChangeGateState(ctx, "demo", addEntry("web", testEntry("culvert-gate", "s1"))); err != nil {
		t.Fatal(err)
	}
	server.controller(nil)
	if err := c.EnsureGates(ctx, "demo", testGates, nil); err != nil {
		t.Fatal(err)
	}
	// A colleague's newer image is adopted.
	theirs := testGates
	theirs.Agent.Image = "x:2"
	if err := c.EnsureGates(ctx, "demo", theirs, nil); err != nil {
		t.Fatal(err)
	}
	d, err := c.client.Deployments("demo").Get(ctx, "culvert-gate", metav1.GetOptions{})
	if err != nil || d.Spec.Template.Spec.Containers[0].Image != "x:1" || d.OwnerReferences[0].UID != ownerOf(t, c) {
		t.Fatalf("%+v, %v", d, err)
	}
	if b := server.list("PodDisruptionBudget"); !slices.Equal(b, []string{"culvert-gate"}) {
		t.Errorf("budgets %v", b)
	}
	// But not one that speaks otherwise.
	d.Annotations[AnnotationGateProtocol] = "2"
	server.put(d)
	if err := c.EnsureGates(ctx, "demo", theirs, nil); !errors.As(err, &e) || e.Code != api.CodeExists || !strings.Contains(e.Message, `"2"`) {
		t.Errorf("another protocol: %v", err)
	}
	delete(d.Labels, LabelGate)
	server.put(d)
	if err := c.EnsureGates(ctx, "demo", testGates, nil); !errors.As(err, &e) || e.Code != api.CodeExists {
		t.Errorf("somebody else's Deployment: %v", err)
	}
}

// The pods of an older ConfigMap are Ready for a moment more, and Services select
// them.
func TestEnsureGatesAfterAnOlderConfigMap(t *testing.T) {
	server, c := newFleetAPI(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	old := gatePod("old", "culvert-gate", "older", true)
	server.put(old)
	stale, err := testGates.deployment(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo", UID: "older"}})
	if err != nil {
		t.Fatal(err)
	}
	server.put(stale)
	server.put(testGates.budget(&corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "culvert-gate", Namespace: "demo", UID: "older"}}))
	if _, err := c.ChangeGateState(ctx, "demo", addEntry("web", testEntry("culvert-gate", "s1"))); err != nil {
		t.Fatal(err)
	}
	server.controller(nil)
	var mu sync.Mutex
	gone := false
	err = c.EnsureGates(ctx, "demo", testGates, func(step string) {
		if strings.Contains(step, "of before") {
			mu.Lock()
			gone = true
			mu.Unlock()
			go server.remove(old)
		}
	})
	if err != nil || !gone {
		t.Fatalf("waited %v, %v", gone, err)
	}
	owner := string(ownerOf(t, c))
	d, err := c.client.Deployments("demo").Get(ctx, "culvert-gate", metav1.GetOptions{})
	if err != nil || d.Labels[LabelGateState] != owner || d.UID == stale.UID {
		t.Errorf("%+v, %v", d.Labels, err)
	}
	b, err := c.client.PodDisruptionBudgets("demo").Get(ctx, "culvert-gate", metav1.GetOptions{})
	if err != nil || b.Labels[LabelGateState] != owner {
		t.Errorf("%+v, %v", b.Labels, err)
	}
}

func TestEnsureGatesThatDoNotStart(t *testing.T) {
	server, c := newFleetAPI(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := c.ChangeGateState(ctx, "demo", addEntry("web", testEntry("culvert-gate", "s1"))); err != nil {
		t.Fatal(err)
	}
	server.controller(func(pod *corev1.Pod) {
		if strings.Contains(pod.Name, "-2") { // one of two is not enough
			pod.Status.Conditions = nil
			pod.Status.ContainerStatuses = []corev1.ContainerStatus{{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "no such host"}}}}
		}
	})
	err := c.EnsureGates(ctx, "demo", testGates, nil)
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeImage || !strings.Contains(e.Message, "the agent's image") || ctx.Err() != nil {
		t.Errorf("%v", err)
	}
	// Of gates that were there, it is an error only when the time is over.
	short, cancelShort := context.WithTimeout(ctx, 300*time.Millisecond)
	defer cancelShort()
	var steps []string
	err = c.EnsureGates(short, "demo", testGates, func(step string) { steps = append(steps, step) })
	if !errors.As(err, &e) || e.Code != api.CodeImage || short.Err() == nil || !slices.ContainsFunc(steps, func(s string) bool { return strings.Contains(s, "no such host") }) {
		t.Errorf("%v after %q", err, steps)
	}
}

// With two budgets a pod cannot be evicted.
func TestEnsureGatesBudget(t *testing.T) {
	server, c := newFleetAPI(t)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	server.put(&policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "demo"},
		Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "web"}}},
	})
	if _, err := c.ChangeGateState(ctx, "demo", addEntry("scale.deployment.web", testEntry("culvert-gate-web", "s1"))); err != nil {
		t.Fatal(err)
	}
	server.controller(nil)
	own := GateSpec{Name: "culvert-gate-web", Agent: AgentSpec{Image: "x:1"}, PodLabels: map[string]string{"app": "web"}}
	if err := c.EnsureGates(ctx, "demo", own, nil); err != nil {
		t.Fatal(err)
	}
	if b := server.list("PodDisruptionBudget"); !slices.Equal(b, []string{"web"}) {
		t.Errorf("budgets %v", b)
	}
	other := GateSpec{Name: "culvert-gate-db", Agent: AgentSpec{Image: "x:1"}, PodLabels: map[string]string{"app": "db"}}
	if err := c.EnsureGates(ctx, "demo", other, nil); err != nil {
		t.Fatal(err)
	}
	if b := server.list("PodDisruptionBudget"); !slices.Equal(b, []string{"culvert-gate-db", "web"}) {
		t.Errorf("budgets %v", b)
	}
	// Its own gates are made anew when they were made otherwise.
	before, err := c.client.Deployments("demo").Get(ctx, "culvert-gate-db", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	other.Ports = []corev1.ContainerPort{{ContainerPort: 80}}
	if err := c.EnsureGates(ctx, "demo", other, nil); err != nil {
		t.Fatal(err)
	}
	if after, err := c.client.Deployments("demo").Get(ctx, "culvert-gate-db", metav1.GetOptions{}); err != nil || after.UID == before.UID {
		t.Errorf("the same Deployment, %v", err)
	}
	for range 2 {
		if err := c.DeleteGates(ctx, "demo", "culvert-gate-db"); err != nil {
			t.Fatal(err)
		}
	}
	if d, b := server.list("Deployment"), server.list("PodDisruptionBudget"); !slices.Equal(d, []string{"culvert-gate-web"}) || !slices.Equal(b, []string{"web"}) {
		t.Errorf("left %v, %v", d, b)
	}
}
