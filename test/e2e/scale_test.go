//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// headlessIPs are the addresses to which the shop's headless Service leads.
func headlessIPs(t *testing.T, service string) []string {
	t.Helper()
	r := fromPod("node1", "lookup", service+".shop")
	if r.Code != 0 {
		return nil // none just now
	}
	return strings.Fields(r.Stdout)
}

// TestHeadless: clients of a headless Service look its pods up and dial the very
// port. So its gates are its pods, and listen there.
func TestHeadless(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	local := alice.serve(t, "127.0.0.1")
	before := headlessIPs(t, "stock")
	// It gives a StatefulSet's pods their names, which nobody should lose unawares.
	refused{args: []string{"exchange", "stock", "--expose", "8080:http"}, code: 1, words: []string{"stock-0.stock", "--mode scale", "--force"}}.check(t, alice)
	alice.intercept(t, "exchange", "stock", "--expose", "8080:http", "--force")
	eventually(t, 15*time.Second, func() error { // what was looked up is kept by the cluster DNS for some seconds
		for _, ip := range headlessIPs(t, "stock") {
			for _, old := range before {
				if ip == old {
					return fmt.Errorf("the name still leads to %s", ip)
				}
			}
		}
		return nil
	})
	served(t, "http", "stock.shop:8080", "alice")
	for _, ip := range headlessIPs(t, "stock") {
		addr := ip + ":8080"
		if strings.Contains(ip, ":") {
			addr = "[" + ip + "]:8080"
		}
		served(t, "http", addr, "alice")
	}
	local.stop()
	served(t, "http", "stock.shop:8080", "stock-*")
	alice.leave(t, "stock")
	eventually(t, 15*time.Second, func() error {
		name, _, err := whoAnswers("node2", "http", "stock.shop:8080")
		if err == nil && !serves(name, "stock-*") {
			err = fmt.Errorf("%s answers", name)
		}
		return err
	})

	alice.serve(t, "127.0.0.1")
	alice.intercept(t, "mesh", "stock", "--expose", "8080:http", "--force", "--version-mark", "alice")
	meshed(t, "stock.shop:8080", "alice", 15*time.Second, "VERSION:alice")
	meshed(t, "stock.shop:8080", "stock-*", time.Second)
	alice.leave(t, "stock")
	meshed(t, "stock.shop:8080", "stock-*", 15*time.Second, "VERSION:alice")
}

// TestScale: the pods of a workload are replaced by the machine, and come back as
// they were.
func TestScale(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	replicas := func(t *testing.T, workload string) string {
		t.Helper()
		return kubectl(t, "-n", "shop", "get", workload, "-o", "jsonpath={.spec.replicas}")
	}
	for _, c := range []struct{ workload, addr, origin string }{
		{"deployment/cart", cartPort(t, 80), "cart-*"},
		{"statefulset/stock", "stock.shop:8080", "stock-*"},
	} {
		t.Run(c.workload, func(t *testing.T) {
			before := listNamespace(t, "shop")
			r := alice.culvert("exchange", c.workload, "--expose", "8080:8080", "--mode", "scale")
			t.Cleanup(func() { alice.leave(t, "--all") })
			if r.Code != 0 {
				t.Fatalf("exchange --mode scale: %v", r)
			}
			for _, word := range []string{"replace", "pods", "fail open"} {
				if !strings.Contains(strings.ToLower(r.Stdout+r.Stderr), word) {
					t.Errorf("it does not say %q: %v", word, r)
				}
			}
			if n := replicas(t, c.workload); n != "0" {
				t.Errorf("%s has %s replicas", c.workload, n)
			}
			// Pods that end go on being found for a moment; that is what this mode costs.
			for _, from := range clients {
				eventually(t, 15*time.Second, func() error {
					name, _, err := whoAnswers(from, "http", c.addr)
					if err == nil && name != "alice" {
						err = fmt.Errorf("%s answers", name)
					}
					return err
				})
			}
			served(t, "http", c.addr, "alice")
			alice.leave(t, c.workload)
			sameNamespace(t, "shop", before, 30*time.Second)
			eventually(t, 15*time.Second, func() error {
				name, _, err := whoAnswers("node1", "http", c.addr)
				if err == nil && !serves(name, c.origin) {
					err = fmt.Errorf("%s answers", name)
				}
				return err
			})
		})
	}
	t.Run("autoscaled", func(t *testing.T) {
		apply(t, `
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata: {name: cart, namespace: shop}
spec:
  scaleTargetRef: {apiVersion: apps/v1, kind: Deployment, name: cart}
  minReplicas: 2
  maxReplicas: 3
  metrics: [{type: Resource, resource: {name: cpu, target: {type: Utilization, averageUtilization: 90}}}]
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata: {name: cart, namespace: shop}
spec: {minAvailable: 1, selector: {matchLabels: {app: cart}}}
`)
		before := listNamespace(t, "shop")
		r := alice.culvert("exchange", "deployment/cart", "--expose", "8080:8080", "--mode", "scale")
		said := strings.ToLower(r.Stdout + r.Stderr)
		if !strings.Contains(said, "autoscaler") || !strings.Contains(said, "budget") {
			t.Errorf("neither autoscaler nor budget are told of: %v", r)
		}
		alice.leave(t, "--all")
		sameNamespace(t, "shop", before, 30*time.Second)
	})
	t.Run("killed", func(t *testing.T) {
		alice.intercept(t, "exchange", "deployment/cart", "--expose", "8080:8080", "--mode", "scale")
		vanish(t, alice)
		if r := alice.culvert("recover", "deployment/cart", "--force"); r.Code != 0 {
			t.Errorf("recover: %v", r)
		}
		eventually(t, 20*time.Second, func() error {
			if n := replicas(t, "deployment/cart"); n != "2" {
				return fmt.Errorf("%s replicas", n)
			}
			return nil
		})
		if err := lab.StartDaemon(); err != nil {
			t.Fatal(err)
		}
		alice.connect(t)
		kubectl(t, "-n", "shop", "rollout", "status", "deployment/cart", "--timeout=60s")
	})
}

// TestEphemeral: kt-connect's third mode is recognised.
func TestEphemeral(t *testing.T) {
	openShop(t)
	r := aliceAt(t).culvert("exchange", "cart", "--expose", "8080:80", "--mode", "ephemeral")
	if r.Code != 2 || !strings.Contains(r.Stderr, "ephemeral") || !strings.Contains(r.Stderr, "selector") {
		t.Errorf("--mode ephemeral: %v", r)
	}
}
