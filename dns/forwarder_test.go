package dns

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// clusterZone is what a cluster's CoreDNS knows in these tests.
func clusterZone(t testing.TB) func(*dns.Msg, bool) *dns.Msg {
	return zone(t, "cluster.local.",
		"web.demo.svc.cluster.local. 5 IN A 10.96.0.7",
		"web.demo.svc.cluster.local. 5 IN AAAA fd00:10:96::7",
		"api.other.svc.cluster.local. 7 IN A 10.96.0.8",
		"web-0.web.demo.svc.cluster.local. 5 IN A 10.244.1.5",
		"_http._tcp.web.demo.svc.cluster.local. 5 IN SRV 0 100 80 web.demo.svc.cluster.local.",
		"ext.demo.svc.cluster.local. 5 IN CNAME www.example.org.",
		"10-244-1-5.demo.pod.cluster.local. 5 IN A 10.244.1.5",
		"5.1.244.10.in-addr.arpa. 5 IN PTR web-0.web.demo.svc.cluster.local.",
		"7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa. 5 IN PTR web.demo.svc.cluster.local.",
	)
}

var known = services{"demo/": true, "demo/web": true, "demo/ext": true, "demo/gone": true, "other/": true, "other/api": true, "dev/": true}

func standard(t testing.TB, cluster, machine *server) Config {
	c := Config{Context: "kind-a", Namespace: "demo", Names: known, Namespaces: known.list,
		Ranges: func() []netip.Prefix {
			return []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:96::/112")}
		}}
	if cluster != nil {
		c.Cluster = []netip.AddrPort{cluster.addr}
	}
	if machine != nil {
		c.Machine = []netip.AddrPort{machine.addr}
	}
	return c
}

