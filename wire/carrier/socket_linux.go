package carrier

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// maxSegments and maxGathered bound one sendmsg with UDP_SEGMENT: the kernel
	// takes 64 segments (UDP_MAX_SEGMENTS) and a datagram's 65,507 bytes.
	maxSegments, maxGathered = 64, 65000
	// socketBuffer is asked for each way, in bytes: at 1 Gbit/s 16 ms, which is
	// what a busy processor makes a reader wait. An unprivileged socket gets what
	// net.core.rmem_max allows.
	socketBuffer = 2 << 20
)

// socket is a UDP socket that sends and receives many datagrams with one system
// call where the kernel can (UDP_SEGMENT and UDP_GRO, udp(7)).
type socket struct {
	c    *net.UDPConn
	rc   syscall.RawConn
	wide bool // AF_INET6, which takes IPv4 in its mapped form

	wmu     sync.Mutex // guards what sends
	segment bool       // UDP_SEGMENT works
	iov     [maxSegments]unix.Iovec
	out     unix.Msghdr
	to      unix.RawSockaddrInet6
	gso     [3]uint64 // struct cmsghdr and 16 bits
	werr    unix.Errno
	write   func(fd uintptr) bool
	stalled bool // the socket was full, and has a deadline

	// Of the one goroutine that receives.
	buf    []byte // one datagram, or many of the same length
	left   []byte // of buf, not yet given away
	step   int    // their length
	from   netip.AddrPort
	riov   unix.Iovec
	in     unix.Msghdr
	sender unix.RawSockaddrInet6
	gro    [8]uint64 // struct cmsghdrs
	got    int
	rerr   unix.Errno
	wait   bool
	read   func(fd uintptr) bool
}

func newSocket(c *net.UDPConn) (*socket, error) {
	s := &socket{c: c, buf: make([]byte, 64<<10)}
	var err error
	if s.rc, err = c.SyscallConn(); err != nil {
		return nil, err
	}
	_ = c.SetReadBuffer(socketBuffer)
	_ = c.SetWriteBuffer(socketBuffer)
	var failed error
	err = s.rc.Control(func(fd uintptr) {
		domain, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_DOMAIN)
		if err != nil {
			failed = os.NewSyscallError("getsockopt", err)
			return
		}
		s.wide = domain == unix.AF_INET6
		// Never fragments: a probe that arrives says that the path takes its length.
		// PROBE ignores what ICMP says, which anybody can forge: ip(7).
		if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, unix.IP_PMTUDISC_PROBE); err != nil {
			failed = os.NewSyscallError("setsockopt IP_MTU_DISCOVER", err)
		}
		if s.wide {
			if err := unix.SetsockoptInt(int(fd), unix.IPPROTO_IPV6, unix.IPV6_MTU_DISCOVER, unix.IPV6_PMTUDISC_PROBE); err != nil {
				failed = os.NewSyscallError("setsockopt IPV6_MTU_DISCOVER", err)
			}
		}
		_, err = unix.GetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_SEGMENT)
		s.segment = err == nil
		_ = unix.SetsockoptInt(int(fd), unix.IPPROTO_UDP, unix.UDP_GRO, 1)
	})
	if err == nil {
		err = failed
	}
	if err != nil {
		return nil, err
	}
	s.write, s.read = s.sendmsg, s.recvmsg
	return s, nil
}

// addr writes to as the socket's family has it.
func (s *socket) addr(to netip.AddrPort) error {
	port := networkOrder(to.Port())
	if s.wide {
		s.to = unix.RawSockaddrInet6{Family: unix.AF_INET6, Port: port, Addr: to.Addr().As16()}
		s.out.Name, s.out.Namelen = (*byte)(unsafe.Pointer(&s.to)), unix.SizeofSockaddrInet6
		return nil
	}
	if !to.Addr().Is4() {
		return fmt.Errorf("sending to %s: this machine has no IPv6", to)
	}
	*(*unix.RawSockaddrInet4)(unsafe.Pointer(&s.to)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port, Addr: to.Addr().As4()}
	s.out.Name, s.out.Namelen = (*byte)(unsafe.Pointer(&s.to)), unix.SizeofSockaddrInet4
	return nil
}

// networkOrder turns a port of this machine's byte order into one of the
// network's, and back.
func networkOrder(port uint16) uint16 {
	var b [2]byte
	binary.NativeEndian.PutUint16(b[:], port)
	return binary.BigEndian.Uint16(b[:])
}

// probe sends one datagram.
func (s *socket) probe(to netip.AddrPort, b []byte) error {
	_, err := s.send(to, [][]byte{b})
	return err
}

