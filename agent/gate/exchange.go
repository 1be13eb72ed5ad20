package gate

import (
	"errors"
	"net/http"
	"time"
)

// errAgain: the connection had ended before anything of the response came, and the
// request can be sent by another.
var errAgain = errors.New("to be sent again")

// errBodyEnd ends a pump whose body has passed.
var errBodyEnd = errors.New("the body ended")

// errTruncated: a message ended too early.
var errTruncated = errors.New("a message ended in its midst")

// exchange sends r to r.up and passes the response on.
func (h *http1) exchange(r *request) (keep bool, err error) {
	u := r.up
	// Where the write fails there may be a response all the same, and the read tells.
	_ = u.write1(h, r)
	if !r.body.done || !u.reused || !r.idempotent {
		h.in.use(r.n + r.first)
		r.in = false
	}
	if !r.body.done {
		r.sending = make(chan struct{})
		go h.sendRest(r)
	}
	keep, err = h.receive(r)
	if err == errHandedOver {
		return false, err
	}
	if err == errAgain {
		h.forget(u)
		return false, err
	}
	if r.in {
		h.in.use(r.n + r.first)
		r.in = false
	}
	if r.sending != nil {
		if err == nil && keep {
			<-r.sending
		}
		stopped := h.stopSending(r)
		switch {
		case err == nil && stopped:
			h.in.discard()
		case err == nil && keep && r.sent != nil:
			h.forget(u)
			return false, r.sent
		}
	}
	if u.spent {
		h.forget(u)
	}
	return keep, err
}

// write1 sends r's head, with its changes, and what there is of its body.
func (u *upstream) write1(h *http1, r *request) error {
	out := outBuffers.Get().(*[]byte)
	defer putOut(out)
	*out = h.appendRequest(*out, r)
	*out = append(*out, h.in.buffered()[r.n:r.n+r.first]...)
	h.route.count.up.Add(int64(r.n + r.first))
	return u.write(*out)
}

// appendRequest appends r's head as the next one gets it.
func (h *http1) appendRequest(out []byte, r *request) []byte {
	if r.h2c {
		r.dropFields("upgrade", "http2-settings", "connection")
	}
	at := 0
	for i := range r.fields {
		f := &r.fields[i]
		switch {
		case f.drop:
			out = append(out, r.b[at:f.start]...)
			at = f.end
		case i == r.forwardedFor, i == r.forwarded:
			out = append(out, r.b[at:f.value.to]...)
			at = f.value.to
			if f.value.from < f.value.to {
				out = append(out, ", "...)
			}
			if i == r.forwarded {
				out = append(out, h.forwarded.element...)
			} else {
				out = append(out, h.forwarded.address...)
			}
		}
	}
	out = append(out, r.b[at:len(r.b)-len("\r\n")]...)
	if r.forwardedFor < 0 {
		out = append(out, "X-Forwarded-For: "...)
		out = append(out, h.forwarded.address...)
		out = append(out, "\r\n"...)
	}
	if r.forwardedProto < 0 {
		out = append(out, "X-Forwarded-Proto: "...)
		out = append(out, h.forwarded.proto...)
		out = append(out, "\r\n"...)
	}
	if r.h2c && r.close {
		out = append(out, "Connection: close\r\n"...)
	}
	return append(out, "\r\n"...)
}

// sendRest passes the rest of r's body on, in a goroutine of its own: its response
// may come before that has ended.
func (h *http1) sendRest(r *request) {
	defer close(r.sending)
	u := r.up
	if u.up == nil {
		if u.up, r.sent = newPump(h.client, u.conn); r.sent != nil {
			reset(u.conn)
			return
		}
	}
	r.sent = h.pass(u.up, &r.body, &r.stop, func(n int) { h.route.count.up.Add(int64(n)) })
	if r.sent != nil {
		reset(u.conn) // whoever waits for the response is told
	}
}