func TestNameForms(t *testing.T) {
	cluster := serve(t, clusterZone(t))
	machine := serve(t, zone(t, ".", "www.example.org. 60 IN A 192.0.2.1", "go.dev. 60 IN A 192.0.2.2"))
	_, addr := start(t, "127.0.0.1", standard(t, cluster, machine))
	for _, tt := range []struct {
		name  string
		qtype uint16
		want  string // "" is an empty answer
		rcode int
	}{
		{"web", dns.TypeA, "10.96.0.7", 0},
		{"WeB.deMo", dns.TypeA, "10.96.0.7", 0},
		{"web.demo", dns.TypeAAAA, "fd00:10:96::7", 0},
		{"web.demo.svc", dns.TypeA, "10.96.0.7", 0},
		{"web.demo.svc.cluster.local", dns.TypeA, "10.96.0.7", 0},
		{"web.demo.svc.kind-a.culvert", dns.TypeA, "10.96.0.7", 0},
		{"api.other", dns.TypeA, "10.96.0.8", 0},
		{"api.other", dns.TypeAAAA, "", 0}, // NODATA
		{"web-0.web", dns.TypeA, "10.244.1.5", 0},
		{"web-0.web.demo", dns.TypeA, "10.244.1.5", 0},
		{"web-0.web.demo.svc.cluster.local", dns.TypeA, "10.244.1.5", 0},
		{"web-9.web.demo", dns.TypeA, "", dns.RcodeNameError},
		{"_http._tcp.web.demo", dns.TypeSRV, "0 100 80 web.demo.svc.cluster.local.", 0},
		{"_http._tcp.web", dns.TypeSRV, "0 100 80 web.demo.svc.cluster.local.", 0},
		{"ext.demo", dns.TypeCNAME, "www.example.org.", 0},
		{"10-244-1-5.demo.pod", dns.TypeA, "10.244.1.5", 0},
		{"5.1.244.10.in-addr.arpa", dns.TypePTR, "web-0.web.demo.svc.cluster.local.", 0},
		{"7.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.6.9.0.0.0.1.0.0.0.0.d.f.ip6.arpa", dns.TypePTR, "web.demo.svc.cluster.local.", 0},
		{"gone.demo", dns.TypeA, "", dns.RcodeNameError},
		{"nope.demo.svc", dns.TypeA, "", dns.RcodeNameError},
		{"nope.demo.svc.kind-b.culvert", dns.TypeA, "", dns.RcodeNameError},
		{"www.example.org", dns.TypeA, "192.0.2.1", 0},
		{"go.dev", dns.TypeA, "192.0.2.2", 0},
		{"nope.demo", dns.TypeA, "", dns.RcodeNameError},
	} {
		for _, network := range []string{"udp", "tcp"} {
			m := ask(t, addr, network, tt.name, tt.qtype)
			got := ""
			for _, r := range m.Answer {
				if r.Header().Name != tt.name+"." {
					t.Errorf("%s: an answer belongs to %s", tt.name, r.Header().Name)
				}
				got += strings.TrimPrefix(r.String(), r.Header().String())
			}
			if got != tt.want || m.Rcode != tt.rcode {
				t.Errorf("%s %s over %s: %q %s, want %q", tt.name, dns.TypeToString[tt.qtype], network, got, dns.RcodeToString[m.Rcode], tt.want)
			}
			if len(m.Question) != 1 || m.Question[0].Name != tt.name+"." || m.Question[0].Qtype != tt.qtype {
				t.Errorf("%s: question came back as %v", tt.name, m.Question)
			}
			if tt.want == "" && !strings.Contains(tt.name, "kind-b") && len(m.Ns) != 1 {
				t.Errorf("%s: SOA of a negative answer is lost: %v", tt.name, m.Ns)
			}
			for _, r := range m.Ns {
				if !dns.IsSubDomain(r.Header().Name, m.Question[0].Name) {
					t.Errorf("%s: SOA of %s keeps the answer from being cached", tt.name, r.Header().Name)
				}
			}
		}
	}
	m := ask(t, addr, "udp", "api.other", dns.TypeA)
	if !m.Authoritative || !m.RecursionAvailable || !m.RecursionDesired || m.Answer[0].Header().Ttl != 7 {
		t.Errorf("flags or TTL changed: %v", m)
	}
	if m := ask(t, addr, "udp", "_http._tcp.web.demo", dns.TypeSRV); len(m.Extra) == 0 || m.Extra[0].Header().Name != "web.demo.svc.cluster.local." {
		t.Errorf("additional section of SRV: %v", m.Extra)
	}
	for _, q := range cluster.questions() {
		if strings.Contains(q, "go.dev") || strings.Contains(q, "example") || strings.Contains(q, "nope.demo.demo") {
			t.Errorf("the cluster was asked %s", q)
		}
	}
	for _, q := range machine.questions() {
		if strings.Contains(q, "cluster.local") || strings.Contains(q, "web") {
			t.Errorf("the machine's resolver was asked %s", q)
		}
	}
}

func TestNamespaceOfAPublicName(t *testing.T) {
	cluster := serve(t, zone(t, "cluster.local.", "go.dev.svc.cluster.local. 5 IN A 10.96.0.9"))
	machine := serve(t, zone(t, ".", "go.dev. 60 IN A 192.0.2.2", "pkg.go.dev. 60 IN A 192.0.2.3"))
	c := standard(t, cluster, machine)
	names := services{"dev/": true, "demo/": true, "demo/dev": true}
	c.Names = names
	_, addr := start(t, "127.0.0.1", c)
	for _, name := range []string{"go.dev", "pkg.go.dev", "x.dev"} {
		ask(t, addr, "udp", name, dns.TypeA)
	}
	if q := cluster.questions(); len(q) != 0 {
		t.Errorf("without the Service the cluster was asked %q", q)
	}
	c.Names = services{"dev/": true, "dev/go": true}
	_, addr = start(t, "127.0.0.1", c)
	if m := ask(t, addr, "udp", "go.dev", dns.TypeA); len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "10.96.0.9" {
		t.Errorf("with the Service: %v", m)
	}
	if m := ask(t, addr, "udp", "pkg.go.dev", dns.TypeA); len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "192.0.2.3" {
		t.Errorf("a public name beside the Service: %v", m)
	}
}

