//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// TestPreview: a new Service that the machine answers, and from outside too.
func TestPreview(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	t.Run("inside", func(t *testing.T) {
		i := alice.intercept(t, "preview", "cart-next", "--expose", "8080:80")
		if i.Kind != api.KindPreview || i.Service != "cart-next" || len(i.Ports) != 1 || i.Ports[0].Port != 80 {
			t.Errorf("have %+v", i)
		}
		served(t, "http", "cart-next.shop:80", "alice")
		served(t, "http", cartPort(t, 80), "cart-*")
		if got := sh(t, "curl -sS --max-time 10 http://cart-next.shop/who"); !strings.HasPrefix(got, "alice ") {
			t.Errorf("on the laptop: %s", got)
		}
		wantListed(t, "cart-next", listed{Kind: "preview", Alive: true, User: "alice"})
		if r := alice.culvert("preview", "cart-next", "--expose", "8080:80"); r.Code != 1 || !strings.Contains(r.Stderr, "cart-next") {
			t.Errorf("the same name again: %v", r)
		}
		if r := alice.culvert("preview", "cart", "--expose", "8080:80"); r.Code != 1 || !strings.Contains(r.Stderr, "exchange") {
			t.Errorf("the name of a Service that exists: %v", r)
		}
		alice.leave(t, "cart-next")
		if r := lab.Kubectl("", nil, "-n", "shop", "get", "service", "cart-next"); r.Code == 0 {
			t.Errorf("the Service stays: %v", r)
		}
	})
	t.Run("load balancer", func(t *testing.T) {
		got := alice.preview(t, []string{"--expose", "8080:80", "--external"}, "service/cart-next",
			`{"status":{"loadBalancer":{"ingress":[{"ip":"203.0.113.7"}]}}}`)
		if len(got.Addresses) != 1 || !strings.Contains(got.Addresses[0], "203.0.113.7") {
			t.Errorf("addresses %v", got.Addresses)
		}
		served(t, "http", "cart-next.shop:80", "alice")
		alice.leave(t, "cart-next")
	})
	t.Run("ingress", func(t *testing.T) {
		got := alice.preview(t, []string{"--expose", "8080:80", "--external", "--host", "cart.example.test", "--ingress-class", "mine"}, "ingress/cart-next",
			`{"status":{"loadBalancer":{"ingress":[{"ip":"203.0.113.8"}]}}}`)
		if !strings.Contains(fmt.Sprint(got.Addresses), "cart.example.test") {
			t.Errorf("addresses %v", got.Addresses)
		}
		rule := kubectl(t, "-n", "shop", "get", "ingress", "cart-next", "-o", "jsonpath={.spec.ingressClassName} {.spec.rules[0].host} {.spec.rules[0].http.paths[0].backend.service.name}")
		if rule != "mine cart.example.test cart-next" {
			t.Errorf("the Ingress is %s", rule)
		}
		alice.leave(t, "cart-next")
	})
}

// preview starts one that waits for an address, and plays the controller that
// gives it.
func (d developer) preview(t *testing.T, flags []string, object, status string) api.Intercept {
	t.Helper()
	t.Cleanup(func() { d.leave(t, "--all") })
	ended := make(chan netlab.Result, 1)
	go func() {
		ended <- netlab.Run(d.command(context.Background(), append([]string{"preview", "cart-next", "-o", "json"}, flags...)...))
	}()
	eventually(t, 20*time.Second, func() error {
		if r := lab.Kubectl("", nil, "-n", "shop", "patch", object, "--subresource=status", "--type=merge", "-p", status); r.Code != 0 {
			return fmt.Errorf("the controller's status: %v", r)
		}
		return nil
	})
	r := <-ended
	i, err := lastJSON[api.Intercept](r.Stdout)
	if r.Code != 0 || err != nil {
		t.Fatalf("preview: %v, %v", err, r)
	}
	return i
}

// TestExpose: ports on the agent's pod IP, stable while the session lives. A
// program registers them where clients look up IPs, and is called.
func TestExpose(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	i := alice.intercept(t, "expose", "8080", "9000:9091", "9001/udp")
	if i.Kind != api.KindExpose || len(i.Addresses) == 0 {
		t.Fatalf("have %+v", i)
	}
	// The registry's own variables, as a program of the developer's gets them.
	vars := sh(t, "culvert env --advertise dubbo --format export")
	var registered netip.AddrPort
	for _, address := range i.Addresses {
		if a, err := netip.ParseAddrPort(address); err == nil && a.Addr().Is4() && a.Port() == 8080 {
			registered = a
		}
	}
	for _, want := range []string{"DUBBO_IP_TO_REGISTRY='" + registered.Addr().String() + "'", "DUBBO_PORT_TO_REGISTRY='8080'"} {
		if !strings.Contains(vars, want) {
			t.Errorf("the variables do not have %s:\n%s", want, vars)
		}
	}
	// The registry hands out what the program registered.
	kubectl(t, "-n", "clients", "create", "configmap", "registry", "--from-literal=cart="+registered.String())
	t.Cleanup(func() { kubectl(t, "-n", "clients", "delete", "configmap", "registry") })
	found := kubectl(t, "-n", "clients", "get", "configmap", "registry", "-o", "jsonpath={.data.cart}")
	served(t, "http", found, "alice")
	ip := registered.Addr().String()
	served(t, "tcp", ip+":9091", "alice")
	served(t, "udp", ip+":9001", "alice")
	if r := alice.culvert("expose", "8081:8080"); r.Code != 1 || !strings.Contains(r.Stderr, "8080") {
		t.Errorf("a port that is exposed already: %v", r)
	}
	if name, _, err := whoAnswers("node1", "tcp", ip+":9092"); err == nil {
		t.Errorf("a port that is not exposed is answered by %s", name)
	}
	alice.leave(t, "9091")
	served(t, "http", found, "alice")
	if _, _, err := whoAnswers("node1", "tcp", ip+":9091"); err == nil {
		t.Error("a port that was left still answers")
	}
}

// TestForward: a local port for those who want one, without a session.
func TestForward(t *testing.T) {
	openShop(t)
	alice := aliceAt(t)
	pod := words(t, "-n", "shop", "get", "pods", "-l", "app=cart", "-o", "jsonpath={.items[0].metadata.name}")[0]
	for _, args := range [][]string{
		{"cart", "6060:80"},
		{"service/cart", "6061:http"},
		{"pod/" + pod, "6062:8080"},
		{clusterIP(t, "cart"), "6063:80"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			ctx, cancel := context.WithCancel(context.Background())
			cmd := alice.command(ctx, append([]string{"forward"}, args...)...)
			said := &output{}
			cmd.Stdout, cmd.Stderr = said, said
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			t.Cleanup(func() {
				cancel()
				<-ended
			})
			port, _, _ := strings.Cut(args[1], ":")
			eventually(t, 15*time.Second, func() error {
				r := lab.Run(netlab.Alice, "curl", "-sS", "--max-time", "5", "http://127.0.0.1:"+port+"/who")
				if r.Code != 0 || !strings.HasPrefix(r.Stdout, "cart-") {
					return fmt.Errorf("%v\n%s", r, said)
				}
				return nil
			})
		})
	}
	if r := alice.culvert("forward", "nowhere", "6064:80"); r.Code != 1 || !strings.Contains(r.Stderr, "nowhere") {
		t.Errorf("forward of a Service that is not there: %v", r)
	}
}
