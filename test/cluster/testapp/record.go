package main

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"sync"
)

// recordListener is for a server that tells its clients what they sent, byte for
// byte: net/http keeps neither the order nor the case of headers.
type recordListener struct{ net.Listener }

func (l recordListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &recordConn{Conn: c}, nil
}

// recordConn remembers the last bytes that it received: more than a head may have.
type recordConn struct {
	net.Conn

	mu   sync.Mutex // handlers ask while the server reads
	seen []byte
}

// recorded is how many bytes are remembered at least.
const recorded = 16 << 10

func (c *recordConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.seen = append(c.seen, b[:n]...)
	if len(c.seen) > 2*recorded {
		c.seen = append(c.seen[:0], c.seen[len(c.seen)-recorded:]...)
	}
	return n, err
}

// recordKey is where a connection is in the contexts of its requests.
type recordKey struct{}

func withRecord(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, recordKey{}, c)
}

// rawHead is the head of a request as it came, without the empty line at its end;
// empty for HTTP/2, which has none. Of pipelined requests with the same first line
// it is the last.
func rawHead(r *http.Request) string {
	c, ok := r.Context().Value(recordKey{}).(*recordConn)
	if !ok || r.ProtoMajor != 1 {
		return ""
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	at := bytes.LastIndex(c.seen, []byte(r.Method+" "+r.RequestURI+" "+r.Proto+"\r\n"))
	if at < 0 {
		return ""
	}
	head, _, _ := bytes.Cut(c.seen[at:], []byte("\r\n\r\n"))
	return string(head)
}
