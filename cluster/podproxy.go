package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/carrier"
)

// PodProxy dials a TCP port on the address of an agent's pod, through the API
// server's pods/proxy: without the kubelet and without SPDY, since what follows
// the HTTP Upgrade is raw bytes. It is a carrier.Dialer. The bytes travel in the
// clear between API server and pod, and anybody may reach the port: both ends
// have to prove themselves (carrier.Prove), and nothing may travel there that is
// not encrypted.
type PodProxy struct {
	cluster *Cluster
	agent   Agent
	port    int
}

// PodProxy dials port of the agent's pod. It opens no connection yet.
func (c *Cluster) PodProxy(a *Agent, port int) *PodProxy {
	return &PodProxy{cluster: c, agent: *a, port: port}
}

// Name is "pods/proxy".
func (p *PodProxy) Name() string { return "pods/proxy" }

// proxyTimeout bounds the way to the 101. Where a NetworkPolicy drops the API
// server's SYN, nothing ever comes; otherwise it takes two round trips.
const proxyTimeout = 5 * time.Second

// Dial has the API server connect to the pod. The connection's Close releases
// blocked reads and writes. Errors are *api.Error: CodeForbidden if RBAC does
// not allow pods/proxy, CodeUnreachable if the API server does not reach the
// pod's port; both are normal.
func (p *PodProxy) Dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, proxyTimeout)
	defer cancel()
	conn, err := p.dial(ctx)
	if err == nil {
		return conn, nil
	}
	what := fmt.Sprintf("pods/proxy to pod %s/%s", p.agent.Namespace, p.agent.Pod)
	switch {
	case isMissingRight(err):
		return nil, &api.Error{Code: api.CodeForbidden, Message: fmt.Sprintf("RBAC: get pods/proxy is not allowed in namespace %q", p.agent.Namespace), Hint: hintRBAC}
	case errors.Is(err, context.DeadlineExceeded):
		return nil, &api.Error{Code: api.CodeUnreachable,
			Message: fmt.Sprintf("%s: no answer within %v; a NetworkPolicy or firewall may keep the API server from port %d of the pod", what, proxyTimeout, p.port)}
	}
	return nil, translate(what, err)
}

func (p *PodProxy) dial(ctx context.Context) (net.Conn, error) {
	target := p.cluster.client.Pods(p.agent.Namespace).URL(fmt.Sprintf("%s:%d", p.agent.Pod, p.port), "proxy")
	target.Path += "/" // what is shorter may be redirected
	return p.cluster.upgradeTo(ctx, (*upgrade).bytes, http.MethodGet, target, "proxy", func(u *upgrade) (net.Conn, error) {
		return &rawConn{Conn: u.conn, abort: u.abort}, nil
	})
}

// bytes upgrades to bytes that mean nothing to anybody between the two ends.
func (u *upgrade) bytes(req *http.Request) (*http.Response, error) {
	req.Header.Set("Upgrade", carrier.ProxyUpgrade)
	return u.send(req)
}

// rawConn is closed below TLS: nothing waits for a lock or for the other side.
type rawConn struct {
	net.Conn
	abort func()
}

// NetConn is the connection below, for who wants to know its state.
func (c *rawConn) NetConn() net.Conn { return c.Conn }

func (c *rawConn) Close() error {
	c.abort()
	return c.Conn.Close()
}