// pass moves a body by p to its end.
func (h *http1) pass(p *pump, b *body, stop interface{ Load() bool }, count func(n int)) error {
	var wrong error
	p.before = func() error {
		if b.done || stop != nil && stop.Load() {
			return errBodyEnd
		}
		return nil
	}
	p.limit = func(x []byte) int {
		n, err := b.skip(x)
		if err != nil {
			wrong = err
			return 0
		}
		return n
	}
	p.moved = func(x []byte) {
		_, _ = b.take(x) // which limit has seen
		count(len(x))
		h.conn.active.Store(time.Now().UnixNano())
	}
	err := p.run()
	switch {
	case wrong != nil:
		return wrong
	case b.done:
		return nil
	case err == nil && b.kind == bodyUntilClose:
		b.done = true
		return nil
	case err == nil:
		return errTruncated
	}
	return err // errBodyEnd: it was stopped
}

// stopSending ends sendRest, and with it the connection; false: it had ended already.
func (h *http1) stopSending(r *request) bool {
	select {
	case <-r.sending:
		return false
	default:
	}
	r.stop.Store(true)
	_ = h.client.SetReadDeadline(time.Unix(1, 0)) // fails when it is closed, and so does the read
	reset(r.up.conn)
	<-r.sending
	_ = h.client.SetReadDeadline(time.Time{})
	return true
}

// receive passes the response to r on. With errAgain nothing of it came.
func (h *http1) receive(r *request) (keep bool, err error) {
	u := r.up
	resp := heads.Get().(*head)
	defer heads.Put(resp)
	for {
		n, err := u.readHead(false)
		if err == nil {
			err = resp.parseResponse(u.buffered()[:n])
		}
		if err != nil {
			return h.noResponse(r, err)
		}
		if r.in {
			h.in.use(r.n + r.first)
			r.in = false
		}
		if resp.status == http.StatusSwitchingProtocols {
			return h.switched(r, resp)
		}
		if resp.status >= 200 {
			break
		}
		r.begun = true
		r.expect = false // the body comes
		if err := h.in.write(resp.b); err != nil {
			return false, err
		}
		u.use(n)
	}
	return h.pass2(r, resp)
}

// noResponse tells the client, or has r sent again.
func (h *http1) noResponse(r *request, err error) (keep bool, _ error) {
	u := r.up
	silent := len(u.buffered()) == 0
	if r.in && r.body.done && u.reused && silent && !r.begun && h.setIdle(false) {
		return false, errAgain
	}
	if r.begun {
		return false, err
	}
	status := http.StatusBadGateway
	why := "The connection to " + h.served(r) + " ended without a response."
	bad := (*badMessage)(nil)
	if errors.As(err, &bad) {
		why = "The response of " + h.served(r) + " is not HTTP: " + bad.why + "."
	}
	if r.sending != nil {
		h.stopSending(r)
		r.sending = nil
		switch {
		case errors.As(r.sent, &bad):
			status, why = bad.status, bad.why
		case errors.Is(r.sent, errTruncated):
			return false, errTruncated // and nobody is there any more
		}
		r.line.Status, r.line.Error = status, why
		return false, h.refuse(status, why, false)
	}
	r.line.Status, r.line.Error = status, why
	if !r.atOrigin {
		r.m.count.failed.Add(1)
	}
	h.forget(u)
	return h.answer(r, &badMessage{status, why})
}

func (h *http1) served(r *request) string {
	if r.atOrigin {
		return "what serves this port"
	}
	return "the machine of " + r.m.name() + ", whose request this is,"
}

// switched hands both sides to the relay of bytes, which has no buffers.
func (h *http1) switched(r *request, resp *head) (keep bool, err error) {
	u := r.up
	if !r.upgrade || r.h2c {
		return h.noResponse(r, bad("it switches protocols unasked"))
	}
	if r.sending != nil {
		if <-r.sending; r.sent != nil {
			return false, r.sent
		}
	}
	// Before anything is written, since the client may answer at once.
	if b := h.in.buffered(); len(b) > 0 {
		if err := u.write(b); err != nil {
			return false, err
		}
		h.in.release()
	}
	out := outBuffers.Get().(*[]byte)
	*out = h.appendResponse(*out, r, resp, false)
	*out = append(*out, u.buffered()[len(resp.b):]...)
	err = h.in.write(*out)
	putOut(out)
	if err != nil {
		return false, err
	}
	r.line.Status = resp.status
	u.release()
	m := r.m
	if r.atOrigin {
		m = nil
	}
	if err = h.handOver(u.conn, m, protoOther); err == errHandedOver && r.wanted {
		h.logged(r, err)
	}
	return false, err
}

