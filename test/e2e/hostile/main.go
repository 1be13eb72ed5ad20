// Command hostile is a test double of culvert-agent that attacks the machine
// it is connected to: it behaves until the session trusts it, and then adds
// packets of its own to whatever it answers. It is what a taken-over agent pod
// could do.
package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/internal/version"
	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/netstack"
)

// Victims of the attack; the test listens there.
const (
	tcpPort, udpPort = 2222, 2223
	lanHost          = "192.168.50.9"
	forgedSource     = "10.244.99.99"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "health" {
		return // always well
	}
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		os.Exit(1)
	}
}

func serve() error {
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", carrier.ControlPort))
	if err != nil {
		return err
	}
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			if err := attack(c); err != nil {
				fmt.Println("session ended:", err)
			}
		}()
	}
}

func attack(c net.Conn) error {
	var n *node
	var failed error
	stream, _, err := carrier.Accept(context.Background(), c, func(h carrier.Hello) carrier.Welcome {
		n, failed = newNode(h)
		if failed != nil {
			return carrier.Welcome{Protocol: carrier.Protocol, Error: failed.Error()}
		}
		resolv, _ := os.ReadFile("/etc/resolv.conf")
		return carrier.Welcome{
			Protocol: carrier.Protocol, Version: version.Version, PublicKey: n.key.Public().String(),
			Instance: "hostile", ResolvConf: string(resolv), Features: []string{carrier.FeatureGSO},
		}
	})
	if err != nil {
		return err
	}
	// As the agent does: the session begins the handshake, and until then the
	// stack's own packets wait, or two handshakes would cross.
	n.ep.Hold(true)
	n.bind.Attach(stream)
	for range 500 {
		if !n.tunnel.LastHandshake().IsZero() {
			fmt.Println("the session trusts us")
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	n.ep.Hold(false)
	<-stream.Done()
	n.tunnel.Close()
	return stream.Err()
}

// node is the double's end of the tunnel.
type node struct {
	key    wire.Key
	ep     *netstack.Endpoint
	bind   *carrier.Bind
	tunnel *wire.Tunnel
}

func newNode(hello carrier.Hello) (*node, error) {
	n := &node{key: wire.NewPrivateKey(), bind: carrier.NewBind(carrier.BindConfig{})}
	n.ep = netstack.New(netstack.Config{MTU: hello.MTU, GSO: true})
	s, err := netstack.NewStack(n.ep) // answers echo requests by itself
	if err != nil {
		return nil, err
	}
	// connect's last probe is a TCP connection to the agent's port 53.
	for _, a := range hello.Agent {
		if !a.Is4() {
			continue
		}
		address := tcpip.AddrFrom4(a.As4())
		if err := s.AddProtocolAddress(netstack.NIC, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber, AddressWithPrefix: address.WithPrefix()}, stack.AddressProperties{}); err != nil {
			return nil, fmt.Errorf("adding %s: %s", a, err)
		}
		dns, err := gonet.ListenTCP(s, tcpip.FullAddress{NIC: netstack.NIC, Addr: address, Port: 53}, ipv4.ProtocolNumber)
		if err != nil {
			return nil, err
		}
		go func() {
			for {
				c, err := dns.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
	}
	if n.tunnel, err = wire.New(wire.Config{Device: &device{Device: n.ep, victims: hello.Tunnel}, PrivateKey: n.key, Bind: n.bind, Passive: true, Log: slog.Default()}); err != nil {
		return nil, err
	}
	peer, err := wire.ParseKey(hello.PublicKey)
	if err != nil {
		return nil, err
	}
	return n, n.tunnel.SetPeer(peer, []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")})
}

// device adds forged packets to each batch that leaves.
type device struct {
	tun.Device // the endpoint, without its queue's own way to be read
	victims    []netip.Addr
	count      atomic.Int64
}

func (d *device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	all := d.forged()
	first := int(d.count.Load()) % len(all)
	forged := all[first:min(first+4, len(all))] // a few at a time: WireGuard asks for few
	room := len(bufs) - len(forged)
	n, err := d.Device.Read(bufs[:room], sizes[:room], offset)
	if err != nil {
		return n, err
	}
	for _, p := range forged {
		sizes[n] = copy(bufs[n][offset:], p)
		n++
	}
	if c := d.count.Add(int64(len(forged))); c/50 != (c-int64(len(forged)))/50 {
		fmt.Println("forged packets sent:", c)
	}
	return n, nil
}

// forged are the packets of one round: everything that must never arrive.
func (d *device) forged() [][]byte {
	source := netip.MustParseAddr(forgedSource)
	targets := []netip.Addr{netip.MustParseAddr(lanHost), netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("192.168.50.2")}
	for _, v := range d.victims {
		if v.Is4() {
			targets = append(targets, v)
		}
	}
	var ps [][]byte
	for _, t := range targets {
		ps = append(ps,
			tcp4(source, t, 40000, tcpPort, header.TCPFlagSyn),
			tcp4(source, t, 40001, tcpPort, header.TCPFlagAck),
			tcp4(netip.MustParseAddr(lanHost), t, 40002, tcpPort, header.TCPFlagSyn),
			udp4(source, t, 53, udpPort),
			udp4(netip.MustParseAddr("127.0.0.1"), t, 53, udpPort),
			echo4(source, t),
		)
	}
	return ps
}

func ip4(src, dst netip.Addr, proto uint8, payload []byte) []byte {
	b := make([]byte, header.IPv4MinimumSize+len(payload))
	header.IPv4(b).Encode(&header.IPv4Fields{
		TotalLength: uint16(len(b)), TTL: 64, Protocol: proto,
		SrcAddr: tcpip.AddrFrom4(src.As4()), DstAddr: tcpip.AddrFrom4(dst.As4()),
	})
	h := header.IPv4(b)
	h.SetChecksum(^h.CalculateChecksum())
	copy(b[header.IPv4MinimumSize:], payload)
	return b
}

func tcp4(src, dst netip.Addr, sport, dport uint16, flags header.TCPFlags) []byte {
	t := header.TCP(make([]byte, header.TCPMinimumSize))
	t.Encode(&header.TCPFields{SrcPort: sport, DstPort: dport, SeqNum: 1, AckNum: 1, DataOffset: header.TCPMinimumSize, Flags: flags, WindowSize: 65535})
	sum := header.PseudoHeaderChecksum(header.TCPProtocolNumber, tcpip.AddrFrom4(src.As4()), tcpip.AddrFrom4(dst.As4()), uint16(len(t)))
	t.SetChecksum(^t.CalculateChecksum(sum))
	return ip4(src, dst, uint8(header.TCPProtocolNumber), t)
}

func udp4(src, dst netip.Addr, sport, dport uint16) []byte {
	u := make([]byte, header.UDPMinimumSize+6)
	binary.BigEndian.PutUint16(u, sport)
	binary.BigEndian.PutUint16(u[2:], dport)
	binary.BigEndian.PutUint16(u[4:], uint16(len(u)))
	copy(u[header.UDPMinimumSize:], "forged")
	return ip4(src, dst, uint8(header.UDPProtocolNumber), u) // checksum 0: none
}

func echo4(src, dst netip.Addr) []byte {
	i := header.ICMPv4(make([]byte, header.ICMPv4MinimumSize))
	i.SetType(header.ICMPv4Echo)
	i.SetChecksum(header.ICMPv4Checksum(i, 0))
	return ip4(src, dst, uint8(header.ICMPv4ProtocolNumber), i)
}
