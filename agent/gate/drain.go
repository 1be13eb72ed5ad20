package gate

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httputil"
	"net/textproto"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// A drain asks what is open to end, so that nobody loses a request by it:
//
//   - HTTP/1: the next response says Connection: close, and the connection ends
//     with it. A request is the next if bytes of the server were the last before
//     it. One that is idle for 3 s is closed.
//   - HTTP/2: GOAWAY is put between two frames of the server; the client goes, or
//     the connection is closed when its last stream has ended.
//   - others: closed once nothing has flowed for a second.
//
// What is open when the drain is over is reset, and at once what leads to a session
// that is dead.

// drainLocked begins a drain of every connection that must end. g.mu is held.
func (g *Gate) drainLocked() {
	for c := range g.conns {
		if (c.backend != nil || c.mesh != nil) && c.mustDrain() {
			c.drain()
		}
		if c.mesh != nil {
			c.mesh.follow(c.route.spec.Load())
		}
	}
}

// mustDrain: the gate, the route, the entry or the agent ends, or machine or agent
// are no longer the route's. gate.mu is held.
func (c *conn) mustDrain() bool {
	sp := c.route.spec.Load()
	return c.gate.terminating || c.route.gone.Load() || sp.draining || c.mesh != nil && sp.table == nil ||
		c.watch != nil && (!sp.serves(machineKey{c.watch, c.machineID}) || c.watch.status() == intercept.Leaving)
}

// drainAgent drains what is open by way of an agent that is about to end.
func (g *Gate) drainAgent(w *watcher) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		if c.watch == w {
			c.drain()
		}
		if c.mesh != nil {
			c.mesh.follow(c.route.spec.Load())
		}
	}
}

// resetAgent ends what is open by way of an agent that is gone.
func (g *Gate) resetAgent(w *watcher) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		if c.watch == w {
			c.reset()
		}
		if c.mesh != nil {
			c.mesh.lost(w)
		}
	}
}

// drain begins the drain of c, once. What leads to a session that is dead would
// wait for it in vain. gate.mu is held.
func (c *conn) drain() {
	if c.watch != nil && c.route.spec.Load().over {
		c.reset()
		return
	}
	if c.until.Load() != 0 {
		return
	}
	c.until.Store(time.Now().Add(c.gate.cfg.Drain).UnixNano())
	c.draining.Store(true)
	if c.mesh != nil {
		c.mesh.leave()
		return
	}
	c.wakeDown()
}

// wakeDown has down say GOAWAY though nothing comes from the backend. Whoever
// made the last of its two conditions true calls it.
func (c *conn) wakeDown() {
	if c.draining.Load() && c.proto.Load() == protoHTTP2 {
		_ = c.backend.SetReadDeadline(time.Unix(1, 0)) // fails when it is closed, and then nobody waits
	}
}

// sweep ends drained connections that are idle, or too late.
func (g *Gate) sweep(ctx context.Context) {
	t := time.NewTicker(g.times.sweep)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		g.flows.sweep()
		now := time.Now()
		g.mu.Lock()
		for c := range g.conns {
			switch {
			case c.mesh != nil:
				c.mesh.sweep(now)
			case c.draining.Load():
				c.sweep(now)
			}
		}
		g.mu.Unlock()
	}
}

func (c *conn) sweep(now time.Time) {
	idle := now.UnixNano()-c.active.Load() >= int64(c.gate.times.lull)
	quiet := now.UnixNano()-c.active.Load() >= int64(c.gate.times.keepAlive)
	late := now.UnixNano() >= c.until.Load()
	proto := c.proto.Load()
	between := proto <= protoHTTP1 && c.last.Load() != upward
	switch {
	case idle && (proto == protoOther || c.answered.Load() || c.streams.left()), between && quiet, late && (between || idle && proto > protoHTTP1):
		c.finish()
	case late:
		c.reset()
	}
}

// Protocols of a connection, by the client's first bytes.
const (
	protoUnknown = iota // it said nothing, or too little
	protoHTTP1
	protoHTTP2
	protoOther
)

// maxHead is how many bytes tell the protocol.
const maxHead = 24

const http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// protocolOf tells what begins with b.
func protocolOf(b []byte) int32 {
	b = b[:min(len(b), maxHead)]
	if strings.HasPrefix(http2Preface, string(b)) {
		if len(b) < len("PRI * HTTP") {
			return protoUnknown
		}
		return protoHTTP2
	}
	method, rest, found := bytes.Cut(b, []byte(" "))
	for _, x := range method {
		if (x < 'A' || x > 'Z') && x != '-' {
			return protoOther
		}
	}
	switch {
	case !found && len(b) < maxHead, found && len(rest) == 0 && len(method) > 0:
		return protoUnknown
	case len(method) == 0, !found:
		return protoOther
	case rest[0] == '/', rest[0] == '*', rest[0] == 'h': // also http://, for proxies
		return protoHTTP1
	}
	return protoOther
}

// lookUp looks at what the client sends. Bytes that were not taken by the backend
// are looked at again.
func (c *conn) lookUp(b []byte) int {
	proto := c.proto.Load()
	if proto == protoUnknown {
		if proto = protocolOf(append(c.head[:len(c.head):len(c.head)], b...)); proto != protoUnknown {
			c.proto.Store(proto)
			c.wakeDown()
		}
	}
	// Before anything of the request is written, or its response could be missed.
	if proto == protoHTTP1 && c.draining.Load() && c.last.Load() != upward && c.final.Load() == nil {
		if protocolOf(b) == protoHTTP1 {
			method, _, _ := strings.Cut(string(b[:min(len(b), maxHead)]), " ")
			c.final.Store(&method)
		}
	}
	c.last.Store(upward)
	return len(b)
}

