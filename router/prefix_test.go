package router

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

func plan(s ...string) []api.Route {
	var res []api.Route
	for _, p := range s {
		res = append(res, api.Route{Prefix: netip.MustParsePrefix(p), Source: "test"})
	}
	return res
}

func nets(s ...string) (res []netip.Prefix) {
	for _, r := range plan(s...) {
		res = append(res, r.Prefix)
	}
	return res
}

func TestCovered(t *testing.T) {
	for _, c := range []struct {
		p    string
		by   []string
		want bool
	}{
		{"10.0.0.0/24", nil, false},
		{"10.0.0.0/24", []string{"10.0.0.0/24"}, true},
		{"10.0.0.0/24", []string{"10.0.0.0/8"}, true},
		{"10.0.0.0/24", []string{"10.0.0.0/25"}, false},
		{"10.0.0.0/24", []string{"10.0.0.128/25", "10.0.0.0/25"}, true},
		{"10.0.0.0/30", []string{"10.0.0.0/32", "10.0.0.1/32", "10.0.0.2/32", "10.0.0.3/32"}, true},
		{"10.0.0.0/30", []string{"10.0.0.0/32", "10.0.0.1/32", "10.0.0.3/32"}, false},
		{"10.0.0.1/32", []string{"10.0.0.1/32"}, true},
		{"fd00::/8", []string{"fd00::/9", "fd80::/9"}, true},
		{"fd00::/8", []string{"0.0.0.0/0"}, false},
	} {
		if got := covered(netip.MustParsePrefix(c.p), nets(c.by...)); got != c.want {
			t.Errorf("%s by %v: %v", c.p, c.by, got)
		}
	}
}

func TestConflicts(t *testing.T) {
	lan := &Facts{
		Gateways:  []Gateway{{Addr: netip.MustParseAddr("192.168.1.1"), Device: "wlan0", Default: true}, {Addr: netip.MustParseAddr("10.1.2.3"), Device: "eth1"}},
		DNS:       []netip.AddrPort{netip.MustParseAddrPort("192.168.1.1:53"), netip.MustParseAddrPort("10.96.0.53:53")},
		Addresses: []Address{{netip.MustParsePrefix("192.168.1.20/24"), "wlan0"}, {netip.MustParsePrefix("172.17.0.1/16"), "docker0"}},
		Routes: []LocalRoute{
			{Prefix: netip.MustParsePrefix("192.168.1.0/24"), Device: "wlan0", Connected: true},
			{Prefix: netip.MustParsePrefix("172.17.0.0/16"), Device: "docker0", Connected: true},
			{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Device: "corp0"},
			{Prefix: netip.MustParsePrefix("10.42.7.0/24"), Device: "wg0", VPN: "wireguard"},
		},
		Sessions: []SessionRanges{{ID: "a1", Context: "b", Routes: nets("10.50.0.0/16"), Excluded: nets("10.50.9.0/24")}},
	}
	for _, c := range []struct {
		plan, excluded string
		want           []string // local: flag
	}{
		{"10.244.0.0/16", "", nil}, // inside a wider corporate route
		{"192.168.0.0/16", "", []string{"route 192.168.1.0/24 dev wlan0 (connected network): 192.168.1.0/24"}},
		{"192.168.0.0/16", "192.168.1.0/24", nil},
		{"192.168.0.0/16", "192.168.1.0/25,192.168.1.128/25", nil},
		{"192.168.0.0/16", "192.168.1.0/25", []string{"route 192.168.1.0/24 dev wlan0 (connected network): 192.168.1.0/24"}},
		{"192.168.1.0/28", "", []string{"DNS server 192.168.1.1: 192.168.1.1"}},
		{"192.168.1.16/28", "", []string{"this machine's address 192.168.1.20 dev wlan0: 192.168.1.20"}},
		{"192.168.1.64/28", "", nil},
		{"172.17.0.0/16", "", []string{"route 172.17.0.0/16 dev docker0 (connected network): 172.17.0.0/16"}},
		{"10.42.0.0/16", "", []string{"route 10.42.7.0/24 dev wg0 (another VPN: wireguard): 10.42.7.0/24"}},
		{"10.96.0.0/12", "", []string{"DNS server 10.96.0.53: 10.96.0.53"}},
		{"10.96.0.0/12", "10.96.0.53/32", nil},
		{"10.1.0.0/16", "", []string{"gateway 10.1.2.3 dev eth1: 10.1.2.3"}},
		{"10.50.3.0/24", "", []string{"range 10.50.0.0/16 of session a1 (context b): 10.50.3.0/24"}},
		{"10.48.0.0/12", "", []string{"range 10.50.0.0/16 of session a1 (context b): 10.50.0.0/16"}},
		{"10.50.9.0/25", "", nil}, // the other session leaves it out
		{"10.48.0.0/12", "10.50.0.0/16", nil},
	} {
		var excluded []netip.Prefix
		if c.excluded != "" {
			excluded = nets(strings.Split(c.excluded, ",")...)
		}
		var got []string
		for _, k := range lan.Conflicts(plan(c.plan), excluded) {
			got = append(got, k.Local+": "+strings.TrimPrefix(k.Flag, "--exclude-ips "))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s without %q:\n got %q\nwant %q", c.plan, c.excluded, got, c.want)
		}
	}
}

