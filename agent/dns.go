package agent

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
)

const (
	// maxQueries bounds the DNS queries that wait for an answer; more are
	// dropped, and asked again by the client.
	maxQueries = 512
	// maxDNSConns bounds the DNS connections over TCP; more are closed.
	maxDNSConns = 64
	// maxNameservers is the resolver's own bound, MAXNS of resolv.h.
	maxNameservers = 3
	dnsHeader      = 12 // RFC 1035 section 4.1.1
	dnsPort        = 53
)

// dnsRelay answers at port 53 of the agent's own addresses with what the pod's
// nameservers say. They may be link-local (NodeLocal DNSCache), where only the
// pod can reach them. Messages pass unchanged, so every record type, rcode, TTL
// and truncation is the nameserver's.
type dnsRelay struct {
	node    *node
	queries chan struct{}
	conns   chan struct{}

	stop func() // ends what listens for the session

	mu     sync.Mutex
	open   map[net.Conn]struct{}
	closed bool
}

func newDNSRelay(n *node) *dnsRelay {
	return &dnsRelay{
		node:    n,
		queries: make(chan struct{}, maxQueries),
		conns:   make(chan struct{}, maxDNSConns),
		open:    map[net.Conn]struct{}{},
	}
}

// listen opens the stack's sockets at addrs, which are on an interface of it, and
// serves them until stop is called.
func (d *dnsRelay) listen(nic tcpip.NICID, addrs []netip.Addr) (stop func(), err error) {
	var opened []io.Closer
	stop = func() {
		for _, c := range opened {
			c.Close()
		}
	}
	for _, addr := range addrs {
		at := tcpip.FullAddress{NIC: nic, Addr: tcpip.AddrFromSlice(addr.AsSlice()), Port: dnsPort}
		c, err := gonet.DialUDP(d.node.stack, &at, nil, protocolOf(addr))
		if err != nil {
			stop()
			return nil, fmt.Errorf("listening for DNS at %s: %w", addr, err)
		}
		opened = append(opened, c)
		l, err := gonet.ListenTCP(d.node.stack, at, protocolOf(addr))
		if err != nil {
			stop()
			return nil, fmt.Errorf("listening for DNS over TCP at %s: %w", addr, err)
		}
		opened = append(opened, l)
		d.node.spawn(func() { d.servePackets(c) })
		d.node.spawn(func() { d.serveConns(l) })
	}
	return stop, nil
}

func (d *dnsRelay) close() {
	d.mu.Lock()
	d.closed = true
	for c := range d.open {
		c.Close()
	}
	d.mu.Unlock()
	if d.stop != nil {
		d.stop()
	}
}

func (d *dnsRelay) servePackets(c *gonet.UDPConn) {
	buf := make([]byte, datagramMax)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			if d.node.ctx.Err() != nil || errors.Is(err, io.EOF) || strings.Contains(err.Error(), "closed") {
				return
			}
			continue // an ICMP error of a client that is gone
		}
		if n < dnsHeader {
			continue
		}
		select {
		case d.queries <- struct{}{}:
		default:
			continue
		}
		query := append([]byte(nil), buf[:n]...)
		d.node.spawn(func() {
			defer func() { <-d.queries }()
			if answer := d.ask(query, "udp"); answer != nil {
				_, _ = c.WriteTo(answer, from) // datagrams may be lost
			}
		})
	}
}

func (d *dnsRelay) serveConns(l *gonet.TCPListener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return // only close ends it
		}
		select {
		case d.conns <- struct{}{}:
			d.node.spawn(func() {
				defer func() { <-d.conns }()
				d.serveConn(c)
			})
		default:
			c.Close()
		}
	}
}

