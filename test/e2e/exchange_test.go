//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// unchangedShop wants that the test leaves the shop as it found it.
func unchangedShop(t *testing.T) {
	t.Helper()
	openShop(t)
	before := nobodyLeft(t)
	t.Cleanup(func() { sameNamespace(t, "shop", before, 30*time.Second) })
}

// cartPort is the address of a port of the Service cart, by its cluster IP.
func cartPort(t *testing.T, port int) string { return fmt.Sprintf("%s:%d", clusterIP(t, "cart"), port) }

func TestExchange(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	t.Run("first in the namespace", func(t *testing.T) {
		alice.serve(t, "127.0.0.1")
		begun := time.Now()
		i := alice.intercept(t, "exchange", "cart", "--expose", "8080:80,9000:echo", "--expose", "9001:dgram")
		t.Logf("first exchange in the namespace, no gates: %v until it says so, and the machine answers after %v", time.Since(begun), answeredBy(t, "alice", time.Second))
		want := []api.InterceptPort{
			{Local: 8080, Listening: true, Port: 80, Name: "http", Protocol: "TCP", TargetPort: "web"},
			{Local: 9000, Listening: true, Port: 7000, Name: "echo", Protocol: "TCP", TargetPort: "9000"},
			{Local: 9001, Listening: true, Port: 7001, Name: "dgram", Protocol: "UDP", TargetPort: "dgram"},
		}
		for k := range i.Ports { // whether a UDP port has somebody is not known
			if i.Ports[k].Protocol == "UDP" {
				i.Ports[k].Listening = true
			}
		}
		if fmt.Sprint(i.Ports) != fmt.Sprint(want) || i.Kind != api.KindExchange || i.Service != "cart" || i.Namespace != "shop" || i.Since.IsZero() {
			t.Errorf("have %+v, want ports %+v", i, want)
		}
		for _, ip := range serviceAddrs(t, "cart") {
			served(t, "http", net.JoinHostPort(ip, "80"), "alice")
			served(t, "tcp", net.JoinHostPort(ip, "7000"), "alice")
			served(t, "udp", net.JoinHostPort(ip, "7001"), "alice")
			served(t, "tcp", net.JoinHostPort(ip, "7002"), "cart-*") // not exposed
		}
		// A pod of the Service itself calls it, too.
		r := lab.Kubectl("", nil, "-n", "shop", "exec", "deployment/cart", "--", "/testapp", "who", "http", "cart")
		if r.Code != 0 || !strings.HasPrefix(r.Stdout, "alice ") {
			t.Errorf("one of the Service's own pods: %v", r)
		}
		for _, url := range []string{"http://cart.shop", "http://cart.shop.svc.cluster.local", "http://" + cartPort(t, 80)} {
			if got := sh(t, "curl -sS --max-time 10 "+url+"/who"); !strings.HasPrefix(got, "alice ") {
				t.Errorf("%s on the laptop itself: %s", url, got)
			}
		}
		wantListed(t, "cart", listed{Name: "cart", Kind: "exchange", Alive: true})
		if got := intercepts(t, netlab.Alice); len(got) != 1 || got[0].Service != "cart" {
			t.Errorf("the daemon lists %+v", got)
		}
		// Datagrams of many sizes, and more than one flow.
		for _, size := range []string{"1", "1400", "20000"} {
			if r := fromPod("node1", "udp", cartPort(t, 7001), size, "20"); r.Code != 0 || !strings.Contains(r.Stdout, ", 0 lost") {
				t.Errorf("datagrams of %s bytes: %v", size, r)
			}
		}
		if r := fromPod("node2", "put", "http://"+cartPort(t, 80)+"/sha256", "20000000"); r.Code != 0 {
			t.Errorf("a body of 20 MB: %v", r)
		}
	})
	// The same intercept, and the program at other addresses.
	alice.intercept(t, "exchange", "service/cart", "--expose", "8080:web", "--expose", "9000:9000")
	for _, on := range []string{"::1", "0.0.0.0", "127.0.0.1"} {
		t.Run("the program listens at "+on, func(t *testing.T) {
			alice.serve(t, on)
			served(t, "http", cartPort(t, 80), "alice")
			served(t, "tcp", cartPort(t, 7000), "alice")
			served(t, "udp", cartPort(t, 7001), "cart-*")
		})
	}
	alice.leave(t, "cart")
	served(t, "http", cartPort(t, 80), "cart-*")
	t.Run("PROXY protocol", func(t *testing.T) {
		alice.serve(t, "127.0.0.1", "--proxy-protocol")
		begun := time.Now()
		alice.intercept(t, "exchange", "svc/cart", "--expose", "8080:http", "--proxy-protocol")
		t.Logf("started within %v", time.Since(begun))
		for _, c := range clients {
			ip := kubectl(t, "-n", "clients", "get", "pod", c, "-o", "jsonpath={.status.podIP}")
			name, caller, err := whoAnswers(c, "http", cartPort(t, 80))
			if host, _, _ := net.SplitHostPort(caller); err != nil || name != "alice" || host != ip {
				t.Errorf("%s calls from %s, and %s sees %s, %v", c, ip, name, caller, err)
			}
		}
	})
	t.Run("by its workload", func(t *testing.T) {
		alice.serve(t, "127.0.0.1")
		// A Service of only this Deployment would do; several are named.
		r := alice.culvert("exchange", "deployment/cart", "--expose", "8080:web")
		if r.Code != 0 && (!strings.Contains(r.Stderr, "cart") || !strings.Contains(r.Stderr, "shelf")) {
			t.Errorf("exchange deployment/cart: %v", r)
		}
		alice.leave(t, "--all")
	})
}

