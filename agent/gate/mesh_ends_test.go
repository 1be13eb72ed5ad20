package gate

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// TestMeshEarlyResponse: a final response passes while the body still comes, and the
// connection goes on when both have ended.
func TestMeshEarlyResponse(t *testing.T) {
	t.Parallel()
	early := func(c *net.TCPConn) {
		br := bufio.NewReader(c)
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly")
			io.Copy(io.Discard, r.Body)
		}
	}
	a := startAgent(t, func(_ intercept.Header, c *net.TCPConn) { early(c) })
	_, route := meshOf(t, serve(t, early), intercept.HTTPSniff, a, nil)
	for _, mark := range []string{"", "a"} {
		c := dial(t, route.Listen)
		br := bufio.NewReader(c)
		for range 2 {
			fmt.Fprintf(c, "POST / HTTP/1.1\r\nHost: x\r\nVersion: %s\r\nContent-Length: 100000\r\n\r\n", mark)
			if resp, got := readResponse(t, br, "POST"); got != "early" || resp.Close {
				t.Fatalf("%q, closes %t", got, resp.Close)
			}
			io.WriteString(c, strings.Repeat("x", 100000))
		}
	}
}

// TestMeshBadBody: a body that turns out to be none is refused, and its request ends.
func TestMeshBadBody(t *testing.T) {
	t.Parallel()
	failed := make(chan error, 1)
	origin := httpOrigin(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		failed <- err
	}))
	_, route := meshOf(t, origin, intercept.HTTPSniff, httpAgent(t, named("machine")), nil)
	c, br := sendRaw(t, route.Listen, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhe")
	time.Sleep(20 * time.Millisecond)
	io.WriteString(c, "lloWORLD\r\n0\r\n\r\n")
	if resp, _ := readResponse(t, br, "POST"); resp.StatusCode != http.StatusBadRequest || !resp.Close {
		t.Errorf("status %d", resp.StatusCode)
	}
	if err := <-failed; err == nil {
		t.Error("the origin took it")
	}
}

// TestMeshServerGone: a server that ends while a body still comes is an error that the
// client can read.
func TestMeshServerGone(t *testing.T) {
	t.Parallel()
	origin := serve(t, func(c *net.TCPConn) {
		c.Read(make([]byte, 1000))
		c.Close()
	})
	_, route := meshOf(t, origin, intercept.HTTPSniff, httpAgent(t, named("machine")), nil)
	_, br := sendRaw(t, route.Listen, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhello")
	if resp, _ := readResponse(t, br, "POST"); resp.StatusCode != http.StatusBadGateway || !resp.Close {
		t.Errorf("status %d", resp.StatusCode)
	}
}

// TestMeshMachineCloses: the machine's connection is not the client's, and the origin's
// is.
func TestMeshMachineCloses(t *testing.T) {
	t.Parallel()
	closing := func(name string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Connection", "close")
			io.WriteString(w, name)
		})
	}
	_, route := meshOf(t, httpOrigin(t, closing("origin")), intercept.HTTPSniff, httpAgent(t, closing("machine")), nil)
	request := "GET / HTTP/1.1\r\nHost: x\r\nVersion: %s\r\n\r\n"
	c := dial(t, route.Listen)
	br := bufio.NewReader(c)
	for _, mark := range []string{"a", "a", ""} {
		fmt.Fprintf(c, request, mark)
		if resp, got := readResponse(t, br, "GET"); resp.Close != (mark == "") || (got == "machine") != (mark == "a") {
			t.Errorf("%q: %q, closes %t", mark, got, resp.Close)
		}
	}
	if _, err := br.ReadByte(); err != io.EOF {
		t.Errorf("its end: %v", err)
	}
}

// TestMeshOldClient: of HTTP/1.0, with and without keep-alive.
func TestMeshOldClient(t *testing.T) {
	t.Parallel()
	_, route := meshOf(t, httpOrigin(t, named("origin")), intercept.HTTPSniff, httpAgent(t, named("machine")), nil)
	c, br := sendRaw(t, route.Listen, "GET / HTTP/1.0\r\nConnection: keep-alive\r\nVersion: a\r\n\r\n")
	if _, got := readResponse(t, br, "GET"); got != "machine GET " {
		t.Errorf("answer %q", got)
	}
	io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	if _, got := readResponse(t, br, "GET"); got != "origin GET " {
		t.Errorf("answer %q", got)
	}
	if _, err := br.ReadByte(); err != io.EOF {
		t.Errorf("its end: %v", err)
	}
}

// TestMeshNoBodies: responses that have none though a length is said.
func TestMeshNoBodies(t *testing.T) {
	t.Parallel()
	answers := map[string]string{
		"HEAD /length": "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
		"HEAD /chunks": "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
		"GET /204":     "HTTP/1.1 204 No Content\r\n\r\n",
		"GET /304":     "HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n",
		"GET /hints":   "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
		"GET /lf":      "HTTP/1.1 200\nContent-Length: 2\n\nok",
	}
	handle := func(c *net.TCPConn) {
		br := bufio.NewReader(c)
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			io.WriteString(c, answers[r.Method+" "+r.URL.Path])
		}
	}
	a := startAgent(t, func(_ intercept.Header, c *net.TCPConn) { handle(c) })
	_, route := meshOf(t, serve(t, handle), intercept.HTTPSniff, a, nil)
	c := dial(t, route.Listen)
	for request, answer := range answers {
		for _, mark := range []string{"", "a"} {
			if got := ask(t, c, request+" HTTP/1.1\r\nHost: x\r\nVersion: "+mark+"\r\n\r"); got != answer {
				// The second part may come later.
				rest := make([]byte, max(0, len(answer)-len(got)))
				io.ReadFull(c, rest)
				if got+string(rest) != answer {
					t.Errorf("%s %q: %q", request, mark, got)
				}
			}
		}
	}
}

// TestMeshHalfClosed: a client that has said all gets its answer, and the server is
// told that nothing more comes.
func TestMeshHalfClosed(t *testing.T) {
	t.Parallel()
	origin := serve(t, func(c *net.TCPConn) {
		defer c.Close()
		b, _ := io.ReadAll(c) // to the client's end
		fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n%d", min(len(b), 99))
	})
	_, route := meshOf(t, origin, intercept.HTTPSniff, httpAgent(t, named("machine")), nil)
	c, br := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	c.CloseWrite()
	if _, got := readResponse(t, br, "GET"); len(got) != 2 {
		t.Errorf("answer %q", got)
	}
}

// TestMeshIdle: connections whose request is over are idle, and count as such.
func TestMeshIdle(t *testing.T) {
	a := httpAgent(t, named("machine"))
	g, route := meshOf(t, httpOrigin(t, named("origin")), intercept.HTTPKnown, a, nil)
	for range 200 {
		_, br := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		readResponse(t, br, "GET")
	}
	idle := func(m *meshConn) bool {
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.idle && len(m.backends) == 1 && !m.backends[0].busy
	}
	eventually(t, "all are idle", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		n := 0
		for c := range g.conns {
			if c.mesh != nil && idle(c.mesh) {
				n++
			}
		}
		return n == 200
	})
	if n := largeHeads.Load(); n < 0 {
		t.Errorf("%d large heads", n)
	}
}
