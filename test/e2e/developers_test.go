//go:build e2e

package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// neighbour is the second developer's machine, made when a test needs it first.
var neighbour *netlab.Machine

// bobNextDoor is Bob at the neighbour of the laptop, with a daemon of his own.
func bobNextDoor(t *testing.T) developer {
	t.Helper()
	openShop(t)
	if neighbour == nil {
		m, err := netlab.NewNeighbour()
		if err != nil {
			t.Fatal(err)
		}
		neighbour = m
	}
	if err := neighbour.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		neighbour.Culvert(netlab.Bob, "disconnect") // of a test that failed
		if err := neighbour.StopDaemon(); err != nil {
			t.Error(err)
		}
	})
	return developer{neighbour, netlab.Bob}
}

// TestTwoDevelopers: one Service has one holder. The second is told who that is,
// may wait for him, and takes over from one who is gone. Two Services of one
// namespace are no matter.
func TestTwoDevelopers(t *testing.T) {
	unchangedShop(t)
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	bob.serve(t, "127.0.0.1")
	alice.connect(t)
	bob.connect(t)

	t.Run("told and waiting", func(t *testing.T) {
		alice.intercept(t, exchangeCart...)
		since := wantListed(t, "cart", listed{Kind: "exchange", Alive: true, User: "alice"}).Since
		r := bob.culvert(exchangeCart...)
		if r.Code != 1 || !strings.Contains(r.Stderr, "alice") || !strings.Contains(r.Stderr, "--wait") {
			t.Errorf("Bob's exchange of the same Service: %v", r)
		}
		t.Logf("since %v, Bob is told: %s", since, strings.TrimSpace(r.Stderr))
		if r := bob.culvert("recover", "cart"); r.Code != 1 || !strings.Contains(r.Stderr, "alice") {
			t.Errorf("Bob recovers what Alice holds and uses: %v", r)
		}
		served(t, "http", cartPort(t, 80), "alice")
		if r := bob.culvert(append(exchangeCart, "--wait", "1s")...); r.Code != 1 || !strings.Contains(r.Stderr, "alice") {
			t.Errorf("Bob waits for 1 s: %v", r)
		}
		waited := make(chan netlab.Result, 1)
		go func() { waited <- bob.culvert(append(exchangeCart, "--wait", "60s")...) }()
		time.Sleep(2 * time.Second)
		begun := time.Now()
		alice.leave(t, "cart")
		if r := <-waited; r.Code != 0 {
			t.Errorf("Bob waited: %v", r)
		}
		answeredBy(t, "bob", 2*time.Second)
		t.Logf("Bob has it %v after Alice left", time.Since(begun))
	})
	// From here on Bob has it.
	t.Run("one each", func(t *testing.T) {
		load := startLoad(t, "node1", "http://"+cartPort(t, 80)+"/who", time.Minute)
		fresh := startLoad(t, "node2", "http://"+cartPort(t, 80)+"/who", time.Minute, "--keepalive=false")
		alice.intercept(t, "exchange", "shelf", "--expose", "8080:80")
		shelfBy(t, "alice", 3*time.Second) // its nodes were changed a moment ago, and let a second pass
		served(t, "http", cartPort(t, 80), "bob")
		// Alice's machine is away; Bob's is not.
		link(t, "--cut", "on")
		time.Sleep(2 * time.Second)
		served(t, "http", "shelf.shop:80", "cart-*")
		link(t, "--cut", "off")
		shelfBy(t, "alice", 10*time.Second)
		alice.leave(t, "shelf")
		for _, l := range []*loading{load, fresh} {
			got := l.stop(t)
			got.none(t)
			if len(got.Answers) != 1 || len(got.Answers["bob"]) == 0 {
				t.Errorf("others than Bob answered: %v", got.Answers)
			}
		}
	})
	t.Run("taken over", func(t *testing.T) {
		served(t, "http", cartPort(t, 80), "bob")
		lease := vanish(t, bob)
		r := alice.culvert(exchangeCart...)
		if r.Code != 1 || !strings.Contains(r.Stderr, "bob") {
			t.Errorf("Bob is away for seconds, and Alice's exchange says: %v", r)
		}
		// Not renewed for eleven minutes.
		ago := time.Now().UTC().Add(-11 * time.Minute).Format("2006-01-02T15:04:05.000000Z")
		kubectl(t, "-n", "shop", "patch", lease, "--type=merge", "-p", `{"spec":{"renewTime":"`+ago+`"}}`)
		wantListed(t, "cart", listed{Kind: "exchange", Alive: false, User: "bob"})
		load := startLoad(t, "node1", "http://"+cartPort(t, 80)+"/who", time.Minute, "--keepalive=false")
		alice.intercept(t, exchangeCart...)
		answeredBy(t, "alice", 2*time.Second)
		load.stop(t).none(t)
		wantListed(t, "cart", listed{Kind: "exchange", Alive: true, User: "alice"})
		// Bob is back, and what he starts with does not hurt Alice.
		if err := bob.StartDaemon(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3 * time.Second)
		served(t, "http", cartPort(t, 80), "alice")
		alice.leave(t, "cart")
		served(t, "http", cartPort(t, 80), "cart-*")
		bob.connect(t) // takes away what the killed session left
	})
}