// TestWarmExchange: while gates run in the namespace, an exchange starts at once.
func TestWarmExchange(t *testing.T) {
	unchangedShop(t)
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	alice.intercept(t, "exchange", "shelf", "--expose", "8080:80")
	for range 3 {
		begun := time.Now()
		alice.intercept(t, "exchange", "cart", "--expose", "8080:80")
		t.Logf("with gates: %v until it says so, the machine answers after another %v", time.Since(begun), answeredBy(t, "alice", 2*time.Second))
		begun = time.Now()
		alice.leave(t, "cart")
		t.Logf("left after %v", time.Since(begun))
		served(t, "http", cartPort(t, 80), "cart-*")
		served(t, "http", "shelf.shop:80", "alice")
	}
}

// TestExchangeAlone: without a session it starts one, which has no routes and no
// names, and which ends with the last intercept.
func TestExchangeAlone(t *testing.T) {
	unchangedShop(t)
	before := listMachine(t)
	alice := aliceAt(t)
	alice.serve(t, "127.0.0.1")
	begun := time.Now()
	alice.intercept(t, "exchange", "cart", "--expose", "8080:80")
	answeredBy(t, "alice", time.Second)
	t.Logf("without a session: %v", time.Since(begun))
	if r := lab.Run(netlab.Alice, "getent", "hosts", "cart.shop"); r.Code == 0 {
		t.Errorf("names of the cluster are known: %v", r)
	}
	if got := sh(t, "ip route get "+clusterIP(t, "cart")); !strings.Contains(got, "192.168.50.1") {
		t.Errorf("a Service goes elsewhere than before: %s", got)
	}
	alice.leave(t, "cart")
	eventually(t, 15*time.Second, func() error {
		if s := status(t, netlab.Alice); len(s) != 0 {
			return fmt.Errorf("the session does not end: %+v", s)
		}
		if diff := compare(before, listMachine(t)); diff != "" && !strings.Contains(diff, "8080") {
			return fmt.Errorf("left on the machine:\n%s", diff)
		}
		return nil
	})
}

// listed is a Service as `culvert list` shows it.
type listed struct {
	Name, Kind, Mode, User string
	Since                  time.Time
	Alive                  bool
}

// wantListed wants that a Service is in `culvert list`, in the order of names, as
// it should be.
func wantListed(t *testing.T, name string, want listed) listed {
	t.Helper()
	r := aliceAt(t).culvert("list", "-o", "json")
	var all []listed
	if err := json.Unmarshal([]byte(r.Stdout), &all); r.Code != 0 || err != nil {
		t.Fatalf("culvert list: %v, %v", err, r)
	}
	for _, l := range all {
		if l.Name != name {
			continue
		}
		if l.Kind != want.Kind || l.Alive != want.Alive || want.Mode != "" && l.Mode != want.Mode || want.User != "" && !strings.Contains(l.User, want.User) {
			t.Errorf("culvert list shows %+v, want %+v", l, want)
		}
		return l
	}
	t.Errorf("culvert list does not show %s: %+v", name, all)
	return listed{}
}

// intercepts are those of a user's sessions, as his daemon knows them: the API is
// asked as the CLI does.
func intercepts(t *testing.T, u netlab.User) (all []api.Intercept) {
	t.Helper()
	text := lab.Run(u, "curl", "-sS", "--unix-socket", lab.Socket, "http://culvert"+api.PathIntercepts)
	if err := json.Unmarshal([]byte(text.Stdout), &all); err != nil {
		t.Fatalf("the daemon's intercepts: %v, %v", err, text)
	}
	return all
}
