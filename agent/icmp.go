package agent

import (
	"context"
	"net/netip"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// echoHeader is the length of type, code, checksum, ident and sequence number
// (RFC 792, RFC 4443 section 4.1).
const echoHeader = 8

// unreachableCode is why a target cannot be reached, for both versions of ICMP.
type unreachableCode int

const (
	netUnreachable unreachableCode = iota
	hostUnreachable
	portUnreachable
	prohibited
)

// v4 is the code of RFC 792 and RFC 1812 section 5.2.7.1.
func (c unreachableCode) v4() header.ICMPv4Code {
	return [...]header.ICMPv4Code{header.ICMPv4NetUnreachable, header.ICMPv4HostUnreachable,
		header.ICMPv4PortUnreachable, header.ICMPv4AdminProhibited}[c]
}

// v6 is the code of RFC 4443 section 3.1.
func (c unreachableCode) v6() header.ICMPv6Code {
	return [...]header.ICMPv6Code{header.ICMPv6NetworkUnreachable, header.ICMPv6AddressUnreachable,
		header.ICMPv6PortUnreachable, header.ICMPv6Prohibited}[c]
}

// onClose calls f when the node closes, unless stop is called before.
func (n *node) onClose(f func()) (stop func() bool) { return context.AfterFunc(n.ctx, f) }

// sendEchoReply answers e with payload, in the name of its target.
func (n *node) sendEchoReply(e echo, payload []byte) {
	msg := make([]byte, echoHeader+len(payload))
	if e.to.Is4() {
		h := header.ICMPv4(msg)
		h.SetType(header.ICMPv4EchoReply)
		h.SetIdent(e.ident)
		h.SetSequence(e.seq)
	} else {
		h := header.ICMPv6(msg)
		h.SetType(header.ICMPv6EchoReply)
		h.SetIdent(e.ident)
		h.SetSequence(e.seq)
	}
	copy(msg[echoHeader:], payload)
	n.sendICMP(e.to, e.from, msg)
}

// sendEchoUnreachable tells the sender of e that its target cannot be reached.
func (n *node) sendEchoUnreachable(code unreachableCode, e echo) {
	start := make([]byte, echoHeader)
	proto := header.ICMPv4ProtocolNumber
	start[0] = byte(header.ICMPv4Echo)
	if e.to.Is6() {
		proto = header.ICMPv6ProtocolNumber
		start[0] = byte(header.ICMPv6EchoRequest)
	}
	start[4], start[5] = byte(e.ident>>8), byte(e.ident)
	start[6], start[7] = byte(e.seq>>8), byte(e.seq)
	n.sendUnreachable(code, proto, tcpip.AddrFromSlice(e.from.AsSlice()), tcpip.AddrFromSlice(e.to.AsSlice()), start)
}

// sendUnreachable tells client that its packet to target, which began with the
// transport header start, could not be delivered. It comes from the target's
// own address, the only one that certainly has a route to here on the client.
func (n *node) sendUnreachable(code unreachableCode, proto tcpip.TransportProtocolNumber, client, target tcpip.Address, start []byte) {
	if len(start) < 8 {
		return
	}
	var msg []byte
	if client.Len() == header.IPv4AddressSize {
		msg = make([]byte, header.ICMPv4MinimumSize+header.IPv4MinimumSize+len(start))
		h := header.ICMPv4(msg)
		h.SetType(header.ICMPv4DstUnreachable)
		h.SetCode(code.v4())
		ip := header.IPv4(msg[header.ICMPv4MinimumSize:])
		ip.Encode(&header.IPv4Fields{
			TotalLength: uint16(header.IPv4MinimumSize + len(start)),
			TTL:         64, Protocol: uint8(proto), SrcAddr: client, DstAddr: target,
		})
		ip.SetChecksum(^ip.CalculateChecksum())
		copy(ip[header.IPv4MinimumSize:], start)
	} else {
		msg = make([]byte, header.ICMPv6DstUnreachableMinimumSize+header.IPv6MinimumSize+len(start))
		h := header.ICMPv6(msg)
		h.SetType(header.ICMPv6DstUnreachable)
		h.SetCode(code.v6())
		ip := header.IPv6(msg[header.ICMPv6DstUnreachableMinimumSize:])
		ip.Encode(&header.IPv6Fields{
			PayloadLength: uint16(len(start)), TransportProtocol: proto, HopLimit: 64, SrcAddr: client, DstAddr: target,
		})
		copy(ip[header.IPv6MinimumSize:], start)
	}
	n.sendICMP(netipAddr(target), netipAddr(client), msg)
}

// sendICMP sums msg and sends it, in fragments if need be. What cannot be sent
// is lost, as ICMP may be.
func (n *node) sendICMP(from, to netip.Addr, msg []byte) {
	src, dst := tcpip.AddrFromSlice(from.AsSlice()), tcpip.AddrFromSlice(to.AsSlice())
	route, err := n.stack.FindRoute(n.nicOf(to), src, dst, protocolOf(to), false)
	if err != nil {
		return
	}
	defer route.Release()
	proto := header.ICMPv4ProtocolNumber
	if to.Is4() {
		h := header.ICMPv4(msg)
		h.SetChecksum(0)
		h.SetChecksum(^checksum.Checksum(msg, 0))
	} else {
		proto = header.ICMPv6ProtocolNumber
		h := header.ICMPv6(msg[:echoHeader])
		h.SetChecksum(0)
		h.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
			Header: h, Src: src, Dst: dst,
			PayloadCsum: checksum.Checksum(msg[echoHeader:], 0), PayloadLen: len(msg) - echoHeader,
		}))
	}
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: int(route.MaxHeaderLength()),
		Payload:            buffer.MakeWithData(msg),
	})
	defer pkt.DecRef()
	pkt.TransportProtocolNumber = proto
	_ = route.WritePacket(stack.NetworkHeaderParams{Protocol: proto, TTL: 64}, pkt)
}
