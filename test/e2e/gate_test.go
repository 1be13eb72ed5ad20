//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// evict asks for a pod's eviction, as `kubectl drain` does.
func evict(t *testing.T, namespace, pod string) {
	t.Helper()
	eviction := fmt.Sprintf(`{"apiVersion":"policy/v1","kind":"Eviction","metadata":{"name":%q,"namespace":%q}}`, pod, namespace)
	r := lab.Kubectl("", strings.NewReader(eviction), "create", "--raw", fmt.Sprintf("/api/v1/namespaces/%s/pods/%s/eviction", namespace, pod), "-f", "-")
	if r.Code != 0 {
		t.Fatal(r)
	}
}

// twoGates waits until two gates are ready, none of them ending, and returns them.
func twoGates(t *testing.T) (ready []string) {
	t.Helper()
	eventually(t, 30*time.Second, func() error {
		out := kubectl(t, "-n", "shop", "get", "pods", "-l", "app.kubernetes.io/name=culvert-gate", "-o",
			`jsonpath={range .items[*]}{.metadata.name} {.metadata.deletionTimestamp} {.status.conditions[?(@.type=="Ready")].status}{"\n"}{end}`)
		ready = nil
		for line := range strings.Lines(out) {
			if f := strings.Fields(line); len(f) == 2 && f[1] == "True" {
				ready = append(ready, f[0])
			}
		}
		if len(ready) != 2 || strings.Count(out, "culvert-gate") != 2 {
			return fmt.Errorf("gates:\n%s", out)
		}
		return nil
	})
	return ready
}

// TestGateLoss: what happens to gates and agent in an ordinary cluster's life
// costs no request; kill -9 of one costs those that were on its connections.
func TestGateLoss(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	alice.intercept(t, exchangeCart...)
	t.Run("placed", func(t *testing.T) {
		nodes := words(t, "-n", "shop", "get", "pods", "-l", "app.kubernetes.io/name=culvert-gate", "-o", "jsonpath={.items[*].spec.nodeName}")
		slices.Sort(nodes)
		if fmt.Sprint(nodes) != "[node1 node2]" {
			t.Errorf("gates are on %v", nodes)
		}
		if got := kubectl(t, "-n", "shop", "get", "poddisruptionbudgets", "-l", "app.kubernetes.io/managed-by=culvert", "-o", "jsonpath={.items[*].status.expectedPods}"); got != "2" {
			t.Errorf("disruption budgets of pods: %s", got)
		}
	})
	// First, while neither gate was ever killed: a container that is killed again
	// waits for 10 s.
	t.Run("gates killed while the machine sleeps", func(t *testing.T) {
		pods := twoGates(t)
		link(t, "--cut", "on")
		for _, g := range pods {
			killPod(t, "shop", g)
		}
		for _, g := range pods {
			restarted(t, g)
		}
		for _, g := range twoGates(t) {
			if !slices.Contains(pods, g) {
				t.Errorf("the pod %s is another than before", g)
			}
		}
		for _, ip := range serviceAddrs(t, "cart")[:1] {
			served(t, "http", ip+":80", "cart-*")
			served(t, "tcp", ip+":7000", "cart-*")
			served(t, "udp", ip+":7001", "cart-*")
		}
		startLoad(t, "node1", "http://"+cartPort(t, 80)+"/who", 2*time.Second, "--keepalive=false").wait(t).none(t)
		link(t, "--cut", "off")
		answeredBy(t, "alice", 10*time.Second)
	})
	agentPod := func(t *testing.T) (namespace, pod string) {
		t.Helper()
		s := status(t, netlab.Alice)[0]
		return s.Agent.Namespace, s.Agent.Pod
	}
	for _, c := range []struct {
		name string
		do   func(*testing.T) // and waits until it is over
		// killed: it is gone without a word, so requests on what was open fail, and,
		// until the cluster notices, on what is sent to it.
		killed bool
		origin bool // may answer meanwhile
	}{
		{name: "gate evicted", do: func(t *testing.T) {
			evict(t, "shop", twoGates(t)[0])
			twoGates(t)
		}},
		{name: "agent evicted", origin: true, do: func(t *testing.T) {
			namespace, pod := agentPod(t)
			evict(t, namespace, pod)
			kubectl(t, "-n", namespace, "wait", "--for=delete", "pod/"+pod, "--timeout=30s")
		}},
		{name: "node drained of agent and gate", origin: true, do: func(t *testing.T) {
			node := status(t, netlab.Alice)[0].Agent.Node
			t.Cleanup(func() { kubectl(t, "uncordon", node) })
			kubectl(t, "drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--pod-selector=app.kubernetes.io/managed-by=culvert", "--timeout=30s")
		}},
		{name: "agent killed", origin: true, killed: true, do: func(t *testing.T) { killAgent(t, status(t, netlab.Alice)[0]) }},
		{name: "gate killed", killed: true, do: func(t *testing.T) { killPod(t, "shop", twoGates(t)[0]) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			twoGates(t)
			url, most := "http://"+cartPort(t, 80)+"/who", time.Minute
			loads := []*loading{
				startLoad(t, "node1", url, most),
				startLoad(t, "node2", url, most, "--post", "--rate", "100"),
				startLoad(t, "node2", url, most, "--keepalive=false"),
			}
			time.Sleep(time.Second)
			begun := time.Now()
			c.do(t)
			done := time.Now()
			if c.killed {
				time.Sleep(notice)
			}
			answeredBy(t, "alice", 20*time.Second)
			time.Sleep(500 * time.Millisecond)
			for _, l := range loads {
				got := l.stop(t)
				if c.killed {
					killedOne(t, got, begun, done)
				} else {
					got.none(t)
				}
				origin, ok := got.at("cart-*", begun)
				if !ok {
					continue
				}
				t.Logf("the origin served from %v on", origin.Sub(begun))
				if !c.origin {
					t.Errorf("the origin served although the machine was there")
				}
				if l == loads[2] { // what is kept stays with the origin
					away := got.pause("alice", begun)
					t.Logf("the machine answered nothing for %v", away)
					if away > 6*time.Second {
						t.Errorf("%s: the machine answered nothing for %v", c.name, away)
					}
				}
			}
			waitState(t, netlab.Alice, api.Connected, 20*time.Second)
		})
	}
}

// notice is how long it may take until every node knows that a process is dead:
// the kubelet sees it within a second, and then so does each node's kube-proxy.
const notice = 2 * time.Second

// restarted waits until the only container of a pod of the shop was started again.
func restarted(t *testing.T, pod string) {
	t.Helper()
	eventually(t, 30*time.Second, func() error {
		if n := kubectl(t, "-n", "shop", "get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"); n == "0" {
			return fmt.Errorf("%s was started once", pod)
		}
		return nil
	})
}

// killedOne wants that what failed was on an open connection, or was refused by a
// process that was dead before the cluster could know.
func killedOne(t *testing.T, got loaded, begun, done time.Time) {
	t.Helper()
	open, refused := 0, time.Duration(0)
	for _, f := range got.Failures {
		switch at := time.UnixMilli(f.At); {
		case f.Kind == "refused" && at.Before(done.Add(notice)):
			refused = max(refused, at.Sub(begun))
		case f.Reused || at.Before(done):
			open++
		default:
			t.Errorf("%v after the kill a request failed: %+v", at.Sub(done), f)
			return
		}
	}
	t.Logf("of %d failures %d were on open connections; refused until %v after the kill began, which took %v", got.Failed, open, refused, done.Sub(begun))
	if open > loadClients {
		t.Errorf("%d failures on open connections, of which there were %d", open, loadClients)
	}
}
