//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// xdsPort is where Istio's control plane tells clients how to route.
const xdsPort = 15010

// istioBin is a file that `make -C test/cluster istio` made.
func istioBin(name string) string { return filepath.Join(lab.Repo, "test", "cluster", "bin", name) }

// knowRules has the cluster know the kinds of Istio and Gateway API until the test ends.
func knowRules(t *testing.T) {
	t.Helper()
	kubectl(t, "apply", "--server-side", "-f", istioBin("istio-crds.yaml"), "-f", istioBin("gateway-crds.yaml"))
	t.Cleanup(func() {
		kubectl(t, "delete", "--ignore-not-found", "-f", istioBin("istio-crds.yaml"), "-f", istioBin("gateway-crds.yaml"))
	})
	namespaceKinds = sync.OnceValues(listKinds)
	t.Cleanup(func() { namespaceKinds = sync.OnceValues(listKinds) })
	kubectl(t, "wait", "--for=condition=Established", "crd", "virtualservices.networking.istio.io", "httproutes.gateway.networking.k8s.io", "--timeout=30s")
}

// startIstio runs Istio's control plane at the laptop until the test ends. There are no
// proxies: clients of gRPC are routed by it themselves (xDS).
func startIstio(t *testing.T) {
	t.Helper()
	knowRules(t)
	apply(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n")
	dir := t.TempDir()
	mesh := filepath.Join(dir, "mesh.yaml")
	if err := os.WriteFile(mesh, []byte("rootNamespace: istio-system\ntrustDomain: cluster.local\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(dir, "istio.log"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	cmd := lab.Command(ctx, netlab.Root, istioBin("istio"), "discovery", "--kubeconfig", kubeconfig(t, "", "admin"), "--meshConfig", mesh,
		"--grpcAddr", fmt.Sprintf("127.0.0.1:%d", xdsPort), "--httpAddr", "127.0.0.1:15080", "--httpsAddr", "", "--secureGRPCAddr", "",
		"--monitoringAddr", "127.0.0.1:15014", "--domain", "cluster.local")
	cmd.Env = append(cmd.Env, "POD_NAMESPACE=istio-system", "POD_NAME=istiod", "ENABLE_CA_SERVER=false", "VALIDATION_WEBHOOK_CONFIG_NAME=",
		"INJECTION_WEBHOOK_CONFIG_NAME=", "PILOT_ENABLE_GATEWAY_API_DEPLOYMENT_CONTROLLER=false", "PILOT_ENABLE_GATEWAY_API_GATEWAYCLASS_CONTROLLER=false")
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }() // it is stopped
	t.Cleanup(func() {
		stop()
		<-ended
		log.Close()
		if t.Failed() {
			text, _ := os.ReadFile(log.Name())
			t.Logf("istio:\n%s", text[max(0, len(text)-6000):])
		}
	})
	eventually(t, 60*time.Second, func() error {
		if r := lab.Run(netlab.Root, "curl", "-sSf", "http://127.0.0.1:15080/ready"); r.Code != 0 {
			return fmt.Errorf("istio is not ready: %v", r)
		}
		return nil
	})
}

// routed is what became of a routed client's calls.
type routed struct {
	Servers, Failed map[string]int
}

// routedCommand calls the gRPC server at a Service, by its name, from the laptop.
func routedCommand(ctx context.Context, service string, args ...string) (run func() (routed, error)) {
	bootstrap := fmt.Sprintf(`{"xds_servers":[{"server_uri":"127.0.0.1:%d","channel_creds":[{"type":"insecure"}],"server_features":["xds_v3"]}],
"node":{"id":"sidecar~192.0.2.7~client.shop~shop.svc.cluster.local","metadata":{"GENERATOR":"grpc","NAMESPACE":"shop"}}}`, xdsPort)
	cmd := lab.Command(ctx, netlab.Root, istioBin("istio"), slices.Concat([]string{"call"}, args, []string{"xds:///" + service + ".shop.svc.cluster.local:9005"})...)
	cmd.Env = append(cmd.Env, "GRPC_XDS_BOOTSTRAP_CONFIG="+bootstrap)
	return func() (got routed, err error) {
		r := netlab.Run(cmd)
		if err := json.Unmarshal([]byte(r.Stdout), &got); r.Code != 0 || err != nil {
			return got, fmt.Errorf("a routed call: %v, %v", err, r)
		}
		return got, nil
	}
}

// routes wants that a server gets a client's calls before long.
func routes(t *testing.T, service, name string, within time.Duration, headers ...string) {
	t.Helper()
	var args []string
	for _, h := range headers {
		args = append(args, "--header", h)
	}
	eventually(t, within, func() error {
		got, err := routedCommand(context.Background(), service, args...)()
		if err == nil && (len(got.Failed) > 0 || !serves(only(got.Servers), name)) {
			err = fmt.Errorf("with %q it is %+v, not %s", headers, got, name)
		}
		return err
	})
}

func only(servers map[string]int) string {
	return strings.Join(slices.Sorted(maps.Keys(servers)), " and ")
}

// routedLoad calls all the time until the returned function is called.
func routedLoad(t *testing.T, service string, lasts time.Duration, headers ...string) (result func() routed) {
	t.Helper()
	args := []string{"--for", lasts.String(), "--every", "5ms"}
	for _, h := range headers {
		args = append(args, "--header", h)
	}
	run := routedCommand(background(t), service, args...)
	done := make(chan struct{})
	var got routed
	var err error
	go func() {
		defer close(done)
		got, err = run()
	}()
	return func() routed {
		<-done
		if err != nil {
			t.Error(err)
		}
		for why, n := range got.Failed {
			// grpc-go picks by new routes a moment before it knows their clusters, whoever
			// changes routes: nothing was sent.
			if strings.Contains(why, "unknown cluster selected for RPC") {
				t.Logf("%d calls failed in the client: %s", n, why)
				delete(got.Failed, why)
			}
		}
		return got
	}
}

const callsService = `
apiVersion: v1
kind: Service
metadata: {name: calls, namespace: shop}
spec: {selector: {app: cart}, ports: [{name: grpc-calls, port: 9005, appProtocol: grpc}]}
`

// shopOfOthers is all of the shop but what sessions have there while they are connected.
func shopOfOthers(t *testing.T) []string {
	return slices.DeleteFunc(listNamespace(t, "shop"), func(line string) bool {
		name, _, _ := strings.Cut(line, " ")
		_, name, _ = strings.Cut(name, "/")
		return strings.HasPrefix(name, "culvert-agent-") || strings.HasPrefix(line, "Lease/culvert-")
	})
}

// mayMesh gives developers the roles of rules.
const mayMesh = `
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-mesh-istio, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-mesh-istio}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: developers}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-mesh-gateway, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-mesh-gateway}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: developers}]
`

// ruled is a kind of object with rules, as the shop's owner has one.
type ruled struct {
	mode, kind string
	owner      string // his object calls
	changed    string // and what he makes of it while somebody meshes
	rules      string // jsonpath of what the rules lead to
}

var istioRules = ruled{mode: api.ModeIstio, kind: "virtualservice", rules: "{.items[*].spec.http[*].route[*].destination.host}",
	owner: `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: calls, namespace: shop}
spec:
  hosts: [calls]
  http:
  - {name: all, timeout: 20s, route: [{destination: {host: calls, port: {number: 9005}}}]}
`,
	changed: `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: calls, namespace: shop, labels: {round: two}}
spec:
  hosts: [calls]
  http:
  - {name: slow, match: [{uri: {prefix: /slow}}], route: [{destination: {host: calls, port: {number: 9005}}}]}
  - {name: all, timeout: 30s, route: [{destination: {host: calls, port: {number: 9005}}}]}
`}

var gatewayRules = ruled{mode: api.ModeGateway, kind: "httproute", rules: "{.items[*].spec.rules[*].backendRefs[*].name}",
	owner: `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: calls, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: calls, port: 9005}]
  rules:
  - {matches: [{path: {type: PathPrefix, value: /}, headers: [{name: x-fast, value: "yes"}]}], backendRefs: [{name: calls, port: 9005}]}
  - {backendRefs: [{name: calls, port: 9005}]}
`,
	changed: `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: calls, namespace: shop, labels: {round: two}}
spec:
  parentRefs: [{group: "", kind: Service, name: calls, port: 9005}]
  rules:
  - {matches: [{path: {type: Exact, value: /testapp.Echo/Unary}}], backendRefs: [{name: calls, port: 9005}]}
  - {backendRefs: [{name: calls, port: 9005}]}
`}

// TestMeshByRules: where Istio or Gateway API decides where requests go, marked ones are
// led to the machine by a rule there, and a real client goes by it. Others' rules, and
// whose they are, stay as they are.
func TestMeshByRules(t *testing.T) {
	unchangedShop(t)
	startIstio(t)
	ownerApplies(t, callsService)
	t.Cleanup(func() { kubectl(t, "-n", "shop", "delete", "service", "calls") })
	alice, bob := aliceAt(t), bobNextDoor(t)
	bob.serve(t, "127.0.0.1")
	alice.connect(t)
	bob.connect(t)
	mesh := func(mark string, more ...string) []string {
		return append([]string{"mesh", "calls", "--expose", "9005", "--version-mark", mark}, more...)
	}
	routes(t, "calls", "cart-*", 20*time.Second)

	t.Run("without the role", func(t *testing.T) {
		for _, mode := range []string{api.ModeIstio, api.ModeGateway} {
			r := alice.culvert(mesh("alice", "--mode", mode)...)
			if r.Code != 1 || !strings.Contains(r.Stderr, "culvert-mesh-"+mode) || !strings.Contains(r.Stderr, "--mode router") {
				t.Errorf("--mode %s: %v", mode, r)
			}
		}
		if i := alice.intercept(t, mesh("alice")...); i.Mode != api.ModeRouter || !strings.Contains(strings.Join(i.Notes, " "), "culvert-mesh-istio") {
			t.Errorf("auto is %+v", i)
		}
		alice.leave(t, "calls")
	})
	apply(t, mayMesh)

	for _, rules := range []ruled{istioRules, gatewayRules} {
		t.Run(rules.mode, func(t *testing.T) { rules.test(t, alice, bob, mesh) })
		alice.connect(t) // rules.test killed what there was
	}
}

func (x ruled) test(t *testing.T, alice, bob developer, mesh func(string, ...string) []string) {
	program := alice.serve(t, "127.0.0.1")
	ruledTo := func() string { return kubectl(t, "-n", "shop", "get", x.kind, "-o", "jsonpath="+x.rules) }

	t.Run("of one's own", func(t *testing.T) {
		before := shopOfOthers(t)
		alice.intercept(t, mesh("alice", "--mode", x.mode)...)
		bob.intercept(t, mesh("bob", "--mode", x.mode)...)
		routes(t, "calls", "alice", 15*time.Second, "version:alice")
		routes(t, "calls", "bob", 15*time.Second, "version:bob")
		routes(t, "calls", "cart-*", time.Second)
		// The owner makes one, too: culvert's does not stand in its way.
		ownerApplies(t, x.owner)
		eventually(t, 15*time.Second, func() error {
			names := kubectl(t, "-n", "shop", "get", x.kind, "-o", "name")
			if to := ruledTo(); strings.Contains(names, "culvert") || strings.Count(to, "calls-culvert-") != 2 {
				return fmt.Errorf("there are %s, whose rules lead to %s", names, to)
			}
			return nil
		})
		routes(t, "calls", "alice", 15*time.Second, "version:alice")
		routes(t, "calls", "bob", time.Second, "version:bob")
		kubectl(t, "-n", "shop", "delete", x.kind, "calls")
		routes(t, "calls", "alice", 15*time.Second, "version:alice")
		alice.leave(t, "calls")
		routes(t, "calls", "bob", 2*time.Second, "version:bob")
		bob.leave(t, "calls")
		sameLines(t, before, 20*time.Second, func() []string { return shopOfOthers(t) })
	})

	ownerApplies(t, x.owner)
	t.Cleanup(func() { kubectl(t, "-n", "shop", "delete", x.kind, "calls") })
	routes(t, "calls", "cart-*", 10*time.Second)
	before := shopOfOthers(t)
	t.Run("in front of the owner's", func(t *testing.T) {
		plain, marked := routedLoad(t, "calls", 25*time.Second), routedLoad(t, "calls", 25*time.Second, "version:alice")
		i := alice.intercept(t, mesh("alice", "--tag-responses")...)
		if i.Mode != x.mode {
			t.Errorf("auto is %+v", i)
		}
		begun := time.Now()
		routes(t, "calls", "alice", 15*time.Second, "version:alice")
		t.Logf("a client knows after %v", time.Since(begun))
		if r := bob.culvert(mesh("alice")...); r.Code != 1 || !strings.Contains(r.Stderr, "alice") {
			t.Errorf("Bob takes Alice's mark: %v", r)
		}
		bob.intercept(t, mesh("bob", "--match", "path:/testapp.Echo/Unary")...)
		routes(t, "calls", "bob", 15*time.Second, "version:bob")
		r := bob.culvert("list")
		for _, word := range []string{"mesh (" + x.mode + ")", "header:VERSION=alice", "header:VERSION=bob"} {
			if !strings.Contains(r.Stdout, word) {
				t.Errorf("culvert list does not say %q: %v", word, r)
			}
		}
		if r := bob.culvert("mesh", "--show", "calls"); r.Code != 0 || !strings.Contains(r.Stdout, x.mode) || !strings.Contains(r.Stdout, "accepted") {
			t.Errorf("mesh --show: %v", r)
		}
		if r := bob.culvert("logs", "--router", "calls"); r.Code != 0 || !strings.Contains(r.Stdout, "POST /testapp.Echo/Unary HTTP/2") {
			t.Errorf("logs --router: %v", r)
		}
		alice.leave(t, "calls")
		routes(t, "calls", "bob", time.Second, "version:bob")
		bob.leave(t, "calls")
		routes(t, "calls", "cart-*", 2*time.Second, "version:alice")
		if got := plain(); len(got.Failed) > 0 || strings.Contains(only(got.Servers), "alice") {
			t.Errorf("calls without a mark: %+v", got)
		} else {
			t.Logf("calls without a mark, 0 failed: %v", got.Servers)
		}
		if got := marked(); len(got.Failed) > 0 || got.Servers["alice"] == 0 {
			t.Errorf("calls with Alice's mark: %+v", got)
		} else {
			t.Logf("calls with Alice's mark, 0 failed: %v", got.Servers)
		}
		sameLines(t, before, 20*time.Second, func() []string { return shopOfOthers(t) })
	})
	t.Run("a machine that is away", func(t *testing.T) {
		alice.intercept(t, mesh("alice")...)
		routes(t, "calls", "alice", 15*time.Second, "version:alice")
		program.stop()
		routes(t, "calls", "cart-*", 2*time.Second, "version:alice")
		alice.serve(t, "127.0.0.1")
		routes(t, "calls", "alice", 2*time.Second, "version:alice")
		if err := alice.KillWith(alice.pid()); err != nil {
			t.Fatal(err)
		}
		if to := ruledTo(); !strings.Contains(to, "calls-culvert-") {
			t.Errorf("rules lead to %s", to)
		}
		r := bob.culvert("recover", "calls", "--force")
		if r.Code != 0 || !strings.Contains(r.Stdout, "its own again") {
			t.Errorf("recover: %v", r)
		}
		if to := ruledTo(); strings.Contains(to, "calls-culvert-") {
			t.Errorf("after recover rules lead to %s", to)
		}
		if err := alice.StartDaemon(); err != nil {
			t.Fatal(err)
		}
		sameLines(t, before, 30*time.Second, func() []string { return shopOfOthers(t) })
	})
	alice.serve(t, "127.0.0.1")
	alice.connect(t)
	t.Run("the owner changes it", func(t *testing.T) {
		alice.intercept(t, mesh("alice")...)
		ownerApplies(t, x.changed) // unforced: he owns his rules still
		eventually(t, 10*time.Second, func() error {
			if to := ruledTo(); !strings.Contains(to, "calls-culvert-") {
				return fmt.Errorf("rules lead to %s", to)
			}
			return nil
		})
		routes(t, "calls", "alice", 15*time.Second, "version:alice")
		alice.leave(t, "calls")
		ownerApplies(t, x.owner)
		sameLines(t, before, 20*time.Second, func() []string { return shopOfOthers(t) })
	})
}

// cartRules are the owner's objects for the Service cart.
const cartRules = `
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: cart, namespace: shop}
spec: {hosts: [cart], http: [{route: [{destination: {host: cart, port: {number: 80}}}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: cart, namespace: shop}
spec:
  parentRefs: [{group: "", kind: Service, name: cart, port: 80}]
  rules: [{backendRefs: [{name: cart, port: 80}]}]
`

// TestMeshByRulesKilled: a session is killed at a step, and what it was about to do, or
// to undo, is undone by its daemon, or by anybody else; no rule leads to nothing.
func TestMeshByRulesKilled(t *testing.T) {
	unchangedShop(t)
	knowRules(t)
	apply(t, mayMesh)
	ownerApplies(t, cartRules)
	t.Cleanup(func() { kubectl(t, "-n", "shop", "delete", "virtualservice,httproute", "cart") })
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	before := listNamespace(t, "shop")
	for _, c := range []struct{ mode, step string }{
		{"istio", "switch"}, {"istio", "active"}, {"istio", "restore"}, {"istio", "drain"}, {"istio", "origin-deleted"}, {"istio", "entry-removed"},
		{"gateway", "active"}, {"gateway", "drain"}, {"manual", "active"},
	} {
		t.Run(c.mode+" "+c.step, func(t *testing.T) {
			one := &walk{developer: alice, service: "cart", address: cartPort(t, 80), mesh: true, mode: c.mode}
			if c.step == "active" {
				if r := one.at("kill", c.step, "expose", "8080"); r.Code != 0 {
					t.Fatalf("expose: %v", r)
				}
			}
			if err := one.prepare("kill", c.step); err != nil {
				t.Fatal(err)
			}
			r := <-one.last("kill", c.step)
			t.Logf("killed: %s", strings.TrimSpace(r.Stderr))
			if c.step == "active" { // and his daemon: nobody of his is left
				var pid int
				eventually(t, 10*time.Second, func() error { // the daemon started another
					if pid = alice.pid(); pid == 0 {
						return errors.New("there is no session")
					}
					return nil
				})
				if err := lab.KillWith(pid); err != nil {
					t.Fatal(err)
				}
				if c.mode == "gateway" {
					ago := time.Now().UTC().Add(-25 * time.Hour).Format("2006-01-02T15:04:05.000000Z")
					for _, lease := range words(t, "-n", "shop", "get", "leases", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "name") {
						kubectl(t, "-n", "shop", "patch", lease, "--type=merge", "-p", `{"spec":{"renewTime":"`+ago+`"}}`)
					}
					if r := bob.culvert("clean"); r.Code != 0 || !strings.Contains(r.Stdout, "cart-culvert-") {
						t.Errorf("clean: %v", r)
					}
				} else if r := bob.culvert("recover", "cart", "--force"); r.Code != 0 || !strings.Contains(r.Stdout, "its own again") {
					t.Errorf("recover: %v", r)
				}
				if left := kubectl(t, "-n", "shop", "get", "virtualservices,httproutes,services", "-o", "yaml"); strings.Contains(left, "cart-culvert-") {
					t.Errorf("after recover there is %s", left)
				}
				if err := lab.StartDaemon(); err != nil {
					t.Fatal(err)
				}
			}
			eventually(t, 20*time.Second, func() error {
				if r := alice.Culvert(alice.user, "disconnect"); r.Code != 0 {
					return fmt.Errorf("disconnect: %v", r)
				}
				return one.nobodyHere()
			})
			sameNamespace(t, "shop", before, 30*time.Second)
		})
	}
}

// proxiedShop is a workload with a container of the name that Istio's proxy has, and a
// PeerAuthentication by which that would take nothing but mutual TLS.
const proxiedShop = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: proxied, namespace: shop}
spec:
  selector: {matchLabels: {app: proxied}}
  template:
    metadata: {labels: {app: proxied}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsNonRoot: true, runAsUser: 65534, seccompProfile: {type: RuntimeDefault}}
      containers:
      - {name: app, image: "testapp.local/testapp:1", args: [serve], securityContext: &s {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}}
      - {name: istio-proxy, image: "testapp.local/busybox:1", command: [sleep, "3600"], securityContext: *s}