// pass2 passes a final response on.
func (h *http1) pass2(r *request, resp *head) (keep bool, err error) {
	u := r.up
	b := responseBody(resp, r.method == http.MethodHead)
	first, err := b.take(u.buffered()[len(resp.b):])
	if err != nil {
		return h.noResponse(r, err)
	}
	upKeeps := resp.persists() && b.kind != bodyUntilClose && !resp.ambiguous
	keep = r.keep && b.kind != bodyUntilClose && (resp.minor == 1 || resp.keepAlive) && !h.conn.draining.Load()
	switch {
	case r.atOrigin && !upKeeps:
		keep = false
	case r.sending != nil && (r.expect || !upKeeps): // else its end is waited for
		// Whether the rest of the body comes nobody knows, or it has nowhere to go.
		select {
		case <-r.sending:
			keep = keep && r.sent == nil
		default:
			keep = false
		}
	}
	r.line.Status = resp.status
	r.begun = true
	h.route.count.down.Add(int64(len(resp.b) + first))
	if err := h.writeResponse(r, resp, first, keep); err != nil {
		return false, err
	}
	u.use(len(resp.b) + first)
	if !b.done {
		if u.down == nil {
			if u.down, err = newPump(u.conn, h.client); err != nil {
				return false, err
			}
		}
		if err := h.pass(u.down, &b, nil, func(n int) { h.route.count.down.Add(int64(n)) }); err != nil {
			return false, err
		}
	}
	if !upKeeps || len(u.buffered()) > 0 || h.halfClosed() {
		u.spent = true
	} else {
		u.used = time.Now()
		h.setBusy(u.held, false)
	}
	return keep, nil
}

// halfClosed: the client's FIN was passed on, so that nothing more can be sent.
func (h *http1) halfClosed() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.gone
}

// writeResponse sends a head and what there is of the body, with one write, and
// without a copy where nothing changes.
func (h *http1) writeResponse(r *request, resp *head, first int, keep bool) error {
	whole := r.up.buffered()[:len(resp.b)+first]
	if (r.atOrigin || !r.m.TagResponses && !resp.close) && (keep || !resp.persists()) {
		return h.in.write(whole)
	}
	out := outBuffers.Get().(*[]byte)
	defer putOut(out)
	*out = h.appendResponse(*out, r, resp, !keep)
	*out = append(*out, whole[len(resp.b):]...)
	return h.in.write(*out)
}

// appendResponse appends a response's head as the client gets it.
func (h *http1) appendResponse(out []byte, r *request, resp *head, closing bool) []byte {
	upgrade := resp.status == http.StatusSwitchingProtocols
	if resp.connection && !upgrade && (closing || !r.atOrigin && resp.close) {
		resp.dropFields("connection", "keep-alive")
	}
	tag := !r.atOrigin && r.m.TagResponses
	if tag {
		resp.dropFields("x-culvert-served-by")
	}
	at := 0
	for i := range resp.fields {
		if f := &resp.fields[i]; f.drop {
			out = append(out, resp.b[at:f.start]...)
			at = f.end
		}
	}
	end := len(resp.b) - 1 // the empty line may be LF alone
	if end > 0 && resp.b[end-1] == '\r' {
		end--
	}
	out = append(out, resp.b[at:end]...)
	if tag {
		out = append(out, r.m.tag...)
	}
	if closing {
		out = append(out, "Connection: close\r\n"...)
	}
	return append(out, "\r\n"...)
}
