package agent

import (
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// TestQueuesShareTheMemory: what all queues may hold stays within the shared
// fifth, whatever the number of connections.
func TestQueuesShareTheMemory(t *testing.T) {
	for _, limit := range []int64{64 << 20, 460 << 20, 4 << 30} {
		most := Config{MemoryLimit: limit}.withDefaults().MaxTCP
		for n := 1; n <= most; n++ {
			if share := shareOf(limit, n); share*2*int64(n) > limit/5 && share > minQueue || 2*minQueue*int64(most) > limit/4 {
				t.Fatalf("%d connections of %d with a limit of %d: %d bytes each", n, most, limit, share)
			}
		}
	}
	const limit = 32 << 20
	a := startAgent(t, Config{MemoryLimit: limit, MaxTCP: 300}, func(x *timing) {
		x.governor = time.Hour // the client's memory, in this process too, is above the limit
	})
	c := connect(t, a, true)
	// The targets read nothing: queues fill as far as they are let.
	addr := serve(t, target, func(s *net.TCPConn) { time.Sleep(time.Minute); s.Close() })
	first := c.mustTCP(addr)
	before := bufferSum(a)
	if before > limit/5 {
		t.Errorf("one connection may queue %d bytes", before)
	}
	for range 199 {
		c.mustTCP(addr)
	}
	eventually(t, "all together are within the fifth", func() bool {
		sum := bufferSum(a)
		return a.node().tcp.total() == 200 && sum <= limit/5 && sum > 0
	})
	for range 8 {
		go first.Write(make([]byte, 4<<20))
	}
	time.Sleep(300 * time.Millisecond)
	if sum := bufferSum(a); sum > limit/5 {
		t.Errorf("under load they may queue %d bytes", sum)
	}
}

func bufferSum(a *Agent) (sum int64) {
	a.node().tcp.each(func(r *relay) {
		sum += r.ep.SocketOptions().GetSendBufferSize() + r.ep.SocketOptions().GetReceiveBufferSize()
	})
	return sum
}

// TestFullMemoryRefuses: above three quarters new connections get a RST, and
// those that there are go on.
func TestFullMemoryRefuses(t *testing.T) {
	a := startAgent(t, Config{}, func(x *timing) { x.governor = time.Hour })
	c := connect(t, a, true)
	addr := serve(t, target, echoTCP)
	old := c.mustTCP(addr)
	a.node().gov.full.Store(true)
	if _, err := c.dialTCP(addr, 2*time.Second); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("a new connection: %v", err)
	}
	checkEcho(t, old)
	a.node().gov.full.Store(false)
	checkEcho(t, c.mustTCP(addr))
}

// TestFullMemoryIsNoticed: the limit is a megabyte, and Go alone uses more.
func TestFullMemoryIsNoticed(t *testing.T) {
	a := startAgent(t, Config{MemoryLimit: 1 << 20}, func(x *timing) { x.governor = 5 * time.Millisecond })
	connect(t, a, true)
	eventually(t, "the memory is full", func() bool { return !a.node().gov.admits() })
}

// TestDialEndsWithItsClient: a RST before the target's answer ends the dial.
func TestDialEndsWithItsClient(t *testing.T) {
	a := startAgent(t, Config{}, func(x *timing) { x.dial = time.Minute })
	c := connect(t, a, true)
	go c.dialTCP(netip.AddrPortFrom(silent, 80), 5*time.Second)
	dialing := func() int { _, d := a.node().tcp.counts(); return d }
	eventually(t, "it is being dialled", func() bool { return dialing() == 1 })
	f := a.node().tcp
	f.mu.Lock()
	var syn header.TCP
	for _, d := range f.dialing {
		syn = d.syn
	}
	f.mu.Unlock()
	pkt := make([]byte, header.IPv4MinimumSize+header.TCPMinimumSize)
	ip := header.IPv4(pkt)
	ip.Encode(&header.IPv4Fields{TotalLength: uint16(len(pkt)), TTL: 64, Protocol: uint8(header.TCPProtocolNumber),
		SrcAddr: full(tunnel4, 0).Addr, DstAddr: full(silent, 0).Addr})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.TCP(pkt[header.IPv4MinimumSize:]).Encode(&header.TCPFields{SrcPort: syn.SourcePort(), DstPort: syn.DestinationPort(),
		SeqNum: syn.SequenceNumber() + 1, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagRst})
	if _, err := a.node().endpoint.Write([][]byte{pkt}, 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "nothing is being dialled", func() bool { return dialing() == 0 })
}
