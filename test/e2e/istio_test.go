//go:build e2e

package e2e

import (
	"context"
	"encoding/json"
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

// startIstio has the cluster know the kinds of Istio and Gateway API, and runs Istio's
// control plane at the laptop until the test ends. There are no proxies: clients of
// gRPC are routed by it themselves (xDS).
func startIstio(t *testing.T) {
	t.Helper()
	kubectl(t, "apply", "--server-side", "-f", istioBin("istio-crds.yaml"), "-f", istioBin("gateway-crds.yaml"))
	t.Cleanup(func() {
		kubectl(t, "delete", "--ignore-not-found", "-f", istioBin("istio-crds.yaml"), "-f", istioBin("gateway-crds.yaml"))
	})
	namespaceKinds = sync.OnceValues(listKinds)
	t.Cleanup(func() { namespaceKinds = sync.OnceValues(listKinds) })
	apply(t, "apiVersion: v1\nkind: Namespace\nmetadata: {name: istio-system}\n")
	kubectl(t, "wait", "--for=condition=Established", "crd", "virtualservices.networking.istio.io", "httproutes.gateway.networking.k8s.io", "--timeout=30s")

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
		alice.leave(t, "calls")
		routes(t, "calls", "bob", time.Second, "version:bob")
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
		bob.intercept(t, mesh("bob", "--match", "path:/testapp.Echo/Unary")...)
		routes(t, "calls", "bob", 15*time.Second, "version:bob")
		if r := bob.culvert(mesh("alice")...); r.Code != 1 || !strings.Contains(r.Stderr, "alice") {
			t.Errorf("Bob takes Alice's mark: %v", r)
		}
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
		}
		if got := marked(); len(got.Failed) > 0 || got.Servers["alice"] == 0 {
			t.Errorf("calls with Alice's mark: %+v", got)
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
