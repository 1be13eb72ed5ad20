package session

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// udpIdle ends a flow in which no datagram moves.
const udpIdle = 60 * time.Second

var loopback4, loopback6 = netip.MustParseAddr("127.0.0.1"), netip.IPv6Loopback()

// meetUDP joins a flow's datagrams to a local program by a socket of its own, so
// that the program can tell flows apart.
func (in *inbound) meetUDP(ctx context.Context, c wire.Inbound, h intercept.Header, t target) (run func()) {
	to, ok := udpListener(t.Local)
	if !ok {
		in.answer(c, h, intercept.Refused, nil)
		return nil
	}
	socket, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, t.Local)))
	if err != nil {
		in.answer(c, h, intercept.Refused, err)
		return nil
	}
	in.enter(h.ID, c)
	f := &udpFlow{c: c, socket: socket}
	if accept(c) != nil {
		f.end()
		in.leave(h.ID, c)
		return nil
	}
	return func() {
		defer in.leave(h.ID, c)
		f.run(ctx)
	}
}

// udpFlow is a flow of datagrams between a connection from the cluster and a
// connected socket. It ends when either side does, when the program's port is
// closed, or when it is idle, which is the socket's read deadline.
type udpFlow struct {
	c      wire.Inbound
	socket *net.UDPConn
	last   atomic.Int64 // unix nanoseconds of the last touch that counted
}

func (f *udpFlow) run(ctx context.Context) {
	f.touch()
	stop := context.AfterFunc(ctx, f.end)
	defer stop()
	down := make(chan struct{})
	go func() {
		defer close(down)
		defer f.end()
		f.down()
	}()
	f.up()
	f.end()
	<-down
}

func (f *udpFlow) end() {
	f.socket.Close()
	f.c.Close()
}

// touch puts the end off. Each second will do.
func (f *udpFlow) touch() {
	now := time.Now()
	if last := f.last.Load(); now.UnixNano()-last > int64(time.Second) && f.last.CompareAndSwap(last, now.UnixNano()) {
		_ = f.socket.SetReadDeadline(now.Add(udpIdle))
	}
}

// up moves datagrams to the program.
func (f *udpFlow) up() {
	for {
		n, err := intercept.DatagramSize(f.c)
		if err != nil {
			return
		}
		buf := buffers.Get().(*[64 << 10]byte)
		_, err = io.ReadFull(f.c, buf[:n])
		if err == nil {
			f.touch()
			_, err = f.socket.Write(buf[:n])
		}
		buffers.Put(buf)
		if err != nil && !errors.Is(err, syscall.ENOBUFS) { // a full queue loses a datagram, no more
			return
		}
	}
}

// down moves datagrams of the program to the cluster.
func (f *udpFlow) down() {
	scratch := func(p []byte) error {
		buf := buffers.Get().(*[64 << 10]byte)
		defer buffers.Put(buf)
		f.touch()
		return intercept.WriteDatagram(f.c, p, buf[:])
	}
	_ = receive(f.socket, scratch) // whatever it is, the flow ends
}

// udpListener is the loopback address at which a program has opened a UDP port:
// nothing else tells before the first datagram.
func udpListener(port uint16) (netip.Addr, bool) {
	table4, err4 := udpTable("/proc/thread-self/net/udp", port)
	table6, err6 := udpTable("/proc/thread-self/net/udp6", port)
	if err4 != nil && err6 != nil { // not Linux
		for _, a := range []netip.Addr{loopback4, loopback6} {
			if inUse(netip.AddrPortFrom(a, port)) {
				return a, true
			}
		}
		return netip.Addr{}, false
	}
	any4, any6 := netip.IPv4Unspecified(), netip.IPv6Unspecified()
	switch {
	case slices.Contains(table4, loopback4), slices.Contains(table4, any4), slices.Contains(table6, netip.AddrFrom16(loopback4.As16())):
		return loopback4, true
	case slices.Contains(table6, loopback6), slices.Contains(table6, any6): // the latter may be for IPv6 alone
		return loopback6, true
	}
	return netip.Addr{}, false
}

// udpTable lists the addresses at which sockets without a peer have the port: a
// table of the kernel's, proc(5).
func udpTable(file string, port uint16) (found []netip.Addr, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		field := strings.Fields(lines.Text())
		if len(field) < 3 {
			continue
		}
		local, ok1 := parseProcAddr(field[1])
		remote, ok2 := parseProcAddr(field[2])
		if ok1 && ok2 && local.Port() == port && remote.Port() == 0 {
			found = append(found, local.Addr())
		}
	}
	return found, lines.Err()
}

// parseProcAddr reads "0100007F:1F90": the address is in words of the machine's
// byte order.
func parseProcAddr(text string) (netip.AddrPort, bool) {
	host, p, ok := strings.Cut(text, ":")
	b, err := hex.DecodeString(host)
	port, perr := strconv.ParseUint(p, 16, 16)
	if !ok || err != nil || perr != nil || len(b)%4 != 0 {
		return netip.AddrPort{}, false
	}
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 { // little-endian
		for word := range slices.Chunk(b, 4) {
			slices.Reverse(word)
		}
	}
	addr, ok := netip.AddrFromSlice(b)
	return netip.AddrPortFrom(addr, uint16(port)), ok
}

// inUse tells whether a program has the UDP port of an address.
func inUse(at netip.AddrPort) bool {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return errors.Is(err, syscall.EADDRINUSE)
	}
	c.Close()
	return false
}

// listening tells whether a program has opened a port (network is intercept.TCP or
// intercept.UDP) at a loopback address of this machine. A TCP program sees a
// connection that ends at once.
func listening(network string, port uint16) bool {
	if network == intercept.UDP {
		_, ok := udpListener(port)
		return ok
	}
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		if c, err := net.DialTimeout("tcp", fmt.Sprintf("%s:%d", host, port), localTime); err == nil {
			c.Close()
			return true
		}
	}
	return false
}
