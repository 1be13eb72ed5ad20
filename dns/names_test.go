package dns

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

func testSettings(names services, c Config) *settings {
	c.Names = names
	if c.Context == "" {
		c.Context = "kind-a"
	}
	if c.Namespace == "" {
		c.Namespace = "demo"
	}
	c.Namespaces = names.list
	c.Ranges = func() []netip.Prefix {
		return []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.96.0.0/12"), netip.MustParsePrefix("fd00:10:96::/112")}
	}
	return New(c).settings.Load()
}

func TestRoute(t *testing.T) {
	names := services{"demo/": true, "demo/web": true, "demo/dev": true, "other/": true, "other/api": true,
		"dev/": true, "dev/go": true, "app/": true, "kube-system/": true}
	s := testSettings(names, Config{Machine: []netip.AddrPort{}})
	const full = ".svc.cluster.local"
	long := strings.Repeat("a.", 110)
	for _, tt := range []struct {
		name string
		to   place
		full string
	}{
		{"web", toCluster, "web.demo" + full},
		{"api", toMachine, ""}, // of another namespace
		{"web.demo", toCluster, "web.demo" + full},
		{"api.other", toCluster, "api.other" + full},
		{"nope.other", toMachine, ""},
		{"nope.other.svc", toCluster, "nope.other" + full},
		{"web.demo.svc", toCluster, "web.demo" + full},
		{"web.demo.svc.cluster.local", toCluster, ""},
		{"cluster.local", toCluster, ""},
		{"xcluster.local", toMachine, ""},
		{`x\.cluster.local`, toMachine, ""},
		{"web-0.web", toCluster, "web-0.web.demo" + full},
		{"web-0.web.demo", toCluster, "web-0.web.demo" + full},
		{"web-0.web.demo.svc", toCluster, "web-0.web.demo" + full},
		{"web-0.web.demo.svc.cluster.local", toCluster, ""},
		{"web-0.nope.demo", toMachine, ""},
		{"_http._tcp.web", toCluster, "_http._tcp.web.demo" + full},
		{"_http._tcp.api.other", toCluster, "_http._tcp.api.other" + full},
		{"_http._tcp.api.other.svc", toCluster, "_http._tcp.api.other" + full},
		{"_http._tcp.nope.other", toMachine, ""},
		{"_ldap._tcp.corp.example.com", toMachine, ""},
		{"10-244-1-5.demo.pod", toCluster, "10-244-1-5.demo.pod.cluster.local"},
		{"fd00--1.demo.pod", toCluster, "fd00--1.demo.pod.cluster.local"},
		{"www.demo.pod", toMachine, ""},
		{"go.dev", toCluster, "go.dev" + full},         // the Service is there
		{"pkg.go.dev", toCluster, "pkg.go.dev" + full}, // with fallback
		{"web.dev", toMachine, ""},
		{"dev", toCluster, "dev.demo" + full},
		{"x.dev", toMachine, ""}, // the Service dev in our namespace does not take .dev
		{"go.app", toMachine, ""},
		{"example.com", toMachine, ""},
		{"", toMachine, ""},
		{"localhost", toMachine, ""},
		{"web.demo.svc.kind-a.culvert", toCluster, "web.demo" + full},
		{"web.demo.kind-a.culvert", toCluster, "web.demo" + full},
		{"web.kind-a.culvert", toCluster, "web.demo" + full},
		{"10-244-1-5.demo.pod.kind-a.culvert", toCluster, "10-244-1-5.demo.pod.cluster.local"},
		{"web.demo.svc.cluster.local.kind-a.culvert", toCluster, "web.demo" + full},
		{"example.com.kind-a.culvert", nowhere, ""},
		{"kind-a.culvert", noData, ""},
		{"culvert", noData, ""},
		{"web.demo.svc.kind-b.culvert", nowhere, ""},
		{"5.1.244.10.in-addr.arpa", toCluster, ""},
		{"1.0.111.10.in-addr.arpa", toCluster, ""},
		{"244.10.in-addr.arpa", toCluster, ""},
		{"10.in-addr.arpa", toMachine, ""},
		{"1.0.112.10.in-addr.arpa", toMachine, ""},
		{"1.0.168.192.in-addr.arpa", toMachine, ""},
		{"01.1.244.10.in-addr.arpa", toMachine, ""},
		{"a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa", toCluster, ""},
		{"a.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.7.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa", toMachine, ""},
		{"ip6.arpa", toMachine, ""},
		{long + "web.demo.svc", toMachine, ""}, // too many labels for any form
	} {
		got := s.route(tt.name, false)
		if got.to != tt.to || got.name != tt.full {
			t.Errorf("route(%q) = %v %q, want %v %q", tt.name, got.to, got.name, tt.to, tt.full)
		}
		if want := tt.to == toCluster && strings.HasSuffix(tt.name, ".dev") || tt.name == "dev"; got.fallback != want {
			t.Errorf("route(%q).fallback = %v", tt.name, got.fallback)
		}
	}
}

