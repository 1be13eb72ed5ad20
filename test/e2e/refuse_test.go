//go:build e2e

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// refusal is a connect that must fail: with this exit code, naming these words,
// soon, and with nothing changed on the machine or in the cluster.
type refusal struct {
	name   string
	user   netlab.User // zero: Alice
	args   []string    // after "connect"; --kubeconfig developer and --image are added unless given
	env    []string
	code   int
	words  []string
	within time.Duration // zero: 20 s
}

func (r refusal) check(t *testing.T) {
	t.Helper()
	if r.user.Name == "" {
		r.user = netlab.Alice
	}
	if r.within == 0 {
		r.within = 20 * time.Second
	}
	args := append([]string{"connect"}, r.args...)
	joined := " " + strings.Join(args, " ") + " "
	if !strings.Contains(joined, " --kubeconfig ") && r.env == nil {
		args = append(args, "--kubeconfig", kubeconfig(t, "", "developer"))
	}
	if !strings.Contains(joined, " --image ") {
		args = append(args, "--image", image)
	}
	before := listMachine(t)
	cmd := lab.Command(background(t), r.user, filepath.Join(lab.Dir, "bin/culvert"), args...)
	cmd.Env = append(cmd.Env, r.env...)
	got := netlab.Run(cmd)
	if got.Code != r.code {
		t.Errorf("culvert %v: want exit code %d: %v", args, r.code, got)
	}
	for _, w := range r.words {
		if !strings.Contains(strings.ToLower(got.Stderr), strings.ToLower(w)) {
			t.Errorf("culvert %v: the error does not name %q: %v", args, w, got)
		}
	}
	if got.Took > r.within {
		t.Errorf("culvert %v: the error took %v", args, got.Took)
	}
	if diff := compare(before, listMachine(t)); diff != "" {
		t.Errorf("culvert %v changed the machine:\n%s", args, diff)
	}
	eventually(t, 10*time.Second, func() error { return noAgents(t) })
	if t.Failed() {
		t.Logf("daemon:\n%s", lab.Tail(30))
	}
}

func noAgents(t *testing.T) error {
	if left := kubectl(t, "get", "deployments,replicasets,pods", "-A", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "name"); left != "" {
		return &leftError{left}
	}
	return nil
}

type leftError struct{ what string }

func (e *leftError) Error() string { return "left in the cluster: " + e.what }

func TestRefusals(t *testing.T) {
	dead := filepath.Join(lab.Home(netlab.Alice), "dead.kubeconfig")
	config, err := os.ReadFile(kubeconfig(t, "", "developer"))
	if err != nil {
		t.Fatal(err)
	}
	unreachable := strings.NewReplacer(":6443", ":6444").Replace(string(config))
	if err := os.WriteFile(dead, []byte(unreachable), 0o644); err != nil {
		t.Fatal(err)
	}
	apply(t, `
apiVersion: v1
kind: Namespace
metadata: {name: tight}
---
apiVersion: v1
kind: ResourceQuota
metadata: {name: none, namespace: tight}
spec: {hard: {pods: "0"}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-user, namespace: tight}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-user}
subjects: [{kind: Group, name: developers, apiGroup: rbac.authorization.k8s.io}]
`)
	for _, r := range []refusal{
		{name: "no kubeconfig", args: []string{"--context", ""}, env: []string{"KUBECONFIG="}, code: 1, words: []string{"kubeconfig", "--kubeconfig"}},
		{name: "missing kubeconfig", args: []string{"--kubeconfig", "/nowhere/config"}, code: 1, words: []string{"/nowhere/config"}},
		{name: "unknown context", args: []string{"--context", "prod"}, code: 1, words: []string{"prod", "culvert-test"}},
		{name: "expired credentials", args: []string{"--kubeconfig", kubeconfig(t, "", "expired")}, code: 1, words: []string{"credential"}},
		{name: "forbidden", args: []string{"--kubeconfig", kubeconfig(t, "", "nobody")}, code: 1, words: []string{"create", "deployments", "default"}},
		{name: "API server unreachable", args: []string{"--kubeconfig", dead}, code: 1, words: []string{"6444"}},
		{name: "image that cannot be pulled", args: []string{"--image", "registry.invalid/culvert-agent:1"}, code: 1, words: []string{"registry.invalid/culvert-agent:1", "--image"}, within: 40 * time.Second},
		{name: "namespace missing", args: []string{"-n", "nowhere", "--kubeconfig", kubeconfig(t, "", "admin")}, code: 1, words: []string{"nowhere"}},
		{name: "quota", args: []string{"-n", "tight"}, code: 1, words: []string{"tight", "quota"}},
		{name: "malformed exclude", args: []string{"--exclude-ips", "10.96.0.0/33"}, code: 2, words: []string{"10.96.0.0/33"}},
		{name: "malformed include", args: []string{"--includeIps", "10.300.0.1"}, code: 2, words: []string{"10.300.0.1"}},
		{name: "default route included", args: []string{"--include-ips", "0.0.0.0/0"}, code: 2, words: []string{"0.0.0.0/0"}},
		{name: "default route excluded", args: []string{"--exclude-ips", "::/0"}, code: 2, words: []string{"::/0"}},
		{name: "unknown flag", args: []string{"--exclude-ip", "10.0.0.1"}, code: 2, words: []string{"--exclude-ip"}},
		{name: "the local network included", args: []string{"--include-ips", "192.168.50.0/24"}, code: 1, words: []string{"192.168.50", "--exclude-ips"}},
		{name: "public address included", args: []string{"--include-ips", "8.8.8.0/24"}, code: 1, words: []string{"8.8.8.0/24"}},
		{name: "root", user: netlab.Root, code: 1, words: []string{"root", "sudo"}},
		{name: "caller not in the group", user: netlab.Mallory, code: 1, words: []string{"group culvert", "usermod"}},
		{name: "no such daemon", env: []string{"CULVERT_SOCKET=/nowhere/culvert.sock", "KUBECONFIG=" + kubeconfig(t, "", "developer")}, code: 1, words: []string{"/nowhere/culvert.sock", "culvertd"}},
	} {
		t.Run(r.name, r.check)
	}
}

