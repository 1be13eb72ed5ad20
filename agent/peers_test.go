package agent

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.zx2c4.com/wireguard/conn"
	wireguard "golang.zx2c4.com/wireguard/device"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/netstack"
	"github.com/culvert-dev/culvert/wire/peer"
)

var (
	peerRange4 = netip.MustParsePrefix("198.19.5.16/28")
	peerRange6 = netip.MustParsePrefix("fdcc::/64")
	peerRanges = []netip.Prefix{peerRange4, peerRange6}
)

// asker is the session's way to ask about peers.
func asker(a *Agent, secret string) *peer.Client {
	return &peer.Client{Secret: secret, Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", a.cfg.MetricsAddr)
	}}
}

// addPeer adds a peer and joins as it, with a WireGuard device of stock, on UDP
// sockets, and a stack where the peer would have its kernel. DNS is in
// hello.Agent.
func addPeer(t *testing.T, a *Agent, ask *peer.Client, name string) (*client, peer.State) {
	t.Helper()
	key := wire.NewPrivateKey()
	st, err := ask.Add(t.Context(), name, peer.Ask{PublicKey: key.Public().String(), Ranges: peerRanges})
	if err != nil {
		t.Fatal(err)
	}
	c := &client{t: t, key: key}
	for _, p := range st.Peers {
		if p.Name == name {
			c.hello.Tunnel = p.Addresses
		}
	}
	c.hello.Agent = st.DNS
	c.endpoint = netstack.New(netstack.Config{MTU: st.MTU})
	if c.stack, err = netstack.NewStack(c.endpoint); err != nil {
		t.Fatal(err)
	}
	for _, addr := range c.hello.Tunnel {
		if err := c.stack.AddProtocolAddress(netstack.NIC, tcpip.ProtocolAddress{Protocol: protocolOf(addr),
			AddressWithPrefix: tcpip.AddrFromSlice(addr.AsSlice()).WithPrefix()}, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	d := wireguard.NewDevice(c.endpoint, conn.NewStdNetBind(), wireguard.NewLogger(wireguard.LogLevelSilent, ""))
	server, err := wire.ParseKey(st.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.IpcSet(fmt.Sprintf("private_key=%s\npublic_key=%s\nendpoint=%s:%d\nallowed_ip=0.0.0.0/0\nallowed_ip=::/0\n",
		hex.EncodeToString(key[:]), hex.EncodeToString(server[:]), target, st.Port)); err != nil {
		t.Fatal(err)
	}
	if err := d.Up(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.endpoint.Close()
		d.Close()
		c.stack.Destroy()
	})
	return c, st
}

// askPeers starts an agent with a session, and a nameserver that it relays to.
func askPeers(t *testing.T) (*Agent, *client, *peer.Client) {
	needRoot(t)
	nameserver(t, target6, dns.RcodeSuccess)
	a := startAgent(t, Config{PeerPort: freeUDP(t), PodIPs: []netip.Addr{target, target6},
		ResolvConf: resolvFile(t, "nameserver "+target6.String()+"\n")}, nil)
	s := connect(t, a, true)
	return a, s, asker(a, s.hello.Secret)
}

func freeUDP(t *testing.T) int {
	c, err := net.ListenUDP("udp", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).Port
}

func TestPeerReaches(t *testing.T) {
	a, session, ask := askPeers(t)
	c, st := addPeer(t, a, ask, "phone")
	if st.Instance != a.instance || len(st.DNS) != 2 || st.MTU != 1420 {
		t.Errorf("state: %+v", st)
	}
	for _, to := range []netip.Addr{target, target6} {
		conn := c.mustTCP(serve(t, to, echoTCP))
		sent := bytes.Repeat([]byte("peer"), 1<<20)
		go conn.Write(sent)
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("4 MiB by %s: %v", to, err)
		}
		u := c.dialUDP(serveUDP(t, netip.AddrPortFrom(to, 0), func(b []byte) []byte { return b }))
		datagram := bytes.Repeat([]byte("d"), 9000)
		if _, err := u.Write(datagram); err != nil {
			t.Fatal(err)
		}
		if n, err := u.Read(got); err != nil || !bytes.Equal(got[:n], datagram) {
			t.Errorf("UDP by %s: %d bytes, %v", to, n, err)
		}
		if _, _, ok := c.ping(to, 7, []byte("payload"), 5*time.Second); !ok {
			t.Errorf("%s does not answer a ping", to)
		}
	}
	if _, _, ok := c.ping(silent, 7, nil, 500*time.Millisecond); ok {
		t.Error("an address where nobody is answers a ping")
	}
	for _, server := range c.hello.Agent {
		for _, tcp := range []bool{false, true} {
			if r, err := c.query(server, tcp, "name.test."); err != nil || len(r.Answer) != 1 {
				t.Errorf("DNS at %s, tcp %v: %v, %v", server, tcp, r, err)
			}
		}
		if _, _, ok := c.ping(server, 7, nil, 5*time.Second); !ok {
			t.Errorf("the agent does not answer a ping at %s", server)
		}
	}
	// The session goes on beside it.
	echoOnce(t, session, serve(t, target, echoTCP))
	eventually(t, "the list shows the peer's traffic", func() bool {
		st, err := ask.Get(t.Context())
		return err == nil && len(st.Peers) == 1 && !st.Peers[0].LastHandshake.IsZero() && st.Peers[0].From != "" && st.Peers[0].Received > 4<<20
	})
}

func echoOnce(t *testing.T, c *client, to netip.AddrPort) {
	t.Helper()
	conn := c.mustTCP(to)
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
		t.Fatalf("echo by %s: %v", to, err)
	}
}

