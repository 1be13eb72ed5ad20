package rig

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
	"golang.zx2c4.com/wireguard/tun/netstack"

	"github.com/culvert-dev/culvert/wire"
)

// stockRole is one end of a tunnel of wireguard-go as it comes: its own Bind
// over UDP and its own TUN device, or its own netstack.
type stockRole struct {
	Key, Peer wire.Key
	Address   netip.Addr // in the tunnel
	Other     netip.Addr // the peer's
	Listen    uint16
	Endpoint  string `json:",omitempty"` // the peer's UDP address, where it is known
	Device    string // name of the TUN device
	// Relay, if set, is where connections to Address are taken to, from ports of a
	// netstack: what an agent would be that is made of stock parts.
	Relay netip.Addr
	Ports []uint16
}

func (r *stockRole) start() (stop func(), err error) {
	var d tun.Device
	var stack *netstack.Net
	if r.Relay.IsValid() {
		d, stack, err = netstack.CreateNetTUN([]netip.Addr{r.Address}, nil, mtu)
	} else {
		d, err = tun.CreateTUN(r.Device, mtu)
	}
	if err != nil {
		return nil, err
	}
	w := device.NewDevice(d, conn.NewDefaultBind(), device.NewLogger(device.LogLevelError, "wireguard-go: "))
	var b strings.Builder
	fmt.Fprintf(&b, "private_key=%s\nlisten_port=%d\n", hex.EncodeToString(r.Key[:]), r.Listen)
	fmt.Fprintf(&b, "public_key=%s\nallowed_ip=%s\n", hex.EncodeToString(r.Peer[:]), netip.PrefixFrom(r.Other, r.Other.BitLen()))
	if r.Endpoint != "" {
		fmt.Fprintf(&b, "endpoint=%s\npersistent_keepalive_interval=25\n", r.Endpoint)
	}
	if err := errors.Join(w.IpcSet(b.String()), w.Up()); err != nil {
		w.Close()
		return nil, err
	}
	if stack == nil {
		err = configure(r.Device, []netip.Prefix{netip.PrefixFrom(r.Address, r.Address.BitLen())},
			[]netip.Prefix{netip.PrefixFrom(r.Other, r.Other.BitLen())})
	} else {
		for _, port := range r.Ports {
			err = errors.Join(err, r.relay(stack, port))
		}
	}
	if err != nil {
		w.Close()
		return nil, err
	}
	return w.Close, nil
}

// relay takes connections to a port on to a real socket, as an agent does.
func (r *stockRole) relay(stack *netstack.Net, port uint16) error {
	l, err := stack.ListenTCPAddrPort(netip.AddrPortFrom(r.Address, port))
	if err != nil {
		return fmt.Errorf("listening in the netstack: %w", err)
	}
	go func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				out, err := net.DialTimeout("tcp", netip.AddrPortFrom(r.Relay, port).String(), 5*time.Second)
				if err != nil {
					in.Close()
					return
				}
				join(in, out)
			}()
		}
	}()
	return nil
}

// Stock is a tunnel of stock wireguard-go over UDP between two namespaces that
// reach each other.
type Stock struct {
	Near, Far *Process
	Addr      netip.Addr // where the far end, or what it relays to, answers
}

// StockConfig says between whom.
type StockConfig struct {
	Near, Far *Namespace
	FarAddr   netip.Addr // of the far namespace, for the UDP path
	Number    uint8      // makes names, ports and addresses unique among Stocks
	// Relay makes the far end a netstack that takes connections on to that address.
	Relay netip.Addr
}

// NewStock starts both ends.
func NewStock(c StockConfig) (s *Stock, err error) {
	a, b := wire.NewPrivateKey(), wire.NewPrivateKey()
	near, far := netip.AddrFrom4([4]byte{198, 19, c.Number, 1}), netip.AddrFrom4([4]byte{198, 19, c.Number, 2})
	port := 51820 + uint16(c.Number)
	name := fmt.Sprintf("stock%d", c.Number)
	s = &Stock{Addr: far}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.Far, err = c.Far.start(role{Stock: &stockRole{Key: b, Peer: a.Public(), Address: far, Other: near, Listen: port,
		Device: name, Relay: c.Relay, Ports: []uint16{9000, 9002, 9003}}}, ""); err != nil {
		return s, err
	}
	if s.Near, err = c.Near.start(role{Stock: &stockRole{Key: a, Peer: b.Public(), Address: near, Other: far, Listen: port,
		Device: name, Endpoint: netip.AddrPortFrom(c.FarAddr, port).String()}}, ""); err != nil {
		return s, err
	}
	return s, c.Near.Await(netip.AddrPortFrom(far, 9000))
}

// Close ends both ends.
func (s *Stock) Close() {
	s.Near.Close()
	s.Far.Close()
}
