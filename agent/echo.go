package agent

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// maxEchoes bounds the echo requests that wait for their reply; more are
// dropped. Each holds a socket, a goroutine and its payload.
const maxEchoes = 256

// echoForwarder sends echo requests on from unprivileged ping sockets
// (icmp(7), ping_group_range) and returns their replies. It never makes one up:
// without the right to such sockets there is no answer.
type echoForwarder struct {
	node  *node
	slots chan struct{}
	warn  sync.Once
}

func newEchoForwarder(n *node) *echoForwarder {
	f := &echoForwarder{node: n, slots: make(chan struct{}, maxEchoes)}
	n.stack.SetTransportProtocolHandler(header.ICMPv4ProtocolNumber, f.handle)
	n.stack.SetTransportProtocolHandler(header.ICMPv6ProtocolNumber, f.handle)
	if err := probePing(); err != nil {
		f.denied(err)
	}
	return f
}

// probePing tells whether this process may open ping sockets.
func probePing() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func (f *echoForwarder) denied(err error) {
	f.warn.Do(func() {
		f.node.agent.notes.set("ping", "echo requests are not forwarded: this pod may not open ping sockets; set the sysctl net.ipv4.ping_group_range")
		f.node.agent.log.Warn("ping sockets are not permitted", "error", err, "sysctl", "net.ipv4.ping_group_range")
	})
}

// echo is one echo request.
type echo struct {
	from, to netip.Addr
	ident    uint16
	seq      uint16
	payload  []byte
}

// parseEcho reads an ICMP message that starts at its type. False: it is no echo
// request. The payload is not copied.
func parseEcho(v6 bool, msg []byte) (echo, bool) {
	request := byte(header.ICMPv4Echo)
	if v6 {
		request = byte(header.ICMPv6EchoRequest)
	}
	if len(msg) < echoHeader || msg[0] != request || msg[1] != 0 {
		return echo{}, false
	}
	return echo{
		ident:   binary.BigEndian.Uint16(msg[4:]),
		seq:     binary.BigEndian.Uint16(msg[6:]),
		payload: msg[echoHeader:],
	}, true
}

// parseReply reads what a ping socket received; false if it is not the reply to
// the request with this sequence number. The kernel has checked sum and ident.
func parseReply(v6 bool, msg []byte, seq uint16) ([]byte, bool) {
	reply := byte(header.ICMPv4EchoReply)
	if v6 {
		reply = byte(header.ICMPv6EchoReply)
	}
	if len(msg) < echoHeader || msg[0] != reply || binary.BigEndian.Uint16(msg[6:]) != seq {
		return nil, false
	}
	return msg[echoHeader:], true
}

// handle takes an ICMP packet on the goroutine that delivers packets. True keeps
// the stack from answering it.
func (f *echoForwarder) handle(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
	to := netipAddr(id.LocalAddress)
	if slices.Contains(f.node.self, to) || f.node.peers.owns(to) {
		return false // the stack answers: a probe of the way here
	}
	v6 := pkt.NetworkProtocolNumber == header.IPv6ProtocolNumber
	msg := append(append([]byte(nil), pkt.TransportHeader().Slice()...), pkt.Data().AsRange().ToSlice()...)
	e, ok := parseEcho(v6, msg)
	if !ok {
		return true
	}
	e.from, e.to = netipAddr(id.RemoteAddress), to
	if !f.node.targets.allows(to, 0) {
		f.node.agent.metrics.refused("icmp")
		return true
	}
	select {
	case f.slots <- struct{}{}:
		f.node.spawn(func() {
			defer func() { <-f.slots }()
			f.forward(e)
		})
	default:
	}
	return true
}

// forward sends one request and waits for its reply.
func (f *echoForwarder) forward(e echo) {
	f.node.agent.metrics.echoes.Inc()
	reply, err := f.ask(e)
	switch {
	case err == nil:
		f.node.sendEchoReply(e, reply)
	case errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM) || errors.Is(err, unix.EPROTONOSUPPORT):
		f.denied(err)
	default:
		if code, ok := unreachable(err); ok {
			f.node.sendEchoUnreachable(code, e)
		}
	}
}

// ask sends e's payload from a socket of its own and returns the reply's.
func (f *echoForwarder) ask(e echo) ([]byte, error) {
	family, proto, request := unix.AF_INET, unix.IPPROTO_ICMP, byte(header.ICMPv4Echo)
	var to unix.Sockaddr
	if e.to.Is4() {
		to = &unix.SockaddrInet4{Addr: e.to.As4()}
	} else {
		family, proto, request = unix.AF_INET6, unix.IPPROTO_ICMPV6, byte(header.ICMPv6EchoRequest)
		to = &unix.SockaddrInet6{Addr: e.to.As16()}
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, proto)
	if err != nil {
		return nil, err
	}
	if err := unix.Connect(fd, to); err != nil {
		unix.Close(fd)
		return nil, err
	}
	sock := os.NewFile(uintptr(fd), "ping")
	defer sock.Close()

	// The kernel fills in checksum and ident.
	msg := make([]byte, echoHeader+len(e.payload))
	msg[0] = request
	binary.BigEndian.PutUint16(msg[6:], e.seq)
	copy(msg[echoHeader:], e.payload)
	deadline := time.Now().Add(f.node.agent.times.echo)
	if err := sock.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := sock.Write(msg); err != nil {
		return nil, err
	}
	stop := f.node.onClose(func() { sock.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, len(msg)+1)
	for {
		n, err := sock.Read(buf)
		if err != nil {
			return nil, err
		}
		if payload, ok := parseReply(e.to.Is6(), buf[:n], e.seq); ok {
			return payload, nil
		}
	}
}
