package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/transport"

	"github.com/culvert-dev/culvert/internal/nonblock"
)

// Protocols of port-forward: SPDY as Kubernetes always had it, and the same
// inside WebSocket messages, since 1.30 (KEP-4006).
const (
	portForwardProtocol = "portforward.k8s.io"
	tunnelProtocol      = "SPDY/3.1+" + portForwardProtocol
)

// PortForward dials a TCP port on loopback of an agent's pod, through the API
// server and the kubelet. It is a carrier.Dialer. Each Dial makes a connection
// of its own: streams that share one share its queues, and one that is reset
// takes the others with it.
type PortForward struct {
	cluster *Cluster
	agent   Agent
	port    int

	mu   sync.Mutex
	spdy bool // the last Dial had to use SPDY
}

// PortForward dials port of the agent's pod. It opens no connection yet.
func (c *Cluster) PortForward(a *Agent, port int) *PortForward {
	return &PortForward{cluster: c, agent: *a, port: port}
}

// Name is "port-forward (WebSocket)" or "port-forward (SPDY)", as the last Dial
// did it.
func (p *PortForward) Name() string {
	if p.spdyOnly() {
		return "port-forward (SPDY)"
	}
	return "port-forward (WebSocket)"
}

func (p *PortForward) spdyOnly() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.spdy
}

// Dial opens a stream: by WebSocket, or by SPDY where the server or something
// before it does not know the former. The connection's Close releases blocked
// reads and writes; after a deadline passed it can only be closed. The pod's
// own refusal ("connection refused") comes as the error of the first Read. Errors
// are *api.Error.
func (p *PortForward) Dial(ctx context.Context) (net.Conn, error) {
	what := fmt.Sprintf("port-forward to pod %s/%s", p.agent.Namespace, p.agent.Pod)
	if !p.spdyOnly() {
		conn, err := p.dial(ctx, (*upgrade).webSocket)
		if err == nil {
			return conn, nil
		}
		var refused *refusal
		if !errors.As(err, &refused) || refused.final() {
			return nil, translate(what, err)
		}
	}
	conn, err := p.dial(ctx, (*upgrade).spdy)
	if err != nil {
		return nil, translate(what, err)
	}
	p.mu.Lock()
	p.spdy = true
	p.mu.Unlock()
	return conn, nil
}

// dialTimeout bounds the way to an open stream: TCP, TLS, the upgrade, the
// kubelet's answer.
const dialTimeout = 20 * time.Second

// dial upgrades a request by one of the two ways and opens the stream in what
// results.
func (p *PortForward) dial(ctx context.Context, way upgradeFunc) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	target := p.cluster.client.Pods(p.agent.Namespace).URL(p.agent.Pod, "portforward")
	return p.cluster.upgradeTo(ctx, way, http.MethodPost, target, "port-forward", func(u *upgrade) (net.Conn, error) {
		return openStream(u.conn, u.abort, p.port)
	})
}