func TestPickAddresses(t *testing.T) {
	f := &Facts{}
	in := func(a netip.Addr, p string) bool { return netip.MustParsePrefix(p).Contains(a) }
	check := func(f *Facts, avoid []netip.Prefix, pool string) {
		t.Helper()
		var taken []netip.Addr
		for range 50 {
			tunnel, agent, inbound, err := PickAddresses(f, avoid, taken)
			if err != nil {
				t.Fatal(err)
			}
			for _, pair := range [][]netip.Addr{tunnel, agent, inbound} {
				if len(pair) != 2 || !in(pair[0], pool) || !in(pair[1], "fd00::/8") {
					t.Fatalf("picked %v, want of %s", pair, pool)
				}
				for _, a := range pair {
					if slices.Contains(taken, a) {
						t.Fatalf("%s twice", a)
					}
					if within(single(a), avoid) {
						t.Fatalf("%s is to be avoided", a)
					}
					taken = append(taken, a)
				}
			}
		}
	}
	check(f, nil, "100.64.0.0/10")
	check(f, nets("100.64.0.0/11", "100.96.0.0/12", "fd00::/9"), "100.112.0.0/12")
	check(f, nets("100.64.0.0/10"), "198.19.0.0/16")
	tailscale := &Facts{Addresses: []Address{{netip.MustParsePrefix("100.101.102.103/32"), "tailscale0"}}}
	check(tailscale, nil, "198.19.0.0/16")
	check(&Facts{Routes: []LocalRoute{{Prefix: netip.MustParsePrefix("100.64.5.0/24")}}}, nil, "198.19.0.0/16")
	check(tailscale, nets("198.18.0.0/15"), "10.0.0.0/8")
	check(&Facts{Routes: []LocalRoute{{Prefix: netip.MustParsePrefix("0.0.0.0/1")}, {Prefix: netip.MustParsePrefix("128.0.0.0/1")}}}, nil, "100.64.0.0/10")
	check(&Facts{Sessions: []SessionRanges{{Routes: nets("100.64.0.0/10")}}}, nil, "198.19.0.0/16")
	if _, _, _, err := PickAddresses(f, nets("0.0.0.0/0"), nil); err == nil {
		t.Error("addresses where there are none")
	}
	if _, _, _, err := PickAddresses(f, nets("fc00::/7"), nil); err == nil {
		t.Error("IPv6 addresses where there are none")
	}
}

