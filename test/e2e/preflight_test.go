//go:build e2e

package e2e

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// refused is a command about intercepts that has to fail, or to warn, naming
// these words.
type refused struct {
	name  string
	args  []string
	code  int
	words []string
}

func (r refused) check(t *testing.T, d developer) {
	t.Helper()
	got := d.culvert(r.args...)
	if got.Code != r.code {
		t.Errorf("culvert %v: want exit code %d: %v", r.args, r.code, got)
	}
	for _, w := range r.words {
		if !strings.Contains(strings.ToLower(got.Stdout+got.Stderr), strings.ToLower(w)) {
			t.Errorf("culvert %v does not say %q: %v", r.args, w, got)
		}
	}
	if got.Took > 40*time.Second {
		t.Errorf("culvert %v took %v", r.args, got.Took)
	}
}

// exchangeOf is an exchange of port 80.
func exchangeOf(service string, more ...string) []string {
	return append([]string{"exchange", service, "--expose", "8080:80"}, more...)
}

// TestBadIntercepts: what cannot be is refused with the reason, before anything
// changes.
func TestBadIntercepts(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	for _, r := range []refused{
		{name: "no ports", args: []string{"exchange", "cart"}, code: 2, words: []string{"--expose"}},
		{name: "no Service", args: []string{"exchange", "--expose", "8080"}, code: 2},
		{name: "not a port", args: []string{"exchange", "cart", "--expose", "web"}, code: 2, words: []string{"web", "--expose"}},
		{name: "port 0", args: []string{"exchange", "cart", "--expose", "0:80"}, code: 2, words: []string{"0:80"}},
		{name: "port 70000", args: []string{"exchange", "cart", "--expose", "70000:80"}, code: 2, words: []string{"70000"}},
		{name: "three ports", args: []string{"exchange", "cart", "--expose", "8080:80:90"}, code: 2, words: []string{"8080:80:90"}},
		{name: "unknown mode", args: exchangeOf("cart", "--mode", "mash"), code: 2, words: []string{"mash", "selector", "scale"}},
		{name: "unknown answer to refusals", args: exchangeOf("cart", "--on-local-refused", "maybe"), code: 2, words: []string{"maybe", "origin", "refuse"}},
		{name: "unknown answer to conflicts", args: exchangeOf("cart", "--on-conflict", "maybe"), code: 2, words: []string{"maybe", "reapply", "leave"}},
		{name: "preview without a name", args: []string{"preview", "--expose", "8080"}, code: 2},
		{name: "preview with a bad name", args: []string{"preview", "Cart_2", "--expose", "8080"}, code: 2, words: []string{"Cart_2"}},
		{name: "expose of nothing", args: []string{"expose"}, code: 2},
		{name: "leave without a session", args: []string{"leave", "cart"}, code: 1, words: []string{`"cart"`, "culvert recover cart"}},
	} {
		t.Run(r.name, func(t *testing.T) { r.check(t, alice) })
	}
	alice.connect(t)
	// It is not for want of rights that these two are refused.
	for _, ns := range []string{"default", "kube-system"} {
		apply(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-intercept, namespace: `+ns+`}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-intercept}
subjects: [{kind: Group, name: developers, apiGroup: rbac.authorization.k8s.io}]
`)
	}
	for _, r := range []refused{
		{name: "missing Service", args: exchangeOf("crat"), code: 1, words: []string{"crat", "cart", "shop"}},
		{name: "missing Deployment", args: exchangeOf("deployment/crat"), code: 1, words: []string{"crat", "cart"}},
		{name: "unknown kind", args: exchangeOf("cronjob/cart"), code: 2, words: []string{"cronjob"}},
		{name: "ExternalName", args: exchangeOf("outside"), code: 2, words: []string{"outside", "ExternalName"}},
		{name: "no selector", args: exchangeOf("manual"), code: 2, words: []string{"manual", "selector"}},
		{name: "no such port", args: []string{"exchange", "cart", "--expose", "8080:81"}, code: 2, words: []string{"81", "80", "http"}},
		{name: "port and targetPort", args: []string{"exchange", "twins", "--expose", "8080:9000"}, code: 2, words: []string{"9000", "one", "other"}},
		{name: "another protocol", args: []string{"exchange", "cart", "--expose", "8080:http/udp"}, code: 2, words: []string{"udp", "tcp", "http"}},
		{name: "one port twice", args: []string{"exchange", "cart", "--expose", "8080:80,8081:http"}, code: 2, words: []string{"80"}},
		{name: "the API server", args: exchangeOf("kubernetes", "-n", "default"), code: 2, words: []string{"kubernetes", "default"}},
		{name: "kube-system", args: []string{"exchange", "kube-dns", "--expose", "5300:53/udp", "-n", "kube-system"}, code: 1, words: []string{"kube-system", "--force"}},
		{name: "leave of what is not intercepted", args: []string{"leave", "cart"}, code: 1, words: []string{"cart"}},
		{name: "recover of what is missing", args: []string{"recover", "crat"}, code: 1, words: []string{"crat"}},
		{name: "environment of what is missing", args: []string{"env", "deployment/crat"}, code: 1, words: []string{"crat", "cart"}},
	} {
		t.Run(r.name, func(t *testing.T) { r.check(t, alice) })
	}
	t.Run("nobody listens", func(t *testing.T) {
		refused{args: exchangeOf("cart"), words: []string{"8080", "listen", "origin"}}.check(t, alice)
		served(t, "http", cartPort(t, 80), "cart-*")
		alice.serve(t, "127.0.0.1")
		served(t, "http", cartPort(t, 80), "alice")
		refused{args: []string{"exchange", "cart", "--expose", "9000:echo"}, code: 1, words: []string{"cart", "already"}}.check(t, alice)
		alice.leave(t, "cart")
	})
}

// TestInterceptRights: who lacks a right is told which, before anything changes.
func TestInterceptRights(t *testing.T) {
	apply(t, `
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: connect-only, namespace: shop}
rules:
- {apiGroups: [apps], resources: [deployments], verbs: [create, get, list, watch, delete]}
- {apiGroups: [""], resources: [pods, services], verbs: [create, get, list, watch]}
- {apiGroups: [""], resources: [pods/portforward], verbs: [create, get]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: connect-only, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: connect-only}
subjects: [{kind: User, name: limited, apiGroup: rbac.authorization.k8s.io}]
`)
	unchangedShop(t)
	alice := aliceAt(t)
	limited := []string{"--kubeconfig", kubeconfig(t, "", "limited")}
	refused{args: append(exchangeOf("cart"), limited...), code: 1, words: []string{"get configmaps", "shop", "culvert-intercept"}}.check(t, alice)
	refused{args: append([]string{"preview", "next", "--expose", "8080"}, limited...), code: 1, words: []string{"shop"}}.check(t, alice)
	refused{args: append([]string{"env", "deployment/cart"}, limited...), code: 1, words: []string{"configmaps"}}.check(t, alice)
	lab.Culvert(netlab.Alice, "disconnect") // where a session was made for it
	served(t, "http", cartPort(t, 80), "cart-*")
}

// onNodes runs a shell command on both nodes.
func onNodes(t *testing.T, command string) {
	t.Helper()
	for _, node := range []string{"node1", "node2"} {
		if r := lab.Cluster("exec", node, "--", "sh", "-c", command); r.Code != 0 {
			t.Fatalf("%s on %s: %v", command, node, r)
		}
	}
}

// eventuallyServed wants that a name answers HTTP at an address before long, for
// the clients on both nodes.
func eventuallyServed(t *testing.T, addr, name string, limit time.Duration) {
	t.Helper()
	begun := time.Now()
	for _, c := range clients {
		eventually(t, limit, func() error {
			got, _, err := whoAnswers(c, "http", addr)
			if err == nil && !serves(got, name) {
				err = fmt.Errorf("%s from %s is answered by %s, not %s", addr, c, got, name)
			}
			return err
		})
	}
	t.Logf("%s answers at %s after %v", name, addr, time.Since(begun).Round(10*time.Millisecond))
}

// TestPreflight: what would break the Service is found while nothing has changed.
func TestPreflight(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.serve(t, "127.0.0.1")
	alice.connect(t)
	t.Run("gates do not reach the origin", func(t *testing.T) {
		onNodes(t, "nft 'table inet preflight { chain forward { type filter hook forward priority -5; tcp dport 8080 drop; }; }'")
		t.Cleanup(func() { onNodes(t, "nft delete table inet preflight") })
		before := serviceLines(t)
		t.Cleanup(func() { alice.leave(t, "--all") }) // if it is not refused
		refused{args: exchangeOf("cart"), code: 1, words: []string{"cart", "reach", "80"}}.check(t, alice)
		sameLines(t, before, time.Second, func() []string { return serviceLines(t) })
	})
	t.Run("NetworkPolicy", func(t *testing.T) {
		apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: cart, namespace: shop}
spec:
  podSelector: {matchLabels: {app: cart}}
  ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: clients}}}]}]
`)
		before := listNamespace(t, "shop")
		r := alice.culvert(exchangeOf("cart")...)
		t.Cleanup(func() { alice.leave(t, "--all") })
		switch ours := kubectl(t, "-n", "shop", "get", "networkpolicies", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "jsonpath={.items[*].spec}"); {
		case r.Code == 0 && !strings.Contains(ours, "culvert-gate"):
			t.Errorf("gates may not reach the origin: %v, own policies: %s", r, ours)
		case r.Code != 0 && !strings.Contains(r.Stderr, "NetworkPolicy"):
			t.Errorf("exchange: %v", r)
		default:
			t.Logf("%v\nown policies: %s", r, ours)
		}
		alice.leave(t, "--all")
		sameOwn(t, "shop", before, 10*time.Second)
		if left := kubectl(t, "-n", "shop", "get", "networkpolicies", "-o", "name"); left != "networkpolicy.networking.k8s.io/cart" {
			t.Errorf("left: %s", left)
		}
	})
	t.Run("traffic policy and affinity", func(t *testing.T) {
		apply(t, `
apiVersion: v1
kind: Service
metadata: {name: near, namespace: shop}
spec: {selector: {app: cart}, internalTrafficPolicy: Local, ports: [{name: http, port: 80, targetPort: web}]}
---
apiVersion: v1
kind: Service
metadata: {name: sticky, namespace: shop}
spec: {selector: {app: cart}, sessionAffinity: ClientIP, ports: [{name: http, port: 80, targetPort: web}]}
`)
		refused{args: exchangeOf("near"), code: 1, words: []string{"near", "Local", "--force"}}.check(t, alice)
		refused{args: exchangeOf("near", "--force")}.check(t, alice)
		// Nodes learn of each change within a second or two when there are many.
		eventuallyServed(t, "near.shop:80", "alice", 3*time.Second)
		// Clients that stay with a pod of its come here all the same, and back.
		served(t, "http", "sticky.shop:80", "cart-*")
		refused{args: exchangeOf("sticky"), words: []string{"affinity"}}.check(t, alice)
		eventuallyServed(t, "sticky.shop:80", "alice", 3*time.Second)
		alice.leave(t, "--all")
		served(t, "http", "sticky.shop:80", "cart-*")
	})
	t.Run("admission", func(t *testing.T) {
		apply(t, `
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: frozen}
spec:
  matchConstraints: {resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [UPDATE], resources: [services]}]}
  validations: [{expression: "object.metadata.name != 'shelf'", message: the shelf is frozen this week}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: frozen}
spec: {policyName: frozen, validationActions: [Deny]}
`)
		eventually(t, 20*time.Second, func() error { // until the API server has it in force
			if r := lab.Kubectl("", nil, "-n", "shop", "annotate", "--dry-run=server", "service", "shelf", "x=y"); r.Code == 0 {
				return errors.New("the Service can still be changed")
			}
			return nil
		})
		refused{args: exchangeOf("shelf"), code: 1, words: []string{"the shelf is frozen this week"}}.check(t, alice)
		served(t, "http", "shelf.shop:80", "cart-*")
	})
	t.Run("quota", func(t *testing.T) {
		apply(t, `
apiVersion: v1
kind: Namespace
metadata: {name: tight-shop}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: none, namespace: tight-shop}
spec: {hard: {pods: "0"}}
---
apiVersion: v1
kind: Service
metadata: {name: till, namespace: tight-shop}
spec: {selector: {app: till}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-user, namespace: tight-shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-user}
subjects: [{kind: Group, name: developers, apiGroup: rbac.authorization.k8s.io}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-intercept, namespace: tight-shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-intercept}
subjects: [{kind: Group, name: developers, apiGroup: rbac.authorization.k8s.io}]
`)
		refused{args: exchangeOf("till", "-n", "tight-shop"), code: 1, words: []string{"quota", "tight-shop"}}.check(t, alice)
		left := listNamespace(t, "tight-shop")
		if i := slices.IndexFunc(left, func(l string) bool { return strings.Contains(l, "culvert-gate") || strings.Contains(l, "Lease/") }); i >= 0 {
			t.Errorf("left: %s", left[i])
		}
	})
}
