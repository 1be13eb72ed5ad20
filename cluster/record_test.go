package cluster

import (
	"maps"
	"reflect"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
)

func TestRecordOf(t *testing.T) {
	want := Record{
		Version: 1, Phase: PhaseActive, Session: "s1", User: "eve", Origin: "o", Since: time.Unix(1700000000, 0).UTC(), Kind: "exchange",
		Selector: map[string]string{"app": "web"}, Gates: map[string]string{LabelName: "culvert-gate"},
		Ports:         []RecordedPort{{80, corev1.ProtocolTCP, intstr.FromString("http"), 20000}, {53, corev1.ProtocolUDP, intstr.FromInt32(5353), 20001}},
		Managed:       []metav1.ManagedFieldsEntry{entry("argocd", metav1.ManagedFieldsOperationApply, `{"f:spec":{"f:selector":{}}}`)},
		OriginService: "web-culvert-origin", Gate: "culvert-gate", Reapplied: []time.Time{time.Unix(1700000100, 0).UTC()},
	}
	text, err := want.encode()
	if err != nil {
		t.Fatal(err)
	}
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "demo", Annotations: map[string]string{AnnotationIntercept: text}}}
	got, err := RecordOf(s)
	if err != nil || !reflect.DeepEqual(*got, want) {
		t.Errorf("got %+v, %v, want %+v", got, err, want)
	}
	for text, says := range map[string]string{`{"version":1`: "cannot be read", `{"version":2}`: "version 2", ``: "cannot be read"} {
		s.Annotations[AnnotationIntercept] = text
		_, err := RecordOf(s)
		wantError(t, err, api.CodeInternal, "demo/web", AnnotationIntercept, says)
	}
	if r, err := RecordOf(&corev1.Service{}); r != nil || err != nil {
		t.Errorf("%v, %v", r, err)
	}
}

// What is below an intercept: what was there before, or what others made of it.
func TestRecordBelow(t *testing.T) {
	r := Record{
		Phase:    PhaseActive,
		Selector: map[string]string{"app": "web", "track": "a", LabelName: "web"},
		Gates:    map[string]string{LabelName: "culvert-gate", LabelManagedBy: "culvert"},
		Ports:    []RecordedPort{{80, corev1.ProtocolTCP, intstr.FromString("http"), 20000}},
	}
	and := func(more ...string) map[string]string {
		m := maps.Clone(r.Gates)
		for i := 0; i < len(more); i += 2 {
			m[more[i]] = more[i+1]
		}
		return m
	}
	const applied = `{"spec":{"selector":{"app":"web2"}}}`
	for _, test := range []struct {
		name          string
		present, want map[string]string
		applied       string
		manager       string
	}{
		{"the gates", and(), r.Selector, "", ""},
		{"replaced", map[string]string{"app": "web2"}, map[string]string{"app": "web2"}, "", ""},
		{"removed", nil, nil, "", ""},
		{"kubectl apply, without the old key", and("app", "web2"), map[string]string{"app": "web2"}, applied, ""},
		{"kubectl apply of an old manifest", and("version", "2"), map[string]string{"app": "web", "track": "a", LabelName: "web", "version": "2"}, applied, ""},
		{"Helm", and("app", "web2"), map[string]string{"app": "web2"}, "", "helm"},
		{"an operator's patch of one key", and("rollout", "x7"), map[string]string{"app": "web", "track": "a", LabelName: "web", "rollout": "x7"}, "", "argo-rollouts"},
		{"a patch of a key of the gates", and(LabelName, "web2"), map[string]string{"app": "web", "track": "a", LabelName: "web2"}, "", "kubectl-patch"},
		{"a key of the gates removed", map[string]string{LabelName: "culvert-gate"}, r.Selector, "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &corev1.Service{Spec: corev1.ServiceSpec{Selector: test.present}}
			if test.applied != "" {
				s.Annotations = map[string]string{corev1.LastAppliedConfigAnnotation: test.applied}
			}
			if test.manager != "" {
				s.ManagedFields = []metav1.ManagedFieldsEntry{entry(test.manager, metav1.ManagedFieldsOperationUpdate, `{"f:spec":{"f:selector":{}}}`)}
			}
			if got := r.below(s).Spec.Selector; !maps.Equal(got, test.want) {
				t.Errorf("got %v, want %v", got, test.want)
			}
			if !maps.Equal(s.Spec.Selector, test.present) {
				t.Error("the Service itself was changed")
			}
		})
	}
	s := &corev1.Service{Spec: corev1.ServiceSpec{Selector: r.Gates, Ports: []corev1.ServicePort{
		{Port: 80, TargetPort: intstr.FromInt32(20000)}, // no protocol is TCP
		{Port: 80, Protocol: corev1.ProtocolUDP, TargetPort: intstr.FromInt32(20000)},
	}}}
	if got := r.below(s).Spec.Ports; got[0].TargetPort != intstr.FromString("http") || got[1].TargetPort.IntVal != 20000 {
		t.Errorf("ports %v", got)
	}
	done := r
	done.Phase = PhaseRestored
	if got := done.below(s); !reflect.DeepEqual(got, s) {
		t.Errorf("restored: %+v", got)
	}
	if got := (*Record)(nil).below(s); !reflect.DeepEqual(got, s) {
		t.Errorf("none: %+v", got)
	}
}

func entry(manager string, operation metav1.ManagedFieldsOperationType, fields string) metav1.ManagedFieldsEntry {
	return metav1.ManagedFieldsEntry{
		Manager: manager, Operation: operation, APIVersion: "v1", FieldsType: "FieldsV1", FieldsV1: metav1.NewFieldsV1(fields),
	}
}