// serveConn answers the queries of one connection, one after the other
// (RFC 7766 section 6.2.1.1 allows it), until it is idle for 10 s.
func (d *dnsRelay) serveConn(c net.Conn) {
	defer c.Close()
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return
	}
	d.open[c] = struct{}{}
	d.mu.Unlock()
	defer func() {
		d.mu.Lock()
		delete(d.open, c)
		d.mu.Unlock()
	}()
	for {
		_ = c.SetDeadline(time.Now().Add(10 * time.Second)) // never fails on the stack's connections
		query, err := readMessage(c)
		if err != nil || len(query) < dnsHeader {
			return
		}
		answer := d.ask(query, "tcp")
		if answer == nil || writeMessage(c, answer) != nil {
			return
		}
	}
}

// ask relays query to the pod's nameservers in their order; the first that
// answers at all is believed. When none does the answer is SERVFAIL, so that
// the client need not wait longer than we did.
func (d *dnsRelay) ask(query []byte, network string) []byte {
	d.node.agent.metrics.queries.WithLabelValues(network).Inc()
	var errs []error
	for _, server := range nameservers(d.node.agent.resolvConf()) {
		ctx, cancel := context.WithTimeout(d.node.ctx, d.node.agent.times.dnsTry)
		answer, err := exchange(ctx, network, server, query)
		cancel()
		if err == nil {
			return answer
		}
		errs = append(errs, err)
		if d.node.ctx.Err() != nil {
			return nil
		}
	}
	d.node.agent.metrics.failedQueries.Inc()
	d.node.agent.log.Debug("no nameserver answered", "error", errors.Join(errs...))
	return servfail(query)
}

// exchange asks one server and waits for the answer with the query's id.
func exchange(ctx context.Context, network string, server netip.AddrPort, query []byte) ([]byte, error) {
	var dialer net.Dialer
	c, err := dialer.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, fmt.Errorf("asking nameserver %s: %w", server, err)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	var answer []byte
	if network == "tcp" {
		if err = writeMessage(c, query); err == nil {
			answer, err = readMessage(c)
		}
		if err == nil && !answers(answer, query) {
			err = errors.New("the answer is not to the query")
		}
	} else if _, err = c.Write(query); err == nil {
		buf := make([]byte, datagramMax)
		for err == nil && !answers(answer, query) {
			var n int
			n, err = c.Read(buf)
			answer = buf[:n]
		}
	}
	if err != nil {
		return nil, fmt.Errorf("asking nameserver %s: %w", server, err)
	}
	return answer, nil
}

// answers tells whether message is an answer with query's id.
func answers(message, query []byte) bool {
	return len(message) >= dnsHeader && message[0] == query[0] && message[1] == query[1] && message[2]&0x80 != 0
}

// servfail makes of query the answer that there is none: RFC 1035 section 4.1.1,
// QR and RA set, rcode 2. The rest of the message, question and EDNS, stays.
func servfail(query []byte) []byte {
	answer := append([]byte(nil), query...)
	answer[2] |= 0x80
	answer[3] = answer[3]&0x70 | 0x80 | 2
	return answer
}

// readMessage reads a message with its length before it: RFC 1035 section 4.2.2.
func readMessage(r io.Reader) ([]byte, error) {
	var size [2]byte
	if _, err := io.ReadFull(r, size[:]); err != nil {
		return nil, err
	}
	m := make([]byte, binary.BigEndian.Uint16(size[:]))
	_, err := io.ReadFull(r, m)
	return m, err
}

func writeMessage(w io.Writer, m []byte) error {
	if len(m) > 0xffff {
		return errors.New("message is longer than 65535 bytes")
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(m))), m...))
	return err
}

// nameservers reads the nameserver lines of resolv.conf(5).
func nameservers(conf string) []netip.AddrPort {
	var found []netip.AddrPort
	for line := range strings.Lines(conf) {
		field := strings.Fields(line)
		if len(field) < 2 || field[0] != "nameserver" {
			continue
		}
		if addr, err := netip.ParseAddr(field[1]); err == nil && len(found) < maxNameservers {
			found = append(found, netip.AddrPortFrom(addr, dnsPort))
		}
	}
	return found
}