// send sends messages and returns how many. Those of the same length go
// together; a shorter one may be the last of them.
func (s *socket) send(to netip.AddrPort, msgs [][]byte) (int, error) {
	s.wmu.Lock()
	defer s.wmu.Unlock()
	if err := s.addr(to); err != nil {
		return 0, err
	}
	sent := 0
	for sent < len(msgs) {
		n, size, total := 1, len(msgs[sent]), len(msgs[sent])
		for s.segment && sent+n < len(msgs) && n < maxSegments {
			m := len(msgs[sent+n])
			if m > size || m == 0 || total+m > maxGathered || len(msgs[sent+n-1]) < size {
				break
			}
			total += m
			n++
		}
		for i, m := range msgs[sent : sent+n] {
			s.iov[i].Base = unsafe.SliceData(m)
			s.iov[i].SetLen(len(m))
		}
		s.out.Iov = &s.iov[0]
		s.out.SetIovlen(n)
		s.out.Control = nil
		s.out.SetControllen(0)
		if n > 1 {
			control := (*[len(s.gso) * 8]byte)(unsafe.Pointer(&s.gso))
			h := (*unix.Cmsghdr)(unsafe.Pointer(control))
			h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
			h.SetLen(unix.CmsgLen(2))
			binary.NativeEndian.PutUint16(control[unix.CmsgLen(0):], uint16(size))
			s.out.Control = &control[0]
			s.out.SetControllen(unix.CmsgSpace(2))
		}
		err := s.rc.Write(s.write)
		if s.stalled {
			s.stalled = false
			_ = s.c.SetWriteDeadline(time.Time{})
		}
		if err == nil && s.werr != 0 {
			err = os.NewSyscallError("sendmsg", s.werr)
		}
		if n > 1 && (s.werr == unix.EIO || s.werr == unix.EINVAL || s.werr == unix.EMSGSIZE) {
			s.segment = false // a device without checksum offload (EIO), or an old kernel
			continue
		}
		if err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

func (s *socket) sendmsg(fd uintptr) bool {
	for {
		_, _, s.werr = unix.Syscall(unix.SYS_SENDMSG, fd, uintptr(unsafe.Pointer(&s.out)), 0)
		switch s.werr {
		case unix.EINTR:
		case unix.EAGAIN:
			s.stall()
			return false
		default:
			return true
		}
	}
}

// stall bounds the wait of a send that finds the socket full: a device that
// takes nothing must not keep everything from the stream.
func (s *socket) stall() {
	if !s.stalled {
		s.stalled = true
		_ = s.c.SetWriteDeadline(time.Now().Add(silentAfter))
	}
}

// receive waits for datagrams and copies those that admit lets in to msgs. It
// may return none. Only one goroutine may call it at a time.
func (s *socket) receive(msgs [][]byte, sizes []int, admit func(netip.AddrPort, []byte) bool) (int, error) {
	n := 0
	for n < len(msgs) {
		if len(s.left) == 0 {
			s.wait = n == 0
			if err := s.rc.Read(s.read); err != nil {
				if errors.Is(err, os.ErrDeadlineExceeded) {
					err = net.ErrClosed
				}
				return n, err
			}
			if s.rerr == unix.EAGAIN {
				return n, nil
			}
			if s.rerr != 0 {
				continue // an ICMP error of an earlier datagram: nothing of ours
			}
			s.arrange()
			continue
		}
		b := s.left[:min(s.step, len(s.left))]
		s.left = s.left[len(b):]
		if len(b) <= len(msgs[n]) && admit(s.from, b) {
			sizes[n] = copy(msgs[n], b)
			n++
		}
	}
	return n, nil
}

func (s *socket) recvmsg(fd uintptr) bool {
	s.riov.Base = &s.buf[0]
	s.riov.SetLen(len(s.buf))
	s.in = unix.Msghdr{Name: (*byte)(unsafe.Pointer(&s.sender)), Namelen: unix.SizeofSockaddrInet6, Iov: &s.riov, Control: (*byte)(unsafe.Pointer(&s.gro))}
	s.in.SetIovlen(1)
	s.in.SetControllen(len(s.gro) * 8)
	for {
		n, _, errno := unix.Syscall(unix.SYS_RECVMSG, fd, uintptr(unsafe.Pointer(&s.in)), 0)
		s.got, s.rerr = int(n), errno
		switch errno {
		case unix.EINTR:
		case unix.EAGAIN:
			return !s.wait
		default:
			return true
		}
	}
}

// arrange looks at what recvmsg brought: who sent it, and how long each datagram
// is (UDP_GRO).
func (s *socket) arrange() {
	s.left, s.step = s.buf[:s.got], max(s.got, 1)
	port := networkOrder(s.sender.Port)
	if s.sender.Family == unix.AF_INET6 {
		s.from = netip.AddrPortFrom(netip.AddrFrom16(s.sender.Addr).Unmap(), port)
	} else {
		v4 := (*unix.RawSockaddrInet4)(unsafe.Pointer(&s.sender))
		s.from = netip.AddrPortFrom(netip.AddrFrom4(v4.Addr), port)
	}
	control := (*[len(s.gro) * 8]byte)(unsafe.Pointer(&s.gro))[:min(int(s.in.Controllen), len(s.gro)*8)]
	// Nothing else was asked for, so it is the first message or there is none.
	if len(control) < unix.CmsgLen(4) {
		return
	}
	if h := (*unix.Cmsghdr)(unsafe.Pointer(&control[0])); h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO {
		s.step = max(int(binary.NativeEndian.Uint32(control[unix.CmsgLen(0):])), 1)
	}
}
