package netstack

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"sync"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

const offset = 16

// packet is an IPv4 packet as the stack would write it.
func packet(proto uint8, payload int) *stack.PacketBuffer {
	p := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: header.IPv4MinimumSize,
		Payload:            buffer.MakeWithData(bytes.Repeat([]byte{7}, payload)),
	})
	h := header.IPv4(p.NetworkHeader().Push(header.IPv4MinimumSize))
	h.Encode(&header.IPv4Fields{TotalLength: uint16(header.IPv4MinimumSize + payload), TTL: 64, Protocol: proto})
	return p
}

func write(e *Endpoint, p *stack.PacketBuffer) (int, tcpip.Error) {
	var l stack.PacketBufferList
	l.PushBack(p)
	defer p.DecRef()
	return e.Link().WritePackets(l)
}

func buffers(n int) ([][]byte, []int) {
	bufs := make([][]byte, n)
	for i := range bufs {
		bufs[i] = make([]byte, 65535)
	}
	return bufs, make([]int, n)
}

const (
	protoICMP = uint8(header.ICMPv4ProtocolNumber)
	protoTCP  = uint8(header.TCPProtocolNumber)
	protoUDP  = uint8(header.UDPProtocolNumber)
)

func TestReadDrainsInOrder(t *testing.T) {
	e := New(Config{})
	defer e.Close()
	for i := range 100 {
		write(e, packet(protoUDP, i+1))
	}
	bufs, sizes := buffers(64)
	seen := 0
	for seen < 100 {
		n, err := e.Read(bufs, sizes, offset)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			seen++
			if sizes[i] != header.IPv4MinimumSize+seen || bufs[i][offset]>>4 != 4 || bufs[i][offset+sizes[i]-1] != 7 {
				t.Fatalf("packet %d has %d bytes", seen, sizes[i])
			}
		}
	}
	if q := e.Queued(); q != 0 {
		t.Errorf("%d bytes are still queued", q)
	}
}

// TestDatagramsWaitAndTCPDoesNot: what one flow of UDP has queued holds up only
// its own sender, and above the bound the longest flow loses.
func TestDatagramsWaitAndTCPDoesNot(t *testing.T) {
	e := New(Config{QueueBytes: datagramBytes + 100_000})
	defer e.Close()
	for e.Queued() < datagramBytes {
		write(e, packet(protoUDP, 1000))
	}
	done := make(chan struct{})
	go func() {
		write(e, packet(protoUDP, 1000))
		close(done)
	}()
	for range 90 {
		write(e, packet(protoTCP, 1000))
	}
	select {
	case <-done:
		t.Fatal("UDP did not wait")
	case <-time.After(50 * time.Millisecond):
	}
	if e.Dropped() != 0 {
		t.Fatalf("%d packets dropped below the bound", e.Dropped())
	}
	for range 50 {
		write(e, packet(protoICMP, 1000))
	}
	if q := e.Queued(); q > datagramBytes+100_000 || e.Dropped() == 0 {
		t.Fatalf("%d bytes are queued, %d packets dropped", q, e.Dropped())
	}
	bufs, sizes := buffers(128)
	other := 0
	for e.Queued() > 0 {
		n, err := e.Read(bufs, sizes, offset)
		if err != nil {
			t.Fatal(err)
		}
		for i := range n {
			if bufs[i][offset+9] != protoUDP {
				other++
			}
		}
	}
	if other != 140 {
		t.Errorf("%d packets of the short flows arrived of 140", other)
	}
	select {
	case <-done:
	case <-time.After(time.Second):
		t.Fatal("UDP still waits though there is room")
	}
}

func TestCloseReleasesEverybody(t *testing.T) {
	e := New(Config{})
	for e.Queued() < datagramBytes {
		write(e, packet(protoUDP, 1000))
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := write(e, packet(protoUDP, 1000)); err == nil {
				t.Error("a packet was written to a closed endpoint")
			}
		})
	}
	other := New(Config{})
	wg.Go(func() {
		bufs, sizes := buffers(1)
		if _, err := other.Read(bufs, sizes, offset); !errors.Is(err, os.ErrClosed) {
			t.Errorf("Read after Close: %v", err)
		}
	})
	time.Sleep(50 * time.Millisecond)
	for range 2 {
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		other.Close()
	}
	wg.Wait()
	if ev, ok := <-e.Events(); !ok || ev != tun.EventUp {
		t.Error("the device was never up")
	}
	if _, ok := <-e.Events(); ok {
		t.Error("events go on after Close")
	}
}

