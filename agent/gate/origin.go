package gate

import (
	"cmp"
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// backendTime bounds the dial of one of an origin's pods, backendsTime that of all:
// the origin's own address comes after them, and a client waits.
const backendTime, backendsTime = time.Second, 2 * time.Second

// dialOrigin connects to what served a route before. Where pods stand in for an origin
// that the nodes do not know yet, which refuses then, the error is what is wrong with
// the pods.
func dialOrigin(ctx context.Context, d net.Dialer, r intercept.Route) (*net.TCPConn, error) {
	pod := d
	pod.Timeout, pod.Deadline = min(d.Timeout, backendTime), time.Now().Add(min(d.Timeout, backendsTime))
	var wrong error
	for _, k := range rand.Perm(len(r.Backends)) {
		c, err := pod.DialContext(ctx, "tcp", r.Backends[k])
		if err == nil {
			return c.(*net.TCPConn), nil
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			wrong = err
		}
	}
	c, err := d.DialContext(ctx, "tcp", r.Origin)
	if err != nil {
		return nil, cmp.Or(wrong, err)
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
