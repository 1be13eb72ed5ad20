package gate

import (
	"context"
	"math/rand/v2"
	"net"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// backendTime bounds the dial of one of an origin's pods, backendsTime that of all:
// the origin's own address comes after them, and a client waits.
const backendTime, backendsTime = time.Second, 2 * time.Second

// dialOrigin connects to what served a route before.
func dialOrigin(ctx context.Context, d net.Dialer, r intercept.Route) (*net.TCPConn, error) {
	pod := d
	pod.Timeout, pod.Deadline = min(d.Timeout, backendTime), time.Now().Add(min(d.Timeout, backendsTime))
	for _, k := range rand.Perm(len(r.Backends)) {
		if c, err := pod.DialContext(ctx, "tcp", r.Backends[k]); err == nil {
			return c.(*net.TCPConn), nil
		}
	}
	c, err := d.DialContext(ctx, "tcp", r.Origin)
	if err != nil {
		return nil, err
	}
	return c.(*net.TCPConn), nil
}

// originOf is where datagrams go: of them nobody tells whether they arrive.
func originOf(r intercept.Route) string {
	if len(r.Backends) > 0 {
		return r.Backends[rand.IntN(len(r.Backends))]
	}
	return r.Origin
}
