package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/netstack"
)

// node is the agent's end of one session's tunnel: WireGuard, the network stack
// behind it, and the forwarders that turn its flows into sockets. It lives as
// long as the agent; streams and keys come and go.
type node struct {
	agent    *Agent
	gso      bool
	self     []netip.Addr // the agent's addresses in the tunnel
	inbound  []netip.Addr
	targets  *targets
	bind     *carrier.Bind
	endpoint *netstack.Endpoint
	stack    *stack.Stack
	tunnel   *wire.Tunnel

	tcp  *tcpForwarder
	udp  *udpForwarder
	echo *echoForwarder
	dns  *dnsRelay
	gov  *governor

	proxy     *proxyDoor    // nil if there is none
	datagrams *datagramDoor // nil if there is none
	peers     *peers
	door      *inboundDoor // for connections from the cluster
	exposed   *exposed

	allowed []netip.Prefix // addresses of the peer
	turn    atomic.Uint64  // counts peers

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once
}

// newNode builds and starts the node of the session that h introduces, without
// a peer.
func (a *Agent) newNode(h carrier.Hello) (*node, error) {
	n := &node{
		agent:   a,
		gso:     slices.Contains(h.Features, carrier.FeatureGSO),
		self:    h.Agent,
		inbound: h.Inbound,
	}
	var way *carrier.Datagrams
	if n.datagrams = a.openDatagrams(h); n.datagrams != nil {
		way = n.datagrams.way
	}
	n.bind = carrier.NewBind(carrier.BindConfig{Datagrams: way})
	for _, addr := range slices.Concat(h.Tunnel, h.Inbound) {
		n.allowed = append(n.allowed, netip.PrefixFrom(addr, addr.BitLen()))
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	n.peers = &peers{node: n}
	n.door = newInboundDoor(n)
	n.exposed = &exposed{node: n}
	n.targets = newTargets(a.cfg, h, n.peers)
	mtu := mtuOf(h)
	n.endpoint = netstack.New(netstack.Config{MTU: mtu, GSO: n.gso, Split: func() int { return way.MaxPacket(mtu) }})
	s, err := netstack.NewStack(n.endpoint)
	if err != nil {
		n.cancel()
		n.bind.Shutdown()
		return nil, fmt.Errorf("making the network stack: %w", err)
	}
	n.stack = s
	if err := n.start(); err != nil {
		n.close()
		return nil, err
	}
	return n, nil
}

func mtuOf(h carrier.Hello) int {
	if h.MTU == 0 {
		return netstack.DefaultMTU
	}
	return h.MTU
}

func (n *node) start() error {
	// The agent's own addresses are on the interface, so that the stack itself
	// answers an echo request to them: the session's probe of the whole path.
	for _, addr := range n.self {
		if err := n.stack.AddProtocolAddress(netstack.NIC, tcpip.ProtocolAddress{
			Protocol:          protocolOf(addr),
			AddressWithPrefix: tcpip.AddrFromSlice(addr.AsSlice()).WithPrefix(),
		}, stack.AddressProperties{}); err != nil {
			return fmt.Errorf("adding address %s: %s", addr, err)
		}
	}
	n.gov = newGovernor(n)
	n.gov.fit(0)
	n.tcp = newTCPForwarder(n)
	n.udp = newUDPForwarder(n)
	n.echo = newEchoForwarder(n)
	n.dns = newDNSRelay(n)
	var err error
	if n.dns.stop, err = n.dns.listen(netstack.NIC, n.self); err != nil {
		return err
	}
	t, err := wire.New(wire.Config{Device: n.endpoint, PrivateKey: n.agent.key, Bind: n.bind, Log: n.agent.log, Passive: true})
	if err != nil {
		return fmt.Errorf("starting WireGuard: %w", err)
	}
	n.tunnel = t
	n.proxy = n.agent.openProxy(n)
	n.door.listen()
	if n.datagrams != nil {
		n.spawn(func() { n.datagrams.run(n) })
	}
	n.spawn(n.gov.run)
	n.spawn(n.udp.sweep)
	return nil
}

// spawn runs f in a goroutine that close waits for.
func (n *node) spawn(f func()) {
	n.wg.Add(1)
	go func() {
		defer n.wg.Done()
		f()
	}()
}

// handshakeWait is how long the session has to begin a handshake before the
// agent, if it has something to send, begins one itself.
const handshakeWait = 3 * time.Second

// setPeer makes the session's process that introduced itself last the only
// peer; connections of the stack stay. It begins the handshake, and until then
// packets wait: they would begin another one from this end, and when two cross
// both are lost.
func (n *node) setPeer(key wire.Key) error {
	if n.proxy != nil {
		n.proxy.renew()
	}
	if n.datagrams != nil {
		n.datagrams.renew()
	}
	n.endpoint.Hold(true)
	n.door.renew()
	if err := n.tunnel.SetPeer(key, n.allowed); err != nil {
		n.endpoint.Hold(false)
		return fmt.Errorf("setting the WireGuard peer: %w", err)
	}
	turn := n.turn.Add(1)
	n.spawn(func() {
		t := time.NewTicker(5 * time.Millisecond)
		defer t.Stop()
		for end := time.Now().Add(handshakeWait); time.Now().Before(end) && n.tunnel.LastHandshake().IsZero(); {
			select {
			case <-t.C:
			case <-n.ctx.Done():
				return
			}
			if n.turn.Load() != turn {
				return // a later peer's turn
			}
		}
		n.endpoint.Hold(false)
	})
	return nil
}

// errRefused is a reset instead of a connection.
var errRefused = errors.New("refused")

// dialSession connects from the agent's address to the session's inbound one.
func (n *node) dialSession(ctx context.Context, port uint16) (net.Conn, error) {
	ep, wq, err := n.dialEndpoint(ctx, port)
	if err != nil {
		return nil, err
	}
	return gonet.NewTCPConn(wq, ep), nil
}

// dialEndpoint is dialSession for who wants the endpoint itself. IPv4 goes first.
func (n *node) dialEndpoint(ctx context.Context, port uint16) (tcpip.Endpoint, *waiter.Queue, error) {
	for _, to := range n.inbound {
		for _, from := range n.self {
			if from.Is4() != to.Is4() {
				continue
			}
			ep, wq, err := n.dialFrom(ctx, from, netip.AddrPortFrom(to, port))
			if err != nil {
				return nil, nil, fmt.Errorf("dialling port %d of the session: %w", port, err)
			}
			return ep, wq, nil
		}
	}
	return nil, nil, fmt.Errorf("dialling port %d of the session: no inbound address of the agent's family", port)
}

func (n *node) dialFrom(ctx context.Context, from netip.Addr, to netip.AddrPort) (tcpip.Endpoint, *waiter.Queue, error) {
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	wq := new(waiter.Queue)
	ep, terr := n.stack.NewEndpoint(tcp.ProtocolNumber, protocolOf(from), wq)
	if terr != nil {
		return nil, nil, fmt.Errorf("making an endpoint: %s", terr)
	}
	entry, notify := waiter.NewChannelEntry(waiter.WritableEvents)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	terr = ep.Bind(tcpip.FullAddress{NIC: netstack.NIC, Addr: tcpip.AddrFromSlice(from.AsSlice())})
	if terr == nil {
		terr = ep.Connect(tcpip.FullAddress{NIC: netstack.NIC, Addr: tcpip.AddrFromSlice(to.Addr().AsSlice()), Port: to.Port()})
	}
	if _, ok := terr.(*tcpip.ErrConnectStarted); ok {
		select {
		case <-ctx.Done():
			ep.Abort()
			ep.Close()
			return nil, nil, ctx.Err()
		case <-notify:
		}
		terr = ep.LastError()
	}
	if terr != nil {
		ep.Close()
		if _, ok := terr.(*tcpip.ErrConnectionRefused); ok {
			return nil, nil, errRefused
		}
		return nil, nil, errors.New(terr.String())
	}
	return ep, wq, nil
}

// close ends every flow and waits for the goroutines. The endpoint goes first:
// it releases who waits to send, with the stack's locks in hand.
func (n *node) close() {
	n.once.Do(func() {
		n.cancel()
		if n.proxy != nil {
			n.proxy.close()
		}
		n.door.close()
		n.exposed.close()
		n.endpoint.Close()
		n.peers.close()
		if n.tunnel != nil {
			n.tunnel.Close()
		}
		n.bind.Shutdown()
		if n.tcp != nil {
			n.tcp.close()
		}
		if n.udp != nil {
			n.udp.close()
		}
		if n.dns != nil {
			n.dns.close()
		}
		n.stack.Close()
		n.wg.Wait()
		n.stack.Destroy()
	})
}

func protocolOf(addr netip.Addr) tcpip.NetworkProtocolNumber {
	if addr.Is4() {
		return ipv4.ProtocolNumber
	}
	return ipv6.ProtocolNumber
}

func netipAddr(a tcpip.Address) netip.Addr {
	addr, _ := netip.AddrFromSlice(a.AsSlice())
	return addr
}