func TestValidate(t *testing.T) {
	policy := Policy{AllowPrefixes: nets("8.0.0.0/6", "2a00:1450::/32"), AllowDomains: []string{"dev", ".Corp."}, Config: "/etc/culvert/culvertd.yaml"}
	for _, c := range []struct {
		prefix      string
		usual, root string // part of the error, "" for none
	}{
		{"10.244.0.0/16", "", ""}, {"10.0.0.0/8", "", ""}, {"10.244.1.3/32", "", ""}, {"172.16.0.0/12", "", ""},
		{"192.168.0.0/16", "", ""}, {"100.64.0.0/10", "", ""}, {"198.18.0.0/15", "", ""}, {"240.10.0.0/16", "", ""},
		{"34.118.224.0/20", "", ""}, {"fd00:10:244::/56", "", ""}, {"fd00::/16", "", ""},
		{"0.0.0.0/0", "default route", "default route"}, {"::/0", "default route", "default route"},
		{"0.0.0.0/8", "this network", "this network"},
		{"127.0.0.0/8", "loopback", "loopback"}, {"127.0.0.1/32", "loopback", "loopback"}, {"::1/128", "loopback", "loopback"},
		{"169.254.169.254/32", "link-local", "link-local"}, {"fe80::/10", "link-local", "link-local"},
		{"224.0.0.0/4", "multicast", "multicast"}, {"ff02::/16", "multicast", "multicast"},
		{"255.255.255.255/32", "broadcast", "broadcast"}, {"::ffff:10.0.0.0/104", "IPv4-mapped", "IPv4-mapped"},
		{"10.0.0.0/7", "larger than a /8", ""}, {"fc00::/7", "larger than a /16", "larger than a /16"},
		{"8.8.8.0/24", "public", ""}, {"1.1.1.0/24", "public", "public"}, {"172.0.0.0/8", "public", "public"},
		{"34.118.224.0/19", "public", "public"}, {"2a00:1450:4001::/48", "public", ""}, {"2001:4860::/32", "public", "public"},
	} {
		for _, try := range []struct {
			p    Policy
			want string
		}{{Policy{}, c.usual}, {policy, c.root}} {
			err := Validate(plan("10.96.0.0/12", c.prefix), nil, try.p)
			expect(t, c.prefix, err, c.prefix, try.want)
		}
	}
	for _, c := range []struct{ domain, usual, root string }{
		{"cluster.local", "", ""}, {"svc", "", ""}, {"culvert", "", ""}, {"my-team", "", ""}, {"svc.cluster.local.", "", ""},
		{"k8s.example.com", "", ""}, {"example.com", "", ""}, {"96.10.in-addr.arpa", "", ""}, {"github.io", "", ""}, {"_tcp.demo", "", ""},
		{".", "root", "root"}, {"", "root", "root"}, {"local", "multicast DNS", "multicast DNS"}, {"localhost", "this machine", "this machine"},
		{"com", "public suffix", "public suffix"}, {"dev", "public suffix", ""}, {"DEV.", "public suffix", ""}, {"app", "public suffix", "public suffix"},
		{"co.uk", "public suffix", "public suffix"}, {"corp", "", ""}, {"in-addr.arpa", "public suffix", "public suffix"},
		{"a b", "character", "character"}, {"x\nnameserver 1.2.3.4", "character", "character"}, {"a..b", "label", "label"},
		{strings.Repeat("a", 64), "label", "label"}, {strings.Repeat("a.", 130), "253", "253"},
	} {
		expect(t, c.domain, Validate(nil, []string{"svc", c.domain}, Policy{}), fmt.Sprintf("%q", c.domain), c.usual)
		expect(t, c.domain, Validate(nil, []string{"svc", c.domain}, policy), fmt.Sprintf("%q", c.domain), c.root)
	}
	expect(t, "many routes", Validate(make([]api.Route, MaxRoutes+1), nil, Policy{}), "1025", "at most 1024")
	expect(t, "many domains", Validate(nil, make([]string, MaxDomains+1), Policy{}), "513", "at most 512")
	expect(t, "no prefix", Validate([]api.Route{{}}, nil, Policy{}), "invalid", "no prefix")
	err := Validate(plan("1.1.1.0/24"), []string{"dev"}, policy)
	var e *api.Error
	if !errors.As(Validate(plan("1.1.1.0/24"), []string{"com"}, policy), &e) ||
		e.Code != api.CodeDenied || !strings.Contains(e.Hint, "allowDomains or allowPrefixes in /etc/culvert/culvertd.yaml") {
		t.Errorf("hint of %#v, %v", e, err)
	}
	if err := ValidateExcluded(plan("0.0.0.0/0")); err != nil {
		t.Error(err)
	}
	if ValidateExcluded(make([]api.Route, MaxExcluded+1)) == nil || ValidateExcluded(make([]api.Route, 1)) == nil {
		t.Error("excluded prefixes are not bounded")
	}
}

// expect wants an error with the name and the reason, or none.
func expect(t *testing.T, what string, err error, name, reason string) {
	t.Helper()
	if reason == "" {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		return
	}
	if err == nil || !strings.Contains(err.Error(), reason) || !strings.Contains(err.Error(), name) {
		t.Errorf("%s: error %v, want one with %q and %q", what, err, name, reason)
	}
}

func TestBucket(t *testing.T) {
	b := newBucket(2, time.Second)
	now := time.Now()
	var got []time.Duration
	for range 4 {
		got = append(got, b.take(now))
	}
	if want := []time.Duration{0, 0, time.Second, 2 * time.Second}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if b.take(now.Add(time.Hour)) != 0 || b.take(now.Add(time.Hour)) != 0 || b.take(now.Add(time.Hour)) == 0 {
		t.Error("the bucket did not fill up to its size")
	}
}
