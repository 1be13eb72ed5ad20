//go:build e2e

package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

// marked asks the cart from a pod, with headers, and returns who answered and with
// which status.
func marked(client, addr string, headers ...string) (server string, status int, err error) {
	args := []string{"--json", "ask", "http://" + addr + "/who"}
	for _, h := range headers {
		args = append(args, "--header", h)
	}
	r := fromPod(client, args...)
	var got struct {
		Server string
		Status int
	}
	if err := json.Unmarshal([]byte(r.Stdout), &got); r.Code != 0 || err != nil {
		return "", 0, fmt.Errorf("%s asks %s with %q: %v", client, addr, headers, r)
	}
	return got.Server, got.Status, nil
}

// meshed wants that name answers requests with these headers, from pods on both nodes,
// before long.
func meshed(t *testing.T, addr, name string, within time.Duration, headers ...string) {
	t.Helper()
	eventually(t, within, func() error {
		for _, c := range clients {
			got, status, err := marked(c, addr, headers...)
			if err == nil && (!serves(got, name) || status != 200) {
				err = fmt.Errorf("%s answers %s with %d, not %s", got, c, status, name)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// TestMesh: two developers mesh one Service at once, each with a mark of his own, and
// nobody else notices.
func TestMesh(t *testing.T) {
	unchangedShop(t)
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	bob.serve(t, "127.0.0.1")
	alice.connect(t)
	bob.connect(t)
	at := cartPort(t, 80)

	begun := time.Now()
	i := alice.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "alice", "--tag-responses")
	if i.Kind != api.KindMesh || i.Mode != api.ModeRouter || !slices.Equal(i.Match, []string{"header:VERSION=alice"}) || strings.Contains(strings.Join(i.Notes, " "), "not known") {
		t.Errorf("have %+v", i)
	}
	meshed(t, at, "alice", 3*time.Second, "VERSION:alice")
	t.Logf("first mesh in the namespace, no gates: %v until the first request is at the machine", time.Since(begun))
	meshed(t, at, "cart-*", time.Second)
	meshed(t, at, "cart-*", time.Second, "VERSION:Alice")
	meshed(t, at, "cart-*", time.Second, "X-VERSION:alice")
	served(t, "tcp", cartPort(t, 7000), "cart-*")
	served(t, "udp", cartPort(t, 7001), "cart-*")

	t.Run("refused", func(t *testing.T) {
		for _, c := range []struct {
			args []string
			says []string
		}{
			{[]string{"mesh", "cart", "--expose", "8080:80", "--version-mark", "version:alice"}, []string{"alice", "VERSION", "--wait"}},
			{[]string{"mesh", "cart", "--expose", "8080:80", "--version-mark", "a b:c"}, []string{"a b", "RFC 9110"}},
			{[]string{"mesh", "cart", "--expose", "9001:dgram"}, []string{"7001", "exchange"}},
			{[]string{"mesh", "carts", "--expose", "8080:80"}, []string{"did you mean", "cart"}},
			{[]string{"mesh", "cart", "--expose", "8080:81"}, []string{"81"}},
			{[]string{"mesh", "cart", "--expose", "8080:80", "--match", "heder:a=b"}, []string{"heder"}},
			{[]string{"mesh", "cart", "--expose", "8080:80", "--mode", "istio"}, []string{"VirtualService", "does not have", "--mode router"}},
			{[]string{"mesh", "cart", "--expose", "8080:80", "--mode", "gateway"}, []string{"HTTPRoute", "does not have"}},
			{[]string{"exchange", "cart", "--expose", "8080:80"}, []string{"meshed", "alice"}},
			{[]string{"recover", "cart"}, []string{"alice", "alive"}},
		} {
			r := bob.culvert(c.args...)
			if r.Code == 0 {
				t.Errorf("culvert %v: %v", c.args, r)
			}
			for _, word := range c.says {
				if !strings.Contains(r.Stderr, word) {
					t.Errorf("culvert %v does not say %q: %v", c.args, word, r)
				}
			}
		}
		r := alice.culvert("mesh", "cart", "--expose", "8080:80", "--version-mark", "again")
		if r.Code != 1 || !strings.Contains(r.Stderr, "already") {
			t.Errorf("a second mesh of one's own: %v", r)
		}
		meshed(t, at, "alice", time.Second, "VERSION:alice")
	})

	begun = time.Now()
	bob.intercept(t, "mesh", "cart", "--expose", "8080:http", "--version-mark", "X-Dev:Feature/X", "--on-gone", "fail")
	t.Logf("a second developer: %v", time.Since(begun))
	meshed(t, at, "bob", time.Second, "x-dev:Feature/X")
	meshed(t, at, "alice", time.Second, "version:alice")
	meshed(t, at, "cart-*", time.Second)

	t.Run("shown", func(t *testing.T) {
		r := bob.culvert("list")
		for _, word := range []string{"alice", "bob", "mesh", "header:VERSION=alice", "header:X-Dev=Feature/X"} {
			if !strings.Contains(r.Stdout, word) {
				t.Errorf("culvert list does not say %q: %v", word, r)
			}
		}
		show, err := lastJSON[struct {
			Members []struct {
				User  string
				Alive bool
			}
			Routes []struct {
				RequestsToOrigin int64
				Members          []struct{ Requests int64 }
			}
		}](alice.culvert("mesh", "--show", "cart", "-o", "json").Stdout)
		if err != nil || len(show.Members) != 2 || !show.Members[1].Alive || show.Members[0].User != "alice" || len(show.Routes[0].Members) != 2 ||
			show.Routes[0].Members[1].Requests == 0 || show.Routes[0].RequestsToOrigin == 0 {
			t.Errorf("mesh --show: %+v, %v", show, err)
		}
		if r := alice.culvert("mesh", "--show", "cart"); r.Code != 0 || !strings.Contains(r.Stdout, "VERSION=alice") {
			t.Errorf("mesh --show as a table: %v", r)
		}
		if r := alice.culvert("logs", "--router", "cart"); r.Code != 0 || !strings.Contains(r.Stdout, "GET /who HTTP/1.1 200") || !strings.Contains(r.Stdout, "-> bob") {
			t.Errorf("logs --router: %v", r)
		}
	})

	t.Run("a machine that is away", func(t *testing.T) {
		link(t, "--cut", "on")
		meshed(t, at, "cart-*", 3*time.Second, "VERSION:alice")
		meshed(t, at, "bob", time.Second, "X-Dev:Feature/X") // his is not
		link(t, "--cut", "off")
		meshed(t, at, "alice", 10*time.Second, "VERSION:alice")
		signalled(t, bob.pid(), syscall.SIGSTOP)
		eventually(t, 5*time.Second, func() error {
			_, status, err := marked(clients[0], at, "X-Dev:Feature/X")
			if err == nil && status != 503 {
				err = fmt.Errorf("status %d", status)
			}
			return err
		})
		meshed(t, at, "alice", time.Second, "VERSION:alice")
		// The daemon replaces a session that does not answer.
		meshed(t, at, "bob", 30*time.Second, "X-Dev:Feature/X")
	})

	t.Run("who came first leaves first", func(t *testing.T) {
		alice.leave(t, "cart")
		meshed(t, at, "cart-*", 2*time.Second, "VERSION:alice")
		meshed(t, at, "bob", time.Second, "X-Dev:Feature/X")
	})
	t.Run("the last one", func(t *testing.T) {
		bob.leave(t, "cart")
		meshed(t, at, "cart-*", 2*time.Second, "X-Dev:Feature/X")
	})
	t.Run("of what is exchanged", func(t *testing.T) {
		alice.intercept(t, "exchange", "cart", "--expose", "8080:80")
		r := bob.culvert("mesh", "cart", "--expose", "8080:80", "--version-mark", "bob")
		if r.Code != 1 || !strings.Contains(r.Stderr, "alice") || !strings.Contains(r.Stderr, "--wait") {
			t.Errorf("a mesh of what Alice exchanges: %v", r)
		}
		alice.leave(t, "cart")
	})
}

// TestMeshKilled: the session's process is killed while others are in the mesh, and
// goes on; and one that vanished is taken out by whoever cleans.
func TestMeshKilled(t *testing.T) {
	unchangedShop(t)
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	bob.serve(t, "127.0.0.1")
	alice.connect(t)
	bob.connect(t)
	at := cartPort(t, 80)
	bob.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "bob")
	alice.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "alice")
	meshed(t, at, "alice", 3*time.Second, "VERSION:alice")
	meshed(t, at, "bob", 3*time.Second, "VERSION:bob")
	signalled(t, alice.pid(), syscall.SIGKILL)
	meshed(t, at, "alice", 10*time.Second, "VERSION:alice")
	meshed(t, at, "bob", time.Second, "VERSION:bob")

	lease := vanish(t, bob)
	meshed(t, at, "cart-*", 5*time.Second, "VERSION:bob")
	// Whoever cleans after a day finds what is Bob's, and nothing of Alice's.
	ago := time.Now().UTC().Add(-25 * time.Hour).Format("2006-01-02T15:04:05.000000Z")
	kubectl(t, "-n", "shop", "patch", lease, "--type=merge", "-p", `{"spec":{"renewTime":"`+ago+`"}}`)
	if r := alice.culvert("clean", "--dry-run"); r.Code != 0 || !strings.Contains(r.Stdout, "bob") || strings.Contains(r.Stdout, "restore") {
		t.Errorf("clean --dry-run: %v", r)
	}
	if r := alice.culvert("clean"); r.Code != 0 {
		t.Errorf("clean: %v", r)
	}
	if r := alice.culvert("list", "-o", "json"); r.Code != 0 || strings.Contains(r.Stdout, `"bob"`) {
		t.Errorf("after clean: %v", r)
	}
	meshed(t, at, "alice", time.Second, "VERSION:alice")
	if err := bob.StartDaemon(); err != nil { // finds nothing of his
		t.Fatal(err)
	}
	time.Sleep(3 * time.Second)
	meshed(t, at, "alice", time.Second, "VERSION:alice")
	bob.connect(t)

	// The last one vanishes, too: whoever recovers waits until he is known to be gone.
	lease = vanish(t, alice)
	r := bob.culvert("recover", "cart")
	if r.Code == 0 || !strings.Contains(r.Stderr, "alice") {
		t.Errorf("recover of a mesh whose member was just seen: %v", r)
	}
	kubectl(t, "-n", "shop", "patch", lease, "--type=merge", "-p", `{"spec":{"renewTime":"`+ago+`"}}`)
	if r := bob.culvert("recover", "cart"); r.Code != 0 {
		t.Errorf("recover: %v", r)
	}
	meshed(t, at, "cart-*", 2*time.Second, "VERSION:alice")
	if err := alice.StartDaemon(); err != nil { // takes away its agent
		t.Fatal(err)
	}
}

// TestMeshMemberKilled: the process of one who leaves is killed at each step of that,
// and nobody else in the mesh notices.
func TestMeshMemberKilled(t *testing.T) {
	unchangedShop(t)
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	bob.serve(t, "127.0.0.1")
	// It forbids nothing, but with it gates, origin and each member's agent need policies.
	apply(t, `
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: everything, namespace: shop}
spec: {podSelector: {}, ingress: [{}]}
`)
	bob.connect(t)
	at := cartPort(t, 80)
	bob.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "bob")
	meshed(t, at, "bob", 3*time.Second, "VERSION:bob")
	load := startLoad(t, "node1", "http://"+at+"/who", 5*time.Minute, "--header", "VERSION:bob", "--keepalive=false")
	var before []string
	eventually(t, 30*time.Second, func() error { // gates stop going by the pods' own addresses
		if before = listNamespace(t, "shop"); strings.Contains(strings.Join(before, "\n"), "backends") {
			return errors.New("the mesh has not settled")
		}
		return nil
	})
	for _, step := range []string{"entry", "push", "active", "drain", "entry-removed", "policy-deleted"} {
		one := &walk{developer: alice, service: "cart", address: at, mesh: true}
		if step == "active" { // a session that outlives the command
			if r := one.at("kill", step, "expose", "8080"); r.Code != 0 {
				t.Fatalf("expose: %v", r)
			}
		}
		if err := one.prepare("kill", step); err != nil {
			t.Fatal(err)
		}
		r := <-one.last("kill", step)
		if step == "active" {
			meshed(t, at, "alice", 15*time.Second, "VERSION:walk")
		}
		eventually(t, 20*time.Second, func() error {
			if r := alice.Culvert(alice.user, "disconnect"); r.Code != 0 {
				return fmt.Errorf("disconnect: %v", r)
			}
			return one.nobodyHere()
		})
		sameLines(t, withoutTimes(before), 20*time.Second, func() []string { return withoutTimes(listNamespace(t, "shop")) })
		meshed(t, at, "bob", time.Second, "VERSION:bob")
		t.Logf("killed at %s: %s", step, strings.TrimSpace(r.Stderr))
	}
	got := load.stop(t)
	got.none(t)
	if first, ok := got.at("cart-*", time.UnixMilli(got.Begun)); ok {
		t.Errorf("the origin answered what is Bob's at %v", first)
	}
}

// withoutTimes leaves out what changes while a mesh goes on: its state's generation,
// and the times of heartbeats.
func withoutTimes(lines []string) (same []string) {
	for _, l := range lines {
		if strings.HasPrefix(l, "ConfigMap/culvert-gate data generation") || strings.HasPrefix(l, "Lease/") && strings.Contains(l, " spec renewTime ") {
			continue
		}
		same = append(same, l)
	}
	return same
}

// TestMeshUnderLoad: developers come and go, the first and the last among them, and
// no request fails, whosoever it is.
func TestMeshUnderLoad(t *testing.T) {
	unchangedShop(t)
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	bob.serve(t, "127.0.0.1")
	alice.connect(t)
	bob.connect(t)
	at := cartPort(t, 80)
	url, most := "http://"+at+"/who", 2*time.Minute
	loads := []*loading{
		startLoad(t, "node1", url, most),
		startLoad(t, "node2", url, most, "--keepalive=false"),
		startLoad(t, "node1", url, most, "--post", "--rate", "100", "--header", "VERSION:alice"),
		startLoad(t, "node2", url, most, "--keepalive=false", "--rate", "100", "--header", "VERSION:bob"),
	}
	time.Sleep(time.Second)
	alice.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "alice")
	bob.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "bob")
	meshed(t, at, "bob", 3*time.Second, "VERSION:bob")
	through := startLoad(t, "node1", url, most, "--rate", "100", "--header", "VERSION:alice") // whose connections begin at gates
	time.Sleep(2 * time.Second)
	alice.leave(t, "cart")
	time.Sleep(time.Second)
	bob.leave(t, "cart")
	time.Sleep(300 * time.Millisecond)
	for _, l := range append(loads, through) {
		got := l.stop(t)
		got.none(t)
		switch l {
		case loads[0], loads[1]:
			if len(got.Answers["alice"])+len(got.Answers["bob"]) > 0 {
				t.Errorf("machines answered what is not marked: %v", got.Answers)
			}
		case loads[3]:
			if len(got.Answers["bob"]) < 50 || len(got.Answers["alice"]) > 0 {
				t.Errorf("Bob answered %d of his, Alice %d", len(got.Answers["bob"]), len(got.Answers["alice"]))
			}
		case through:
			if len(got.Answers["alice"]) < 50 || len(got.Answers["bob"]) > 0 {
				t.Errorf("Alice answered %d of hers, Bob %d", len(got.Answers["alice"]), len(got.Answers["bob"]))
			}
		}
	}
}

