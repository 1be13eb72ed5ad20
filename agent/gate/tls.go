package gate

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// A mesh whose members have the Service's key can see into TLS. The gate ends the
// client's TLS and begins its own to the origin and to machines; between them stands
// a pair of connections on loopback, so that all of the router goes on with plain TCP.
// Keys come with a pushed state, and are in memory only: a gate that has none, because
// it was started anew, passes TLS to the origin as it is until it is told.

const (
	// handshakeTime is for one handshake.
	handshakeTime = 10 * time.Second
	// plainTime is for a program's answer to the beginning of one, before it is taken
	// for one without TLS.
	plainTime = 3 * time.Second
	// tlsCost is what a connection with TLS at both ends is reckoned with, in bytes:
	// two pairs with two buffers each, and crypto/tls's own.
	tlsCost = 128 << 10
	// maxKeys bounds the keys of one gate.
	maxKeys = 64
)

// protoTLS is sniffed, and no protocol that a relay knows.
const protoTLS = 100

// Protocols of ALPN (RFC 7301, and RFC 9113 3.2).
const (
	alpnHTTP1 = "http/1.1"
	alpnHTTP2 = "h2"
)

// tlsKey is an entry's.
type tlsKey struct {
	cert  tls.Certificate
	roots *x509.CertPool
}

// parseKey reads a key and the certificates that came with it.
func parseKey(k intercept.TLSKey) (*tlsKey, error) {
	cert, err := tls.X509KeyPair([]byte(k.Certificate), []byte(k.Key))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(k.Authority)) // there may be none
	for _, der := range cert.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil {
			roots.AddCert(c)
		}
	}
	return &tlsKey{cert: cert, roots: roots}, nil
}

// trusts wants the origin to show the very certificate, or one for the name that the
// same authority signed.
func (k *tlsKey) trusts(s tls.ConnectionState) error {
	if len(s.PeerCertificates) == 0 {
		return errors.New("the origin shows no certificate")
	}
	leaf := s.PeerCertificates[0]
	if k.cert.Leaf != nil && leaf.Equal(k.cert.Leaf) {
		return nil
	}
	between := x509.NewCertPool()
	for _, c := range s.PeerCertificates[1:] {
		between.AddCert(c)
	}
	_, err := leaf.Verify(x509.VerifyOptions{Roots: k.roots, Intermediates: between, DNSName: s.ServerName})
	return err
}

// check wants an origin that may be trusted at the other end of c. One that speaks no
// TLS at all is no matter: what is no TLS passes as it is.
func (k *tlsKey) check(ctx context.Context, c *net.TCPConn) error {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	s := &secured{key: k, server: k.name()}
	err := tls.Client(c, s.toOrigin(alpnHTTP2, alpnHTTP1)).HandshakeContext(ctx)
	var plain tls.RecordHeaderError
	if err == nil || errors.As(err, &plain) {
		return nil
	}
	return fmt.Errorf("with TLS it does not show the certificate of the Secret, nor one that its authority signed: %w", err)
}

// name is one that the certificate is for.
func (k *tlsKey) name() string {
	if k.cert.Leaf != nil && len(k.cert.Leaf.DNSNames) > 0 {
		return k.cert.Leaf.DNSNames[0]
	}
	return ""
}

