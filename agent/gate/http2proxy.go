package gate

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"

	"github.com/culvert-dev/culvert/wire/intercept"
)

const (
	// streamWindow and connWindow are what one stream and one connection may have
	// buffered each way, in bytes, where the other side does not take it.
	streamWindow = 128 << 10
	connWindow   = 256 << 10
	// maxClientStreams is how many a client may have open at once.
	maxClientStreams = 250
	// maxUpstreams is how many connections to one machine or the origin serve a
	// client's connection: more than one only where the server allows few streams.
	maxUpstreams = 8
	// maxHTTP2Head bounds a head, in bytes, as with HTTP/1.
	maxHTTP2Head = 64 << 10
)

// maxHTTP2 is how many connections of HTTP/2 clients are routed at one time: two
// thirds of the memory limit if all have their windows full both ways. Those above
// it pass as they are, to the origin.
func (c Config) maxHTTP2() int64 {
	return max(8, c.MemoryLimit*2/3/(2*connWindow))
}

// http2Proxy serves a client of HTTP/2: each stream by itself, by a connection to the
// origin or to a machine that is this client's alone, and speaks HTTP/2 by prior
// knowledge as he does. A request has X-Forwarded-For, X-Forwarded-Proto and Forwarded
// as in HTTP/1; its 100 (Continue) is the gate's. There is no time-out. What a reset
// stream's code was does not pass: it is CANCEL upwards and INTERNAL_ERROR downwards.
type http2Proxy struct {
	*meshConn
	transport *http2.Transport
	server    *http.Server
	origin    *net.TCPConn // given, and not used yet
	forwarded forwarding

	mu    sync.Mutex // of what follows, and held by who looks for an upstream
	ups   []*upstream2
	dials map[machineKey]*sync.Mutex // held while one is dialled
}

// upstream2 is a connection of HTTP/2 to the origin or a machine.
type upstream2 struct {
	held    *backend
	conn    *http2.ClientConn
	used    atomic.Bool // by a request before
	streams int         // under way; http2Proxy.mu guards it
}

// serveHTTP2 serves a client that speaks HTTP/2. Nothing was read from it. It owns
// origin, which may be nil.
func (c *meshConn) serveHTTP2(origin *net.TCPConn) error {
	g := c.gate
	if !g.enterHTTP2() {
		g.log.Warn("too many HTTP/2 connections: one is not routed, and goes to the origin", "port", c.route.at.port, "limit", g.cfg.maxHTTP2())
		if origin == nil {
			var err error
			if origin, err = c.dialOrigin(g.life); err != nil {
				return err
			}
		}
		return c.handOver(origin, nil, protoUnknown)
	}
	defer g.http2s.Add(-1)
	return c.streams(origin, &http2.ServeConnOpts{})
}

// enterHTTP2 counts a connection, or is false where there are as many as may be. Who
// is counted takes one from g.http2s at its end.
func (g *Gate) enterHTTP2() bool {
	if g.http2s.Add(1) > g.cfg.maxHTTP2() {
		g.http2s.Add(-1)
		return false
	}
	return true
}

// streams serves the client's streams to the end of the connection. Of o it sets who
// serves them.
func (c *meshConn) streams(origin *net.TCPConn, o *http2.ServeConnOpts) error {
	limits := &http.HTTP2Config{MaxReceiveBufferPerConnection: connWindow, MaxReceiveBufferPerStream: streamWindow, MaxConcurrentStreams: maxClientStreams}
	t, err := http2.ConfigureTransports(&http.Transport{DisableCompression: true, HTTP2: limits, MaxResponseHeaderBytes: maxHTTP2Head})
	if err != nil {
		return err
	}
	p := &http2Proxy{meshConn: c, transport: t, origin: origin, forwarded: forwardingOf(c.from, c.secure != nil), dials: map[machineKey]*sync.Mutex{}}
	p.server = &http.Server{Handler: p, HTTP2: limits, MaxHeaderBytes: maxHTTP2Head}
	s := &http2.Server{}
	if err := http2.ConfigureServer(p.server, s); err != nil {
		return err
	}
	ended := make(chan struct{})
	defer close(ended)
	go func() {
		select {
		case <-c.leaving(): // GOAWAY, and the end when the last stream has ended
			ctx, cancel := context.WithCancel(context.Background())
			cancel()
			_ = p.server.Shutdown(ctx) // which is not about connections that were given to it
		case <-ended:
		}
	}()
	if origin != nil {
		b := c.hold(nil, origin)
		c.setBusy(b, false)
		p.ups = append(p.ups, &upstream2{held: b})
	}
	o.Context, o.BaseConfig, o.Handler = c.gate.life, p.server, p
	s.ServeConn(c.client, o)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.ups {
		if u.conn != nil {
			_ = u.conn.Close() // and with it what reads it
		}
	}
	return nil
}