func TestRcodesAreKept(t *testing.T) {
	answer := func(q *dns.Msg, tcp bool) *dns.Msg {
		var code int
		if _, err := fmt.Sscanf(strings.ToLower(q.Question[0].Name), "rcode-%d", &code); err != nil {
			return nil
		}
		m := new(dns.Msg).SetRcode(q, code)
		m.SetEdns0(1232, false)
		return m
	}
	cluster, machine := serve(t, answer), serve(t, answer)
	c := standard(t, cluster, machine)
	names := services{}
	for i := range 24 {
		names[fmt.Sprintf("demo/rcode-%d", i)] = true
	}
	c.Names = names
	_, addr := start(t, "127.0.0.1", c)
	for _, code := range []int{0, 1, 2, 3, 4, 5, 8, 9, 10, 16, 23} {
		for _, suffix := range []string{".demo", ".demo.svc.cluster.local", ".example.org"} {
			q := new(dns.Msg).SetQuestion(fmt.Sprintf("rcode-%d%s.", code, suffix), dns.TypeA)
			q.SetEdns0(4096, true)
			if m := exchange(t, addr, "udp", q); m.Rcode != code {
				t.Errorf("%s: rcode %d became %d", suffix, code, m.Rcode)
			}
		}
	}
}

func TestRelayIsRaw(t *testing.T) {
	machine := serve(t, func(q *dns.Msg, tcp bool) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		m.Extra = q.Extra // the options come back
		m.AuthenticatedData = true
		return m
	})
	_, addr := start(t, "127.0.0.1", standard(t, nil, machine))
	q := new(dns.Msg).SetQuestion("WWW.Example.ORG.", dns.TypeTXT)
	q.CheckingDisabled = true
	q.SetEdns0(1400, true)
	opt := q.IsEdns0()
	opt.Option = append(opt.Option, &dns.EDNS0_SUBNET{Code: dns.EDNS0SUBNET, Family: 1, SourceNetmask: 24, Address: net.ParseIP("198.51.100.0").To4()},
		&dns.EDNS0_LOCAL{Code: 65100, Data: []byte("kept")})
	m := exchange(t, addr, "udp", q)
	if !m.AuthenticatedData || m.Question[0].Name != "WWW.Example.ORG." {
		t.Errorf("answer changed: %v", m)
	}
	machine.mu.Lock()
	got := machine.edns[0]
	machine.mu.Unlock()
	if got == nil || got.String() != opt.String() {
		t.Errorf("EDNS changed on the way:\n%v\nwant\n%v", got, opt)
	}
}

func TestBigAnswers(t *testing.T) {
	var records []string
	for i := range 300 {
		records = append(records, fmt.Sprintf("web.demo.svc.cluster.local. 5 IN A 10.244.%d.%d", i/200, i%200))
	}
	cluster := serve(t, zone(t, "cluster.local.", records...))
	_, addr := start(t, "127.0.0.1", standard(t, cluster, nil))
	for _, name := range []string{"web.demo", "web.demo.svc.cluster.local"} {
		m := ask(t, addr, "udp", name, dns.TypeA)
		m.Compress = true // as it came
		if !m.Truncated || m.Len() > 512 {
			t.Errorf("%s over UDP without EDNS: TC %v, %d octets", name, m.Truncated, m.Len())
		}
		if m := ask(t, addr, "tcp", name, dns.TypeA); m.Truncated || len(m.Answer) != 300 {
			t.Errorf("%s over TCP: TC %v, %d records", name, m.Truncated, len(m.Answer))
		}
		q := new(dns.Msg).SetQuestion(name+".", dns.TypeA)
		q.SetEdns0(65000, false) // the upstream's datagram is too long for us: TCP upstream, UDP to the asker
		if m := exchange(t, addr, "udp", q); m.Truncated || len(m.Answer) != 300 {
			t.Errorf("%s over UDP with room: TC %v, %d records", name, m.Truncated, len(m.Answer))
		}
		q.Extra = nil
		q.SetEdns0(1232, false)
		if m := exchange(t, addr, "udp", q); !m.Truncated || len(m.Answer) == 0 || m.IsEdns0() == nil {
			t.Errorf("%s over UDP with 1232: TC %v, %d records, EDNS %v", name, m.Truncated, len(m.Answer), m.IsEdns0())
		}
	}
	if q := cluster.questions(); !slices.ContainsFunc(q, func(s string) bool { return strings.HasPrefix(s, "tcp") }) {
		t.Errorf("a truncated answer was not asked for over TCP: %q", q)
	}
}

