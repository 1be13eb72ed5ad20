package netstack

import (
	"fmt"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/icmp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

// NIC is the only interface of a stack made by NewStack.
const NIC tcpip.NICID = 1

// Buffers of one TCP connection, in bytes, each way. A connection starts with
// the default as its bound and uses what is in flight; the maximum is 4 MiB, a
// gigabit at 32 ms. Smaller ones cost CPU: more wake-ups per byte.
const (
	bufferMin     = 4 << 10
	bufferDefault = 1 << 20
	bufferMax     = 4 << 20
)

// timeWait is short because gVisor swallows a SYN that meets its connection's
// predecessor in TIME-WAIT, unless a listener takes it, and a forwarder is none:
// with 5 s, one in fifty dials of a client that makes 200 a second hung for a
// second or more. What the state is for, an answer to a FIN whose acknowledgement
// was lost, is a reset then, which ends a connection in LAST-ACK as well.
const timeWait = 10 * time.Millisecond

// While the carrier is away packets vanish. Retransmission goes on for about an
// hour (450 times 8 s), and at most 8 s apart, so that a connection is back soon
// after the carrier is; with the default it could take two minutes more.
const (
	maxRTO     = 8 * time.Second
	maxRetries = 450
)

// Path is what kind of carrier is below a stack.
type Path int

const (
	// Stream is a path on which packets arrive in order and all, until it is cut.
	// What looks for losses there finds delays. gVisor's RACK takes a queue for a
	// loss, and its CUBIC leaves slow start when the round trip grows: windows of 70
	// KB, cut into packets of 8 KB that cost as much as those of 64, on a path that
	// holds megabytes. So Reno, which knows nothing but losses, and recovery by SACK
	// (RFC 6675), which wants three later packets acknowledged; whole windows lost at
	// once, as by a cut, are found by time-out either way. And before half a second
	// nothing is taken for lost: the carrier's own queues on a busy machine take
	// longer than gVisor's 200 ms.
	Stream Path = iota
	// Datagrams is a path like any other, which loses and reorders: CUBIC (RFC
	// 9438), RACK (RFC 8985), and the usual shortest time-out.
	Datagrams
)

// Tune sets what connections that are made from now on think of the path.
func Tune(s *stack.Stack, p Path) error {
	recovery := tcpip.TCPRecovery(0)
	control := tcpip.CongestionControlOption("reno")
	first := tcpip.TCPMinRTOOption(500 * time.Millisecond)
	if p == Datagrams {
		recovery = tcpip.TCPRACKLossDetection
		control = "cubic"
		first = tcpip.TCPMinRTOOption(200 * time.Millisecond)
	}
	for _, option := range []tcpip.SettableTransportProtocolOption{&recovery, &control, &first} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return fmt.Errorf("setting TCP option %T: %s", option, err)
		}
	}
	return nil
}

// NewStack makes a stack whose only link is ep. It takes packets for any
// address and sends from any (promiscuous and spoofing), which is how one stack
// stands for a whole cluster. The caller closes ep first, then the stack.
func NewStack(ep *Endpoint) (*stack.Stack, error) {
	s := stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocol, udp.NewProtocol, icmp.NewProtocol4, icmp.NewProtocol6},
	})
	if err := configure(s, ep); err != nil {
		ep.Close()
		s.Destroy()
		return nil, err
	}
	return s, nil
}

func configure(s *stack.Stack, ep *Endpoint) error {
	sack := tcpip.TCPSACKEnabled(true)
	rto := tcpip.TCPMaxRTOOption(maxRTO)
	retries := tcpip.TCPMaxRetriesOption(maxRetries)
	wait := tcpip.TCPTimeWaitTimeoutOption(timeWait)
	send := tcpip.TCPSendBufferSizeRangeOption{Min: bufferMin, Default: bufferDefault, Max: bufferMax}
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: bufferMin, Default: bufferDefault, Max: bufferMax}
	for _, option := range []tcpip.SettableTransportProtocolOption{&sack, &rto, &retries, &wait, &send, &receive} {
		if err := s.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			return fmt.Errorf("setting TCP option %T: %s", option, err)
		}
	}
	if err := Tune(s, Stream); err != nil {
		return err
	}
	if err := s.CreateNIC(NIC, ep.Link()); err != nil {
		return fmt.Errorf("creating the stack's interface: %s", err)
	}
	if err := s.SetPromiscuousMode(NIC, true); err != nil {
		return fmt.Errorf("setting promiscuous mode: %s", err)
	}
	if err := s.SetSpoofing(NIC, true); err != nil {
		return fmt.Errorf("setting spoofing: %s", err)
	}
	s.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: NIC},
		{Destination: header.IPv6EmptySubnet, NIC: NIC},
	})
	return nil
}

// KeepAlive makes a connection of the stack probe a silent peer. The peer is a
// machine that may sleep through a meeting and must find its connections alive:
// they end only after about two hours of silence.
func KeepAlive(ep tcpip.Endpoint) {
	idle := tcpip.KeepaliveIdleOption(5 * time.Minute)
	interval := tcpip.KeepaliveIntervalOption(time.Minute)
	ep.SetSockOpt(&idle)
	ep.SetSockOpt(&interval)
	ep.SetSockOptInt(tcpip.KeepaliveCountOption, 115)
	ep.SocketOptions().SetKeepAlive(true)
}