// upgradeTo sends a request to target, has it upgraded, and makes the connection
// of what results. The end of ctx closes the socket and so ends whatever waits;
// what names the request in a refusal.
func (c *Cluster) upgradeTo(ctx context.Context, way upgradeFunc, method string, target *url.URL, what string, open func(*upgrade) (net.Conn, error)) (conn net.Conn, err error) {
	u, err := c.newUpgrade(ctx, way)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, u.abort)
	defer func() {
		if !stop() {
			err = ctx.Err() // whatever the closed socket led to
		}
		if err != nil {
			u.abort()
			conn = nil
		}
	}()
	req, err := http.NewRequestWithContext(ctx, method, target.String(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := u.wrapped.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	if u.conn == nil {
		return nil, newRefusal(resp, what)
	}
	return open(u)
}

// upgradeFunc sends the request and sets conn if the server upgraded. The answer
// is returned in any case: an exec plugin's round tripper looks at its code.
type upgradeFunc func(*upgrade, *http.Request) (*http.Response, error)

// upgrade makes one connection out of one request, with everything that the
// kubeconfig says of authentication, TLS and proxies. client-go's own round
// trippers for this hide the socket.
type upgrade struct {
	wrapped http.RoundTripper // adds credentials, then calls RoundTrip
	way     upgradeFunc
	dialing context.Context // of the dial; the connection outlives it
	tls     *tls.Config
	proxy   func(*http.Request) (*url.URL, error)

	mu   sync.Mutex
	raw  *socket  // TCP
	conn net.Conn // after the upgrade
	over bool
}

func (c *Cluster) newUpgrade(ctx context.Context, way upgradeFunc) (*upgrade, error) {
	now := c.current().config
	config, err := now.TransportConfig()
	if err != nil {
		return nil, err
	}
	u := &upgrade{proxy: c.proxy(), way: way, dialing: ctx}
	if u.tls, err = transport.TLSConfigFor(config); err != nil {
		return nil, err
	}
	if u.tls == nil {
		u.tls = &tls.Config{}
	}
	// Both upgrades are HTTP/1.1's.
	u.tls = u.tls.Clone()
	u.tls.NextProtos = []string{"http/1.1"}
	u.tls.DynamicRecordSizingDisabled = true // small records are for web pages
	if u.wrapped, err = rest.HTTPWrappersForConfig(now, u); err != nil {
		return nil, err
	}
	return u, nil
}

// RoundTrip gets the request with its credentials.
func (u *upgrade) RoundTrip(req *http.Request) (*http.Response, error) {
	return u.way(u, req)
}

// dialTCP is the dialer below proxy and TLS.
func (u *upgrade) dialTCP(_ context.Context, network, address string) (net.Conn, error) {
	d := net.Dialer{
		Control:         socketOptions,
		Resolver:        new(net.Resolver), // see lookup
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 15 * time.Second, Interval: 5 * time.Second, Count: 4},
	}
	conn, err := d.DialContext(u.dialing, network, address)
	if err != nil {
		return nil, err
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.over {
		conn.Close()
		return nil, net.ErrClosed
	}
	u.raw = newSocket(nonblock.Wrap(conn))
	return u.raw, nil
}

// abort closes the socket, below TLS and WebSocket: nothing waits for a lock or
// for the other side. It may be called often and at any time.
func (u *upgrade) abort() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.over = true
	if u.raw != nil {
		u.raw.Close()
	}
}

// webSocket upgrades to WebSocket messages that hold SPDY. Room in the buffers
// for a whole frame makes it one message, one TLS record run and one write.
func (u *upgrade) webSocket(req *http.Request) (*http.Response, error) {
	d := websocket.Dialer{
		NetDialContext:  u.dialTCP,
		Proxy:           u.proxy,
		TLSClientConfig: u.tls,
		Subprotocols:    []string{tunnelProtocol},
		ReadBufferSize:  readBuffer,
		WriteBufferSize: frameHeader + maxPayload + 16, // 14: the longest WebSocket header
	}
	target := *req.URL
	target.Scheme = strings.Replace(target.Scheme, "http", "ws", 1)
	ws, resp, err := d.DialContext(req.Context(), target.String(), req.Header)
	if resp != nil && errors.Is(err, websocket.ErrBadHandshake) {
		return resp, nil
	}
	if err != nil {
		return nil, err
	}
	if ws.Subprotocol() != tunnelProtocol {
		return resp, nil
	}
	u.conn = &webSocketConn{Conn: ws, socket: u.raw}
	return resp, nil
}

// spdy upgrades to bare SPDY.
func (u *upgrade) spdy(req *http.Request) (*http.Response, error) {
	req.Header.Set("Upgrade", "SPDY/3.1")
	req.Header.Set("X-Stream-Protocol-Version", portForwardProtocol)
	return u.send(req)
}