// TestPeersAreAlone: nothing leads from a peer to another one, to the session, to
// the agent's own ports, nor from the session to a peer.
func TestPeersAreAlone(t *testing.T) {
	a, session, ask := askPeers(t)
	one, st := addPeer(t, a, ask, "one")
	two, _ := addPeer(t, a, ask, "two")
	for _, c := range []*client{one, two} {
		echoOnce(t, c, serve(t, target, echoTCP)) // both are up
	}
	refused := func(who string, c *client, to netip.AddrPort) {
		t.Helper()
		if conn, err := c.dialTCP(to, 5*time.Second); err == nil {
			conn.Close()
			t.Errorf("%s reaches %s", who, to)
		} else if !strings.Contains(err.Error(), "refused") {
			t.Errorf("%s to %s: %v, want refused", who, to, err)
		}
		u := c.dialUDP(to)
		_, _ = u.Write([]byte("x"))
		_ = u.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		if n, err := u.Read(make([]byte, 10)); err == nil {
			t.Errorf("%s gets %d bytes from %s by UDP", who, n, to)
		}
		if _, _, ok := c.ping(to.Addr(), 1, nil, 300*time.Millisecond); ok {
			t.Errorf("%s pings %s", who, to.Addr())
		}
	}
	for _, at := range []int{0, 1} {
		// Listeners of the others, so that what arrived would be answered.
		for _, c := range []*client{session, two} {
			listen(t, c, c.hello.Tunnel[at], 80)
		}
		refused("a peer", one, netip.AddrPortFrom(two.hello.Tunnel[at], 80))
		refused("a peer", one, netip.AddrPortFrom(session.hello.Tunnel[at], 80))
		refused("a peer", one, netip.AddrPortFrom(session.hello.Inbound[at], 80))
		refused("the session", session, netip.AddrPortFrom(two.hello.Tunnel[at], 80))
	}
	if conn, err := one.dialTCP(netip.AddrPortFrom(target, uint16(st.Port)), time.Second); err == nil {
		conn.Close()
		t.Error("a peer reaches the agent's own port")
	}
	// A source that is not its own is dropped by WireGuard: nobody answers there.
	thief := two.hello.Tunnel
	if err := one.stack.AddProtocolAddress(netstack.NIC, tcpip.ProtocolAddress{Protocol: protocolOf(thief[0]),
		AddressWithPrefix: tcpip.AddrFromSlice(thief[0].AsSlice()).WithPrefix()}, stack.AddressProperties{}); err != nil {
		t.Fatal(err)
	}
	own := one.hello.Tunnel
	one.hello.Tunnel = thief
	if conn, err := one.dialTCP(serve(t, target, echoTCP), time.Second); err == nil {
		conn.Close()
		t.Error("a peer connects in another's name")
	}
	one.hello.Tunnel = own
}

