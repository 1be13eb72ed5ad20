package netstack

import (
	"net/netip"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/wire/queue"
)

// maxGSO is the largest TCP super-packet without its headers. A WireGuard
// message of 65,535 bytes has 32 of its own and is padded to 16.
const maxGSO = 65400

// maxPacket is what fits WireGuard's buffer with its header, padding and
// authenticator, and the gate's tag.
const maxPacket = 65535 - 16 - 15 - 16 - 16

// link is the stack's side of an Endpoint: a type of its own, because MTU and
// Close are methods of stack.LinkEndpoint and of tun.Device that differ.
type link Endpoint

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

// WritePackets queues packets for Read.
//
// Nobody waits here with TCP: gVisor sends from the goroutines that deliver what
// has arrived, for many connections, and they must go on, or one connection that
// fills the path would hold up others' acknowledgements. A connection's
// send buffer bounds what it has here. UDP is sent by the goroutine of its one
// flow, which waits above datagramBytes: its socket drops then.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	now := time.Now()
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, p := range pkts.AsSlice() {
		size := p.Size()
		if size > maxPacket {
			l.dropped++
			continue
		}
		key, datagram := keyOf(p)
		flow := l.queue.Flow(&key)
		for datagram && l.queue.FlowBytes(flow) >= datagramBytes && !l.closed {
			l.writable.Wait()
		}
		if l.closed {
			return n, &tcpip.ErrClosedForSend{}
		}
		l.queue.Push(flow, size, p.IncRef(), now)
		for l.queue.Bytes() > l.limit || l.queue.Len() > queuePackets {
			if lost, ok := l.queue.Drop(); ok {
				lost.DecRef()
				l.dropped++
			}
		}
		n++
	}
	if n == 0 {
		return 0, &tcpip.ErrNoBufferSpace{}
	}
	l.readable.Signal()
	return n, nil
}

// keyOf is the flow of a packet, and whether it is UDP's. Fragments have no ports,
// so that all of a datagram go together.
func keyOf(p *stack.PacketBuffer) (k queue.Key, datagram bool) {
	ip, ports := p.NetworkHeader().Slice(), p.TransportHeader().Slice()
	switch {
	case len(ip) >= header.IPv6MinimumSize && ip[0]>>4 == 6:
		h := header.IPv6(ip)
		proto := h.NextHeader()
		fragment := proto == header.IPv6FragmentHeader // the extension header is part of the network header
		if fragment {
			ports = nil
		}
		src, dst := netip.AddrFrom16(h.SourceAddress().As16()), netip.AddrFrom16(h.DestinationAddress().As16())
		return queue.MakeKey(src, dst, proto, ports), fragment || proto == uint8(header.UDPProtocolNumber)
	case len(ip) >= header.IPv4MinimumSize:
		h := header.IPv4(ip)
		if h.More() || h.FragmentOffset() != 0 {
			ports = nil
		}
		src, dst := netip.AddrFrom4(h.SourceAddress().As4()), netip.AddrFrom4(h.DestinationAddress().As4())
		return queue.MakeKey(src, dst, h.Protocol(), ports), h.Protocol() == uint8(header.UDPProtocolNumber)
	}
	return k, false
}

// SupportedGSO: with HostGSO the stack writes super-packets and leaves TCP
// checksums partial.
func (l *link) SupportedGSO() stack.SupportedGSO {
	if l.gso {
		return stack.HostGSOSupported
	}
	return stack.GSONotSupported
}

// GSOMaxSize is in bytes, without headers.
func (l *link) GSOMaxSize() uint32 { return maxGSO }

// Capabilities: WireGuard has authenticated what comes in, from the kernel or
// the stack that made it, so nobody sums it again; a super-packet has no
// complete checksum anyway.
//
// Outgoing, CapabilityTXChecksumOffload is not declared: HostGSO alone makes
// TCP checksums partial, and with the capability the stack would leave UDP
// checksums zero even in fragments, where nobody after it could fill them in.
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	return stack.CapabilityRXChecksumOffload
}

func (l *link) MTU() uint32 {
	l.linkMu.RLock()
	defer l.linkMu.RUnlock()
	return l.mtu
}

func (l *link) SetMTU(mtu uint32) {
	l.linkMu.Lock()
	defer l.linkMu.Unlock()
	l.mtu = mtu
}

// Attach is called with nil when the NIC goes away.
func (l *link) Attach(d stack.NetworkDispatcher) {
	l.linkMu.Lock()
	defer l.linkMu.Unlock()
	l.dispatcher = d
}

func (l *link) IsAttached() bool {
	l.linkMu.RLock()
	defer l.linkMu.RUnlock()
	return l.dispatcher != nil
}

func (l *link) SetOnCloseAction(f func()) {
	l.linkMu.Lock()
	defer l.linkMu.Unlock()
	l.onClose = f
}

func (l *link) Close()                                  { (*Endpoint)(l).Close() }
func (l *link) Wait()                                   {}
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return "" }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareNone }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
