package gate

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// backendTime bounds the dial of one of an origin's pods.
const backendTime = time.Second

// young tells whether the nodes may not know the origin's address yet.
func young(r intercept.Route) bool {
	return len(r.Backends) > 0 && time.Now().Before(r.BackendsUntil)
}

// dialOrigin connects to what served a route before. The Service of the origin is
// new when an intercept starts, and a node that does not know it yet refuses its
// address: then the pods behind it are tried themselves.
func dialOrigin(ctx context.Context, d net.Dialer, r intercept.Route) (*net.TCPConn, error) {
	c, err := d.DialContext(ctx, "tcp", r.Origin)
	if err != nil && errors.Is(err, syscall.ECONNREFUSED) && young(r) {
		d.Timeout = min(d.Timeout, backendTime)
		for _, k := range rand.Perm(len(r.Backends)) {
			if b, e := d.DialContext(ctx, "tcp", r.Backends[k]); e == nil {
				c, err = b, nil
				break
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// originOf is where datagrams go: nobody tells whether an address refuses them.
func originOf(r intercept.Route) string {
	if young(r) {
		return r.Backends[rand.IntN(len(r.Backends))]
	}
	return r.Origin
}