// send makes the request an HTTP/1.1 upgrade to what its header names.
func (u *upgrade) send(req *http.Request) (*http.Response, error) {
	t := &http.Transport{
		DialContext:     u.dialTCP,
		Proxy:           u.proxy,
		TLSClientConfig: u.tls,
		TLSNextProto:    map[string]func(string, *tls.Conn) http.RoundTripper{}, // no HTTP/2
	}
	req.Header.Set("Connection", "Upgrade")
	// The request's context ends with the dial; the connection must not.
	resp, err := t.RoundTrip(req.WithContext(context.WithoutCancel(req.Context())))
	if err != nil {
		return nil, err
	}
	if body, ok := resp.Body.(io.ReadWriteCloser); ok && resp.StatusCode == http.StatusSwitchingProtocols {
		u.conn = &upgradedConn{Conn: u.raw, socket: u.raw, body: body}
	}
	return resp, nil
}

// upgradedConn is the socket for addresses and deadlines, and net/http's view of
// it for bytes.
type upgradedConn struct {
	net.Conn
	socket *socket
	body   io.ReadWriteCloser
}

func (c *upgradedConn) Read(p []byte) (int, error) { return c.body.Read(p) }

func (c *upgradedConn) Write(p []byte) (int, error) {
	c.socket.hold()
	n, err := c.body.Write(p)
	return n, errors.Join(err, c.socket.release())
}

func (c *upgradedConn) Close() error      { return c.body.Close() }
func (c *upgradedConn) NetConn() net.Conn { return c.Conn }

// webSocketConn is the byte stream inside binary messages.
type webSocketConn struct {
	*websocket.Conn
	socket  *socket
	message io.Reader
}

func (c *webSocketConn) Read(p []byte) (int, error) {
	for {
		if c.message == nil {
			kind, r, err := c.NextReader()
			if websocket.IsCloseError(err, websocket.CloseNormalClosure) {
				return 0, io.EOF
			}
			if err != nil {
				return 0, err
			}
			if kind != websocket.BinaryMessage {
				return 0, errors.New("a WebSocket message that is not binary")
			}
			c.message = r
		}
		n, err := c.message.Read(p)
		if errors.Is(err, io.EOF) {
			c.message, err = nil, nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (c *webSocketConn) Write(p []byte) (int, error) {
	c.socket.hold()
	err := c.WriteMessage(websocket.BinaryMessage, p)
	if err := errors.Join(err, c.socket.release()); err != nil {
		return 0, err
	}
	return len(p), nil
}

// goodbye tells the server that this end is on purpose, if that needs no
// waiting.
func (c *webSocketConn) goodbye() {
	message := websocket.FormatCloseMessage(websocket.CloseNormalClosure, "")
	_ = c.WriteControl(websocket.CloseMessage, message, time.Now().Add(100*time.Millisecond))
}

func (c *webSocketConn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// refusal is an answer other than the upgrade.
type refusal struct {
	code  int
	cause error // *apierrors.StatusError if the API server said it
}

func (r *refusal) Error() string { return r.cause.Error() }
func (r *refusal) Unwrap() error { return r.cause }

// final: SPDY would be answered likewise. 403 is not: the WebSocket's GET needs
// another verb than SPDY's POST.
func (r *refusal) final() bool {
	return r.code == http.StatusUnauthorized || r.code == http.StatusNotFound
}

// newRefusal reads an answer other than the upgrade to verb.
func newRefusal(resp *http.Response, verb string) error {
	defer resp.Body.Close()
	r := &refusal{code: resp.StatusCode}
	if r.code == http.StatusSwitchingProtocols {
		r.cause = fmt.Errorf("the server chose protocol %q", resp.Header.Get("Sec-WebSocket-Protocol"))
		return r
	}
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
	object, _, err := codecs.UniversalDeserializer().Decode(body, nil, nil)
	if status, ok := object.(*metav1.Status); ok && err == nil {
		r.cause = &apierrors.StatusError{ErrStatus: *status}
		return r
	}
	// Plain text, from a proxy or an older server.
	text := firstOf(strings.TrimSpace(string(body)), resp.Status)
	r.cause = apierrors.NewGenericServerResponse(resp.StatusCode, verb, schema.GroupResource{Resource: "pods"}, "", text, 0, true)
	return r
}