// fields2 is a request of HTTP/2 as conditions look at it.
type fields2 struct{ r *http.Request }

func (f fields2) method() string { return f.r.Method }

func (f fields2) path() string {
	path, _, _ := strings.Cut(f.r.RequestURI, "?")
	return path
}

func (f fields2) value(name string, i int) (value string, next int, ok bool) {
	if all := f.r.Header[textproto.CanonicalMIMEHeaderKey(name)]; i < len(all) {
		return all[i], i + 1, true
	}
	return "", i, false
}

// ServeHTTP serves one stream.
func (p *http2Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s := &stream2{p: p, w: w, r: r, begun: time.Now(), m: p.table().find(fields2{r})}
	s.body = &firstRead{ReadCloser: r.Body}
	s.wanted = p.wantsLog(s.m)
	s.line = intercept.Request{Time: s.begun, Method: r.Method, Path: fields2{r}.path(), Protocol: "HTTP/2"}
	if s.m != nil {
		s.line.Session, s.line.User = s.m.Holder.Session, s.m.Holder.User
	}
	complete := s.serve()
	if s.wanted {
		s.line.Duration, s.line.Origin = time.Since(s.begun), s.atOrigin
		p.log(s.line)
	}
	if !complete {
		panic(http.ErrAbortHandler) // resets the stream, and nothing else
	}
}

// stream2 is one request and its response.
type stream2 struct {
	p        *http2Proxy
	w        http.ResponseWriter
	r        *http.Request
	body     *firstRead
	m        *member // whose it is
	atOrigin bool    // who serves it
	begun    time.Time
	wanted   bool // for the log
	line     intercept.Request
}

// firstRead tells whether anything of a body was taken.
type firstRead struct {
	io.ReadCloser
	taken atomic.Bool
}

func (f *firstRead) Read(b []byte) (int, error) {
	f.taken.Store(true)
	return f.ReadCloser.Read(b)
}

// serve answers, or is false where the stream has to be reset.
func (s *stream2) serve() (complete bool) {
	for fresh := false; ; fresh = true {
		u, why := s.choose(fresh)
		if why != nil {
			s.line.Status, s.line.Error = why.status, why.why
			s.answer(why)
			return true
		}
		total := &s.p.route.count.requestsToOrigin
		if !s.atOrigin {
			total = &s.m.count.requests
			s.m.count.open.Add(1)
		}
		total.Add(1)
		reused := u.used.Load()
		resp, err := u.conn.RoundTrip(s.request())
		if err == nil {
			u.used.Store(true)
			complete = s.pass(resp)
		}
		if !s.atOrigin {
			s.m.count.open.Add(-1)
		}
		s.p.release(u)
		if err == nil {
			return complete
		}
		if s.r.Context().Err() != nil {
			s.line.Error = "the client went away"
			return false
		}
		if !fresh && !s.body.taken.Load() && (refusedBefore(err) || reused && isIdempotent(s.r.Method)) {
			total.Add(-1)
			continue
		}
		if !s.atOrigin {
			s.m.count.failed.Add(1)
		}
		bad := &badMessage{http.StatusBadGateway, "The connection to " + s.served() + " ended without a response: " + err.Error() + "."}
		s.line.Status, s.line.Error = bad.status, bad.why
		s.answer(bad)
		return true
	}
}

// refusedBefore: the server has not begun with the request (RFC 9113, 8.7).
func refusedBefore(err error) bool {
	var stream http2.StreamError
	var away http2.GoAwayError
	switch {
	case errors.As(err, &stream):
		return stream.Code == http2.ErrCodeRefusedStream
	case errors.As(err, &away):
		return away.ErrCode == http2.ErrCodeNo
	}
	return strings.Contains(err.Error(), "client connection lost") || strings.Contains(err.Error(), "client conn not usable") ||
		strings.Contains(err.Error(), "server sent GOAWAY and closed")
}