func TestRouteWithoutTheService(t *testing.T) {
	s := testSettings(services{"dev/": true, "demo/": true}, Config{Machine: []netip.AddrPort{}})
	for _, name := range []string{"go.dev", "pkg.go.dev", "_http._tcp.go.dev", "dev", "www.demo", "a.b.demo"} {
		if r := s.route(name, false); r.to != toMachine {
			t.Errorf("route(%q) = %v, want the machine", name, r.to)
		}
	}
}

func TestRouteCustomDomain(t *testing.T) {
	s := testSettings(services{"demo/web": true}, Config{ClusterDomain: "K8s.Corp.Example.", Machine: []netip.AddrPort{}})
	for name, want := range map[string]string{"web": "web.demo.svc.k8s.corp.example", "web.demo.svc": "web.demo.svc.k8s.corp.example", "x.k8s.corp.example": ""} {
		if r := s.route(name, false); r.to != toCluster || r.name != want {
			t.Errorf("route(%q) = %+v", name, r)
		}
	}
	for _, name := range []string{"web.demo.svc.cluster.local", "corp.example", "www.corp.example"} {
		if r := s.route(name, false); r.to != toMachine {
			t.Errorf("route(%q) = %+v, want the machine", name, r)
		}
	}
}

func TestRouteWithoutMachine(t *testing.T) {
	s := testSettings(services{"demo/": true, "dev/": true}, Config{})
	for name, want := range map[string]place{
		"x.demo": nowhere, "nothing": nowhere, "x.y.demo": nowhere, "www.x.pod": nowhere, "1.0.0.10.in-addr.arpa": nowhere,
		"go.dev": refused, "example.com": refused, "": refused,
	} {
		if r := s.route(name, false); r.to != want {
			t.Errorf("route(%q) = %v, want %v", name, r.to, want)
		}
	}
}

func FuzzRoute(f *testing.F) {
	for _, name := range []string{"web", "web.demo", "go.dev", "_a._b.web.demo.svc", "5.1.244.10.in-addr.arpa", `a\.b.demo`, "..", "x.kind-a.culvert", "10-1-1-1.x.pod"} {
		f.Add(name)
	}
	names := services{"demo/": true, "demo/web": true, "dev/": true}
	s := testSettings(names, Config{Machine: []netip.AddrPort{}})
	f.Fuzz(func(t *testing.T, name string) {
		name = normal(name)
		r := s.route(name, false)
		if r.to == toCluster && r.name != "" {
			if _, ok := under(r.name, "cluster.local"); !ok {
				t.Errorf("%q is asked as %q, outside the cluster's domain", name, r.name)
			}
			if again := s.route(r.name, false); again.to != toCluster || again.name != "" {
				t.Errorf("%q becomes %q, which is not a full name", name, r.name)
			}
		}
		_, inside := under(name, "cluster.local")
		_, context := under(name, "culvert")
		if publicTop(name) && strings.Contains(name, ".") && !inside && !context && !strings.HasSuffix(name, ".arpa") && r.to != toMachine {
			t.Errorf("public name %q goes to %v", name, r.to)
		}
	})
}