// TestOverlap: what collides with the machine's network is found before
// anything changes, with both sides named and the flag that resolves it.
func TestOverlap(t *testing.T) {
	route := func(t *testing.T, prefix string) {
		root(t, "ip route add "+prefix+" via 192.168.50.9")
		t.Cleanup(func() { root(t, "ip route del "+prefix+" via 192.168.50.9") })
	}
	t.Run("equal", func(t *testing.T) {
		route(t, "10.244.1.0/24")
		refusal{code: 1, words: []string{"10.244.1.0/24", "--exclude-ips"}}.check(t)
	})
	t.Run("inside", func(t *testing.T) {
		route(t, "10.96.7.0/24")
		refusal{code: 1, words: []string{"10.96.7.0/24", "10.96.0.0/16", "--exclude-ips 10.96.7.0/24"}}.check(t)
	})
	t.Run("resolved by the flag", func(t *testing.T) {
		route(t, "10.96.7.0/24")
		s := connect(t, "--exclude-ips", "10.96.7.0/24")
		if got := sh(t, "ip route get 10.96.7.1"); strings.Contains(got, s.Device) {
			t.Errorf("an excluded address goes into the tunnel: %s", got)
		}
	})
	t.Run("a wider route beside it", func(t *testing.T) {
		route(t, "10.0.0.0/8")
		s := connect(t)
		fresh(t, 5*time.Second)
		if got := sh(t, "ip route get 10.1.2.3"); strings.Contains(got, s.Device) || !strings.Contains(got, "192.168.50.9") {
			t.Errorf("an address of the corporate network: %s", got)
		}
	})
}

func TestSecondConnect(t *testing.T) {
	connect(t)
	r := lab.Culvert(netlab.Alice, "connect", "--kubeconfig", kubeconfig(t, "", "developer"), "--image", image)
	if r.Code != 1 || !strings.Contains(r.Stderr, "already") {
		t.Errorf("a second connect to the same cluster: %v", r)
	}
	fresh(t, 5*time.Second)
}

func TestNoTUN(t *testing.T) {
	// A daemon that sees no /dev/net/tun, as in many containers.
	if err := lab.StopDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := lab.StartDaemonBehind("mount -t tmpfs tmpfs /dev/net"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := lab.StopDaemon(); err != nil {
			t.Error(err)
		}
		if err := lab.StartDaemon(); err != nil {
			t.Fatal(err)
		}
	})
	refusal{code: 1, words: []string{"/dev/net/tun"}}.check(t)
}
