package agent

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// nameserver answers every A query at addr with 10.1.2.3 and the given rcode,
// and counts.
func nameserver(t *testing.T, addr netip.Addr, rcode int) {
	t.Helper()
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		r := new(dns.Msg).SetRcode(q, rcode)
		if rcode == dns.RcodeSuccess {
			rr, _ := dns.NewRR(q.Question[0].Name + " 17 IN A 10.1.2.3")
			r.Answer = []dns.RR{rr}
			if _, tcp := w.RemoteAddr().(*net.TCPAddr); !tcp && q.Question[0].Name == "big.test." {
				r.Answer, r.Truncated = nil, true
			}
		}
		_ = w.WriteMsg(r)
	})
	for _, network := range []string{"udp", "tcp"} {
		var s *dns.Server
		var err error
		// The nameserver of the test before may hold its port for a moment longer.
		for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			s = &dns.Server{Addr: netip.AddrPortFrom(addr, 53).String(), Net: network, Handler: handler}
			started, failed := make(chan struct{}), make(chan error, 1)
			s.NotifyStartedFunc = func() { close(started) }
			go func() { failed <- s.ListenAndServe() }()
			select {
			case <-started:
				err = nil
			case err = <-failed:
			}
			if err == nil {
				break
			}
			if time.Now().After(end) {
				t.Fatal(err)
			}
		}
		t.Cleanup(func() { s.Shutdown() })
	}
}

func resolvFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "resolv.conf")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func (c *client) query(to netip.Addr, tcp bool, name string) (*dns.Msg, error) {
	c.t.Helper()
	q := new(dns.Msg).SetQuestion(name, dns.TypeA)
	var conn net.Conn
	if tcp {
		conn = c.mustTCP(netip.AddrPortFrom(to, 53))
	} else {
		conn = c.dialUDP(netip.AddrPortFrom(to, 53))
	}
	co := &dns.Conn{Conn: conn}
	if err := co.WriteMsg(q); err != nil {
		return nil, err
	}
	return co.ReadMsg()
}

func TestDNSRelay(t *testing.T) {
	needRoot(t)
	nameserver(t, target, dns.RcodeSuccess)
	a := startAgent(t, Config{ResolvConf: resolvFile(t, "search a.b\nnameserver "+target.String()+"\noptions ndots:5\n")}, nil)
	c := connect(t, a, true)
	for _, to := range []netip.Addr{agent4, agent6} {
		for _, tcp := range []bool{false, true} {
			r, err := c.query(to, tcp, "x.test.")
			if err != nil || len(r.Answer) != 1 || r.Answer[0].Header().Ttl != 17 {
				t.Errorf("%s, tcp %v: %v, %v", to, tcp, r, err)
			}
		}
	}
	if r, err := c.query(agent4, false, "big.test."); err != nil || !r.Truncated {
		t.Errorf("a truncated answer: %v, %v", r, err)
	}
	if r, err := c.query(agent4, true, "big.test."); err != nil || len(r.Answer) != 1 {
		t.Errorf("the same over TCP: %v, %v", r, err)
	}
	if c.welcome.ResolvConf == "" || c.welcome.Instance == "" {
		t.Errorf("welcome: %+v", c.welcome)
	}
}

func TestDNSRelayKeepsRcode(t *testing.T) {
	needRoot(t)
	nameserver(t, target, dns.RcodeNameError)
	a := startAgent(t, Config{ResolvConf: resolvFile(t, "nameserver "+target.String()+"\n")}, nil)
	c := connect(t, a, true)
	if r, err := c.query(agent4, false, "x.test."); err != nil || r.Rcode != dns.RcodeNameError {
		t.Errorf("%v, %v", r, err)
	}
}

func TestDNSRelayFailsOver(t *testing.T) {
	needRoot(t)
	nameserver(t, target, dns.RcodeSuccess)
	conf := "nameserver " + silent.String() + "\nnameserver " + nowhere.String() + "\nnameserver " + target.String() + "\n"
	a := startAgent(t, Config{ResolvConf: resolvFile(t, conf)}, func(x *timing) { x.dnsTry = 200 * time.Millisecond })
	c := connect(t, a, true)
	for _, tcp := range []bool{false, true} {
		if r, err := c.query(agent4, tcp, "x.test."); err != nil || len(r.Answer) != 1 {
			t.Errorf("tcp %v: %v, %v", tcp, r, err)
		}
	}
}

func TestDNSRelayServfail(t *testing.T) {
	a := startAgent(t, Config{ResolvConf: resolvFile(t, "nameserver "+nowhere.String()+"\n")}, nil)
	c := connect(t, a, true)
	r, err := c.query(agent4, false, "x.test.")
	if err != nil || r.Rcode != dns.RcodeServerFailure || !r.Response || len(r.Question) != 1 {
		t.Errorf("%v, %v", r, err)
	}
}

func TestNameservers(t *testing.T) {
	got := nameservers("# nameserver 1.1.1.1\nnameserver 10.0.0.1\nnameserver\t169.254.20.10 # x\nnameserver rubbish\n;\nnameserver fd00::1\nnameserver 10.0.0.9")
	if len(got) != 3 || got[0].String() != "10.0.0.1:53" || got[1].String() != "169.254.20.10:53" || got[2].String() != "[fd00::1]:53" {
		t.Errorf("%v", got)
	}
}