// takeKeys keeps what was pushed, and forgets keys of entries that are gone. A member
// who has none pushes none, and takes none away.
func (g *Gate) takeKeys(keys map[string]intercept.TLSKey) error {
	parsed := map[string]*tlsKey{}
	for key, k := range keys {
		one, err := parseKey(k)
		if err != nil {
			return fmt.Errorf("the TLS key of %s: %w", key, err)
		}
		parsed[key] = one
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for key := range g.keys {
		if _, ok := g.state.Entries[key]; !ok {
			delete(g.keys, key)
		}
	}
	for key, k := range parsed {
		if g.state.Entries[key].Gate == g.cfg.Name && len(g.keys) < maxKeys {
			g.keys[key] = k
		}
	}
	return nil
}

// keyOf is an entry's, nil for none.
func (g *Gate) keyOf(entry string) *tlsKey {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.keys[entry]
}

// enterTLS is the key of an entry for one more connection, nil where there is none or
// there are too many: then TLS passes as it is. Who has it takes one from g.tlsConns at
// the connection's end.
func (g *Gate) enterTLS(entry string) *tlsKey {
	key := g.keyOf(entry)
	if key == nil {
		return nil
	}
	if g.tlsConns.Add(1) > g.cfg.maxTLS() {
		g.tlsConns.Add(-1)
		g.log.Warn("too many connections with TLS: one is not routed, and goes to the origin", "limit", g.cfg.maxTLS())
		return nil
	}
	return key
}

// maxTLS is how many connections may have TLS ended here at one time.
func (c Config) maxTLS() int64 { return max(64, c.MemoryLimit/4/tlsCost) }

// secured is a client's connection whose TLS the gate ends.
type secured struct {
	key      *tlsKey
	server   string // that the client asked for (SNI), or one that the certificate is for
	protocol string // that was agreed on (ALPN), or empty
}

// serveTLS ends the client's TLS and serves what is in it. Nothing was read from him.
func (c *meshConn) serveTLS(key *tlsKey) error {
	g := c.gate
	s := &secured{key: key}
	client := tls.Server(c.client, &tls.Config{MinVersion: tls.VersionTLS12, GetConfigForClient: func(h *tls.ClientHelloInfo) (*tls.Config, error) {
		if s.server = h.ServerName; s.server == "" {
			s.server = key.name()
		}
		config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{key.cert}}
		if s.protocol = c.agree(s, h.SupportedProtos); s.protocol != "" {
			config.NextProtos = []string{s.protocol}
		}
		return config, nil
	}})
	ctx, cancel := context.WithTimeout(g.life, handshakeTime)
	defer cancel()
	ended := func() { g.tlsConns.Add(-1) }
	if err := client.HandshakeContext(ctx); err != nil {
		ended()
		return fmt.Errorf("the client's TLS: %w", err)
	}
	inner, err := g.bridge(client, ended)
	if err != nil {
		return err
	}
	g.mu.Lock()
	c.mu.Lock()
	c.secure, c.client, c.conn.client = s, inner, inner
	if c.shut {
		reset(inner)
	}
	c.mu.Unlock()
	g.mu.Unlock()
	switch s.protocol {
	case alpnHTTP2:
		c.http2.Store(true)
		return c.serveHTTP2(nil)
	case alpnHTTP1:
		return c.serveHTTP1(nil)
	}
	return c.serveSniffed(false)
}

// agree chooses what the client and the origin both speak: each request goes on in the
// protocol in which it came.
func (c *meshConn) agree(s *secured, offered []string) string {
	if slices.Contains(offered, alpnHTTP2) {
		two := c.route.speakers.ask(machineKey{}, func() (*net.TCPConn, error) { return c.dialOrigin(c.gate.life) }, func(o *net.TCPConn) bool {
			ctx, cancel := context.WithTimeout(c.gate.life, handshakeTime)
			defer cancel()
			conn := tls.Client(o, s.toOrigin(alpnHTTP2, alpnHTTP1))
			return conn.HandshakeContext(ctx) == nil && conn.ConnectionState().NegotiatedProtocol == alpnHTTP2
		})
		if two || !slices.Contains(offered, alpnHTTP1) {
			return alpnHTTP2
		}
	}
	if slices.Contains(offered, alpnHTTP1) {
		return alpnHTTP1
	}
	return ""
}

// toOrigin is how TLS to the origin is begun.
func (s *secured) toOrigin(protocols ...string) *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, ServerName: s.server, NextProtos: protocols,
		InsecureSkipVerify: true, VerifyConnection: s.key.trusts} // the Secret says whom to trust
}

