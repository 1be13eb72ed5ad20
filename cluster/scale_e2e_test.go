//go:build e2e

package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"sigs.k8s.io/yaml"
)

const scaledManifest = `
apiVersion: apps/v1
kind: %s
metadata: {name: %s, namespace: %s, labels: {team: blue}}
spec:
  %s
  selector: {matchLabels: {app: %[2]s}}
  template:
    metadata: {labels: {app: %[2]s}}
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - {name: main, image: "testapp.local/testapp:1", args: [serve], ports: [{containerPort: 8080, name: http}], readinessProbe: {httpGet: {path: /healthz, port: http}, periodSeconds: 1}}
`

// What ScaleDown and ScaleBack did leaves nothing, whoever owned the replicas,
// and the owner's next apply with other replicas does not conflict.
func TestScaleRoundTrip(t *testing.T) {
	ctx := within(t, 4*time.Minute)
	c := as(t, "admin", "")
	ns, err := c.client.Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "scale-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.client.Namespaces().Delete(context.WithoutCancel(ctx), ns.Name, metav1.DeleteOptions{})
	})
	patch := func(kind, name string, how types.PatchType, b []byte, manager string, sub ...string) error {
		options := metav1.PatchOptions{FieldManager: manager}
		switch kind {
		case kindStatefulSet:
			_, err = c.client.StatefulSets(ns.Name).Patch(ctx, name, how, b, options, sub...)
		case kindReplicaSet:
			_, err = c.client.ReplicaSets(ns.Name).Patch(ctx, name, how, b, options, sub...)
		default:
			_, err = c.client.Deployments(ns.Name).Patch(ctx, name, how, b, options, sub...)
		}
		return err
	}
	apply := func(kind, name, replicas string) error {
		if replicas != "" {
			replicas = "replicas: " + replicas
		}
		text := fmt.Sprintf(scaledManifest, kind, name, ns.Name, replicas)
		b, err := yaml.YAMLToJSON([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		return patch(kind, name, types.ApplyPatchType, b, "owner")
	}
	object := func(kind, name string) map[string]any {
		var o any
		var err error
		switch kind {
		case kindStatefulSet:
			o, err = c.client.StatefulSets(ns.Name).Get(ctx, name, metav1.GetOptions{})
		case kindReplicaSet:
			o, err = c.client.ReplicaSets(ns.Name).Get(ctx, name, metav1.GetOptions{})
		default:
			o, err = c.client.Deployments(ns.Name).Get(ctx, name, metav1.GetOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
		b, _ := json.Marshal(o)
		var m map[string]any
		_ = json.Unmarshal(b, &m)
		delete(m, "status")
		meta := m["metadata"].(map[string]any)
		delete(meta, "resourceVersion")
		delete(meta, "generation")
		fields := meta["managedFields"].([]any)
		meta["managedFields"] = slices.DeleteFunc(fields, func(e any) bool { return e.(map[string]any)["subresource"] == "status" })
		return m
	}
	settled := func(kind, name string) {
		for ctx.Err() == nil {
			if o, err := c.scaledObject(ctx, kind, ns.Name, name); err == nil && o.observed >= o.meta.Generation && o.ready == o.replicas {
				return
			}
			time.Sleep(200 * time.Millisecond)
		}
		t.Fatal(ctx.Err())
	}
	for _, x := range []struct {
		kind, name, replicas string
		scale                bool // by the subresource, as kubectl scale and autoscalers do
	}{
		{kindDeployment, "applied", "2", false},
		{kindStatefulSet, "applied-set", "2", false},
		{kindReplicaSet, "applied-rs", "1", false},
		{kindDeployment, "scaled", "", true},
		{kindDeployment, "nobody", "", false},
	} {
		t.Run(x.name, func(t *testing.T) {
			if err := apply(x.kind, x.name, x.replicas); err != nil {
				t.Fatal(err)
			}
			if x.scale {
				if err := patch(x.kind, x.name, types.MergePatchType, []byte(`{"spec":{"replicas":3}}`), "scaler", "scale"); err != nil && !strings.Contains(err.Error(), "no kind") { // of the answer
					t.Fatal(err)
				}
			}
			settled(x.kind, x.name)
			time.Sleep(1500 * time.Millisecond) // managedFields have seconds: a changed time shall be seen
			before := object(x.kind, x.name)
			plan, err := c.PlanScale(ctx, ns.Name, strings.ToLower(x.kind)+"/"+x.name, []Expose{{Local: 8080}}, false)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(strings.Join(plan.Notes, "\n"), plan.Ports, plan.PodLabels)
			r := ScaleRecord{Session: "s1", User: "me", Since: time.Now()}
			for range 2 { // the second time there is nothing to do
				if err := c.ScaleDown(ctx, plan, r); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.ScaleDown(ctx, plan, ScaleRecord{Session: "s2"}); err == nil {
				t.Error("a second session scaled it down")
			}
			if _, err := c.PlanScale(ctx, ns.Name, strings.ToLower(x.kind)+"/"+x.name, []Expose{{Local: 8080}}, false); err == nil {
				t.Error("it can be planned twice")
			}
			settled(x.kind, x.name)
			scaled, err := c.Scaled(ctx, ns.Name)
			if err != nil || len(scaled) != 1 || scaled[0].Name != x.name || scaled[0].Replicas != 0 {
				t.Errorf("%+v, %v", scaled, err)
			}
			start := time.Now()
			for i := range 2 {
				back, err := c.ScaleBack(ctx, ns.Name, x.kind, x.name, func(s string) { t.Log(s) })
				if err != nil || back.Theirs || (i == 0) != (back.Record != nil) {
					t.Fatalf("%+v, %v", back, err)
				}
				if i == 0 && (back.Ready != plan.Replicas || back.Replicas != plan.Replicas) {
					t.Errorf("%+v", back)
				}
			}
			t.Logf("back after %v", time.Since(start))
			if x.kind == kindDeployment {
				sets, err := c.client.ReplicaSets(ns.Name).List(ctx, metav1.ListOptions{LabelSelector: "app=" + x.name})
				if err != nil || len(sets.Items) != 1 || sets.Items[0].Annotations[AnnotationScaled] != "" {
					t.Errorf("%v, %v", sets.Items, err)
				}
			}
			if after := object(x.kind, x.name); !reflect.DeepEqual(before, after) {
				a, _ := json.MarshalIndent(before, "", " ")
				b, _ := json.MarshalIndent(after, "", " ")
				t.Errorf("before: %s\nafter: %s", a, b)
			}
			if x.replicas != "" {
				if err := apply(x.kind, x.name, "1"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	// Without giving the field back the apply conflicts: the test can fail.
	if err := apply(kindDeployment, "kept", "2"); err != nil {
		t.Fatal(err)
	}
	if err := patch(kindDeployment, "kept", types.MergePatchType, []byte(`{"spec":{"replicas":0}}`), fieldManager); err != nil {
		t.Fatal(err)
	}
	if err := patch(kindDeployment, "kept", types.MergePatchType, []byte(`{"spec":{"replicas":2}}`), fieldManager); err != nil {
		t.Fatal(err)
	}
	if err := apply(kindDeployment, "kept", "3"); !apierrors.IsConflict(err) {
		t.Errorf("%v", err)
	}
	// Replicas that somebody sets meanwhile stay.
	if err := apply(kindDeployment, "theirs", "2"); err != nil {
		t.Fatal(err)
	}
	plan, err := c.PlanScale(ctx, ns.Name, "theirs", []Expose{{Local: 1, Remote: "http"}}, false)
	if err == nil {
		err = c.ScaleDown(ctx, plan, ScaleRecord{Session: "s1"})
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := patch(kindDeployment, "theirs", types.MergePatchType, []byte(`{"spec":{"replicas":1}}`), "somebody"); err != nil {
		t.Fatal(err)
	}
	back, err := c.ScaleBack(ctx, ns.Name, "deployment", "theirs", nil)
	if err != nil || !back.Theirs || back.Replicas != 1 {
		t.Errorf("%+v, %v", back, err)
	}
	if text, _ := json.Marshal(object(kindDeployment, "theirs")); strings.Contains(string(text), "culvert") {
		t.Errorf("%s", text)
	}
}