// pair joins two stacks by what each reads and the other is given.
func pair(t testing.TB, a, b Config) (sa, sb *stack.Stack, largest func() int) {
	t.Helper()
	ea, eb := New(a), New(b)
	var mu sync.Mutex
	most := 0
	pump := func(from, to *Endpoint) {
		bufs, sizes := buffers(128)
		for {
			n, err := from.Read(bufs, sizes, offset)
			if err != nil {
				return
			}
			out := make([][]byte, n)
			for i := range out {
				out[i] = bufs[i][:offset+sizes[i]]
				mu.Lock()
				most = max(most, sizes[i])
				mu.Unlock()
			}
			to.Write(out, offset)
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { pump(ea, eb) })
	wg.Go(func() { pump(eb, ea) })
	stacks := make([]*stack.Stack, 2)
	for i, e := range []*Endpoint{ea, eb} {
		s, err := NewStack(e)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.AddProtocolAddress(NIC, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber,
			AddressWithPrefix: tcpip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}).WithPrefix()}, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
		stacks[i] = s
	}
	t.Cleanup(func() {
		ea.Close()
		eb.Close()
		wg.Wait()
		stacks[0].Destroy()
		stacks[1].Destroy()
	})
	return stacks[0], stacks[1], func() int { mu.Lock(); defer mu.Unlock(); return most }
}

func at(host byte, port uint16) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: NIC, Addr: tcpip.AddrFrom4([4]byte{10, 0, 0, host}), Port: port}
}

func TestTCPBetweenStacks(t *testing.T) {
	for name, gso := range map[string]bool{"gso": true, "plain": false} {
		t.Run(name, func(t *testing.T) {
			// Small queues make both directions wait on each other all the time.
			c := Config{MTU: 1420, GSO: gso, QueueBytes: 128 << 10}
			client, server, largest := pair(t, c, c)
			l, err := gonet.ListenTCP(server, at(2, 80), ipv4.ProtocolNumber)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				io.Copy(conn, conn)
				conn.Close()
			}()
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			conn, err := gonet.DialContextTCP(ctx, client, at(2, 80), ipv4.ProtocolNumber)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(30 * time.Second))
			sent := make([]byte, 32<<20)
			_, _ = rand.Read(sent)
			go func() {
				conn.Write(sent)
				conn.CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			if err != nil || !bytes.Equal(got, sent) {
				t.Fatalf("%d of %d bytes came back: %v", len(got), len(sent), err)
			}
			if m := largest(); gso && (m < 16<<10 || m > 65503) || !gso && m > 1420 {
				t.Errorf("the largest packet had %d bytes", m)
			}
		})
	}
}

func TestChecksumsWithoutGSOAreComplete(t *testing.T) {
	e := New(Config{})
	s, err := NewStack(e)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Destroy()
	defer e.Close()
	s.AddProtocolAddress(NIC, tcpip.ProtocolAddress{Protocol: ipv4.ProtocolNumber,
		AddressWithPrefix: at(1, 0).Addr.WithPrefix()}, stack.AddressProperties{})
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	go gonet.DialContextTCP(ctx, s, at(2, 80), ipv4.ProtocolNumber)
	bufs, sizes := buffers(1)
	if _, err := e.Read(bufs, sizes, offset); err != nil {
		t.Fatal(err)
	}
	ip := header.IPv4(bufs[0][offset : offset+sizes[0]])
	tcp := header.TCP(ip.Payload())
	if !ip.IsChecksumValid() || !tcp.IsChecksumValid(ip.SourceAddress(), ip.DestinationAddress(), 0, 0) {
		t.Error("the SYN's checksums are wrong")
	}
}

func TestWriteIgnoresRubbish(t *testing.T) {
	e := New(Config{})
	s, err := NewStack(e)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Destroy()
	defer e.Close()
	bad := [][]byte{make([]byte, offset), append(make([]byte, offset), 0x45), append(make([]byte, offset), 0x60, 0, 0),
		append(make([]byte, offset), 0xff), append(make([]byte, offset), bytes.Repeat([]byte{0x45}, 100)...)}
	if n, err := e.Write(bad, offset); n != len(bad) || err != nil {
		t.Errorf("Write: %d, %v", n, err)
	}
	if e.Delivering() != 0 {
		t.Error("a delivery is still under way")
	}
}

func BenchmarkRead(b *testing.B) {
	for name, size := range map[string]int{"64": 64, "64K": 65000} {
		b.Run(name, func(b *testing.B) {
			e := New(Config{QueueBytes: 64 << 20})
			defer e.Close()
			bufs, sizes := buffers(batchSize)
			p := packet(protoTCP, size)
			var l stack.PacketBufferList
			l.PushBack(p)
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for i := 0; i < b.N; i += batchSize {
				for range batchSize {
					e.Link().WritePackets(l)
				}
				if n, err := e.Read(bufs, sizes, offset); n != batchSize || err != nil {
					b.Fatal(n, err)
				}
			}
		})
	}
}