// protocols is what is offered in turn.
func (s *secured) protocols() []string {
	if s.protocol == "" {
		return nil
	}
	return []string{s.protocol}
}

// originTLS begins TLS on a connection to the origin.
func (c *meshConn) originTLS(ctx context.Context, o *net.TCPConn) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTime)
	defer cancel()
	conn := tls.Client(o, c.secure.toOrigin(c.secure.protocols()...))
	if err := conn.HandshakeContext(ctx); err != nil {
		reset(o)
		return nil, fmt.Errorf("the origin's TLS: %w", err)
	}
	return c.gate.bridge(conn, func() {})
}

// machineTLS begins TLS on a connection to a machine, where the local program speaks
// it; dial connects once more where it does not. Its certificate may be anything: the
// way there is the tunnel's.
func (c *meshConn) machineTLS(ctx context.Context, to machineKey, dial func() (*net.TCPConn, error)) (*net.TCPConn, error) {
	o, err := dial()
	if err != nil || c.route.plain.has(to) {
		return o, err
	}
	hs, cancel := context.WithTimeout(ctx, plainTime)
	defer cancel()
	conn := tls.Client(o, &tls.Config{MinVersion: tls.VersionTLS12, ServerName: c.secure.server, NextProtos: c.secure.protocols(), InsecureSkipVerify: true})
	if err := conn.HandshakeContext(hs); err == nil {
		return c.gate.bridge(conn, func() {})
	}
	o.Close()
	if o, err = dial(); err == nil {
		c.route.plain.add(to)
	}
	return o, err
}

// plainServers are machines of a route whose programs speak no TLS. A new state
// forgets them.
type plainServers struct {
	mu    sync.Mutex
	known map[machineKey]time.Time // until when it is believed
}

func (p *plainServers) has(to machineKey) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.known[to])
}

func (p *plainServers) add(to machineKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.known == nil {
		p.known = map[machineKey]time.Time{}
	}
	p.known[to] = time.Now().Add(speaksFor)
}

func (p *plainServers) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.known = nil
}

// bridge makes of a connection with TLS one without, that ends as it ends. It owns
// secure, also on an error; ended is called when it has ended.
func (g *Gate) bridge(secure *tls.Conn, ended func()) (*net.TCPConn, error) {
	inner, outer, err := loopback()
	if err != nil {
		secure.Close()
		ended()
		return nil, err
	}
	raw, _ := secure.NetConn().(*net.TCPConn)
	var both sync.WaitGroup
	both.Go(func() { // what the peer says
		if err := carry(outer, secure); err != nil {
			reset(outer)
			return
		}
		_ = outer.CloseWrite() // fails when it has ended, too
	})
	both.Go(func() {
		if err := carry(secure, outer); err != nil {
			reset(raw)
			return
		}
		_ = secure.CloseWrite()
	})
	g.wg.Go(func() {
		both.Wait()
		secure.Close()
		outer.Close()
		ended()
	})
	return inner, nil
}

// carry copies to the end.
func carry(to io.Writer, from io.Reader) error {
	b := make([]byte, 16<<10) // a record of TLS (RFC 8446, 5.1)
	for {
		n, err := from.Read(b)
		if n > 0 {
			if _, err := to.Write(b[:n]); err != nil {
				return err
			}
		}
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
	}
}

// loopback is a pair of connected TCP connections.
func loopback() (a, b *net.TCPConn, err error) {
	l, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	if a, err = net.DialTCP("tcp", nil, l.Addr().(*net.TCPAddr)); err != nil {
		return nil, nil, err
	}
	_ = l.SetDeadline(time.Now().Add(5 * time.Second)) // it is there already
	for {
		if b, err = l.AcceptTCP(); err != nil {
			a.Close()
			return nil, nil, err
		}
		if b.RemoteAddr().String() == a.LocalAddr().String() {
			return a, b, nil
		}
		b.Close() // somebody else's in this pod
	}
}
