//go:build e2e

package e2e

import (
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// editKubeconfig is a user's kubeconfig with one change.
func editKubeconfig(t *testing.T, user, old, new string) string {
	t.Helper()
	text, err := os.ReadFile(kubeconfig(t, "", user))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), old) {
		t.Fatalf("no %s in %s", old, text)
	}
	f, err := os.CreateTemp(lab.Home(netlab.Alice), "kubeconfig")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	t.Cleanup(func() { os.Remove(f.Name()) })
	if err := f.Chmod(0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(strings.Replace(string(text), old, new, 1)); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// connectWith connects with a kubeconfig of the test's.
func connectWith(t *testing.T, config string, more ...string) api.Session {
	t.Helper()
	return connectAs(t, netlab.Alice, "", "developer", append([]string{"--kubeconfig", config}, more...)...)
}

// serveProxy is an HTTP proxy that knows CONNECT only, on the laptop's neighbour.
func serveProxy(t *testing.T, addr string) *atomic.Int64 {
	t.Helper()
	var used atomic.Int64
	var l net.Listener
	if err := netlab.In("lan", func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		var up net.Conn
		if err := netlab.In("lan", func() (err error) {
			up, err = net.DialTimeout("tcp", r.Host, 5*time.Second)
			return err
		}); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer up.Close()
		used.Add(1)
		down, buffered, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer down.Close()
		io.WriteString(down, "HTTP/1.1 200 Connection established\r\n\r\n")
		go func() {
			io.Copy(up, buffered)
			up.Close()
		}()
		io.Copy(down, up)
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return &used
}

// TestProxy: an HTTP proxy is in front of the API server, at an address inside
// the cluster's own Service range. All of the session goes through it, and the
// way to it never leads into the tunnel.
func TestProxy(t *testing.T) {
	const proxy = "10.96.250.9"
	lan := func(args ...string) {
		if r := lab.Cluster(append([]string{"exec", "lan", "--"}, args...)...); r.Code != 0 {
			t.Fatalf("%v: %v", args, r)
		}
	}
	lan("ip", "addr", "add", proxy+"/32", "dev", "lo")
	t.Cleanup(func() { lan("ip", "addr", "del", proxy+"/32", "dev", "lo") })
	root(t, "ip route add "+proxy+" via 192.168.50.9")
	t.Cleanup(func() { root(t, "ip route del "+proxy+" via 192.168.50.9") })
	used := serveProxy(t, proxy+":3128")
	// Nobody goes past the proxy.
	root(t, "nft add table inet nodirect; nft 'add chain inet nodirect out { type filter hook output priority 0; }'; nft add rule inet nodirect out ip daddr 172.30.0.10 reject")
	t.Cleanup(func() { root(t, "nft delete table inet nodirect") })

	s := connectWith(t, editKubeconfig(t, "developer", `"server": `, `"proxy-url": "http://`+proxy+`:3128", "server": `))
	if n := used.Load(); n < 2 {
		t.Errorf("the proxy was used %d times: not by the carrier?", n)
	}
	fresh(t, 5*time.Second)
	if got := sh(t, "ip route get "+proxy); strings.Contains(got, s.Device) || !strings.Contains(got, "192.168.50.9") {
		t.Errorf("the proxy goes into the tunnel: %s", got)
	}
	if got := sh(t, "ip route get 10.96.250.8"); !strings.Contains(got, s.Device) {
		t.Errorf("its neighbour in the Service range does not: %s", got)
	}
	sh(t, "getent hosts echo.demo")
}

// TestServerByName: a kubeconfig names the API server by its host name. All of
// its addresses stay out of the tunnel.
func TestServerByName(t *testing.T) {
	s := connectWith(t, editKubeconfig(t, "developer", "172.30.0.10:6443", "api.cluster.test:6443"), "--include-ips", "172.30.0.0/24,fd00:172:30::/64")
	for addr, inside := range map[string]bool{"172.30.0.10": false, "fd00:172:30::10": false, "172.30.0.12": true, "fd00:172:30::12": true} {
		if got := sh(t, "ip route get "+addr); strings.Contains(got, s.Device) != inside {
			t.Errorf("%s: %s, want in the tunnel: %v", addr, got, inside)
		}
	}
	if got := sh(t, "getent ahosts api.cluster.test | awk '{print $1}' | sort -u | wc -l"); got != "2" {
		t.Errorf("api.cluster.test has %s addresses while connected", got)
	}
	fresh(t, 5*time.Second)
}

// TestHostNetwork: the address of a pod that uses its node's is no route.
func TestHostNetwork(t *testing.T) {
	apply(t, `
apiVersion: v1
kind: Pod
metadata: {name: on-the-node, namespace: default}
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  nodeSelector: {kubernetes.io/hostname: node1}
  containers: [{name: app, image: testapp.local/busybox:1, command: [sleep, "600"]}]
`)
	kubectl(t, "-n", "default", "wait", "--for=condition=Ready", "pod/on-the-node", "--timeout=60s")
	ip := kubectl(t, "-n", "default", "get", "pod", "on-the-node", "-o", "jsonpath={.status.podIP}")
	if ip != "172.30.0.11" {
		t.Fatalf("the pod has the address %s, not its node's", ip)
	}
	s := connect(t)
	for _, r := range s.Routes {
		if strings.HasPrefix(r.Prefix.String(), "172.30.") || strings.HasPrefix(r.Prefix.String(), "fd00:172:30:") {
			t.Errorf("a node's address is routed: %v", r)
		}
	}
	for _, addr := range []string{ip, "172.30.0.12", "fd00:172:30::11"} {
		if got := sh(t, "ip route get "+addr); strings.Contains(got, s.Device) {
			t.Errorf("a node's address goes into the tunnel: %s", got)
		}
	}
}

// TestPodsReachable: where the machine's own network reaches the pods too, the
// tunnel is used all the same, and nothing is left of it afterwards.
func TestPodsReachable(t *testing.T) {
	link(t, "--pods", "on")
	s := connect(t)
	fresh(t, 5*time.Second)
	if got := sh(t, "ip route get "+podIPs(t)[0]); !strings.Contains(got, s.Device) {
		t.Errorf("a pod past the tunnel: %s", got)
	}
	alive := longLived(t)
	link(t, "--pods", "off")
	alive(10 * time.Second)
	fresh(t, 5*time.Second)
}

// TestPolicies: the agent passes a namespace that enforces PodSecurity
// "restricted". A quota that demands limits of every pod is told at once, with
// the flag that satisfies it.
func TestPolicies(t *testing.T) {
	apply(t, `
apiVersion: v1
kind: Namespace
metadata: {name: strict, labels: {pod-security.kubernetes.io/enforce: restricted, pod-security.kubernetes.io/enforce-version: latest}}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: limits, namespace: strict}
spec: {hard: {requests.cpu: "1", requests.memory: 1Gi, limits.cpu: "2", limits.memory: 1Gi, pods: "2"}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-user, namespace: strict}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-user}
subjects: [{kind: Group, name: developers, apiGroup: rbac.authorization.k8s.io}]
`)
	refusal{args: []string{"-n", "strict"}, code: 1, words: []string{"limits.cpu", "strict", "--pod-quota"}}.check(t)
	s := connect(t, "-n", "strict", "--pod-quota", "0.5c,256m")
	if s.Agent.Namespace != "strict" {
		t.Errorf("the agent is in %q", s.Agent.Namespace)
	}
	fresh(t, 5*time.Second)
	if r := lab.Culvert(netlab.Alice, "disconnect"); r.Code != 0 {
		t.Fatal(r)
	}
	// More than the quota has left is told with the flag that helps.
	refusal{args: []string{"-n", "strict", "--pod-quota", "4c,4g"}, code: 1, words: []string{"quota", "strict", "--pod-quota"}}.check(t)
}

// TestClusterPackage runs package cluster's own tests against the test cluster,
// on the laptop.
func TestClusterPackage(t *testing.T) {
	dir := t.TempDir()
	binary := filepath.Join(dir, "cluster.test")
	build := exec.Command("go", "test", "-c", "-tags", "e2e", "-o", binary, "./cluster")
	build.Dir = lab.Repo
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building the tests: %v\n%s", err, out)
	}
	cmd := lab.ClusterCommand("exec", "laptop", "--", binary, "-test.v")
	cmd.Dir = filepath.Join(lab.Repo, "cluster")
	cmd.Env = append(os.Environ(), "CULVERT_E2E_USERS="+filepath.Dir(kubeconfig(t, "", "developer")), "CULVERT_E2E_IMAGE="+image)
	r := netlab.Run(cmd)
	if r.Code != 0 {
		t.Errorf("package cluster on the test cluster: %v", r)
	}
}
