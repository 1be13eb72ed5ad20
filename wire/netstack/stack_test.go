package netstack

import (
	"context"
	"io"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// TestDelayIsNoLoss: a carrier that holds packets up, as a busy machine or a
// full link does, loses none. The stack must not send any of them twice, nor
// shrink its window, which shows as packets that are cut into small ones.
func TestDelayIsNoLoss(t *testing.T) {
	ends := [2]*Endpoint{New(Config{GSO: true}), New(Config{GSO: true})}
	var stacks [2]*stack.Stack
	for i, e := range ends {
		s, err := NewStack(e)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Destroy()
		defer e.Close()
		s.AddProtocolAddress(NIC, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber,
			AddressWithPrefix: at(byte(i+1), 0).Addr.WithPrefix()}, stack.AddressProperties{})
		stacks[i] = s
	}
	var packets, sent int // by the server, with data
	done := make(chan struct{})
	carry := func(from, to *Endpoint, each func(size int)) {
		bufs, sizes := buffers(batchSize)
		for i := 0; ; i++ {
			n, err := from.Read(bufs, sizes, offset)
			if err != nil {
				return
			}
			time.Sleep(time.Duration(1+i%7) * time.Millisecond)
			for j := range n {
				each(sizes[j])
				if _, err := to.Write([][]byte{bufs[j][:offset+sizes[j]]}, offset); err != nil {
					return
				}
			}
		}
	}
	go carry(ends[0], ends[1], func(int) {})
	go func() {
		defer close(done)
		carry(ends[1], ends[0], func(size int) {
			if size > 200 {
				packets++
				sent += size
			}
		})
	}()
	l, err := gonet.ListenTCP(stacks[1], at(2, 80), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	const size = 48 << 20
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		_, _ = conn.Write(make([]byte, size))
	}()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn, err := gonet.DialContextTCP(ctx, stacks[0], at(2, 80), ipv4.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(60 * time.Second))
	if n, err := io.Copy(io.Discard, conn); n != size || err != nil {
		t.Fatalf("%d of %d bytes came: %v", n, size, err)
	}
	// Some: a machine that stands still for 200 ms is a time-out to any sender.
	if n := stacks[1].Stats().TCP.Retransmits.Value(); n > 5 {
		t.Errorf("%d packets were sent twice", n)
	}
	ends[0].Close()
	ends[1].Close()
	<-done
	if mean := sent / packets; mean < 40<<10 {
		t.Errorf("%d packets of %d bytes on average", packets, mean)
	}
}

// TestFragmentsHaveWholeChecksums: a datagram longer than the MTU is summed
// before it is cut, since nobody after the stack could.
func TestFragmentsHaveWholeChecksums(t *testing.T) {
	e := New(Config{GSO: true})
	s, err := NewStack(e)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Destroy()
	defer e.Close()
	from, to := tcpip.AddrFrom16([16]byte{0xfd, 15: 1}), tcpip.AddrFrom16([16]byte{0xfd, 15: 2})
	s.AddProtocolAddress(NIC, tcpip.ProtocolAddress{Protocol: ipv6.ProtocolNumber, AddressWithPrefix: from.WithPrefix()}, stack.AddressProperties{})
	conn, err := gonet.DialUDP(s, &tcpip.FullAddress{NIC: NIC, Addr: from, Port: 1000}, &tcpip.FullAddress{NIC: NIC, Addr: to, Port: 2000}, ipv6.ProtocolNumber)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	payload := make([]byte, 25_000)
	for i := range payload {
		payload[i] = byte(i * 7)
	}
	if _, err := conn.Write(payload); err != nil {
		t.Fatal(err)
	}
	datagram := make([]byte, 0, len(payload)+header.UDPMinimumSize)
	bufs, sizes := buffers(batchSize)
	for more := true; more; {
		n, err := e.Read(bufs, sizes, offset)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			ip := header.IPv6(bufs[i][offset : offset+sizes[i]])
			if ip.TransportProtocol() == header.ICMPv6ProtocolNumber {
				continue // the stack's own greetings
			}
			if ip.NextHeader() != header.IPv6FragmentHeader || len(ip) > DefaultMTU {
				t.Fatalf("packet of %d bytes with next header %d", len(ip), ip.NextHeader())
			}
			fragment := header.IPv6Fragment(ip.Payload())
			if int(fragment.FragmentOffset())*8 != len(datagram) {
				t.Fatalf("fragment for %d after %d bytes", int(fragment.FragmentOffset())*8, len(datagram))
			}
			datagram = append(datagram, fragment.Payload()...)
			more = more && fragment.More()
		}
	}
	udp := header.UDP(datagram)
	if !udp.IsChecksumValid(from, to, checksum.Checksum(udp.Payload(), 0)) || udp.Checksum() == 0 {
		t.Errorf("the checksum %#x is wrong", udp.Checksum())
	}
	if len(udp.Payload()) != len(payload) || string(udp.Payload()) != string(payload) {
		t.Error("the datagram is not what was sent")
	}
}
