package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// maxGSO is the largest TCP super-packet without its headers. A WireGuard
// message of 65,535 bytes has 32 of its own and is padded to 16.
const maxGSO = 65400

// link is the stack's side of an Endpoint: a type of its own, because MTU and
// Close are methods of stack.LinkEndpoint and of tun.Device that differ.
type link Endpoint

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

// WritePackets queues packets for Read.
//
// A sender of data that finds the queue full waits, which is what slows the
// stack down to the carrier's speed without losing anything. gVisor sends data
// from the goroutine of a connection's user, from its TCP processors and from
// timers, while it holds that endpoint's lock; neither Read nor the delivery of
// packets needs it. What the stack answers by itself (acknowledgements, resets,
// ICMP) may be sent on the goroutine that delivers, which must not wait: the
// far end may be in the same state, and then neither would ever read. Such
// packets are small; they may take the queue to twice its limit and are
// dropped above that.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, p := range pkts.AsSlice() {
		if l.queue.bytes >= l.limit && mayWait(p) {
			for l.queue.bytes >= l.limit && !l.closed {
				l.readable.Signal()
				l.writable.Wait()
			}
		}
		if l.closed {
			return n, &tcpip.ErrClosedForSend{}
		}
		if l.queue.bytes >= 2*l.limit {
			l.dropped++
			continue
		}
		l.queue.push(p.IncRef())
		n++
	}
	if n == 0 {
		return 0, &tcpip.ErrNoBufferSpace{}
	}
	l.readable.Signal()
	return n, nil
}

// mayWait tells data (TCP with payload, UDP and its fragments) from what the
// stack answers by itself.
func mayWait(p *stack.PacketBuffer) bool {
	ip := p.NetworkHeader().Slice()
	if len(ip) < header.IPv4MinimumSize {
		return false
	}
	proto := ip[9]
	if ip[0]>>4 == 6 {
		proto = ip[6]
	}
	switch proto {
	case uint8(header.TCPProtocolNumber):
		return p.Data().Size() > 0
	case uint8(header.UDPProtocolNumber), header.IPv6FragmentHeader:
		return true
	}
	return false
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