// shelfBy waits until a server answers at the Service shelf.
func shelfBy(t *testing.T, name string, within time.Duration) {
	t.Helper()
	eventually(t, within, func() error {
		for _, c := range clients {
			got, _, err := whoAnswers(c, "http", "shelf.shop:80")
			if err == nil && !serves(got, name) {
				err = fmt.Errorf("%s answers %s, not %s", got, c, name)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// vanish kills all of a developer's at once, so that nothing of it is cleaned up,
// and returns his session's Lease.
func vanish(t *testing.T, d developer) (lease string) {
	t.Helper()
	leases := kubectl(t, "-n", "shop", "get", "leases", "-o", "json")
	pid := d.pid()
	r := d.Culvert(d.user, "status", "-o", "json")
	sessions, err := lastJSON[[]struct{ ID string }](r.Stdout)
	if err != nil || len(sessions) != 1 || !strings.Contains(leases, "culvert-"+sessions[0].ID) {
		t.Fatalf("no Lease of the session %v in %s", r, leases)
	}
	if err := d.KillWith(pid); err != nil {
		t.Fatal(err)
	}
	return "lease/culvert-" + sessions[0].ID
}

// TestClean: what no living session owns is listed, and taken away by anybody;
// what lives stays.
func TestClean(t *testing.T) {
	unchangedShop(t)
	alice, bob := aliceAt(t), bobNextDoor(t)
	alice.serve(t, "127.0.0.1")
	bob.serve(t, "127.0.0.1")
	alice.connect(t)
	alice.intercept(t, "exchange", "shelf", "--expose", "8080:80")
	bob.connect(t)
	bob.intercept(t, exchangeCart...)
	lease := vanish(t, bob)
	ago := time.Now().UTC().Add(-25 * time.Hour).Format("2006-01-02T15:04:05.000000Z")
	kubectl(t, "-n", "shop", "patch", lease, "--type=merge", "-p", `{"spec":{"renewTime":"`+ago+`"}}`)
	before := listNamespace(t, "shop")
	r := alice.culvert("clean", "--dry-run")
	if r.Code != 0 || !strings.Contains(r.Stdout, "cart") || strings.Contains(r.Stdout, "shelf") {
		t.Errorf("clean --dry-run: %v", r)
	}
	sameNamespace(t, "shop", before, time.Second)
	if r := alice.culvert("clean", "--older-than", "48h"); r.Code != 0 || strings.Contains(r.Stdout, "cart") {
		t.Errorf("clean --older-than 48h: %v", r)
	}
	served(t, "http", cartPort(t, 80), "cart-*") // the gates', by now
	load := startLoad(t, "node1", "http://"+cartPort(t, 80)+"/who", 4*time.Second, "--keepalive=false")
	if r := alice.culvert("clean"); r.Code != 0 || !strings.Contains(r.Stdout, "cart") {
		t.Errorf("clean: %v", r)
	}
	load.wait(t).none(t)
	if s := cartSelector(t); strings.Contains(s, "culvert") {
		t.Errorf("the selector is %s", s)
	}
	served(t, "http", "shelf.shop:80", "alice")
	if left := kubectl(t, "-n", "shop", "get", "deployments,leases", "-l", "culvert.dev/session="+strings.TrimPrefix(lease, "lease/culvert-"), "-o", "name"); left != "" {
		t.Errorf("left of Bob's session: %s", left)
	}
	if err := bob.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	alice.leave(t, "shelf")
}

// TestList: every Service of the namespace is listed, whoever has it.
func TestList(t *testing.T) {
	openShop(t)
	alice := aliceAt(t)
	alice.serve(t, "127.0.0.1")
	alice.intercept(t, exchangeCart...)
	l := wantListed(t, "cart", listed{Kind: "exchange", Mode: "selector", User: "alice", Alive: true})
	if age := time.Since(l.Since); age < 0 || age > time.Minute {
		t.Errorf("since %v, %v ago", l.Since, age)
	}
	for _, name := range []string{"shelf", "stock", "outside", "manual", "twins"} {
		wantListed(t, name, listed{})
	}
	r := alice.culvert("list")
	for _, word := range []string{"cart", "shelf", "stock", "alice", "exchange"} {
		if !strings.Contains(r.Stdout, word) {
			t.Errorf("culvert list does not show %s: %v", word, r)
		}
	}
	if strings.Contains(r.Stdout, "origin") {
		t.Errorf("culvert list shows what is culvert's own: %v", r)
	}
}
