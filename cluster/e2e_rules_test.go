//go:build e2e

package cluster

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// knowVirtualServices has the server know Istio's kind until the test ends.
func knowVirtualServices(t *testing.T, c *Cluster) {
	t.Helper()
	text, err := os.ReadFile("../test/cluster/bin/istio-crds.yaml")
	if err != nil {
		t.Fatal(err)
	}
	const name, path = "virtualservices.networking.istio.io", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
	rest := c.client.rest()
	for _, doc := range strings.Split(string(text), "\n---") {
		if !strings.Contains(doc, "name: "+name+"\n") {
			continue
		}
		body, err := yaml.YAMLToJSON([]byte(doc))
		if err != nil {
			t.Fatal(err)
		}
		if err := rest.Post().AbsPath(path).SetHeader("Content-Type", runtime.ContentTypeJSON).Body(body).Do(t.Context()).Error(); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if err := rest.Delete().AbsPath(path, name).Do(context.Background()).Error(); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
		for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
			if apierrors.IsNotFound(rest.Get().AbsPath(path, name).Do(context.Background()).Error()) {
				return
			}
		}
		t.Error("the kind is still there")
	})
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(200 * time.Millisecond) {
		_, err := c.client.customs(virtualServices, "default").list(t.Context())
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// TestRuleCrowdOnServer: twenty add their rules at once, and take them away while twenty
// others come; none is lost, and what is the owner's stays as it is.
func TestRuleCrowdOnServer(t *testing.T) {
	ns, ctx := gatesNamespace(), within(t, 2*time.Minute)
	admin := as(t, "admin", ns)
	knowVirtualServices(t, admin)
	plan := &ServicePlan{Namespace: ns, Name: "crowded", Ports: []PlanPort{{Port: 80, Protocol: corev1.ProtocolTCP, Local: 8080}}}
	heads := func(who string) (all []*ruleHead) {
		for n := range 20 {
			mark, err := intercept.ParseCondition(fmt.Sprintf("header:VERSION=%s%d", who, n))
			if err != nil {
				t.Fatal(err)
			}
			c := as(t, "admin", ns)
			all = append(all, &ruleHead{c: c, plan: plan, router: istio{}, name: memberName(plan.Name, fmt.Sprint(who, n)), list: plan.Ports, spec: &InterceptSpec{Match: []intercept.Condition{mark}}})
		}
		return all
	}
	adds := func(all []*ruleHead) (do []func()) {
		for _, h := range all {
			do = append(do, func() {
				if _, err := h.c.addRules(ctx, h); err != nil {
					t.Errorf("%s is added: %v", h.name, err)
				}
			})
		}
		return do
	}
	removes := func(all []*ruleHead) (do []func()) {
		for _, h := range all {
			do = append(do, func() {
				if err := h.c.removeRules(ctx, ns, h.name, intercept.ModeIstio); err != nil {
					t.Errorf("%s is taken away: %v", h.name, err)
				}
			})
		}
		return do
	}
	both := func(do ...func()) {
		var all sync.WaitGroup
		for _, f := range do {
			all.Go(f)
		}
		all.Wait()
	}
	objects := func(t *testing.T) []*unstructured.Unstructured {
		t.Helper()
		all, err := admin.client.customs(virtualServices, ns).list(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	has := func(t *testing.T, others int, who []*ruleHead) {
		t.Helper()
		all := objects(t)
		if len(all) != 1 {
			t.Fatalf("%d objects", len(all))
		}
		rules := rulesOf(istio{}, all[0])
		for _, h := range who {
			if !ofCulverts(istio{}, firstOfRules(rules, h.name, ns), []string{h.name}, ns) {
				t.Errorf("the rule to %s is lost", h.name)
			}
		}
		if len(rules) != others+len(who) || !(istio{}).leadsTo(rules[len(rules)-1], plan.Name, ns) {
			t.Errorf("%d rules, want %d and then %d of others", len(rules), len(who), others)
		}
	}
	first, second := heads("first"), heads("second")
	t.Run("of culvert's own", func(t *testing.T) {
		both(adds(first)...)
		has(t, 1, first)
		both(append(removes(first), adds(second)...)...)
		has(t, 1, second)
		both(removes(second)...)
		if all := objects(t); len(all) != 0 {
			t.Errorf("%d objects are left", len(all))
		}
	})
	t.Run("of an owner", func(t *testing.T) {
		const text = `{"apiVersion": "networking.istio.io/v1", "kind": "VirtualService", "metadata": {"name": "crowded"}, "spec": {"hosts": ["crowded"], "http": [{"route": [{"destination": {"host": "crowded"}}]}]}}`
		path := admin.client.customs(virtualServices, ns).path("v1")
		rest := admin.client.rest()
		if err := rest.Post().AbsPath(path).Param("fieldManager", "owner").SetHeader("Content-Type", runtime.ContentTypeJSON).Body([]byte(text)).Do(ctx).Error(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = rest.Delete().AbsPath(path, "crowded").Do(context.Background()).Error() }) // a failed test has said why
		before := objects(t)[0]
		both(adds(first)...)
		has(t, 1, first)
		both(append(removes(first), adds(second)...)...)
		has(t, 1, second)
		both(removes(second)...)
		after := objects(t)[0]
		if !covers(after.Object["spec"], before.Object["spec"]) || !covers(before.Object["spec"], after.Object["spec"]) {
			t.Errorf("it is %v, and was %v", after.Object["spec"], before.Object["spec"])
		}
		if got := managerNames(after.GetManagedFields()); got != managerNames(before.GetManagedFields()) {
			t.Errorf("fields belong to %s", got)
		}
	})
}

// firstOfRules is the rule that leads to a Service, nil for none.
func firstOfRules(rules []map[string]any, service, namespace string) map[string]any {
	for _, rule := range rules {
		if (istio{}).leadsTo(rule, service, namespace) {
			return rule
		}
	}
	return nil
}
