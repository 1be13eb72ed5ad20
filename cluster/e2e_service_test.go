//go:build e2e

package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/rest"

	"github.com/culvert-dev/culvert/daemon/api"
)

// interceptedNamespace holds the Services that these tests intercept.
var interceptedNamespace = "culvert-e2e-service"

func interceptedCluster(t *testing.T) *Cluster {
	t.Helper()
	admin := as(t, "admin", interceptedNamespace)
	spaces := admin.client.Namespaces()
	_, err := spaces.Create(within(t, time.Minute), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: interceptedNamespace}}, metav1.CreateOptions{})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		list, err := admin.client.Services(interceptedNamespace).List(context.Background(), metav1.ListOptions{})
		if err != nil {
			t.Error(err)
			return
		}
		for _, s := range list.Items {
			_ = admin.client.Services(interceptedNamespace).Delete(context.Background(), s.Name, metav1.DeleteOptions{})
		}
	})
	return admin
}

// kubectl runs the real one, as the owner of a Service does.
func kubectl(t *testing.T, stdin string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.Command("kubectl", append([]string{"--kubeconfig", filepath.Join(os.Getenv("CULVERT_E2E_USERS"), "admin.kubeconfig"), "-n", interceptedNamespace}, args...)...)
	cmd.Stdin = bytes.NewBufferString(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("kubectl %v: %w: %s", args, err, out)
	}
	return string(out), nil
}