func TestPeerRemoved(t *testing.T) {
	a, session, ask := askPeers(t)
	c, _ := addPeer(t, a, ask, "phone")
	other, _ := addPeer(t, a, ask, "mac")
	server := serve(t, target, echoTCP)
	open, kept := c.mustTCP(server), other.mustTCP(server)
	for _, conn := range []io.ReadWriter{open, kept} {
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	connections := func() int { n, _ := a.node().tcp.counts(); return n }
	if n := connections(); n != 2 {
		t.Fatalf("%d connections, want 2", n)
	}
	if st, err := ask.Remove(t.Context(), "phone"); err != nil || len(st.Peers) != 1 {
		t.Fatalf("remove: %+v, %v", st, err)
	}
	eventually(t, "its connection ends in the agent", func() bool { return connections() == 1 })
	if conn, err := c.dialTCP(server, time.Second); err == nil {
		conn.Close()
		t.Error("a removed peer still connects")
	}
	_, _ = kept.Write([]byte("y"))
	if _, err := io.ReadFull(kept, make([]byte, 1)); err != nil {
		t.Errorf("the other peer's connection: %v", err)
	}
	var r *peer.Refusal
	if _, err := ask.Remove(t.Context(), "phone"); !errors.As(err, &r) || r.Status != 404 {
		t.Errorf("removing it twice: %v", err)
	}

	// With the last one the port closes, and opens again for the next.
	if st, err := ask.Remove(t.Context(), "mac"); err != nil || st.Port != 0 || len(st.Peers) != 0 {
		t.Fatalf("remove: %+v, %v", st, err)
	}
	port := a.cfg.PeerPort
	l, err := net.ListenUDP("udp", &net.UDPAddr{Port: port})
	if err != nil {
		t.Fatalf("the port is still open: %v", err)
	}
	var refusal *peer.Refusal
	if _, err := ask.Add(t.Context(), "late", peer.Ask{PublicKey: wire.NewPrivateKey().Public().String(), Ranges: peerRanges}); !errors.As(err, &refusal) ||
		!strings.Contains(refusal.Reason, fmt.Sprint(port)) {
		t.Errorf("adding a peer while the port is somebody else's: %v", err)
	}
	l.Close()
	again, _ := addPeer(t, a, ask, "phone")
	echoOnce(t, again, server)
	if _, err := again.query(again.hello.Agent[0], false, "name.test."); err != nil {
		t.Error(err)
	}
	echoOnce(t, session, server)
}

// TestPeersSurviveSession: another process of the session finds them as they were.
func TestPeersSurviveSession(t *testing.T) {
	a, session, ask := askPeers(t)
	c, _ := addPeer(t, a, ask, "phone")
	open := c.mustTCP(serve(t, target, echoTCP))
	session.key = wire.NewPrivateKey()
	session.hello.PublicKey = session.key.Public().String()
	conn, err := net.Dial("tcp", a.cfg.ControlAddr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	s, _, err := carrier.Dial(t.Context(), conn, session.hello)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := open.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(open, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if st, err := ask.Get(t.Context()); err != nil || len(st.Peers) != 1 {
		t.Errorf("%+v, %v", st, err)
	}
}

func TestPeerRefusals(t *testing.T) {
	a, session, ask := askPeers(t)
	key := func() string { return wire.NewPrivateKey().Public().String() }
	taken := key()
	for i, tt := range []struct {
		who    *peer.Client
		name   string
		ask    peer.Ask
		status int
		words  string
	}{
		{asker(a, "wrong"), "x", peer.Ask{PublicKey: key(), Ranges: peerRanges}, 401, "only the session"},
		{asker(a, ""), "x", peer.Ask{PublicKey: key(), Ranges: peerRanges}, 401, "only the session"},
		{ask, "a b", peer.Ask{PublicKey: key(), Ranges: peerRanges}, 400, `"a b"`},
		{ask, "-x", peer.Ask{PublicKey: key(), Ranges: peerRanges}, 400, "begins with"},
		{ask, strings.Repeat("x", 16), peer.Ask{PublicKey: key(), Ranges: peerRanges}, 400, "15"},
		{ask, "x", peer.Ask{PublicKey: "abc", Ranges: peerRanges}, 400, `"abc"`},
		{ask, "x", peer.Ask{PublicKey: key()}, 400, "0 ranges"},
		{ask, "x", peer.Ask{PublicKey: key(), Ranges: []netip.Prefix{netip.MustParsePrefix("198.19.5.16/30")}}, 400, "198.19.5.16/30"},
		{ask, "x", peer.Ask{PublicKey: key(), Ranges: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/24")}}, 400, "127.0.0.0/24"},
		{ask, "x", peer.Ask{PublicKey: key(), Ranges: []netip.Prefix{peerRange4, netip.MustParsePrefix("198.19.6.0/24")}}, 400, "each family"},
		{ask, "x", peer.Ask{PublicKey: key(), Ranges: []netip.Prefix{netip.MustParsePrefix("10.77.0.0/24")}}, 400, "contains 10.77.0.1"},
		{ask, "x", peer.Ask{PublicKey: key(), Ranges: []netip.Prefix{netip.MustParsePrefix("198.18.7.0/24")}}, 400, "contains 198.18.7."},
		{ask, "first", peer.Ask{PublicKey: taken, Ranges: peerRanges}, 0, ""},
		{ask, "first", peer.Ask{PublicKey: key(), Ranges: peerRanges}, 409, `"first" already`},
		{ask, "second", peer.Ask{PublicKey: taken}, 409, `of peer "first"`},
	} {
		_, err := tt.who.Add(t.Context(), tt.name, tt.ask)
		var r *peer.Refusal
		switch {
		case tt.status == 0 && err == nil:
		case tt.status == 0 || !errors.As(err, &r) || r.Status != tt.status || !strings.Contains(r.Reason, tt.words):
			t.Errorf("case %d: %v, want %d and %q", i, err, tt.status, tt.words)
		}
	}
	for i := 1; i < peer.Max; i++ {
		st, err := ask.Add(t.Context(), fmt.Sprint("p", i), peer.Ask{PublicKey: key()})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[netip.Addr]bool{}
		for _, p := range st.Peers {
			for j, addr := range p.Addresses {
				if seen[addr] || !peerRanges[j].Contains(addr) || addr == st.DNS[j] {
					t.Errorf("address %s of %s", addr, p.Name)
				}
				seen[addr] = true
			}
		}
	}
	if _, err := ask.Add(t.Context(), "more", peer.Ask{PublicKey: key()}); err == nil || !strings.Contains(err.Error(), fmt.Sprint(peer.Max)) {
		t.Errorf("one peer too many: %v", err)
	}
	// A place that becomes free is the next one's.
	if _, err := ask.Remove(t.Context(), "p2"); err != nil {
		t.Fatal(err)
	}
	if st, err := ask.Add(t.Context(), "new", peer.Ask{PublicKey: key()}); err != nil || len(st.Peers) != peer.Max {
		t.Errorf("in its place: %+v, %v", st, err)
	}
	echoOnce(t, session, serve(t, target, echoTCP))
}
