package agent

import (
	"bytes"
	"net/netip"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/waiter"
)

// ping sends one echo request from the client and returns the reply's payload
// and sequence number; false when none came in time.
func (c *client) ping(to netip.Addr, seq uint16, payload []byte, timeout time.Duration) ([]byte, uint16, bool) {
	c.t.Helper()
	var wq waiter.Queue
	proto := icmp.ProtocolNumber4
	request := header.ICMPv4(make([]byte, echoHeader+len(payload)))
	request.SetType(header.ICMPv4Echo)
	if to.Is6() {
		proto = icmp.ProtocolNumber6
		request[0] = byte(header.ICMPv6EchoRequest)
	}
	request.SetSequence(seq)
	copy(request[echoHeader:], payload)
	ep, terr := c.stack.NewEndpoint(proto, protocolOf(to), &wq)
	if terr != nil {
		c.t.Fatal(terr)
	}
	defer ep.Close()
	ep.SocketOptions().SetSendBufferSize(1<<20, false)
	ep.SocketOptions().SetReceiveBufferSize(1<<20, false)
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	if terr := ep.Bind(full(c.own(to), 0)); terr != nil {
		c.t.Fatal(terr)
	}
	dst := full(to, 0)
	if _, terr := ep.Write(bytes.NewReader(request), tcpip.WriteOptions{To: &dst}); terr != nil {
		c.t.Fatal(terr)
	}
	select {
	case <-ready:
	case <-time.After(timeout):
		return nil, 0, false
	}
	var reply bytes.Buffer
	if _, terr := ep.Read(&reply, tcpip.ReadOptions{}); terr != nil {
		c.t.Fatal(terr)
	}
	b := reply.Bytes()
	return b[echoHeader:], header.ICMPv4(b).Sequence(), true
}

func TestPingReal(t *testing.T) {
	for name, gso := range map[string]bool{"gso": true, "plain": false} {
		t.Run(name, func(t *testing.T) {
			a := startAgent(t, Config{}, nil)
			c := connect(t, a, gso)
			for _, to := range []netip.Addr{target, target6, agent4, agent6} {
				for i, size := range []int{0, 56, 1400, 9000} {
					sent := bytes.Repeat([]byte{byte(i + 1)}, size)
					got, seq, ok := c.ping(to, uint16(1000+i), sent, 5*time.Second)
					if !ok || !bytes.Equal(got, sent) || seq != uint16(1000+i) {
						t.Errorf("ping %s with %d bytes: %d bytes, seq %d, %v", to, size, len(got), seq, ok)
					}
				}
			}
		})
	}
}

func TestPingIsNeverFaked(t *testing.T) {
	a := startAgent(t, Config{}, func(x *timing) { x.echo = 200 * time.Millisecond })
	c := connect(t, a, true)
	for _, to := range []string{"10.77.0.200", "127.0.0.1", "169.254.1.1", inbound4.String(), "8.8.8.8", "fd77::99"} {
		if _, _, ok := c.ping(netip.MustParseAddr(to), 1, nil, 500*time.Millisecond); ok {
			t.Errorf("%s answered", to)
		}
	}
}

func FuzzParseEcho(f *testing.F) {
	f.Add(false, []byte{8, 0, 0, 0, 1, 2, 3, 4, 5})
	f.Add(true, []byte{128, 0, 0, 0, 1, 2, 3, 4})
	f.Add(false, []byte{8})
	f.Fuzz(func(t *testing.T, v6 bool, msg []byte) {
		e, ok := parseEcho(v6, msg)
		if !ok {
			return
		}
		if len(e.payload) != len(msg)-8 || msg[0] != 8 && msg[0] != 128 || e.ident != uint16(msg[4])<<8|uint16(msg[5]) {
			t.Errorf("%v of %x", e, msg)
		}
		reply := append([]byte(nil), msg...)
		reply[0] = 0
		if v6 {
			reply[0] = 129
		}
		if p, ok := parseReply(v6, reply, e.seq); !ok || !bytes.Equal(p, e.payload) {
			t.Errorf("the reply to %x was not taken", msg)
		}
		if _, ok := parseReply(v6, reply, e.seq+1); ok {
			t.Errorf("a reply with another sequence number was taken")
		}
	})
}
