//go:build e2e

package e2e

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// big asks for TestBigCluster, which takes minutes and leaves the cluster full.
var big = flag.Bool("big", false, "fill the cluster with 2,000 namespaces, 5,000 Services and 10,000 pods, and measure connect")

// What a big cluster has, as objects only: no kubelet and no proxy looks at them.
const (
	bigNamespaces, bigServices, bigPods = 2000, 5000, 10000
	bigNodes                            = 50 // with a pod range of 200 pods each
)

// TestBigCluster measures how long connect takes where there is much to list,
// and what the session keeps of it.
func TestBigCluster(t *testing.T) {
	if !*big {
		t.Skip("without -big")
	}
	begun := time.Now()
	fill(t)
	t.Logf("filled in %v", time.Since(begun).Round(time.Second))
	var took []time.Duration
	for range 3 {
		r := lab.Culvert(netlab.Alice, "connect", "--kubeconfig", kubeconfig(t, "", "developer"), "--image", image, "--debug")
		if r.Code != 0 {
			t.Fatalf("connect: %v\nlogs: %v", r, lab.Culvert(netlab.Alice, "logs"))
		}
		took = append(took, r.Took)
		s := status(t, netlab.Alice)[0]
		fresh(t, 5*time.Second)
		sh(t, "getent hosts svc-0.big-0")
		first := memory(t, s)
		time.Sleep(10 * time.Second)
		if r.Took > 3*time.Second {
			t.Logf("where the time went:\n%s\n%v", r.Stderr, lab.Culvert(netlab.Alice, "logs"))
		}
		t.Logf("connect %v; session now %d MB, after 10 s %d MB, at most %d MB; %.1f CPU seconds; %d routes", r.Took.Round(time.Millisecond),
			first["VmRSS"]>>10, memory(t, s)["VmRSS"]>>10, memory(t, s)["VmHWM"]>>10, cpu(t, s.PID), len(s.Routes))
		if most := memory(t, s)["VmHWM"]; most > 120<<10 {
			t.Errorf("the session took %d MB, more than 120", most>>10)
		}
		if r := lab.Culvert(netlab.Alice, "disconnect"); r.Code != 0 {
			t.Fatal(r)
		}
	}
	if m := slices.Sorted(slices.Values(took))[1]; m > 5*time.Second {
		t.Errorf("connect takes %v, more than 5 s", m)
	}
}

// memory is what /proc says of a session, in KiB.
func memory(t *testing.T, s api.Session) map[string]int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.PID))
	if err != nil {
		t.Fatal(err)
	}
	sizes := map[string]int{}
	for _, m := range regexp.MustCompile(`(?m)^(Vm\w+):\s+(\d+) kB`).FindAllSubmatch(text, -1) {
		sizes[string(m[1])], _ = strconv.Atoi(string(m[2]))
	}
	return sizes
}

// cpu is the processor time of a process in seconds: proc(5), utime and stime.
func cpu(t *testing.T, pid int) float64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	user, _ := strconv.Atoi(string(fields[11]))
	system, _ := strconv.Atoi(string(fields[12]))
	return float64(user+system) / 100
}

// fill makes the objects, unless they are there.
func fill(t *testing.T) {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig(t, "", "admin"))
	if err != nil {
		t.Fatal(err)
	}
	config.Dial = func(_ context.Context, network, addr string) (c net.Conn, err error) {
		err = lab.Inside(func() error { c, err = net.Dial(network, addr); return err })
		return c, err
	}
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	send := func(method, path, body string) error {
		var last error
		for range 50 { // a namespace's service account takes a moment
			req, err := http.NewRequestWithContext(t.Context(), method, config.Host+path, bytes.NewBufferString(body))
			if err != nil {
				return err
			}
			req.Header.Set("Content-Type", "application/json")
			if method == http.MethodPatch {
				req.Header.Set("Content-Type", "application/merge-patch+json")
			}
			resp, err := client.Do(req)
			if err != nil {
				return err
			}
			text, _ := io.ReadAll(resp.Body)
			resp.Body.Close()
			if resp.StatusCode < 300 || resp.StatusCode == http.StatusConflict {
				return nil
			}
			last = fmt.Errorf("%s %s: %s: %.300s", method, path, resp.Status, text)
			time.Sleep(200 * time.Millisecond)
		}
		return last
	}
	each := func(what string, n int, one func(i int) error) {
		t.Helper()
		begun := time.Now()
		var g errgroup.Group
		g.SetLimit(32)
		for i := range n {
			g.Go(func() error { return one(i) })
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d %s in %v", n, what, time.Since(begun).Round(time.Second))
	}
	if r := lab.Kubectl("", nil, "get", "configmap", "-n", "default", "big-cluster"); r.Code == 0 {
		return
	}
	ip := func(pod int) string { return fmt.Sprintf("10.244.%d.%d", 20+pod/200, 10+pod%200) }
	each("nodes", bigNodes, func(i int) error {
		return send("POST", "/api/v1/nodes", fmt.Sprintf(`{"metadata":{"name":"big-%d"},"spec":{"unschedulable":true,"podCIDR":"10.244.%d.0/24","podCIDRs":["10.244.%d.0/24"]}}`, i, 20+i, 20+i))
	})
	each("namespaces", bigNamespaces, func(i int) error {
		return send("POST", "/api/v1/namespaces", fmt.Sprintf(`{"metadata":{"name":"big-%d"}}`, i))
	})
	each("Services", bigServices, func(i int) error {
		return send("POST", fmt.Sprintf("/api/v1/namespaces/big-%d/services", i%bigNamespaces), fmt.Sprintf(`{"metadata":{"name":"svc-%d","labels":{
			"service.kubernetes.io/service-proxy-name":"none","app.kubernetes.io/name":"shop","app.kubernetes.io/part-of":"big","helm.sh/chart":"shop-1.2.3"},
			"annotations":{"meta.helm.sh/release-name":"shop","meta.helm.sh/release-namespace":"big"}},
			"spec":{"ports":[{"name":"http","port":80,"targetPort":8080},{"name":"metrics","port":9090}]}}`, i/bigNamespaces))
	})
	each("pods", bigPods, func(i int) error {
		path := fmt.Sprintf("/api/v1/namespaces/big-%d/pods", i%bigNamespaces)
		err := send("POST", path, fmt.Sprintf(`{"metadata":{"name":"pod-%d","labels":{"app.kubernetes.io/name":"shop","pod-template-hash":"5d4f8c7b9"}},
			"spec":{"schedulerName":"nobody","automountServiceAccountToken":false,"containers":[
			{"name":"app","image":"registry.example/shop/app:1.2.3","ports":[{"containerPort":8080}],"env":[{"name":"A","value":"%0100d"},{"name":"B","value":"%0100d"}],
			"resources":{"requests":{"cpu":"10m","memory":"16Mi"}}},{"name":"proxy","image":"registry.example/mesh/proxy:1.2.3"}]}}`, i/bigNamespaces, i, i))
		if err != nil {
			return err
		}
		return send("PATCH", fmt.Sprintf("%s/pod-%d/status", path, i/bigNamespaces), fmt.Sprintf(
			`{"status":{"phase":"Running","hostIP":"172.30.200.%d","podIP":%q,"podIPs":[{"ip":%q}]}}`, 1+i/200, ip(i), ip(i)))
	})
	kubectl(t, "create", "configmap", "-n", "default", "big-cluster")
}