func must(t *testing.T) func(out string, err error) {
	return func(_ string, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}

func manifest(selector string) string {
	return fmt.Sprintf(`{"apiVersion":"v1","kind":"Service","metadata":{"name":"web","labels":{"team":"shop"}},"spec":{"selector":%s,"ports":[
		{"name":"http","port":80,"targetPort":"web"},{"name":"echo","port":9000},{"name":"dns","port":53,"protocol":"UDP","targetPort":5353}]}}`, selector)
}

const (
	firstSelector  = `{"app":"web","track":"a"}`
	secondSelector = `{"app":"web2"}`
)

var gateLabels = map[string]string{LabelName: "culvert-gate", LabelManagedBy: "culvert"}

// switchWeb plans and switches the Service web for a session.
func switchWeb(t *testing.T, c *Cluster, session string) (*ServicePlan, *corev1.Service) {
	t.Helper()
	ctx := within(t, 20*time.Second)
	expose, err := ParseExpose([]string{"8080:80"})
	if err != nil {
		t.Fatal(err)
	}
	plan, err := c.PlanExchange(ctx, interceptedNamespace, "web", expose, false)
	if err != nil {
		t.Fatal(err)
	}
	switched, err := c.Switch(ctx, plan, gateLabels, gatePortsOf(plan), Record{Session: session, User: "e2e", Since: time.Now(), Kind: "exchange"})
	if err != nil {
		t.Fatal(err)
	}
	if !maps.Equal(switched.Spec.Selector, gateLabels) || switched.Spec.Ports[0].TargetPort.IntValue() < 20000 {
		t.Fatalf("switched to %v, %v", switched.Spec.Selector, switched.Spec.Ports)
	}
	return plan, switched
}

func gatePortsOf(plan *ServicePlan) map[PortKey]uint16 {
	ports := map[PortKey]uint16{}
	for i, p := range plan.Ports {
		ports[p.Key()] = uint16(20000 + i)
	}
	return ports
}

func web(t *testing.T, c *Cluster) *corev1.Service {
	t.Helper()
	s, err := c.client.Services(interceptedNamespace).Get(within(t, 10*time.Second), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.ResourceVersion, s.Generation = "", 0
	return s
}

// owner is somebody to whom a Service belongs, and how he changes it.
type owner struct {
	name   string
	create func(t *testing.T)
	change func(t *testing.T, selector string) error
	force  func(t *testing.T, selector string) // while the Service is intercepted
}

func serviceOwners() []owner {
	apply := func(t *testing.T, selector string, args ...string) error {
		_, err := kubectl(t, manifest(selector), append([]string{"apply", "-f", "-"}, args...)...)
		return err
	}
	serverSide := []string{"--server-side", "--field-manager=argocd"}
	onlySelector := func(t *testing.T, selector string, args ...string) error {
		_, err := kubectl(t, `{"apiVersion":"v1","kind":"Service","metadata":{"name":"web"},"spec":{"selector":`+selector+`}}`,
			append([]string{"apply", "-f", "-", "--server-side", "--field-manager=canary"}, args...)...)
		return err
	}
	return []owner{{
		"server-side apply",
		func(t *testing.T) { must(t)("", apply(t, firstSelector, serverSide...)) },
		func(t *testing.T, selector string) error { return apply(t, selector, serverSide...) },
		func(t *testing.T, selector string) {
			must(t)("", apply(t, selector, append(serverSide, "--force-conflicts")...))
		},
	}, {
		"client-side apply",
		func(t *testing.T) { must(t)("", apply(t, firstSelector)) },
		func(t *testing.T, selector string) error { return apply(t, selector) },
		func(t *testing.T, selector string) { must(t)("", apply(t, selector)) },
	}, {
		"create and edit",
		func(t *testing.T) {
			must(t)(kubectl(t, manifest(`{"app":"old"}`), "create", "-f", "-"))
			edit(t, firstSelector)
		},
		func(t *testing.T, selector string) error { edit(t, selector); return nil },
		func(t *testing.T, selector string) { edit(t, selector) },
	}, {
		"two managers",
		func(t *testing.T) {
			must(t)("", apply(t, firstSelector, serverSide...))
			must(t)("", onlySelector(t, firstSelector))
		},
		func(t *testing.T, selector string) error {
			// Both own the selector: one has to let go of it first, then the other's
			// change is no conflict.
			_, err := kubectl(t, `{"apiVersion":"v1","kind":"Service","metadata":{"name":"web"},"spec":{}}`,
				"apply", "-f", "-", "--server-side", "--field-manager=canary")
			if err != nil {
				return err
			}
			return apply(t, selector, serverSide...)
		},
		func(t *testing.T, selector string) { must(t)("", onlySelector(t, selector, "--force-conflicts")) },
	}}
}

// edit replaces the selector as an editor does, by one Update of the whole.
func edit(t *testing.T, selector string) {
	t.Helper()
	must(t)(kubectl(t, "", "patch", "service", "web", "--type=json", "--field-manager=kubectl-edit", "-p", `[{"op":"replace","path":"/spec/selector","value":`+selector+`}]`))
}

// After undo the Service is what it was to the last byte, owners included, and the
// owner's next change, without force, is no conflict.
func TestRestoreGivesBack(t *testing.T) {
	for _, o := range serviceOwners() {
		t.Run(o.name, func(t *testing.T) {
			c := interceptedCluster(t)
			ctx := within(t, time.Minute)
			o.create(t)
			before := web(t, c)
			switchWeb(t, c, "s1")
			did, err := c.Restore(ctx, interceptedNamespace, "web", "s1")
			if err != nil || did.Record == nil || len(did.Done) == 0 || len(did.Theirs) > 0 {
				t.Fatalf("%+v, %v", did, err)
			}
			t.Logf("%q", did.Done)
			if after := web(t, c); !reflect.DeepEqual(before, after) {
				t.Errorf("before %v\nafter  %v", before, after)
			}
			if err := o.change(t, secondSelector); err != nil {
				t.Errorf("the owner's next change: %v", err)
			}
			if got := web(t, c).Spec.Selector; !maps.Equal(got, map[string]string{"app": "web2"}) {
				t.Errorf("selector %v", got)
			}
			if did, err := c.Restore(ctx, interceptedNamespace, "web", ""); err != nil || did.Record != nil {
				t.Errorf("restored twice: %+v, %v", did, err)
			}
		})
	}
}

// Without giving back, the same would fail: this is what the test above guards.
func TestSwitchTakesOwnership(t *testing.T) {
	c := interceptedCluster(t)
	o := serviceOwners()[0]
	o.create(t)
	switchWeb(t, c, "s1")
	if err := o.change(t, secondSelector); err == nil {
		t.Error("an apply over the intercept is no conflict")
	}
}

// What the owner made of the Service while it was intercepted stays, as he meant
// it, and he owns it.
func TestRestoreKeepsTheirs(t *testing.T) {
	for _, o := range serviceOwners() {
		t.Run(o.name, func(t *testing.T) {
			c := interceptedCluster(t)
			ctx := within(t, time.Minute)
			o.create(t)
			switchWeb(t, c, "s1")
			o.force(t, secondSelector)
			did, err := c.Restore(ctx, interceptedNamespace, "web", "s1")
			if err != nil || did.Record == nil || len(did.Theirs) != 1 {
				t.Fatalf("%+v, %v", did, err)
			}
			t.Logf("%q, theirs %q", did.Done, did.Theirs)
			after := web(t, c)
			if !maps.Equal(after.Spec.Selector, map[string]string{"app": "web2"}) || after.Annotations[AnnotationIntercept] != "" {
				t.Errorf("selector %v, annotations %v", after.Spec.Selector, after.Annotations)
			}
			if p := after.Spec.Ports; p[0].TargetPort != intstr.FromString("web") || p[1].TargetPort != intstr.FromInt32(9000) || p[2].TargetPort != intstr.FromInt32(5353) {
				t.Errorf("ports %v", p)
			}
			if slices.ContainsFunc(after.ManagedFields, func(e metav1.ManagedFieldsEntry) bool { return e.Manager == fieldManager }) {
				t.Error("culvert owns fields")
			}
			if err := o.change(t, `{"app":"web3"}`); err != nil {
				t.Errorf("the owner's next change: %v", err)
			}
			if got := web(t, c).Spec.Selector; !maps.Equal(got, map[string]string{"app": "web3"}) {
				t.Errorf("selector %v", got)
			}
		})
	}
}

// The owner's change is told once, is re-applied on top of, and undo restores it.
func TestWatchReplan(t *testing.T) {
	for _, o := range serviceOwners() {
		t.Run(o.name, func(t *testing.T) {
			c := interceptedCluster(t)
			ctx, cancel := context.WithCancel(within(t, time.Minute))
			defer cancel()
			o.create(t)
			plan, switched := switchWeb(t, c, "s1")
			if _, err := c.EnsureOrigin(ctx, plan, "s1"); err != nil {
				t.Fatal(err)
			}
			held, err := RecordOf(switched)
			if err != nil {
				t.Fatal(err)
			}
			changes := make(chan ServiceChange, 10)
			done := make(chan error, 1)
			go func() {
				done <- c.WatchService(ctx, interceptedNamespace, "web", *held, func(change ServiceChange) {
					if change.Kind == Overwritten {
						next, err := c.Replan(ctx, plan, change.Service)
						if err == nil {
							if _, err = c.EnsureOrigin(ctx, next, "s1"); err == nil {
								_, err = c.Switch(ctx, next, gateLabels, gatePortsOf(next), *held)
							}
						}
						if err != nil {
							t.Error(err)
						}
					}
					changes <- change
				})
			}()
			o.force(t, secondSelector)
			if change := <-changes; change.Kind != Overwritten || change.Manager == "" || change.Manager == fieldManager {
				t.Errorf("%s by %q", change.Kind, change.Manager)
			} else {
				t.Logf("%s by %s", change.Kind, change.Manager)
			}
			if got := web(t, c); !maps.Equal(got.Spec.Selector, gateLabels) {
				t.Errorf("selector %v", got.Spec.Selector)
			}
			origin, err := c.client.Services(interceptedNamespace).Get(ctx, OriginName("web"), metav1.GetOptions{})
			if err != nil || !maps.Equal(origin.Spec.Selector, map[string]string{"app": "web2"}) {
				t.Errorf("origin %v, %v", origin.Spec.Selector, err)
			}
			if _, err := c.Restore(ctx, interceptedNamespace, "web", "s1"); err != nil {
				t.Error(err)
			}
			if change := <-changes; change.Kind != Released {
				t.Errorf("restored: %s", change.Kind)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
			if err := c.DeleteOrigin(ctx, interceptedNamespace, "web", ""); err != nil {
				t.Error(err)
			}
			if got := web(t, c).Spec.Selector; !maps.Equal(got, map[string]string{"app": "web2"}) {
				t.Errorf("undo restored %v", got)
			}
			if err := o.change(t, `{"app":"web3"}`); err != nil {
				t.Errorf("the owner's next change: %v", err)
			}
		})
	}
}

func TestOriginOnCluster(t *testing.T) {
	c := interceptedCluster(t)
	ctx := within(t, time.Minute)
	serviceOwners()[0].create(t)
	plan, _ := switchWeb(t, c, "s1")
	for range 2 { // idempotent
		origin, err := c.EnsureOrigin(ctx, plan, "s1")
		if err != nil || origin.Spec.ClusterIP == "" {
			t.Fatalf("%v, %v", origin, err)
		}
		if origin.Spec.Selector["track"] != "a" || origin.Spec.Ports[0].TargetPort != intstr.FromString("web") || origin.OwnerReferences[0].Name != "web" {
			t.Errorf("%+v", origin)
		}
	}
	origin, err := c.EnsureOrigin(ctx, plan, "s2")
	if err != nil || origin.Labels[LabelSession] != "s2" {
		t.Errorf("%v, %v", origin, err)
	}
	for range 2 {
		if err := c.DeleteOrigin(ctx, interceptedNamespace, "web", ""); err != nil {
			t.Error(err)
		}
	}
	if _, err := c.client.Services(interceptedNamespace).Get(ctx, OriginName("web"), metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Error(err)
	}
}

// Two developers switch at once: one of them gets it, and the other is told who.
func TestSwitchOfTwo(t *testing.T) {
	c := interceptedCluster(t)
	ctx := within(t, time.Minute)
	serviceOwners()[0].create(t)
	expose, _ := ParseExpose([]string{"8080:http"})
	plan, err := c.PlanExchange(ctx, interceptedNamespace, "web", expose, false)
	if err != nil {
		t.Fatal(err)
	}
	switchWeb(t, c, "first")
	_, err = c.Switch(ctx, plan, gateLabels, gatePortsOf(plan), Record{Session: "second"})
	wantCode(t, err, api.CodeExists, "e2e", "first")
	// What the second planned is stale as well when the first has left and the
	// owner changed something.
	if _, err := c.Restore(ctx, interceptedNamespace, "web", "second"); err != nil || web(t, c).Spec.Selector["app"] != "" {
		t.Errorf("another's intercept was restored, %v", err)
	}
	if _, err := c.Restore(ctx, interceptedNamespace, "web", ""); err != nil {
		t.Fatal(err)
	}
	edit(t, secondSelector)
	_, err = c.Switch(ctx, plan, gateLabels, gatePortsOf(plan), Record{Session: "second"})
	wantCode(t, err, api.CodeConflict, "changed", "kubectl-edit")
}

func TestPlanRights(t *testing.T) {
	interceptedCluster(t)
	serviceOwners()[0].create(t)
	expose, _ := ParseExpose([]string{"8080:http"})
	_, err := as(t, "nobody", interceptedNamespace).PlanExchange(within(t, 10*time.Second), "", "web", expose, false)
	wantCode(t, err, api.CodeForbidden, "get", "services")
	// The shipped roles' users may read here at most.
	_, err = as(t, "developer", interceptedNamespace).PlanExchange(within(t, 10*time.Second), "", "web", expose, false)
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeForbidden {
		t.Errorf("%v", err)
	}
	t.Log(err)
}

// A kill or a lost answer at any request of switch and restore: undo finishes,
// and the Service is as before.
func TestRestoreAfterKill(t *testing.T) {
	c := interceptedCluster(t)
	for _, o := range serviceOwners()[:2] {
		for _, sent := range []bool{false, true} {
			for n := 1; ; n++ {
				_ = c.client.Services(interceptedNamespace).Delete(within(t, 10*time.Second), "web", metav1.DeleteOptions{})
				o.create(t)
				before := web(t, c)
				cut := &cutTransport{after: n, sent: sent}
				if ran := runCut(t, c, cut); ran {
					if n < 6 {
						t.Errorf("%s: only %d requests", o.name, n-1)
					}
					break
				}
				if _, err := c.Restore(within(t, 10*time.Second), interceptedNamespace, "web", ""); err != nil {
					t.Fatalf("%s, request %d: %v", o.name, n, err)
				}
				if after := web(t, c); !reflect.DeepEqual(before, after) {
					t.Errorf("%s, request %d, sent %v: before %v\nafter  %v", o.name, n, sent, before, after)
				}
			}
		}
	}
}

// cutTransport lets a number of requests pass, and then none: the process died.
type cutTransport struct {
	after int
	sent  bool // the last one arrives, and its answer is lost
	next  http.RoundTripper
}

func (x *cutTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	x.after--
	if x.after > 0 {
		return x.next.RoundTrip(r)
	}
	if x.after == 0 && x.sent {
		if answer, err := x.next.RoundTrip(r); err == nil {
			answer.Body.Close()
		}
	}
	return nil, errors.New("killed")
}

// runCut switches and restores through cut, and says whether it came to its end.
func runCut(t *testing.T, c *Cluster, cut *cutTransport) bool {
	t.Helper()
	config := rest.CopyConfig(c.current().config)
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		cut.next = next
		return cut
	})
	client, err := NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx := within(t, 20*time.Second)
	expose, _ := ParseExpose([]string{"8080:80"})
	plan, err := c.PlanExchange(ctx, interceptedNamespace, "web", expose, false)
	if err != nil {
		t.Fatal(err)
	}
	dying := &Cluster{context: c.context, namespace: c.namespace, client: client}
	if _, err := dying.EnsureOrigin(ctx, plan, "s1"); err != nil {
		return false
	}
	if _, err := dying.Switch(ctx, plan, gateLabels, gatePortsOf(plan), Record{Session: "s1"}); err != nil {
		return false
	}
	if _, err := dying.Restore(ctx, interceptedNamespace, "web", "s1"); err != nil {
		return false
	}
	return dying.DeleteOrigin(ctx, interceptedNamespace, "web", "") == nil
}

// The namespace goes with the last of these tests.
func TestServiceNamespaceGoes(t *testing.T) {
	err := as(t, "admin", interceptedNamespace).client.Namespaces().Delete(within(t, time.Minute), interceptedNamespace, metav1.DeleteOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Error(err)
	}
}