// TestMeshHalfway: the first one in hangs in the midst of its start, when everything is
// there but the traffic; the second does the rest, and nobody notices.
func TestMeshHalfway(t *testing.T) {
	unchangedShop(t)
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	alice.connect(t)
	at := cartPort(t, 80)
	load := startLoad(t, "node1", "http://"+at+"/who", 2*time.Minute, "--keepalive=false")
	half := &walk{developer: bob, service: "cart", address: at, mesh: true}
	if _, err := half.stopped("push"); err != nil {
		t.Fatal(err)
	}
	alice.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "alice")
	meshed(t, at, "alice", 3*time.Second, "VERSION:alice")
	meshed(t, at, "cart-*", time.Second, "VERSION:walk")
	eventually(t, time.Minute, half.nobodyHere) // the daemon gives it up
	meshed(t, at, "alice", time.Second, "VERSION:alice")
	alice.leave(t, "cart")
	got := load.stop(t)
	got.none(t)
	if len(got.Answers["alice"]) > 0 {
		t.Errorf("the machine answered what is not marked: %d", len(got.Answers["alice"]))
	}
}

// TestMeshConflict: somebody changes the Service of a mesh. One of its members puts it
// right, and for all of them; so often as for an exchange, however many they are.
func TestMeshConflict(t *testing.T) {
	openShop(t)
	nobodyLeft(t)
	t.Cleanup(func() {
		newCart(t)
		nobodyLeft(t)
	})
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	bob.serve(t, "127.0.0.1")
	alice.connect(t)
	bob.connect(t)
	at := cartPort(t, 80)
	force := func(manifest string) { t.Helper(); ownerApplies(t, manifest, "--force-conflicts") }
	force(cartChanged("four"))
	want := serviceLines(t)
	ownerApplies(t, cartNarrow)
	alice.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "alice")
	bob.intercept(t, "mesh", "cart", "--expose", "8080:80", "--version-mark", "bob")
	for _, round := range []string{"one", "annotation", "three"} {
		if round == "annotation" { // and nothing else: what was there before is in it
			kubectl(t, "-n", "shop", "annotate", "service", "cart", "culvert.dev/intercept-")
		} else {
			force(cartChanged(round))
		}
		eventually(t, 5*time.Second, func() error {
			if s := cartSelector(t); !strings.Contains(s, "culvert") || round != "annotation" && !strings.Contains(s, round) {
				return fmt.Errorf("round %s: selector and label are %s", round, s)
			}
			if kubectl(t, "-n", "shop", "get", "service", "cart", "-o", `jsonpath={.metadata.annotations.culvert\.dev/intercept}`) == "" {
				return fmt.Errorf("round %s: there is no annotation", round)
			}
			return nil
		})
		if s := kubectl(t, "-n", "shop", "get", "service", "cart-culvert-origin", "-o", "jsonpath={.spec.selector}"); strings.Contains(s, "culvert") {
			t.Fatalf("round %s: the origin selects %s", round, s)
		}
		meshed(t, at, "cart-*", 3*time.Second)
		meshed(t, at, "alice", 3*time.Second, "VERSION:alice")
		meshed(t, at, "bob", 3*time.Second, "VERSION:bob")
		time.Sleep(2500 * time.Millisecond) // until the other member has looked, too
	}
	force(cartChanged("four"))
	eventually(t, 15*time.Second, func() error {
		for _, d := range []developer{alice, bob} {
			r := d.culvert("list", "-o", "json")
			if strings.Contains(r.Stdout, `"mesh"`) || r.Code != 0 {
				return fmt.Errorf("%v", r)
			}
		}
		return nil
	})
	meshed(t, at, "cart-*", 3*time.Second, "VERSION:alice")
	sameLines(t, want, 5*time.Second, func() []string { return serviceLines(t) })
	alice.leave(t, "cart")
	bob.leave(t, "cart")
	sameLines(t, want, 5*time.Second, func() []string { return serviceLines(t) })
}
