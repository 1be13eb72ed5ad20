package main

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/gorilla/websocket"
)

// seen is what a server knows of a request.
type seen struct {
	Server   string `json:"server"`
	Remote   string `json:"remote"`
	Protocol string `json:"protocol"`
	Method   string `json:"method"`
	URI      string `json:"uri"` // as it was sent
	Host     string `json:"host"`
	// Headers are those that net/http shows, by their canonical names.
	Headers http.Header `json:"headers"`
	// Raw is the head byte for byte, of HTTP/1.1.
	Raw      string      `json:"raw,omitempty"`
	Encoding []string    `json:"transfer_encoding,omitempty"`
	Declared int64       `json:"content_length"` // -1: not known before
	Length   int64       `json:"length"`         // of the body
	SHA256   string      `json:"sha256"`
	Trailers http.Header `json:"trailers,omitempty"`
}

// protocols adds what HTTP can do beyond a question and an answer.
func (a *app) protocols(mux *http.ServeMux) {
	mux.HandleFunc("/head", a.head)
	mux.HandleFunc("GET /chunked", a.chunked)
	mux.HandleFunc("GET /sse", a.events)
	mux.HandleFunc("GET /ws", a.websocket)
	mux.HandleFunc("/duplex", duplex)
	mux.HandleFunc("/early", early)
	mux.HandleFunc("/hints", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Link", "</style.css>; rel=preload; as=style")
		w.WriteHeader(http.StatusEarlyHints)
		fmt.Fprintln(w, a.name)
	})
	mux.HandleFunc("/status/{code}", func(w http.ResponseWriter, r *http.Request) {
		code, err := strconv.Atoi(r.PathValue("code"))
		if err != nil || code < 200 || code > 999 {
			code = http.StatusBadRequest
		}
		w.WriteHeader(code)
	})
}

// head answers with all that it knows of the request, once its body has come.
func (a *app) head(w http.ResponseWriter, r *http.Request) {
	h := sha256.New()
	n, err := io.Copy(h, r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	answer(w, seen{
		Server: a.name, Remote: r.RemoteAddr, Protocol: r.Proto, Method: r.Method, URI: r.RequestURI, Host: r.Host, Headers: r.Header, Raw: rawHead(r),
		Encoding: r.TransferEncoding, Declared: r.ContentLength, Length: n, SHA256: hex.EncodeToString(h.Sum(nil)), Trailers: r.Trailer,
	})
}

// series is n, every and size of a query: how many of something at which interval.
func series(q url.Values) (n int, every time.Duration, size int) {
	n, size = 5, 16
	if v, err := strconv.Atoi(q.Get("n")); err == nil && v >= 0 {
		n = v
	}
	if v, err := strconv.Atoi(q.Get("size")); err == nil && v > 0 {
		size = min(v, 1<<20)
	}
	if v, err := time.ParseDuration(q.Get("every")); err == nil {
		every = v
	}
	return n, every, size
}

// pause waits as long as the client is there.
func pause(r *http.Request, d time.Duration) bool {
	select {
	case <-r.Context().Done():
		return false
	case <-time.After(d):
		return true
	}
}

// chunked answers piece by piece and tells in trailers what it was.
func (a *app) chunked(w http.ResponseWriter, r *http.Request) {
	n, every, size := series(r.URL.Query())
	w.Header().Set("Trailer", "X-Pieces, X-Sha256")
	w.Header().Set("Content-Type", "application/octet-stream")
	h := sha256.New()
	out := io.MultiWriter(w, h)
	from := &pattern{}
	for i := range n {
		if i > 0 && !pause(r, every) {
			return
		}
		if _, err := io.CopyN(out, from, int64(size)); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush() // every server of ours can
	}
	w.Header().Set("X-Pieces", strconv.Itoa(n))
	w.Header().Set("X-Sha256", hex.EncodeToString(h.Sum(nil)))
}

// events sends server-sent events, each with its number and the server's name.
func (a *app) events(w http.ResponseWriter, r *http.Request) {
	n, every, _ := series(r.URL.Query())
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	for i := range n {
		if i > 0 && !pause(r, every) {
			return
		}
		if _, err := fmt.Fprintf(w, "id: %d\ndata: %s %d\n\n", i, a.name, i); err != nil {
			return
		}
		_ = http.NewResponseController(w).Flush()
	}
}

// websocket echoes messages. Any page may connect: there is nothing to protect.
func (a *app) websocket(w http.ResponseWriter, r *http.Request) {
	up := websocket.Upgrader{
		ReadBufferSize: 1 << 10, WriteBufferSize: 1 << 10, CheckOrigin: func(*http.Request) bool { return true },
		Subprotocols: []string{"testapp"}, EnableCompression: true,
	}
	c, err := up.Upgrade(w, r, http.Header{servedBy: {a.name}})
	if err != nil {
		return // it has answered
	}
	defer c.Close()
	for {
		kind, b, err := c.ReadMessage()
		if err == nil {
			err = c.WriteMessage(kind, b)
		}
		if err != nil {
			return
		}
	}
}

// duplex sends the body back while it comes.
func duplex(w http.ResponseWriter, r *http.Request) {
	c := http.NewResponseController(w)
	_ = c.EnableFullDuplex() // an error: HTTP/2, which always is
	w.Header().Set("Content-Type", "application/octet-stream")
	w.WriteHeader(http.StatusOK)
	_ = c.Flush()
	b := make([]byte, 32<<10)
	for {
		n, err := r.Body.Read(b)
		if n > 0 {
			if _, err := w.Write(b[:n]); err != nil {
				return
			}
			_ = c.Flush()
		}
		if err != nil {
			return
		}
	}
}

// early answers before it has read any of the body, and does not read it.
func early(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Connection", "close")
	http.Error(w, "nothing was read", http.StatusRequestEntityTooLarge)
}
