package gate

import (
	"cmp"
	"errors"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// http1 serves a client of HTTP/1: one request after the other, each by the
// connection to the origin or to a machine. Bytes pass as they are, but for these:
//
//   - a request: X-Forwarded-For has the client's address appended, X-Forwarded-Proto
//     is http where there was none, and Forwarded gets an element where there was one.
//     Upgrade: h2c is left out where the gate does not take it (h2c.go).
//   - a response: Connection: close where this connection ends with it; a machine's
//     own is left out, since the client's connection is not the machine's; and
//     X-Culvert-Served-By where the member wants it.
//
// Connection and what it names is passed on: the origin's connection is this client's
// alone, so they speak of the same.
type http1 struct {
	*meshConn
	in  *stream
	ups []*upstream

	forwarded forwarding
}

// upstream is a connection to the origin or a machine that may be kept.
type upstream struct {
	*stream
	held     *backend
	used     time.Time // when its last response had ended
	reused   bool      // it was there before the request under way
	spent    bool      // nothing more may be sent by it
	up, down *pump     // of large bodies, made when needed
}

// maxMachines is how many connections to machines a client's connection keeps.
const maxMachines = 4

// maxMachineIdle is how long one is kept: a machine's server closes when it wants.
const maxMachineIdle = time.Second

// outBuffers are heads that are changed on their way.
var outBuffers = sync.Pool{New: func() any { b := make([]byte, 0, smallBuffer); return &b }}

func putOut(b *[]byte) {
	if cap(*b) <= 2*smallBuffer {
		*b = (*b)[:0]
		outBuffers.Put(b)
	}
}

// serveHTTP1 serves a client that speaks HTTP/1. Nothing was read from it. It owns
// origin, which may be nil.
func (c *meshConn) serveHTTP1(origin *net.TCPConn) error {
	in, err := newStream(c.client)
	if err != nil {
		return err
	}
	defer in.release()
	h := &http1{meshConn: c, in: in, forwarded: forwardingOf(c.from, c.secure != nil)}
	defer func() {
		for _, u := range h.ups {
			u.release()
		}
	}()
	if origin != nil {
		if _, err := h.add(nil, origin); err != nil {
			return err
		}
		c.setBusy(h.ups[0].held, false)
	}
	for {
		more, err := h.await()
		if err != nil || !more {
			return err
		}
		keep, err := h.serveOne()
		if err != nil {
			return err
		}
		if !keep {
			if len(in.buffered()) > 0 || hasBytes(c.client) {
				in.discard()
			}
			return nil
		}
	}
}

// await waits for the first byte of a request; false: there is none any more.
func (h *http1) await() (bool, error) {
	for {
		if len(h.in.buffered()) == 0 {
			if !h.setIdle(true) {
				return false, nil
			}
			err := h.in.fill()
			open := h.setIdle(false)
			if err == io.EOF || !open {
				return false, nil
			}
			if err != nil {
				return false, err
			}
		}
		// Empty lines before a request are ignored (RFC 9112, 2.2).
		b := h.in.buffered()
		n := 0
		for n < len(b) && (b[n] == '\r' && (n+1 == len(b) || b[n+1] == '\n') || b[n] == '\n' && n > 0 && b[n-1] == '\r') {
			n++
		}
		if n > 0 && n == len(b) && b[n-1] == '\r' {
			if err := h.in.fill(); err != nil {
				return false, err
			}
			continue
		}
		if n == 0 {
			return true, nil
		}
		h.in.use(n)
	}
}

// request is one that is under way.
type request struct {
	*head
	n          int    // of the head, in bytes, at the beginning of what h.in has
	first      int    // bytes of the body that came with the head
	body       body   // what comes after these
	method     string // for good
	idempotent bool
	keep       bool      // the client keeps its connection
	wanted     bool      // for the log
	start      time.Time // when its head was there

	m        *member // whose it is
	atOrigin bool    // who serves it
	up       *upstream
	line     intercept.Request // of the log
	begun    bool              // something of a response was sent
	in       bool              // it still lies in h.in

	sending chan struct{} // closed when the body's rest was sent, nil: there is none
	sent    error         // then
	stop    atomic.Bool   // sending, at once
}

// serveOne serves the request of which something is buffered.
func (h *http1) serveOne() (keep bool, err error) {
	r := &request{head: heads.Get().(*head)}
	defer heads.Put(r.head)
	n, err := h.in.readHead(true)
	if err == nil {
		err = r.parseRequest(h.in.buffered()[:n])
	}
	if err == nil {
		r.body = requestBody(r.head)
		r.first, err = r.body.take(h.in.buffered()[n:])
	}
	if err != nil {
		if bad := (*badMessage)(nil); errors.As(err, &bad) {
			return false, h.refuse(bad.status, bad.why, false)
		}
		return false, err
	}
	r.n, r.in = n, true
	r.method = methodOf(r.head.method())
	r.idempotent = isIdempotent(r.method)
	r.keep = r.persists()
	r.start = time.Now()
	r.m = h.table().find(r.head)
	if r.wanted = h.wantsLog(r.m); r.wanted {
		r.line = intercept.Request{Time: r.start, Method: r.method, Path: strings.Clone(r.path()), Protocol: "HTTP/1." + strconv.Itoa(r.minor)}
		r.line.Path = r.line.Path[:min(len(r.line.Path), maxLoggedPath)]
		if r.m != nil {
			r.line.Session, r.line.User = r.m.Holder.Session, r.m.Holder.User
		}
	}
	if settings, ok := h.offersHTTP2(r); ok {
		if taken, err := h.upgradeHTTP2(r, settings); taken {
			return false, err
		}
	}
	keep, err = h.route1(r)
	if r.wanted && err != errHandedOver {
		h.logged(r, err)
	}
	return keep, err
}

func (h *http1) logged(r *request, err error) {
	r.line.Duration = time.Since(r.start)
	r.line.Origin = r.atOrigin
	if err != nil && err != errHandedOver && r.line.Error == "" {
		r.line.Error = err.Error()
	}
	h.log(r.line)
}

func methodOf(s string) string {
	switch s {
	case http.MethodGet:
		return http.MethodGet
	case http.MethodPost:
		return http.MethodPost
	case http.MethodPut:
		return http.MethodPut
	}
	return strings.Clone(s)
}

// isIdempotent: a request may be sent again when nobody knows what became of it (RFC
// 9110, 9.2.2). Of others the client decides.
func isIdempotent(method string) bool {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodPut, http.MethodDelete:
		return true
	}
	return false
}

