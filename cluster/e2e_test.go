//go:build e2e

package cluster

// These run on the test cluster, in the network namespace "laptop":
//
//	go test -c -tags e2e -o cluster.test ./cluster
//	CULVERT_E2E_USERS=DIR bin/testcluster exec laptop -- ./cluster.test -test.v
//
// DIR holds a kubeconfig per user of the test cluster (developer.kubeconfig, …).

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

func as(t *testing.T, user, namespace string) *Cluster {
	t.Helper()
	dir := os.Getenv("CULVERT_E2E_USERS")
	if dir == "" {
		t.Fatal("CULVERT_E2E_USERS is not set")
	}
	c, err := Open(api.Options{Kubeconfig: filepath.Join(dir, user+".kubeconfig"), Namespace: namespace})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func wantCode(t *testing.T, err error, code string, parts ...string) {
	t.Helper()
	var e *api.Error
	if !errors.As(err, &e) || e.Code != code {
		t.Fatalf("error %v (%+v), want code %q", err, e, code)
	}
	for _, part := range parts {
		if !strings.Contains(e.Error(), part) {
			t.Errorf("error %q does not say %q", e.Error(), part)
		}
	}
	t.Log(e)
}

func testAgent(session, image string) AgentSpec {
	return AgentSpec{Session: session, Image: image, User: "e2e"}
}

const (
	testImage    = "testapp.local/testapp:1"
	missingImage = "registry.invalid/culvert-agent:none"
)

func TestRangesOfDeveloper(t *testing.T) {
	r, err := as(t, "developer", "demo").Ranges(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	for _, want := range []string{"10.96.0.0/16", "fd00:10:96::/112", "10.244.1.0/24", "10.244.2.0/24"} {
		if !slices.ContainsFunc(r.Routes, func(x api.Route) bool { return x.Prefix.String() == want }) {
			t.Errorf("no route %s", want)
		}
	}
	for _, route := range r.Routes {
		if route.Prefix.Contains(netip.MustParseAddr("172.30.0.11")) {
			t.Errorf("a node is routed: %v", route)
		}
	}
	if len(r.Notes) != 0 {
		t.Errorf("notes: %q", r.Notes)
	}
}

func TestRangesOfSingleNamespaceUser(t *testing.T) {
	c := as(t, "limited", "demo")
	r, err := c.Ranges(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", r)
	if !slices.ContainsFunc(r.Routes, func(x api.Route) bool {
		return x.Prefix.String() == "10.96.0.0/16" && strings.Contains(x.Source, "dry run")
	}) {
		t.Error("the dry run did not tell the Service range")
	}
	if !slices.ContainsFunc(r.Routes, func(x api.Route) bool { return strings.HasPrefix(x.Source, "pod demo/echo") && x.Prefix.IsSingleIP() }) {
		t.Error("no pod of the namespace")
	}
	if len(r.Notes) < 2 {
		t.Errorf("notes: %q", r.Notes)
	}
	if !c.Services().HasService("demo", "echo") || c.Services().HasService("dev", "echo") {
		t.Errorf("Services of %q", c.Services().Namespaces())
	}
}

func TestWatchFindsNewNode(t *testing.T) {
	ctx, cancel := context.WithCancel(within(t, 30*time.Second))
	admin := as(t, "admin", "demo")
	ranges := make(chan Ranges, 100)
	done := make(chan error, 1)
	go func() { done <- as(t, "developer", "demo").WatchRanges(ctx, func(r Ranges) { ranges <- r }) }()
	<-ranges
	nodes := admin.client.Nodes()
	// Cordoned and never ready: nothing lands on it.
	_, err := nodes.Create(ctx, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: "culvert-e2e-node"},
		Spec:       corev1.NodeSpec{Unschedulable: true, PodCIDR: "10.253.7.0/24", PodCIDRs: []string{"10.253.7.0/24"}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer nodes.Delete(context.Background(), "culvert-e2e-node", metav1.DeleteOptions{})
	start := time.Now()
	for r := range ranges {
		if slices.ContainsFunc(r.Routes, func(x api.Route) bool { return x.Prefix.String() == "10.253.7.0/24" }) {
			break
		}
	}
	if took := time.Since(start); took > 3*time.Second {
		t.Errorf("the new node's range took %v", took)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestPreflight(t *testing.T) {
	start := time.Now()
	if err := as(t, "developer", "demo").Preflight(within(t, 10*time.Second), testAgent("e2epre", testImage)); err != nil {
		t.Errorf("developer in demo: %v", err)
	}
	t.Logf("took %v", time.Since(start))
	if err := as(t, "execuser", "demo").Preflight(within(t, 10*time.Second), testAgent("e2epre", testImage)); err != nil {
		t.Logf("execuser in demo: %v", err)
	}
	err := as(t, "developer", "kube-system").Preflight(within(t, 10*time.Second), testAgent("e2epre", testImage))
	wantCode(t, err, api.CodeForbidden, "create deployments.apps", `"kube-system"`)
	err = as(t, "nobody", "demo").Preflight(within(t, 10*time.Second), testAgent("e2epre", testImage))
	wantCode(t, err, api.CodeForbidden, "deployments.apps", "deploy/rbac")
	err = as(t, "expired", "demo").Preflight(within(t, 10*time.Second), testAgent("e2epre", testImage))
	wantCode(t, err, api.CodeCredentials)
	err = as(t, "admin", "no-such-namespace").Preflight(within(t, 10*time.Second), testAgent("e2epre", testImage))
	wantCode(t, err, api.CodeNamespace, "no-such-namespace", "--namespace")
}

func TestPreflightQuotaAndPodSecurity(t *testing.T) {
	admin := as(t, "admin", "culvert-e2e-quota")
	ctx := within(t, 20*time.Second)
	ns := admin.client.Namespaces()
	_, err := ns.Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: "culvert-e2e-quota", Labels: map[string]string{"pod-security.kubernetes.io/enforce": "restricted"},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer ns.Delete(context.Background(), "culvert-e2e-quota", metav1.DeleteOptions{})
	_, err = objects[corev1.ResourceQuota, corev1.ResourceQuotaList](admin.client, "/api/v1", "culvert-e2e-quota", "resourcequotas").Create(ctx, &corev1.ResourceQuota{
		ObjectMeta: metav1.ObjectMeta{Name: "tiny"},
		Spec:       corev1.ResourceQuotaSpec{Hard: corev1.ResourceList{corev1.ResourceRequestsMemory: resource.MustParse("8Mi")}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// The quota controller fills in the status first.
	for deadline := time.Now().Add(10 * time.Second); err == nil && time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		err = admin.Preflight(ctx, testAgent("e2equota", testImage))
	}
	wantCode(t, err, api.CodeNamespace, "exceeded quota", "--pod-quota")
	// Past the preflight, the ReplicaSet's trouble is reported as fast.
	start := time.Now()
	_, err = admin.EnsureAgent(ctx, testAgent("e2equota", testImage), func(s string) { t.Log(s) })
	wantCode(t, err, api.CodeNamespace, "exceeded quota")
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("the refusal took %v", took)
	}
}

func TestEnsureAgentTroubles(t *testing.T) {
	c := as(t, "developer", "demo")
	start := time.Now()
	_, err := c.EnsureAgent(within(t, 40*time.Second), testAgent("e2eimage", missingImage), func(s string) { t.Log(s) })
	wantCode(t, err, api.CodeImage, missingImage, "--image")
	t.Logf("took %v", time.Since(start))

	spec := testAgent("e2enode", testImage)
	spec.NodeSelector = map[string]string{"no-such": "label"}
	start = time.Now()
	_, err = c.EnsureAgent(within(t, 40*time.Second), spec, func(s string) { t.Log(s) })
	wantCode(t, err, api.CodeAgent, "cannot be scheduled", "--node-selector")
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("it took %v", took)
	}

	_, err = c.EnsureAgent(within(t, 20*time.Second), testAgent("e2eprobe", testImage), func(s string) { t.Log(s) })
	wantCode(t, err, api.CodeImage, "not an image of the agent")

	for _, name := range []string{"e2eimage", "e2enode", "e2eprobe"} {
		_, err := c.client.Deployments("demo").Get(within(t, 5*time.Second), AgentName(name), metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			t.Errorf("%s is left: %v", name, err)
		}
	}
	pods, err := c.client.Pods("demo").List(within(t, 5*time.Second), metav1.ListOptions{LabelSelector: LabelManagedBy + "=culvert," + LabelSession + " in (e2eimage,e2enode,e2eprobe)"})
	if err != nil || len(pods.Items) != 0 {
		t.Errorf("pods are left: %d, %v", len(pods.Items), err)
	}
	if err := c.DeleteAgent(within(t, 5*time.Second), AgentName("e2eimage")); err != nil {
		t.Errorf("deleting what is gone: %v", err)
	}
	_, err = c.WaitAgent(within(t, 5*time.Second), AgentName("e2eimage"), nil)
	wantCode(t, err, api.CodeNotFound)
}

// TestAgentLives needs the agent's image in the nodes: CULVERT_E2E_IMAGE.
func TestAgentLives(t *testing.T) {
	image := os.Getenv("CULVERT_E2E_IMAGE")
	if image == "" {
		t.Fatal("CULVERT_E2E_IMAGE is not set")
	}
	c := as(t, "developer", "demo")
	spec := testAgent("e2elive", image)
	defer c.DeleteAgent(context.Background(), AgentName("e2elive"))
	start := time.Now()
	a, err := c.EnsureAgent(within(t, 20*time.Second), spec, func(s string) { t.Logf("%v %s", time.Since(start), s) })
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("ready after %v: %+v", time.Since(start), a)
	start = time.Now()
	b, err := c.EnsureAgent(within(t, 20*time.Second), spec, nil)
	if err != nil || b.UID != a.UID {
		t.Errorf("adopting: %+v, %v", b, err)
	}
	t.Logf("adopted after %v", time.Since(start))
	if err := as(t, "admin", "demo").client.Pods("demo").Delete(within(t, 5*time.Second), a.Pod, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	start = time.Now()
	for b.UID == a.UID {
		if b, err = c.WaitAgent(within(t, 20*time.Second), a.Name, func(s string) { t.Logf("%v %s", time.Since(start), s) }); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("replaced after %v", time.Since(start))
	start = time.Now()
	if err := c.DeleteAgent(within(t, 20*time.Second), a.Name); err != nil {
		t.Fatal(err)
	}
	t.Logf("deleted after %v", time.Since(start))
}

func echoPod(t *testing.T, c *Cluster) *Agent {
	pods, err := c.client.Pods("demo").List(within(t, 5*time.Second), metav1.ListOptions{LabelSelector: "app=echo"})
	if err != nil || len(pods.Items) == 0 {
		t.Fatalf("no echo pod: %v", err)
	}
	return agentOf("echo", &pods.Items[0])
}

func TestPortForward(t *testing.T) {
	c := as(t, "developer", "demo")
	a := echoPod(t, c)
	for _, spdy := range []bool{false, true} {
		p := c.PortForward(a, 9000)
		p.spdy = spdy
		t.Run(p.Name(), func(t *testing.T) {
			start := time.Now()
			conn, err := p.Dial(within(t, 10*time.Second))
			if err != nil {
				t.Fatal(err)
			}
			t.Logf("dial %v, %s", time.Since(start), p.Name())
			start = time.Now()
			one := []byte{1}
			for range 200 {
				if _, err := conn.Write(one); err != nil {
					t.Fatal(err)
				}
				if _, err := io.ReadFull(conn, one); err != nil {
					t.Fatal(err)
				}
			}
			t.Logf("round trip %v", time.Since(start)/200)
			data := make([]byte, 50<<20)
			rand.Read(data)
			start = time.Now()
			go conn.Write(data)
			back := make([]byte, len(data))
			if _, err := io.ReadFull(conn, back); err != nil {
				t.Fatal(err)
			}
			t.Logf("%d MB echoed in %v", len(data)>>20, time.Since(start))
			if !bytes.Equal(data, back) {
				t.Error("other bytes came back")
			}
			released := make(chan error, 1)
			go func() {
				_, err := conn.Read(back)
				released <- err
			}()
			time.Sleep(50 * time.Millisecond)
			start = time.Now()
			conn.Close()
			if err := <-released; err == nil || time.Since(start) > time.Second {
				t.Errorf("Close released the Read after %v with %v", time.Since(start), err)
			}
			if _, err := conn.Write(one); err == nil {
				t.Error("a closed connection takes data")
			}
		})
	}
}

func TestPortForwardBlockedWriteIsReleased(t *testing.T) {
	c := as(t, "developer", "demo")
	// The echo is not read, so the way fills up.
	conn, err := c.PortForward(echoPod(t, c), 9000).Dial(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		for {
			if _, err := conn.Write(make([]byte, 1<<20)); err != nil {
				done <- err
				return
			}
		}
	}()
	time.Sleep(3 * time.Second)
	select {
	case err := <-done:
		t.Fatalf("the way did not fill up: %v", err)
	default:
	}
	start := time.Now()
	conn.Close()
	<-done
	if took := time.Since(start); took > time.Second {
		t.Errorf("Close took %v", took)
	}
}

func TestPortForwardRefusals(t *testing.T) {
	c := as(t, "developer", "demo")
	a := echoPod(t, c)
	conn, err := c.PortForward(a, 4).Dial(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	_, err = conn.Read(make([]byte, 1))
	if err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a port that nobody listens on: %v", err)
	}
	conn.Close()

	a.Pod = "no-such-pod"
	_, err = c.PortForward(a, 9000).Dial(within(t, 10*time.Second))
	if err == nil || !strings.Contains(err.Error(), "no-such-pod") {
		t.Errorf("a pod that does not exist: %v", err)
	}
	_, err = as(t, "nobody", "demo").PortForward(echoPod(t, c), 9000).Dial(within(t, 10*time.Second))
	wantCode(t, err, api.CodeForbidden, "pods/portforward")
	_, err = as(t, "expired", "demo").PortForward(echoPod(t, c), 9000).Dial(within(t, 10*time.Second))
	wantCode(t, err, api.CodeCredentials)
}

func TestResolve(t *testing.T) {
	c := as(t, "developer", "demo")
	for target, want := range map[string]string{
		"10.244.1.7":                  "10.244.1.7:0",
		"10.244.1.7:80":               "10.244.1.7:80",
		"echo":                        ":80",
		"svc/echo":                    ":80",
		"echo.dev":                    ":80",
		"pod/web-0":                   ":0",
		"web-0.demo":                  ":0",
		"echo-headless.demo":          ":0",
		"echo.demo.svc.cluster.local": ":80",
	} {
		got, err := c.Resolve(within(t, 5*time.Second), target, "demo")
		if err != nil || len(got) == 0 {
			t.Errorf("%s: %v", target, err)
			continue
		}
		if s := netip.AddrPortFrom(got[0].Addr, got[0].Port).String(); !strings.HasSuffix(s, want) {
			t.Errorf("%s: %s, want %s", target, s, want)
		}
	}
	_, err := c.Resolve(within(t, 5*time.Second), "no-such-thing", "demo")
	wantCode(t, err, api.CodeNotFound, "no-such-thing")
}

func TestAccess(t *testing.T) {
	checks, err := as(t, "limited", "demo").Access(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	for _, check := range checks {
		if check.Needed && !check.Allowed {
			t.Errorf("the shipped role lacks %s %s", check.Verb, check.Resource)
		}
		if check.Resource == "nodes" && check.Allowed {
			t.Error("limited may see nodes")
		}
	}
}

func TestAddressesAndUnreachable(t *testing.T) {
	c := as(t, "developer", "demo")
	addrs, err := c.Addresses(within(t, 5*time.Second))
	if err != nil || !slices.Contains(addrs, netip.MustParseAddr("172.30.0.10")) {
		t.Errorf("%v, %v", addrs, err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := l.Addr().String()
	l.Close()
	path := writeKubeconfig(t, strings.ReplaceAll(kubeconfigText, "10.1.1.1:6443", closed))
	if c, err = Open(api.Options{Kubeconfig: path}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, c.Preflight(within(t, 10*time.Second), testAgent("e2epre", testImage)), api.CodeUnreachable, closed)
}