func TestDomains(t *testing.T) {
	names := services{"demo/": true, "dev/": true, "app/": true, "corp/": true, "store1/": true}
	f := New(Config{Context: "kind-a", Namespace: "demo", Names: names, Namespaces: func() []string { return []string{"app", "corp", "demo", "dev", "store1"} },
		Ranges: func() []netip.Prefix {
			return []netip.Prefix{netip.MustParsePrefix("172.16.5.9/32"), netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("10.97.0.0/22"),
				netip.MustParsePrefix("fd00:10:96::/108"), netip.MustParsePrefix("10.128.0.0/9")}
		}})
	routing, search := f.Domains()
	want := []string{"cluster.local", "kind-a.culvert", "svc", "pod"}
	want = append(want, "244.10.in-addr.arpa", "0.97.10.in-addr.arpa", "1.97.10.in-addr.arpa", "2.97.10.in-addr.arpa", "3.97.10.in-addr.arpa",
		strings.Repeat("0.", 15)+"6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa")
	want = append(want, "demo", "store1", "9.5.16.172.in-addr.arpa")
	slices.Sort(want)
	got := slices.Sorted(slices.Values(routing))
	if !slices.Equal(got, want) {
		t.Errorf("routing\n%q, want\n%q", got, want)
	}
	if want := []string{"demo.svc.cluster.local", "svc.cluster.local", "cluster.local"}; !slices.Equal(search, want) {
		t.Errorf("search %q, want %q", search, want)
	}
	for _, domain := range routing { // what is routed here is answered here
		if p, ok := parseReverse(domain); ok && p.Bits() > 0 && !slices.ContainsFunc(f.settings.Load().ranges(), func(r netip.Prefix) bool { return r.Overlaps(p) }) {
			t.Errorf("zone %s is of no range", domain)
		}
	}
	f.SetSiblings([]Sibling{{Context: "b", Domains: []string{"cluster.local", "svc", "pod", "b.culvert"}, Addr: netip.MustParseAddrPort("127.0.0.9:53")}})
	if routing, _ := f.Domains(); !slices.Contains(routing, "cluster.local") {
		t.Error("a later session took the first owner's domain")
	}
	f.mu.Lock()
	f.own = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.8:53")}
	f.mu.Unlock()
	f.SetSiblings([]Sibling{{Context: "b", Domains: []string{"cluster.local", "svc"}, Addr: netip.MustParseAddrPort("127.0.0.9:53")},
		{Context: "kind-a", Addr: netip.MustParseAddrPort("127.0.0.8:53")}})
	if routing, _ := f.Domains(); slices.Contains(routing, "cluster.local") || slices.Contains(routing, "svc") || !slices.Contains(routing, "kind-a.culvert") {
		t.Errorf("second owner's domains: %q", routing)
	}
}

func TestDomainsAreBounded(t *testing.T) {
	var many []string
	for i := range 500 {
		many = append(many, "ns-"+strings.Repeat("x", i%40)+string(rune('a'+i%26))+"z")
	}
	f := New(Config{Namespaces: func() []string { return many }})
	routing, search := f.Domains()
	if n := len(routing) + len(search); n != 256 || routing[0] != "cluster.local" {
		t.Errorf("%d domains, the first %q", n, routing[0])
	}
}

func TestLabel(t *testing.T) {
	long := "arn:aws:eks:eu-central-1:123456789012:cluster/" + strings.Repeat("production", 5)
	for in, want := range map[string]string{"kind-a": "kind-a", "Admin@Cluster.example": "admin-cluster-example", "": "context", "---": "context", "übung": "bung", "a_b": "a-b"} {
		if got := Label(in); got != want {
			t.Errorf("Label(%q) = %q, want %q", in, got, want)
		}
	}
	if got := Label(long); len(got) > 63 || got == Label(long+"x") {
		t.Errorf("Label(long) = %q", got)
	}
}

func TestParseResolvConf(t *testing.T) {
	for _, tt := range []struct{ text, servers, search, domain string }{
		{"search demo.svc.cluster.local svc.cluster.local cluster.local ec2.internal\nnameserver 169.254.20.10\noptions ndots:5\n",
			"169.254.20.10", "demo.svc.cluster.local svc.cluster.local cluster.local ec2.internal", "cluster.local"},
		{"nameserver fe80::1%eth0\nnameserver 10.96.0.10\nnameserver nonsense\n# nameserver 1.1.1.1\nsearch a.b\nsearch svc.svc.k8s.lan svc.k8s.lan k8s.lan",
			"fe80::1%eth0 10.96.0.10", "svc.svc.k8s.lan svc.k8s.lan k8s.lan", "k8s.lan"},
		{"search demo.svc.svc.lan svc.svc.lan svc.lan\n", "", "demo.svc.svc.lan svc.svc.lan svc.lan", "svc.lan"},
		{"search svc.Cluster.Local. cluster.local.\n", "", "svc.cluster.local cluster.local", "cluster.local"},
		{"; comment\nsearch corp.example\nnameserver 192.0.2.53", "192.0.2.53", "corp.example", ""},
		{"", "", "", ""},
	} {
		servers, search, domain := ParseResolvConf(tt.text)
		if strings.Join(servers, " ") != tt.servers || strings.Join(search, " ") != tt.search || domain != tt.domain {
			t.Errorf("ParseResolvConf(%q) = %q %q %q", tt.text, servers, search, domain)
		}
	}
}