// route1 finds who serves r, and has it served.
func (h *http1) route1(r *request) (keep bool, err error) {
	for again := false; ; again = true {
		if err := h.choose(r, again); err != nil {
			bad := (*badMessage)(nil)
			if !errors.As(err, &bad) {
				return false, err
			}
			r.line.Status, r.line.Error = bad.status, bad.why
			return h.answer(r, bad)
		}
		total := &h.route.count.requestsToOrigin
		if !r.atOrigin {
			total = &r.m.count.requests
			r.m.count.open.Add(1)
		}
		total.Add(1)
		keep, err = h.exchange(r)
		if !r.atOrigin && err != errHandedOver {
			r.m.count.open.Add(-1)
		}
		if err != errAgain {
			return keep, err
		}
		total.Add(-1)
	}
}

// choose sets who serves r: a kept connection, or a new one. Errors are for the client.
func (h *http1) choose(r *request, fresh bool) error {
	if r.m != nil {
		why := "does not answer"
		if r.m.usable() {
			u, err := h.connect(r.m, fresh)
			if err == nil {
				r.up, r.atOrigin = u, false
				return nil
			}
			if errors.Is(err, errRefused) {
				r.m.count.failed.Add(1)
				return &badMessage{http.StatusBadGateway, "Nothing listens at port " + strconv.Itoa(int(r.m.machine.Local)) + " of the machine of " + r.m.name() + ", whose request this is."}
			}
			why += ": " + err.Error()
		}
		if r.m.fails() {
			r.m.count.failed.Add(1)
			return &badMessage{http.StatusServiceUnavailable, "The machine of " + r.m.name() + ", whose request this is, " + why + "."}
		}
		r.m.count.toOrigin.Add(1)
	}
	r.atOrigin = true
	u, err := h.connect(nil, fresh)
	if err != nil {
		h.route.count.refused.Add(1)
		return &badMessage{http.StatusServiceUnavailable, "What serves this port does not answer: " + err.Error() + "."}
	}
	r.up = u
	return nil
}

