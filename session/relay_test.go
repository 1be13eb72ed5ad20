package session

import (
	"bytes"
	"io"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/wire/intercept"
	"github.com/culvert-dev/culvert/wire/netstack"
)

// stackInbound is a connection of a real netstack.
type stackInbound struct{ *gonet.TCPConn }

func (s stackInbound) Abort()         { s.Close() }
func (s stackInbound) Introduced()    {}
func (s stackInbound) OnReset(func()) {}

// twoStacks are the network stacks of an agent and a session, one cable apart.
func twoStacks(t testing.TB, agent, session netip.Addr) (a, b *stack.Stack) {
	t.Helper()
	var links [2]*netstack.Endpoint
	var stacks [2]*stack.Stack
	for i, addr := range []netip.Addr{agent, session} {
		links[i] = netstack.New(netstack.Config{MTU: 1420, GSO: true})
		s, err := netstack.NewStack(links[i])
		if err != nil {
			t.Fatal(err)
		}
		if err := s.AddProtocolAddress(netstack.NIC, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddrFromSlice(addr.AsSlice()).WithPrefix()}, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
		stacks[i] = s
	}
	for i := range links {
		from, to := links[i], links[1-i]
		go func() {
			bufs, sizes := [][]byte{make([]byte, 65535)}, make([]int, 1)
			for {
				n, err := from.Read(bufs, sizes, 0)
				if err != nil {
					return
				}
				if n == 1 {
					_, _ = to.Write([][]byte{append([]byte(nil), bufs[0][:sizes[0]]...)}, 0)
				}
			}
		}()
	}
	t.Cleanup(func() {
		for i := range links {
			links[i].Close()
			stacks[i].Destroy()
		}
	})
	return stacks[0], stacks[1]
}

// TestRelayThroughNetstack: much, little, pauses longer than a lull, and
// half-close, by the netstack's own connections and their deadlines.
func TestRelayThroughNetstack(t *testing.T) {
	agent, session := netip.MustParseAddr("10.66.0.1"), netip.MustParseAddr("10.66.0.2")
	a, b := twoStacks(t, agent, session)
	port := program(t, "127.0.0.1:0", echo)
	in := targetsOf(t, map[string]target{"a": {Token: "t", Network: intercept.TCP, Local: port}})
	at := tcpip.FullAddress{NIC: netstack.NIC, Addr: tcpip.AddrFromSlice(session.AsSlice()), Port: intercept.Port}
	l, err := gonet.ListenTCP(b, at, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			in.serve(stackInbound{c.(*gonet.TCPConn)})
		}
	}()
	c, err := gonet.DialTCP(a, at, ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if err := intercept.WriteHeader(c, intercept.Header{Network: intercept.TCP, ID: "a", Token: "t"}); err != nil {
		t.Fatal(err)
	}
	if s, err := intercept.ReadStatus(c); err != nil || s != intercept.Accepted {
		t.Fatalf("%v, %v", s, err)
	}
	for i, size := range []int{1, 16 << 20, lullBytes, lullBytes + 1, 64 << 10, 1 << 20} {
		sent := bytes.Repeat([]byte{byte(i), 'x', 'y'}, size/3+1)[:size]
		go c.Write(sent)
		got := make([]byte, size)
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, sent) {
			t.Fatalf("%d bytes: %v", size, err)
		}
		if i%2 == 1 {
			time.Sleep(lullTime + 50*time.Millisecond)
		}
	}
	_ = c.CloseWrite()
	if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
		t.Errorf("at the end %d bytes, %v", len(rest), err)
	}
	c.Close()
	eventually(t, "none is open", func() bool { return in.Open("a") == 0 })
}
