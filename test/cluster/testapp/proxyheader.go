package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"time"
)

// proxyListener is for a server behind something that sends a header of the
// PROXY protocol, version 2, before a connection's first byte (HAProxy's
// proxy-protocol.txt, section 2.2). Its connections' remote address is the
// header's.
type proxyListener struct{ net.Listener }

func (l proxyListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &proxiedConn{Conn: c}, nil
}

// proxiedConn reads its header when it is first used, in its own goroutine.
type proxiedConn struct {
	net.Conn
	once   sync.Once
	remote net.Addr
	err    error
}

func (c *proxiedConn) header() {
	c.once.Do(func() {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		c.remote, c.err = readProxyHeader(c.Conn)
		c.SetReadDeadline(time.Time{})
	})
}

func (c *proxiedConn) Read(b []byte) (int, error) {
	if c.header(); c.err != nil {
		return 0, c.err
	}
	return c.Conn.Read(b)
}

// RemoteAddr is what the header says; what it does not say is the peer's own.
func (c *proxiedConn) RemoteAddr() net.Addr {
	if c.header(); c.remote != nil {
		return c.remote
	}
	return c.Conn.RemoteAddr()
}

var proxySignature = []byte("\r\n\r\n\x00\r\nQUIT\n")

// readProxyHeader reads a header and not a byte more. The address is nil when the
// header has none that we know.
func readProxyHeader(r io.Reader) (net.Addr, error) {
	var head [16]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("read a PROXY header: %w", err)
	}
	if !bytes.Equal(head[:12], proxySignature) || head[12]>>4 != 2 {
		return nil, fmt.Errorf("no PROXY header of version 2: %q", head)
	}
	rest := make([]byte, binary.BigEndian.Uint16(head[14:]))
	if _, err := io.ReadFull(r, rest); err != nil {
		return nil, fmt.Errorf("read a PROXY header: %w", err)
	}
	size := map[byte]int{0x11: 4, 0x21: 16}[head[13]] // TCP over IPv4, over IPv6
	if head[12]&0xf == 0 || size == 0 || len(rest) < 2*size+4 {
		return nil, nil
	}
	ip, _ := netip.AddrFromSlice(rest[:size])
	return net.TCPAddrFromAddrPort(netip.AddrPortFrom(ip, binary.BigEndian.Uint16(rest[2*size:]))), nil
}
