package dns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// services is a fixed Names: "ns/svc" and "ns/" for a namespace.
type services map[string]bool

func (s services) HasService(ns, name string) bool { return s[ns+"/"+name] }
func (s services) HasNamespace(ns string) bool     { return s[ns+"/"] }

func (s services) list() (all []string) {
	for k := range s {
		if ns, ok := strings.CutSuffix(k, "/"); ok {
			all = append(all, ns)
		}
	}
	return all
}

// server is a DNS server on a loopback port, over UDP and TCP, that remembers
// what it was asked.
type server struct {
	addr  netip.AddrPort
	mu    sync.Mutex
	asked []string // "udp web.demo. A"
	edns  []*dns.OPT
}

func (s *server) questions() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.asked...)
}

func (s *server) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked, s.edns = nil, nil
}

// sockets binds a UDP and a TCP socket to one port of ip.
func sockets(t testing.TB, ip string) (net.PacketConn, net.Listener) {
	t.Helper()
	for range 50 {
		l, err := net.Listen("tcp", net.JoinHostPort(ip, "0"))
		if err != nil {
			t.Fatal(err)
		}
		p, err := net.ListenPacket("udp", l.Addr().String())
		if err == nil {
			return p, l
		}
		l.Close()
	}
	t.Fatal("no port is free for UDP and TCP")
	return nil, nil
}

// serve starts a server that answers with handle; nil means silence.
func serve(t testing.TB, handle func(q *dns.Msg, tcp bool) *dns.Msg) *server {
	t.Helper()
	p, l := sockets(t, "127.0.0.1")
	s := &server{addr: addrPort(l.Addr())}
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		network := w.LocalAddr().Network()
		s.mu.Lock()
		if !strings.HasSuffix(q.Question[0].Name, loopZone+".") {
			s.asked = append(s.asked, network+" "+q.Question[0].Name+" "+dns.TypeToString[q.Question[0].Qtype])
			s.edns = append(s.edns, q.Copy().IsEdns0())
		}
		s.mu.Unlock()
		if m := handle(q, network == "tcp"); m != nil {
			_ = w.WriteMsg(m)
		}
	})
	var ready sync.WaitGroup
	ready.Add(2)
	for _, d := range []*dns.Server{{PacketConn: p, UDPSize: 65535}, {Listener: l}} {
		d.Handler = handler
		d.NotifyStartedFunc = ready.Done
		go func() { _ = d.ActivateAndServe() }()
		t.Cleanup(func() { _ = d.Shutdown() })
	}
	ready.Wait()
	return s
}

func rr(t testing.TB, text string) dns.RR {
	t.Helper()
	r, err := dns.NewRR(text)
	if err != nil || r == nil {
		t.Fatalf("record %q: %v", text, err)
	}
	return r
}

// zone answers from records as CoreDNS does: AA, NXDOMAIN and NODATA with a
// SOA of apex, and truncation to the asker's size over UDP.
func zone(t testing.TB, apex string, records ...string) func(*dns.Msg, bool) *dns.Msg {
	var all []dns.RR
	for _, r := range records {
		all = append(all, rr(t, r))
	}
	soa := rr(t, apex+" 30 IN SOA ns.invalid. hostmaster.invalid. 1 7200 1800 86400 30")
	return func(q *dns.Msg, tcp bool) *dns.Msg {
		m := new(dns.Msg).SetReply(q)
		m.Authoritative, m.RecursionAvailable, m.Compress = true, true, true
		exists := false
		for _, r := range all {
			if strings.EqualFold(r.Header().Name, q.Question[0].Name) {
				exists = true
				if r.Header().Rrtype == q.Question[0].Qtype {
					m.Answer = append(m.Answer, dns.Copy(r))
				}
			}
		}
		if srv := len(m.Answer) > 0 && q.Question[0].Qtype == dns.TypeSRV; srv {
			for _, r := range all {
				if r.Header().Name == m.Answer[0].(*dns.SRV).Target && r.Header().Rrtype == dns.TypeA {
					m.Extra = append(m.Extra, dns.Copy(r))
				}
			}
		}
		if !exists {
			m.Rcode = dns.RcodeNameError
		}
		if len(m.Answer) == 0 {
			m.Ns = append(m.Ns, dns.Copy(soa))
		}
		size := dns.MinMsgSize
		if opt := q.IsEdns0(); opt != nil {
			size = int(opt.UDPSize())
			m.SetEdns0(4096, opt.Do())
		}
		if !tcp {
			m.Truncate(size)
		}
		return m
	}
}

