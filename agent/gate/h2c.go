package gate

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"io"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// An offer to go on in HTTP/2 (Upgrade: h2c, RFC 7540, 3.2; curl and Java's HttpClient
// make it) is taken where the server of the request speaks HTTP/2: then each request
// of the connection is a stream. Otherwise it is left out, and HTTP/1 goes on.

const (
	// probeTime is for a server to answer the preface of HTTP/2.
	probeTime = time.Second
	// speaksFor is how long its answer is believed.
	speaksFor = time.Minute
)

// speakers are the servers of one route that were asked. A new state forgets them.
type speakers struct {
	mu    sync.Mutex
	known map[machineKey]speaker
}

type speaker struct {
	http2 bool
	until time.Time
}

func (s *speakers) forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.known = nil
}

// ask tells whether a server speaks HTTP/2; dial connects to it, and speaks finds out.
func (s *speakers) ask(to machineKey, dial func() (*net.TCPConn, error), speaks func(*net.TCPConn) bool) bool {
	s.mu.Lock()
	known, ok := s.known[to]
	s.mu.Unlock()
	if ok && time.Now().Before(known.until) {
		return known.http2
	}
	c, err := dial()
	if err != nil {
		return false // it is asked again
	}
	defer c.Close()
	is := speaks(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.known == nil {
		s.known = map[machineKey]speaker{}
	}
	s.known[to] = speaker{is, time.Now().Add(speaksFor)}
	return is
}

// settingsFrame is an empty one (RFC 9113, 6.5).
var settingsFrame = []byte{0, 0, 0, frameSettings, 0, 0, 0, 0, 0}

const frameSettings = 4

// speaksHTTP2 sends the preface. Who understands it answers with SETTINGS.
func speaksHTTP2(c *net.TCPConn) bool {
	_ = c.SetDeadline(time.Now().Add(probeTime)) // fails when it is closed, and so does what follows
	if _, err := c.Write(append([]byte(http2Preface), settingsFrame...)); err != nil {
		return false
	}
	var head [frameHead]byte
	_, err := io.ReadFull(c, head[:])
	return err == nil && head[3] == frameSettings && bytes.Equal(head[5:], make([]byte, 4))
}

// offersHTTP2 tells whether r offers to go on in HTTP/2 in a way that can be taken: it
// has no body, nothing follows it, and says its settings once.
func (h *http1) offersHTTP2(r *request) (settings []byte, ok bool) {
	if !r.h2c || !r.upgrade || r.minor != 1 || !r.body.done || len(h.in.buffered()) != r.n {
		return nil, false
	}
	text, next, ok := r.value("http2-settings", 0)
	if !ok {
		return nil, false
	}
	if _, _, more := r.value("http2-settings", next); more {
		return nil, false
	}
	settings, err := base64.RawURLEncoding.DecodeString(text)
	return settings, err == nil && len(settings)%6 == 0
}

// upgradeHTTP2 takes the offer, if the request's server speaks HTTP/2, and serves the
// connection to its end. Nothing has happened when taken is false.
func (h *http1) upgradeHTTP2(r *request, settings []byte) (taken bool, err error) {
	if h.conn.draining.Load() {
		return false, nil
	}
	to, dial := machineKey{}, func() (*net.TCPConn, error) { return h.dialOrigin(h.gate.life) }
	if r.m != nil && r.m.usable() {
		to, dial = r.m.key(), func() (*net.TCPConn, error) { return h.dialMember(h.gate.life, r.m) }
	}
	if !h.route.speakers.ask(to, dial, speaksHTTP2) || !h.gate.enterHTTP2() {
		return false, nil
	}
	defer h.gate.http2s.Add(-1)
	req, err := http.ReadRequest(bufio.NewReader(bytes.NewReader(h.in.buffered()[:r.n])))
	if err != nil {
		return false, nil // net/http is stricter: HTTP/1 goes on
	}
	for _, name := range []string{"Connection", "Upgrade", "Http2-Settings", "Keep-Alive"} {
		req.Header.Del(name)
	}
	ctx, cancel := context.WithCancel(h.gate.life) // the connection's end is the request's
	defer cancel()
	h.in.use(r.n)
	r.in = false
	for len(h.ups) > 0 {
		h.forget(h.ups[0])
	}
	h.http2.Store(true)
	if err := h.in.write([]byte("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n")); err != nil {
		return true, err
	}
	return true, h.streams(nil, &http2.ServeConnOpts{UpgradeRequest: req.WithContext(ctx), Settings: settings})
}
