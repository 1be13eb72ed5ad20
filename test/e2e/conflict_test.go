//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// cartChanged is what somebody makes of the Service while it is exchanged: a new
// label with this value, and the wide selector.
func cartChanged(value string) string {
	return strings.Replace(cartWide, "team: shop", "team: shop, round: "+value, 1)
}

// cartState is the intercept as its developer's daemon knows it.
func cartState(t *testing.T) string {
	t.Helper()
	for _, i := range intercepts(t, netlab.Alice) {
		if i.Service == "cart" {
			return i.State
		}
	}
	return ""
}

// cartSelector is the Service's selector and the label round, as they are.
func cartSelector(t *testing.T) string {
	t.Helper()
	return kubectl(t, "-n", "shop", "get", "service", "cart", "-o", "jsonpath={.spec.selector} {.metadata.labels.round}")
}

// TestConflict: somebody else changes the Service while it is exchanged. Culvert's
// change is made again on top of his, at most three times; then his stays. At the
// end the Service is what he made of it last.
func TestConflict(t *testing.T) {
	openShop(t)
	nobodyLeft(t)
	t.Cleanup(func() {
		newCart(t)
		nobodyLeft(t)
	})
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	// The gates go on from one part to the next.
	alice.intercept(t, "exchange", "twins", "--expose", "8080:one")
	force := func(t *testing.T, manifest string) { t.Helper(); ownerApplies(t, manifest, "--force-conflicts") }
	// What the Service is when its owner alone has applied this.
	alone := func(t *testing.T, manifest string) []string {
		t.Helper()
		force(t, manifest)
		return serviceLines(t)
	}
	t.Run("applied once", func(t *testing.T) {
		want := alone(t, cartChanged("one"))
		ownerApplies(t, cartNarrow)
		alice.intercept(t, exchangeCart...)
		force(t, cartChanged("one"))
		took := answeredBy(t, "alice", 5*time.Second)
		eventually(t, 5*time.Second, func() error {
			if s := cartSelector(t); !strings.Contains(s, "culvert") || !strings.Contains(s, "one") {
				return fmt.Errorf("selector and label are %s", s)
			}
			return nil
		})
		t.Logf("applied by its owner, and made again within %v", took)
		alice.leave(t, "cart")
		sameLines(t, want, 5*time.Second, func() []string { return serviceLines(t) })
		ownerApplies(t, cartNarrow)
	})
	t.Run("applied four times", func(t *testing.T) {
		want := alone(t, cartChanged("four"))
		ownerApplies(t, cartNarrow)
		alice.intercept(t, exchangeCart...)
		for _, round := range []string{"one", "two", "three"} {
			force(t, cartChanged(round))
			eventually(t, 5*time.Second, func() error {
				if s := cartSelector(t); !strings.Contains(s, "culvert") || !strings.Contains(s, round) {
					return fmt.Errorf("round %s: selector and label are %s", round, s)
				}
				return nil
			})
			answeredBy(t, "alice", 3*time.Second)
		}
		force(t, cartChanged("four"))
		eventually(t, 5*time.Second, func() error {
			if s := cartState(t); s != api.InterceptLost {
				return fmt.Errorf("the intercept is %q", s)
			}
			return nil
		})
		answeredBy(t, "cart-*", 3*time.Second)
		var cause string
		for _, i := range intercepts(t, netlab.Alice) {
			cause = i.Cause
		}
		t.Logf("given up: %s", cause)
		if !strings.Contains(cause, "cart") && !strings.Contains(cause, "owner") {
			t.Errorf("the cause names nobody: %q", cause)
		}
		sameLines(t, want, 5*time.Second, func() []string { return serviceLines(t) })
		alice.leave(t, "cart")
		sameLines(t, want, 5*time.Second, func() []string { return serviceLines(t) })
		ownerApplies(t, cartNarrow)
	})
	t.Run("replaced", func(t *testing.T) {
		old := kubectl(t, "-n", "shop", "get", "service", "cart", "-o", "json", "--show-managed-fields")
		alice.intercept(t, exchangeCart...)
		// As who had edited an old copy: no annotation of ours, another port's name.
		var service map[string]any
		if err := json.Unmarshal([]byte(old), &service); err != nil {
			t.Fatal(err)
		}
		meta := service["metadata"].(map[string]any)
		for _, field := range []string{"resourceVersion", "managedFields", "generation", "creationTimestamp"} {
			delete(meta, field)
		}
		meta["labels"].(map[string]any)["round"] = "replaced"
		b, _ := json.Marshal(service)
		if r := lab.Kubectl("", strings.NewReader(string(b)), "replace", "-f", "-"); r.Code != 0 {
			t.Fatalf("kubectl replace: %v", r)
		}
		eventually(t, 5*time.Second, func() error {
			if s := cartSelector(t); !strings.Contains(s, "culvert") || !strings.Contains(s, "replaced") {
				return fmt.Errorf("selector and label are %s", s)
			}
			return nil
		})
		answeredBy(t, "alice", 3*time.Second)
		alice.leave(t, "cart")
		if s := cartSelector(t); s != `{"app":"cart","tier":"back"} replaced` {
			t.Errorf("selector and label are %s", s)
		}
		answeredBy(t, "cart-*", 3*time.Second)
		newCart(t) // fields of this one are kubectl's
	})
	t.Run("--on-conflict leave", func(t *testing.T) {
		alice.intercept(t, append(exchangeCart, "--on-conflict", "leave")...)
		force(t, cartChanged("mine"))
		eventually(t, 5*time.Second, func() error {
			if s := cartState(t); s != api.InterceptLost {
				return fmt.Errorf("the intercept is %q", s)
			}
			return nil
		})
		answeredBy(t, "cart-*", 3*time.Second)
		alice.leave(t, "cart")
		if s := cartSelector(t); !strings.Contains(s, "mine") || strings.Contains(s, "culvert") {
			t.Errorf("selector and label are %s", s)
		}
		ownerApplies(t, cartNarrow)
	})
	t.Run("an owner who forces nothing is told", func(t *testing.T) {
		alice.intercept(t, exchangeCart...)
		r := lab.Kubectl("", strings.NewReader(cartWide), "apply", "--server-side", "--field-manager=owner", "-f", "-")
		if r.Code == 0 || !strings.Contains(r.Stderr, "culvert") {
			t.Errorf("an unforced apply while exchanged: %v", r)
		}
		alice.leave(t, "cart")
		ownerApplies(t, cartWide)
		ownerApplies(t, cartNarrow)
	})
	t.Run("the Service is deleted", func(t *testing.T) {
		alice.intercept(t, "exchange", "shelf", "--expose", "8080:80")
		kubectl(t, "-n", "shop", "delete", "service", "shelf")
		eventually(t, 5*time.Second, func() error {
			for _, i := range intercepts(t, netlab.Alice) {
				if i.Service == "shelf" && i.State != api.InterceptLost {
					return fmt.Errorf("the intercept is %q", i.State)
				}
			}
			return nil
		})
		alice.leave(t, "--all")
		openOnceMore(t)
	})
}

// newCart makes the Service anew, with fields that are nobody's but its owner's.
func newCart(t *testing.T) {
	t.Helper()
	kubectl(t, "-n", "shop", "delete", "service", "cart")
	ownerApplies(t, cartNarrow)
}

// openOnceMore applies the shop's manifest again.
func openOnceMore(t *testing.T) {
	t.Helper()
	ownerApplies(t, shopManifest, "--force-conflicts")
}

// serviceLines is the Service cart, but for what changes by itself.
func serviceLines(t *testing.T) []string {
	t.Helper()
	var o map[string]any
	if err := json.Unmarshal([]byte(kubectl(t, "-n", "shop", "get", "service", "cart", "-o", "json", "--show-managed-fields")), &o); err != nil {
		t.Fatal(err)
	}
	name, o := plainObject(o)
	return appendLeaves(nil, name, o)
}
