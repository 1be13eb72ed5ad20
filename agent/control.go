package agent

import (
	"context"
	"crypto/subtle"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/internal/nonblock"
	"github.com/culvert-dev/culvert/internal/version"
	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/queue"
)

const (
	// maxUnmet bounds the streams that have not introduced themselves. Only the
	// session's own redials should be among them; above it new ones are closed.
	maxUnmet = 16
	// maxResolvConf is more than any resolver reads.
	maxResolvConf = 16 << 10
	// maxAddrs bounds each list of addresses of a Hello.
	maxAddrs = 4
)

// owner is the session that this agent serves.
type owner struct {
	session string
	secret  string
	hello   carrier.Hello // as last introduced
	node    *node
}

// serveControl accepts streams until ctx ends.
func (a *Agent) serveControl(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	a.notes.listening.Store(true)
	defer a.notes.listening.Store(false)
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			// Out of descriptors is the one that happens; it passes.
			a.log.Warn("accepting a stream", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		select {
		case a.unmet <- struct{}{}:
			go a.meet(ctx, c)
		default:
			c.Close()
			a.metrics.refusedStreams.Inc()
		}
	}
}

// meet introduces one stream and hands it to the Bind, which owns it then.
func (a *Agent) meet(ctx context.Context, c net.Conn) {
	defer func() { <-a.unmet }()
	ctx, cancel := context.WithTimeout(ctx, a.times.hello)
	defer cancel()
	var n *node
	var refusal string
	s, h, err := carrier.Accept(ctx, nonblock.Wrap(c), func(h carrier.Hello) carrier.Welcome {
		var err error
		if n, err = a.admit(h); err != nil {
			refusal = err.Error()
			return carrier.Welcome{Protocol: carrier.Protocol, Version: version.Version, Error: refusal}
		}
		return a.welcome(n)
	})
	if err != nil || n == nil {
		c.Close()
		a.metrics.refusedStreams.Inc()
		a.log.Warn("stream refused", "session", h.Session, "reason", refusal, "error", err)
		return
	}
	n.bind.Attach(s)
	n.door.machine.again()
	a.metrics.streams.Inc()
	a.log.Info("stream attached", "session", h.Session, "version", h.Version)
}

// admit checks a Hello and makes, or finds, the node of its session.
func (a *Agent) admit(h carrier.Hello) (*node, error) {
	if h.Protocol != carrier.Protocol {
		return nil, fmt.Errorf("protocol %d is not mine (%d, version %s)", h.Protocol, carrier.Protocol, version.Version)
	}
	if h.Session == "" || len(h.Session) > 256 || len(h.Secret) < 32 || len(h.Secret) > 256 {
		return nil, fmt.Errorf("session id or secret is missing or too long")
	}
	peer, err := wire.ParseKey(h.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	if peer.IsZero() || peer == a.key.Public() {
		return nil, fmt.Errorf("public key: it is not the session's own")
	}
	if err := checkAddrs(h); err != nil {
		return nil, err
	}

	a.mu.Lock()
	defer a.mu.Unlock()
	o := a.owner
	if o == nil {
		n, err := a.newNode(h)
		if err != nil {
			return nil, err
		}
		if err := n.setPeer(peer); err != nil {
			n.close()
			return nil, err
		}
		a.owner = &owner{session: h.Session, secret: h.Secret, hello: h, node: n}
		a.log.Info("session met", "session", h.Session, "version", h.Version, "tunnel", h.Tunnel, "gso", n.gso)
		return n, nil
	}
	if h.Session != o.session {
		return nil, fmt.Errorf("this agent belongs to another session (%s)", o.session)
	}
	if subtle.ConstantTimeCompare([]byte(h.Secret), []byte(o.secret)) != 1 {
		return nil, fmt.Errorf("session %s is known here with another secret", o.session)
	}
	if !slices.Equal(h.Tunnel, o.hello.Tunnel) || !slices.Equal(h.Agent, o.hello.Agent) || !slices.Equal(h.Inbound, o.hello.Inbound) {
		return nil, fmt.Errorf("session %s came back with other tunnel addresses than %v", o.session, o.hello.Tunnel)
	}
	if o.node.gso && !slices.Contains(h.Features, carrier.FeatureGSO) {
		return nil, fmt.Errorf("session %s came back without the feature %q, which its open connections use", o.session, carrier.FeatureGSO)
	}
	if h.PublicKey != o.hello.PublicKey {
		if h.Lane != queue.Sparse { // it crossed the first stream of the process, or key, that took over
			return nil, fmt.Errorf("session %s has another key by now", o.session)
		}
		if err := o.node.setPeer(peer); err != nil {
			return nil, err
		}
		a.log.Info("session resumed with a new key", "session", h.Session, "version", h.Version)
	}
	if h.MTU != o.hello.MTU {
		o.node.endpoint.SetMTU(mtuOf(h))
	}
	o.hello = h
	return o.node, nil
}

// checkAddrs refuses a Hello whose addresses could not be the ends of a tunnel.
func checkAddrs(h carrier.Hello) error {
	seen := map[netip.Addr]string{}
	for _, list := range []struct {
		name  string
		addrs []netip.Addr
	}{{"tunnel", h.Tunnel}, {"agent", h.Agent}, {"inbound", h.Inbound}} {
		if len(list.addrs) == 0 || len(list.addrs) > maxAddrs {
			return fmt.Errorf("%d %s addresses, where 1 to %d are possible", len(list.addrs), list.name, maxAddrs)
		}
		for _, addr := range list.addrs {
			if !addr.IsValid() || addr.Is4In6() || addr.Zone() != "" || forbidden(addr) {
				return fmt.Errorf("%s address %s is not one for a tunnel", list.name, addr)
			}
			if other, ok := seen[addr]; ok {
				return fmt.Errorf("address %s is both %s and %s", addr, other, list.name)
			}
			seen[addr] = list.name
		}
	}
	if h.MTU != 0 && (h.MTU < 1280 || h.MTU > 65000) {
		return fmt.Errorf("MTU %d is not between 1280 and 65000", h.MTU)
	}
	return nil
}

func (a *Agent) welcome(n *node) carrier.Welcome {
	w := carrier.Welcome{
		Protocol:   carrier.Protocol,
		Version:    version.Version,
		PublicKey:  a.key.Public().String(),
		Instance:   a.instance,
		ResolvConf: a.resolvConf(),
		PodIPs:     a.cfg.PodIPs,
	}
	if n.proxy != nil {
		w.ProxySecret, w.ProxyPort = n.proxy.current(), a.cfg.ProxyPort
	}
	if n.datagrams != nil {
		w.UDPSecret, w.UDPPort = n.datagrams.current(), a.cfg.UDPPort
	}
	if n.gso {
		w.Features = append(w.Features, carrier.FeatureGSO)
	}
	return w
}

// resolvConf is the text of the pod's resolver settings, read each time: the
// kubelet may have replaced it.
func (a *Agent) resolvConf() string {
	b, err := os.ReadFile(a.cfg.ResolvConf)
	if err != nil {
		a.log.Warn("reading the pod's resolver settings", "error", err)
		return ""
	}
	return string(b[:min(len(b), maxResolvConf)])
}