func (s *stream2) served() string {
	if s.atOrigin {
		return "what serves this port"
	}
	return "the machine of " + s.m.name() + ", whose request this is,"
}

// choose finds who serves the request, and counts it there.
func (s *stream2) choose(fresh bool) (*upstream2, *badMessage) {
	if m := s.m; m != nil {
		why := "does not answer"
		if m.usable() {
			u, err := s.p.acquire(m, fresh)
			if err == nil {
				s.atOrigin = false
				return u, nil
			}
			if errors.Is(err, errRefused) {
				m.count.failed.Add(1)
				return nil, &badMessage{http.StatusBadGateway, "Nothing listens at port " + strconv.Itoa(int(m.machine.Local)) + " of the machine of " + m.name() + ", whose request this is."}
			}
			why += ": " + err.Error()
		}
		if m.fails() {
			m.count.failed.Add(1)
			return nil, &badMessage{http.StatusServiceUnavailable, "The machine of " + m.name() + ", whose request this is, " + why + "."}
		}
		m.count.toOrigin.Add(1)
	}
	s.atOrigin = true
	u, err := s.p.acquire(nil, fresh)
	if err != nil {
		s.p.route.count.refused.Add(1)
		return nil, &badMessage{http.StatusServiceUnavailable, "What serves this port does not answer: " + err.Error() + "."}
	}
	return u, nil
}

// request is s as the next one gets it.
func (s *stream2) request() *http.Request {
	r := s.r
	ctx := httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
			if code == http.StatusContinue { // the server says it when the body is read
				return nil
			}
			to := s.w.Header()
			for name, values := range h {
				to[name] = values
			}
			s.w.WriteHeader(code)
			for name := range h {
				delete(to, name)
			}
			return nil
		},
	})
	target := r.RequestURI
	if strings.HasPrefix(target, "/") {
		target = "//" + r.Host + target // what follows passes as it was sent
	}
	out := (&http.Request{
		Method: r.Method, URL: &url.URL{Scheme: "http", Host: r.Host, Opaque: target}, Host: r.Host,
		Header: r.Header.Clone(), Body: s.body, ContentLength: r.ContentLength, Trailer: r.Trailer,
	}).WithContext(ctx)
	if r.ContentLength == 0 {
		out.Body = http.NoBody
	}
	h := out.Header
	h.Del("Expect")
	if _, ok := h["User-Agent"]; !ok {
		h["User-Agent"] = []string{""} // or the transport names itself
	}
	s.p.forwarded.add(h)
	return out
}

// buffers2 are for bodies of responses on their way.
var buffers2 = sync.Pool{New: func() any { return new([16 << 10]byte) }}

// pass passes a response on.
func (s *stream2) pass(resp *http.Response) (complete bool) {
	defer resp.Body.Close()
	s.line.Status = resp.StatusCode
	h := s.w.Header()
	for name, values := range resp.Header {
		h[name] = values
	}
	if _, ok := h["Date"]; !ok {
		h["Date"] = nil // or the server adds one
	}
	if !s.atOrigin && s.m.TagResponses {
		h.Set(intercept.ServedByHeader, printable(s.m.name()))
	}
	for name := range resp.Trailer { // announced, so that they are sent though the body is empty
		h.Add("Trailer", name)
	}
	s.w.WriteHeader(resp.StatusCode)
	flush := s.w.(http.Flusher) // which http2's are
	if resp.ContentLength != 0 && resp.Body != http.NoBody {
		if s.r.Method != http.MethodHead && resp.ContentLength < 0 {
			flush.Flush() // who streams may wait for it
		}
		buf := buffers2.Get().(*[16 << 10]byte)
		defer buffers2.Put(buf)
		for {
			n, err := resp.Body.Read(buf[:])
			if n > 0 {
				s.p.route.count.down.Add(int64(n))
				if _, err := s.w.Write(buf[:n]); err != nil {
					s.line.Error = err.Error()
					return false
				}
				flush.Flush()
			}
			if err == io.EOF {
				break
			}
			if err != nil {
				s.line.Error = "the response ended in its midst: " + err.Error()
				return false
			}
		}
	}
	for name, values := range resp.Trailer {
		h[http.TrailerPrefix+name] = values
	}
	return true
}