func TestUnreachable(t *testing.T) {
	silent := serve(t, func(*dns.Msg, bool) *dns.Msg { return nil })
	machine := serve(t, zone(t, ".", "www.example.org. 60 IN A 192.0.2.1"))
	_, addr := start(t, "127.0.0.1", standard(t, silent, machine))
	for _, name := range []string{"web.demo", "web.demo.svc.cluster.local", "web"} {
		began := time.Now()
		if m := ask(t, addr, "udp", name, dns.TypeA); m.Rcode != dns.RcodeServerFailure {
			t.Errorf("%s: %s", name, dns.RcodeToString[m.Rcode])
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Errorf("%s: SERVFAIL after %v", name, took)
		}
		if m := ask(t, addr, "udp", "www.example.org", dns.TypeA); len(m.Answer) != 1 {
			t.Errorf("the machine's own name while the cluster is silent: %v", m)
		}
	}
	if q := machine.questions(); slices.ContainsFunc(q, func(s string) bool { return strings.Contains(s, "web") }) {
		t.Errorf("the machine's resolver was asked %q", q)
	}
}

func TestFailover(t *testing.T) {
	broken := serve(t, func(q *dns.Msg, _ bool) *dns.Msg { return new(dns.Msg).SetRcode(q, dns.RcodeServerFailure) })
	silent := serve(t, func(*dns.Msg, bool) *dns.Msg { return nil })
	good := serve(t, zone(t, ".", "www.example.org. 60 IN A 192.0.2.1"))
	p, l := sockets(t, "127.0.0.1")
	closed := addrPort(l.Addr())
	p.Close()
	l.Close()
	c := standard(t, good, nil)
	c.Machine = []netip.AddrPort{closed, broken.addr, silent.addr, good.addr}
	f, addr := start(t, "127.0.0.1", c)
	for _, network := range []string{"udp", "tcp"} {
		if m := ask(t, addr, network, "www.example.org", dns.TypeA); len(m.Answer) != 1 {
			t.Errorf("over %s: %v", network, m)
		}
	}
	began := time.Now()
	if ask(t, addr, "udp", "www.example.org", dns.TypeA); time.Since(began) > 500*time.Millisecond {
		t.Errorf("the server that answered is not preferred: %v", time.Since(began))
	}
	f.SetMachine([]netip.AddrPort{closed, broken.addr})
	if m := ask(t, addr, "udp", "www.example.org", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("all servers bad: %v", m)
	}
	f.SetMachine(nil)
	if m := ask(t, addr, "udp", "www.example.org", dns.TypeA); m.Rcode != dns.RcodeRefused {
		t.Errorf("no servers: %v", m)
	}
}