---
apiVersion: v1
kind: Service
metadata: {name: proxied, namespace: shop}
spec: {selector: {app: proxied}, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: all, namespace: shop}
spec: {mtls: {mode: STRICT}}
`

// TestMeshStrict: what could not reach pods that take nothing but mutual TLS is refused
// before anything changes, and what needs no way to them works.
func TestMeshStrict(t *testing.T) {
	unchangedShop(t)
	knowRules(t)
	apply(t, mayMesh)
	apply(t, proxiedShop)
	kubectl(t, "-n", "shop", "rollout", "status", "deployment/proxied", "--timeout=60s")
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	before := shopOfOthers(t)
	for _, args := range [][]string{
		{"exchange", "proxied", "--expose", "8080:80"},
		{"mesh", "proxied", "--expose", "8080:80"},
		{"mesh", "proxied", "--expose", "8080:80", "--mode", "router", "--on-gone", "fail"},
		{"mesh", "proxied", "--expose", "8080:80", "--mode", "istio"},
	} {
		r := alice.culvert(args...)
		if r.Code != 1 || !strings.Contains(r.Stderr, "STRICT") || !strings.Contains(r.Stderr, "--force") {
			t.Errorf("culvert %v: %v", args, r)
		}
		if args[0] == "mesh" && !strings.Contains(r.Stderr, "--on-gone fail") {
			t.Errorf("culvert %v names no way: %v", args, r)
		}
	}
	sameLines(t, before, time.Second, func() []string { return shopOfOthers(t) })
	i := alice.intercept(t, "mesh", "proxied", "--expose", "8080:80", "--on-gone", "fail")
	if i.Mode != api.ModeIstio {
		t.Errorf("where pods have Istio's proxy the mode is %q", i.Mode)
	}
	// No other rule was there: one of culvert's own leads all else where it went.
	if hosts := words(t, "-n", "shop", "get", "virtualservice", "proxied-culvert", "-o", "jsonpath={.spec.http[*].route[*].destination.host}"); len(hosts) != 2 ||
		!strings.HasPrefix(hosts[0], "proxied-culvert-") || hosts[1] != "proxied.shop.svc.cluster.local" {
		t.Errorf("rules lead to %v", hosts)
	}
	alice.leave(t, "proxied")
	sameLines(t, before, 20*time.Second, func() []string { return shopOfOthers(t) })
}