// connect is a connection to a member's machine, or with nil to the origin.
func (h *http1) connect(m *member, fresh bool) (*upstream, error) {
	to := machineKey{}
	if m != nil {
		to = m.key()
	}
	if i := slices.IndexFunc(h.ups, func(u *upstream) bool { return u.held.to == to }); i >= 0 {
		u := h.ups[i]
		if !fresh && u.waits() && (m == nil || time.Since(u.used) < maxMachineIdle) {
			h.setBusy(u.held, true)
			u.reused = true
			return u, nil
		}
		h.forget(u)
	}
	var c *net.TCPConn
	var err error
	if m == nil {
		c, err = h.dialOrigin(h.gate.life)
	} else {
		c, err = h.dialMember(h.gate.life, m)
	}
	if err != nil {
		return nil, err
	}
	return h.add(m, c)
}

func (h *http1) add(m *member, c *net.TCPConn) (*upstream, error) {
	s, err := newStream(c)
	if err != nil {
		c.Close()
		return nil, err
	}
	if m != nil {
		h.evict()
	}
	u := &upstream{stream: s, held: h.hold(m, c)}
	h.ups = append(h.ups, u)
	return u, nil
}

// evict makes room for one more machine.
func (h *http1) evict() {
	machines := 0
	var oldest *upstream
	for _, u := range h.ups {
		if u.held.to.watch == nil {
			continue
		}
		machines++
		if oldest == nil || u.used.Before(oldest.used) {
			oldest = u
		}
	}
	if machines >= maxMachines {
		h.forget(oldest)
	}
}

// forget closes u.
func (h *http1) forget(u *upstream) {
	u.release()
	h.drop(u.held)
	h.ups = slices.DeleteFunc(h.ups, func(x *upstream) bool { return x == u })
}

// answer is the gate's own response. The connection is kept if all of r is there.
func (h *http1) answer(r *request, bad *badMessage) (keep bool, err error) {
	keep = r.in && r.body.done && r.keep
	if r.in {
		h.in.use(r.n + r.first)
	}
	text := bad.why
	if r.method == http.MethodHead {
		text = ""
	}
	if keep {
		return true, h.respond(bad.status, text, true)
	}
	return false, h.refuse(bad.status, text, false)
}

// refuse answers and ends the connection.
func (h *http1) refuse(status int, text string, keep bool) error {
	h.in.release()
	if err := h.respond(status, text, keep); err != nil {
		return err
	}
	h.in.discard()
	return nil
}

func (h *http1) respond(status int, text string, keep bool) error {
	if text != "" {
		text += "\n"
	}
	out := outBuffers.Get().(*[]byte)
	defer putOut(out)
	b := append(*out, "HTTP/1.1 "...)
	b = strconv.AppendInt(b, int64(status), 10)
	b = append(b, ' ')
	b = append(b, cmp.Or(http.StatusText(status), "Error")...)
	b = append(b, "\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: "...)
	b = strconv.AppendInt(b, int64(len(text)), 10)
	if !keep {
		b = append(b, "\r\nConnection: close"...)
	}
	b = append(b, "\r\n\r\n"...)
	b = append(b, text...)
	*out = b
	return h.in.write(b)
}
