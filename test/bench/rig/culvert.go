package rig

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/agent"
	"github.com/culvert-dev/culvert/internal/cores"
	"github.com/culvert-dev/culvert/internal/nonblock"
	"github.com/culvert-dev/culvert/internal/version"
	"github.com/culvert-dev/culvert/tun"
	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/netstack"
	"github.com/culvert-dev/culvert/wire/queue"
)

// mtu of the tunnels' packets, as in a real session.
const mtu = 1420

// The addresses of the tunnel.
var (
	tunnelAddrs  = []netip.Addr{netip.MustParseAddr("198.18.7.1"), netip.MustParseAddr("fdc0::1")}
	agentAddrs   = []netip.Addr{netip.MustParseAddr("198.18.7.2"), netip.MustParseAddr("fdc0::2")}
	inboundAddrs = []netip.Addr{netip.MustParseAddr("198.18.7.3"), netip.MustParseAddr("fdc0::3")}
)

// agentRole is an agent with the memory of an agent's pod.
type agentRole struct {
	Control string // where it takes sessions
}

// podMemory is the limit of the agent's pod.
const podMemory = 512 << 20

func (r *agentRole) start() (stop func(), err error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	netstack.LogTo(log)
	// As cmd/culvert-agent has it in a pod of this size.
	const limit = podMemory * 9 / 10
	debug.SetMemoryLimit(limit)
	a := agent.New(agent.Config{ControlAddr: r.Control, MetricsAddr: "127.0.0.1:7532", ProxyPort: -1, MemoryLimit: limit, Log: log})
	go cores.Adapt(context.Background())
	ran := make(chan error, 1)
	go func() { ran <- a.Run(context.Background()) }()
	for range 500 {
		if agent.CheckHealth(context.Background(), "127.0.0.1:7532", true) == nil {
			return func() { a.Close() }, nil
		}
		select {
		case err := <-ran:
			return nil, err
		case <-time.After(10 * time.Millisecond):
		}
	}
	return nil, errors.New("the agent is not ready after 5 s")
}

// sessionRole is a session's data path: a TUN device, WireGuard and a stream for
// each lane to the agent, which are plain TCP connections, or UDP beside them.
type sessionRole struct {
	Agent  string // address of its control listener
	Routes []netip.Prefix
	UDP    bool // send nothing by the stream
}

func (r *sessionRole) start() (stop func(), err error) {
	file, err := tun.Create(tun.Config{Name: "culvert0", MTU: mtu})
	if err != nil {
		return nil, err
	}
	device, err := tun.Open(file)
	if err != nil {
		return nil, err
	}
	own := make([]netip.Prefix, len(tunnelAddrs))
	for i, a := range tunnelAddrs {
		own[i] = netip.PrefixFrom(a, a.BitLen())
	}
	if err := configure("culvert0", own, r.Routes); err != nil {
		return nil, err
	}
	go cores.Adapt(context.Background())
	key := wire.NewPrivateKey()
	var udp *carrier.Datagrams
	if r.UDP {
		if udp, err = carrier.ListenDatagrams(false, netip.AddrPort{}); err != nil {
			return nil, err
		}
		udp.Pin()
		go udp.Run(context.Background(), nil)
	}
	local := wire.NewLocal(wire.LocalConfig{TUN: device, Tunnel: tunnelAddrs, Agent: agentAddrs, Inbound: inboundAddrs, MTU: mtu,
		Split: func() int { return udp.MaxPacket(mtu) }})
	bind := carrier.NewBind(carrier.BindConfig{Datagrams: udp})
	tunnel, err := wire.New(wire.Config{Device: local, PrivateKey: key, Bind: bind})
	if err != nil {
		return nil, err
	}
	if err := r.dial(tunnel, bind, udp, key); err != nil {
		tunnel.Close()
		return nil, err
	}
	return tunnel.Close, nil
}

// dial does what a session does once it has a connection to its agent.
func (r *sessionRole) dial(tunnel *wire.Tunnel, bind *carrier.Bind, udp *carrier.Datagrams, key wire.Key) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	hello := carrier.Hello{
		Protocol: carrier.Protocol, Version: version.Version, Session: "bench", Secret: strings.Repeat("s", 44),
		PublicKey: key.Public().String(), Tunnel: tunnelAddrs, Agent: agentAddrs, Inbound: inboundAddrs,
		MTU: mtu, Features: []string{carrier.FeatureGSO},
	}
	if udp != nil {
		hello.Features = append(hello.Features, carrier.FeatureUDP)
	}
	stream, welcome, err := r.stream(ctx, hello)
	if err != nil {
		return err
	}
	bind.Attach(stream)
	if udp != nil {
		at, err := netip.ParseAddrPort(r.Agent)
		if err != nil {
			return err
		}
		udp.Probe(welcome.UDPSecret, []netip.AddrPort{netip.AddrPortFrom(at.Addr(), uint16(welcome.UDPPort))})
		for !udp.State().Up {
			if ctx.Err() != nil {
				return errors.New("no answer by UDP")
			}
			time.Sleep(time.Millisecond)
		}
	}
	peer, err := wire.ParseKey(welcome.PublicKey)
	if err != nil {
		return err
	}
	everything := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	if err := tunnel.SetPeer(peer, everything); err != nil {
		return err
	}
	for tunnel.LastHandshake().IsZero() {
		if ctx.Err() != nil {
			return errors.New("no handshake")
		}
		time.Sleep(time.Millisecond)
	}
	hello.Lane = queue.Bulk
	if stream, _, err = r.stream(ctx, hello); err != nil {
		return err
	}
	bind.Attach(stream)
	return nil
}

// stream opens a TCP connection to the agent and introduces the session on it.
func (r *sessionRole) stream(ctx context.Context, hello carrier.Hello) (*carrier.Stream, carrier.Welcome, error) {
	conn, err := net.Dial("tcp", r.Agent)
	if err != nil {
		return nil, carrier.Welcome{}, err
	}
	stream, welcome, err := carrier.Dial(ctx, nonblock.Wrap(conn), hello)
	if err != nil {
		conn.Close()
		return nil, welcome, fmt.Errorf("introducing the session: %w", err)
	}
	return stream, welcome, nil
}