var switching = []byte("HTTP/1.1 101 ")

// lookDown looks at what the backend sends.
func (c *conn) lookDown(b []byte) int {
	switch c.proto.Load() {
	case protoHTTP1:
		if c.final.Load() != nil {
			return 0 // lastResponse
		}
		if c.last.Load() == upward && bytes.HasPrefix(b, switching) {
			c.proto.Store(protoOther)
		}
	case protoHTTP2:
		if c.draining.Load() && !c.goAway {
			b = b[:min(len(b), c.fromServer.rest())]
		}
	}
	// Before the client can answer: see lookUp.
	c.last.Store(downward)
	return len(b)
}

// lastResponse moves one HTTP/1 response, with Connection: close. Nothing of it
// was read before. With errTakeOver nothing was read that is not written.
func (c *conn) lastResponse() error {
	br := bufio.NewReaderSize(c.backend, 4<<10)
	for {
		head, err := readHead(br)
		if err != nil {
			if werr := c.writeDown(head); werr != nil {
				return werr
			}
			if err == io.EOF {
				return nil // as the server will
			}
			return c.giveBack(br, err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(head)), &http.Request{Method: *c.final.Load()})
		if err != nil {
			if werr := c.writeDown(head); werr != nil {
				return werr
			}
			return c.giveBack(br, errTakeOver)
		}
		switch {
		case resp.StatusCode == http.StatusSwitchingProtocols:
			if err := c.writeDown(head); err != nil {
				return err
			}
			return c.giveBack(br, errTakeOver)
		case resp.StatusCode < 200:
			if err := c.writeDown(head); err != nil {
				return err
			}
			continue
		}
		if err := c.writeDown(closing(head)); err != nil {
			return err
		}
		if err := c.lastBody(br, resp); err != nil {
			return err
		}
		c.answered.Store(true)
		return nil
	}
}

// giveBack writes what was read too much, for err's sake.
func (c *conn) giveBack(br *bufio.Reader, err error) error {
	b, _ := br.Peek(br.Buffered()) // cannot fail
	if werr := c.writeDown(b); werr != nil {
		return werr
	}
	_, _ = br.Discard(len(b))
	return err
}

func (c *conn) writeDown(b []byte) error {
	_, err := c.client.Write(b)
	c.movedDown(len(b))
	return err
}

// maxResponseHead bounds the head of an HTTP response, in bytes. A longer one is
// moved as it is.
const maxResponseHead = 64 << 10

const responseStart = "HTTP/1."

// readHead reads up to and with the empty line. With an error, head is what was
// read so far: errTakeOver if it is no response's.
func readHead(br *bufio.Reader) (head []byte, err error) {
	for n := 1; n <= len(responseStart); n++ {
		// Byte by byte: what is no response may end at any, and there wait for the
		// client.
		b, err := br.Peek(n)
		if !strings.HasPrefix(responseStart, string(b)) {
			return nil, errTakeOver
		}
		if err != nil {
			_, _ = br.Discard(len(b))
			return []byte(responseStart[:len(b)]), err
		}
	}
	for {
		line, err := br.ReadSlice('\n')
		head = append(head, line...)
		switch {
		case len(head) > maxResponseHead:
			return head, errTakeOver
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err != nil:
			return head, err
		case bytes.HasSuffix(head, []byte("\n\r\n")), bytes.HasSuffix(head, []byte("\n\n")):
			return head, nil
		}
	}
}

// closing is a response's head that says Connection: close, and is otherwise as
// the server wrote it.
func closing(head []byte) []byte {
	out := make([]byte, 0, len(head)+len("Connection: close\r\n"))
	for line := range bytes.Lines(head) {
		name, _, _ := bytes.Cut(line, []byte(":"))
		switch strings.ToLower(string(bytes.TrimSpace(name))) {
		case "connection", "keep-alive":
			continue
		case "":
			out = append(out, "Connection: close\r\n"...)
		}
		out = append(out, line...)
	}
	return out
}

// lastBody moves the response's body.
func (c *conn) lastBody(br *bufio.Reader, resp *http.Response) error {
	switch {
	case resp.Request.Method == http.MethodHead, resp.StatusCode == http.StatusNoContent, resp.StatusCode == http.StatusNotModified:
		return nil
	case len(resp.TransferEncoding) > 0 && resp.TransferEncoding[0] == "chunked":
		// What the parser reads is written as it is; what is left then are trailers.
		parse := bufio.NewReader(io.TeeReader(br, writerFunc(c.writeDown)))
		if _, err := io.Copy(io.Discard, httputil.NewChunkedReader(parse)); err != nil {
			return err
		}
		_, err := textproto.NewReader(parse).ReadMIMEHeader()
		if err == io.EOF {
			return nil
		}
		return err
	case resp.ContentLength >= 0:
		return c.moveDown(br, resp.ContentLength)
	}
	err := c.moveDown(br, 1<<62)
	if err == io.EOF {
		return nil
	}
	return err
}

// moveDown moves n bytes, by br's buffer.
func (c *conn) moveDown(br *bufio.Reader, n int64) error {
	for n > 0 {
		if _, err := br.Peek(1); err != nil {
			return err
		}
		b, _ := br.Peek(int(min(n, int64(br.Buffered())))) // cannot fail
		if err := c.writeDown(b); err != nil {
			return err
		}
		_, _ = br.Discard(len(b))
		n -= int64(len(b))
	}
	return nil
}

// writerFunc is a writer of all or nothing.
type writerFunc func(b []byte) error

func (w writerFunc) Write(b []byte) (int, error) {
	if err := w(b); err != nil {
		return 0, err
	}
	return len(b), nil
}