// answer is the gate's own response.
func (s *stream2) answer(bad *badMessage) {
	h := s.w.Header()
	if strings.HasPrefix(s.r.Header.Get("Content-Type"), "application/grpc") {
		// UNAVAILABLE, as a response that is trailers only.
		h.Set("Content-Type", s.r.Header.Get("Content-Type"))
		h.Set("Grpc-Status", "14")
		h.Set("Grpc-Message", grpcMessage(bad.why))
		s.w.WriteHeader(http.StatusOK)
		return
	}
	h.Set("Content-Type", "text/plain; charset=utf-8")
	s.w.WriteHeader(bad.status)
	_, _ = io.WriteString(s.w, bad.why+"\n") // who is gone needs none
}

// grpcMessage percent-encodes as gRPC wants it
// (https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md, Status-Message).
func grpcMessage(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if c := s[i]; c < ' ' || c > '~' || c == '%' {
			b.WriteString("%" + strings.ToUpper(strconv.FormatInt(int64(c)+0x100, 16)[1:]))
		} else {
			b.WriteByte(c)
		}
	}
	return b.String()
}

var errFullUpstreams = errors.New("all of its connections have as many streams as it allows")

// acquire is a connection to a member's machine, or with nil to the origin, that takes
// one request more; fresh: a new one. Who has it calls release.
func (p *http2Proxy) acquire(m *member, fresh bool) (*upstream2, error) {
	to := machineKey{}
	if m != nil {
		to = m.key()
	}
	p.mu.Lock()
	dialling := p.dials[to]
	if dialling == nil {
		dialling = &sync.Mutex{}
		p.dials[to] = dialling
	}
	p.mu.Unlock()
	if !fresh {
		if u := p.kept(to); u != nil {
			return u, nil
		}
	}
	dialling.Lock()
	defer dialling.Unlock()
	if !fresh { // somebody may have made one meanwhile
		if u := p.kept(to); u != nil {
			return u, nil
		}
	}
	if p.count(to) >= maxUpstreams {
		return nil, errFullUpstreams
	}
	var c *net.TCPConn
	var err error
	if m == nil {
		c, err = p.dialOrigin(p.gate.life)
	} else {
		c, err = p.dialMember(p.gate.life, m)
	}
	if err != nil {
		return nil, err
	}
	u := &upstream2{held: p.hold(m, c), streams: 1}
	if u.conn, err = p.transport.NewClientConn(c); err != nil {
		p.drop(u.held)
		return nil, err
	}
	p.mu.Lock()
	p.ups = append(p.ups, u)
	p.mu.Unlock()
	return u, nil
}

// kept is a connection that is there and takes one request more, nil for none. What
// takes none any more is dropped when its last stream has ended.
func (p *http2Proxy) kept(to machineKey) *upstream2 {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range slices.Clone(p.ups) {
		if u.held.to != to {
			continue
		}
		if u.conn == nil { // the origin's that sniff dialled
			var err error
			if u.conn, err = p.transport.NewClientConn(p.origin); err != nil {
				p.forgetLocked(u)
				continue
			}
			u.used.Store(true) // it has waited
		}
		switch {
		case u.conn.CanTakeNewRequest():
			u.streams++
			p.setBusy(u.held, true)
			return u
		case u.streams == 0:
			p.forgetLocked(u)
		}
	}
	return nil
}

func (p *http2Proxy) count(to machineKey) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, u := range p.ups {
		if u.held.to == to {
			n++
		}
	}
	return n
}

// release ends one request on u.
func (p *http2Proxy) release(u *upstream2) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if u.streams--; u.streams > 0 {
		return
	}
	gone := u.held.to.watch != nil && !p.table().has(u.held.to)
	if gone || !u.conn.CanTakeNewRequest() {
		p.forgetLocked(u)
		return
	}
	p.setBusy(u.held, false)
}

// forgetLocked closes u, which has no streams. p.mu is held.
func (p *http2Proxy) forgetLocked(u *upstream2) {
	if u.conn != nil {
		_ = u.conn.Close() // its socket closes anyhow
	}
	p.drop(u.held)
	p.ups = slices.DeleteFunc(p.ups, func(x *upstream2) bool { return x == u })
}