func TestPipelining(t *testing.T) {
	cluster := serve(t, clusterZone(t))
	machine := serve(t, func(q *dns.Msg, _ bool) *dns.Msg { time.Sleep(300 * time.Millisecond); return new(dns.Msg).SetReply(q) })
	_, addr := start(t, "127.0.0.1", standard(t, cluster, machine))
	conn, err := dns.DialTimeout("tcp", addr, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	slow := new(dns.Msg).SetQuestion("slow.example.org.", dns.TypeA)
	fast := new(dns.Msg).SetQuestion("web.", dns.TypeA)
	for _, q := range []*dns.Msg{slow, fast} {
		if err := conn.WriteMsg(q); err != nil {
			t.Fatal(err)
		}
	}
	_ = conn.Conn.(*net.TCPConn).CloseWrite()
	for _, want := range []*dns.Msg{fast, slow} {
		m, err := conn.ReadMsg()
		if err != nil || m.Id != want.Id {
			t.Fatalf("answer %v, %v; want that of %s first", m, err, want.Question[0].Name)
		}
	}
}

func TestRefusals(t *testing.T) {
	cluster, machine := serve(t, clusterZone(t)), serve(t, zone(t, "."))
	_, addr := start(t, "127.0.0.1", standard(t, cluster, machine))
	for _, tt := range []struct {
		name   string
		change func(*dns.Msg)
		rcode  int
	}{
		{"web.demo.", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeANY }, dns.RcodeRefused},
		{"cluster.local.", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeAXFR }, dns.RcodeRefused},
		{"example.org.", func(m *dns.Msg) { m.Question[0].Qtype = dns.TypeIXFR }, dns.RcodeRefused},
		{"web.demo.", func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
		{"example.org.", func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		{"example.org.", func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
	} {
		q := new(dns.Msg).SetQuestion(tt.name, dns.TypeA)
		tt.change(q)
		if m := exchange(t, addr, "tcp", q); m.Rcode != tt.rcode || !m.Response {
			t.Errorf("%v: %s, want %s", q.Question, dns.RcodeToString[m.Rcode], dns.RcodeToString[tt.rcode])
		}
	}
	if q := append(cluster.questions(), machine.questions()...); len(q) != 0 {
		t.Errorf("servers were asked %q", q)
	}
	conn, err := net.Dial("udp", addr) // answers and fragments are not answered
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answer, _ := new(dns.Msg).SetReply(new(dns.Msg).SetQuestion("web.", dns.TypeA)).Pack()
	for _, b := range [][]byte{answer, {1, 2, 3}, {}} {
		_, _ = conn.Write(b)
	}
	_ = conn.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
	if n, err := conn.Read(make([]byte, 512)); err == nil {
		t.Errorf("%d octets came back for no question", n)
	}
}

func TestBounds(t *testing.T) {
	silent := serve(t, func(*dns.Msg, bool) *dns.Msg { return nil })
	machine := serve(t, zone(t, ".", "www.example.org. 60 IN A 192.0.2.1"))
	f, addr := start(t, "127.0.0.1", standard(t, silent, machine))
	for range maxAsking { // as many questions to a silent cluster
		f.askingCluster <- struct{}{}
	}
	began := time.Now()
	if m := ask(t, addr, "udp", "web.demo", dns.TypeA); m.Rcode != dns.RcodeServerFailure || time.Since(began) > time.Second {
		t.Errorf("beyond the bound: %v after %v", m, time.Since(began))
	}
	if m := ask(t, addr, "udp", "www.example.org", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("the machine's names wait for the cluster's: %v", m)
	}
	for range maxAsking {
		<-f.askingCluster
	}
	var conns []net.Conn
	for range maxConns + 5 {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
	}
	last := conns[len(conns)-1]
	_ = last.SetReadDeadline(time.Now().Add(2 * time.Second))
	if _, err := last.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
		t.Errorf("a connection beyond the bound stays open: %v", err)
	}
}

func TestLoops(t *testing.T) {
	// The machine's resolver forwards to us, as a dnsmasq that reads
	// /etc/resolv.conf does.
	var back string
	ready := make(chan struct{})
	loop := serve(t, func(q *dns.Msg, _ bool) *dns.Msg {
		<-ready
		c := dns.Client{Timeout: time.Second}
		m, _, _ := c.Exchange(q, back)
		return m
	})
	c := standard(t, nil, loop)
	f, addr := start(t, "127.0.0.1", c)
	own := netip.MustParseAddrPort(addr)
	back = addr
	close(ready)
	for range 100 {
		if len(f.settings.Load().machine.servers) == 0 {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if s := f.settings.Load().machine.servers; len(s) != 0 {
		t.Fatalf("a resolver that loops is still asked: %v", s)
	}
	if m := ask(t, addr, "udp", "www.example.org", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("no server is left: %v", m)
	}
	good := serve(t, zone(t, ".", "www.example.org. 60 IN A 192.0.2.1"))
	f.SetMachine([]netip.AddrPort{own, loop.addr, good.addr})
	if m := ask(t, addr, "udp", "www.example.org", dns.TypeA); len(m.Answer) != 1 {
		t.Errorf("a good server beside: %v", m)
	}
	if s := f.settings.Load().machine.servers; slices.Contains(s, own) {
		t.Errorf("our own address is asked: %v", s)
	}
}

func TestSiblings(t *testing.T) {
	const web = "web.demo.svc.cluster.local. 5 IN A "
	clusterA := serve(t, zone(t, "cluster.local.", web+"10.96.0.1"))
	clusterB := serve(t, zone(t, "cluster.local.", web+"10.96.0.2", "shop.store1.svc.cluster.local. 5 IN A 10.96.0.3"))
	machine := serve(t, zone(t, ".", "www.example.org. 60 IN A 192.0.2.1"))
	a := standard(t, clusterA, machine)
	b := standard(t, clusterB, machine)
	b.Context, b.Names = "kind-b", services{"demo/": true, "demo/web": true, "store1/": true, "store1/shop": true}
	fa, addrA := start(t, "127.0.0.21", a)
	fb, addrB := start(t, "127.0.0.22", b)
	list := []Sibling{{Context: "kind-a", Addr: netip.MustParseAddrPort(addrA)}, {Context: "kind-b", Addr: netip.MustParseAddrPort(addrB)}}
	list[0].Domains, _ = fa.Domains()
	list[1].Domains = []string{"cluster.local", "kind-b.culvert", "svc", "demo", "store1"}
	fa.SetSiblings(list)
	fb.SetSiblings(list)
	check := func(when string, want map[string]string) {
		t.Helper()
		for name, ip := range want {
			for _, addr := range []string{addrA, addrB} {
				m := ask(t, addr, "udp", name, dns.TypeA)
				if len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != ip || m.Answer[0].Header().Name != name+"." {
					t.Errorf("%s: %s at %s: %v, want %s", when, name, addr, m.Answer, ip)
				}
			}
		}
	}
	always := map[string]string{"web.demo.svc.kind-a.culvert": "10.96.0.1", "web.demo.svc.kind-b.culvert": "10.96.0.2", "www.example.org": "192.0.2.1", "shop.store1": "10.96.0.3"}
	check("both", always)
	check("a first", map[string]string{"web.demo.svc.cluster.local": "10.96.0.1", "web.demo": "10.96.0.1", "web.demo.svc": "10.96.0.1"})
	slices.Reverse(list)
	fa.SetSiblings(list)
	fb.SetSiblings(list)
	check("b first", map[string]string{"web.demo.svc.cluster.local": "10.96.0.2", "web.demo": "10.96.0.2"})
	check("both", always)

	// Each believes that the other owns the domain: an answer comes all the same.
	fa.SetSiblings([]Sibling{list[0], list[1]})
	fb.SetSiblings([]Sibling{list[1], list[0]})
	clusterA.forget()
	clusterB.forget()
	ask(t, addrA, "udp", "web.demo.svc.cluster.local", dns.TypeA)
	if n := len(clusterA.questions()) + len(clusterB.questions()); n != 1 {
		t.Errorf("%d questions for one while the sessions disagree", n)
	}
}

func TestSetCluster(t *testing.T) {
	cluster := serve(t, zone(t, "k8s.lan.", "web.shop9.svc.k8s.lan. 5 IN A 10.96.0.1"))
	c := standard(t, nil, nil)
	c.Names = services{"shop9/web": true}
	f, addr := start(t, "127.0.0.1", c)
	if m := ask(t, addr, "udp", "web.shop9.svc", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("before the agent is known: %v", m)
	}
	f.SetCluster("k8s.lan.", "shop9", []netip.AddrPort{cluster.addr})
	for _, name := range []string{"web", "web.shop9", "web.shop9.svc.k8s.lan"} {
		if m := ask(t, addr, "udp", name, dns.TypeA); len(m.Answer) != 1 {
			t.Errorf("%s: %v", name, m)
		}
	}
}