// start runs a forwarder on a loopback port of ip until the test ends.
func start(t testing.TB, ip string, c Config) (*Forwarder, string) {
	t.Helper()
	p, l := sockets(t, ip)
	f := New(c)
	done := make(chan error, 1)
	go func() { done <- f.Run(context.Background(), []net.PacketConn{p}, []net.Listener{l}) }()
	t.Cleanup(func() {
		f.Close()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	for f.running() == false { // own sockets are known
		time.Sleep(time.Millisecond)
	}
	return f, l.Addr().String()
}

func (f *Forwarder) running() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.cancel != nil
}

func ask(t testing.TB, addr, network, name string, qtype uint16) *dns.Msg {
	t.Helper()
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
	return exchange(t, addr, network, q)
}

func exchange(t testing.TB, addr, network string, q *dns.Msg) *dns.Msg {
	t.Helper()
	c := dns.Client{Net: network, Timeout: 8 * time.Second, UDPSize: 65535}
	m, _, err := c.Exchange(q, addr)
	if err != nil {
		t.Fatalf("asking %s %v: %v", network, q.Question, err)
	}
	return m
}

func TestConcurrentQuestionsLeakNothing(t *testing.T) {
	cluster := serve(t, zone(t, "cluster.local.", "web.demo.svc.cluster.local. 5 IN A 10.96.0.7"))
	machine := serve(t, zone(t, "org.", "example.org. 60 IN A 192.0.2.1"))
	p, l := sockets(t, "127.0.0.1")
	f := New(Config{Namespace: "demo", Cluster: []netip.AddrPort{cluster.addr}, Machine: []netip.AddrPort{machine.addr},
		Names: services{"demo/web": true}})
	before := runtime.NumGoroutine()
	done := make(chan error, 1)
	go func() { done <- f.Run(context.Background(), []net.PacketConn{p}, []net.Listener{l}) }()

	var wg sync.WaitGroup
	errs := make(chan error, 1000)
	for i := range 1000 {
		wg.Go(func() {
			name, want, network := "web.demo.", "10.96.0.7", "udp"
			if i%2 == 1 {
				name, want = "example.org.", "192.0.2.1"
			}
			if i%10 < 1 {
				network = "tcp"
			}
			c := dns.Client{Net: network, Timeout: 3 * time.Second}
			m, _, err := c.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), l.Addr().String())
			for range 4 { // the kernel drops datagrams of such a burst; resolvers ask again
				if err != nil {
					m, _, err = c.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), l.Addr().String())
				}
			}
			switch {
			case err != nil:
				errs <- fmt.Errorf("%s over %s: %w", name, network, err)
			case len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != want || m.Answer[0].Header().Name != name:
				errs <- fmt.Errorf("%s over %s: %v", name, network, m)
			}
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		t.Error(err)
	}
	if n, m := len(f.askingCluster), len(f.askingMachine); n+m != 0 {
		t.Errorf("%d and %d questions are still under way", n, m)
	}
	f.Close()
	f.Close()
	if err := <-done; err != nil {
		t.Errorf("Run: %v", err)
	}
	for range 100 {
		if runtime.NumGoroutine() <= before {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if after := runtime.NumGoroutine(); after > before+2 { // the servers' own come and go
		buf := make([]byte, 1<<20)
		t.Errorf("%d goroutines before, %d after\n%s", before, after, buf[:runtime.Stack(buf, true)])
	}
	if err := f.Run(context.Background(), nil, nil); err == nil {
		t.Error("a closed forwarder ran again")
	}
}
