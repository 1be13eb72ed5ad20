package gate

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// scripted answers each connection's first head with a text, and keeps what it read.
func scripted(t *testing.T, heads chan<- string, answer string) string {
	return serve(t, func(c *net.TCPConn) {
		defer c.Close()
		b := make([]byte, 64<<10)
		n, _ := c.Read(b)
		heads <- string(b[:n])
		io.WriteString(c, answer)
		io.Copy(io.Discard, c)
	})
}

// TestMeshBytes: what a head keeps, and what it gets.
func TestMeshBytes(t *testing.T) {
	t.Parallel()
	const ok = "HTTP/1.1 204 Fine  thing\r\nx-Case: A\r\nContent-Length: 9\r\n\r\n" // 204 has no body whatever it says
	for _, c := range []struct{ request, want string }{
		{"GET /a%2f//b?x=%zz HTTP/1.1\r\nhOsT:  x:80 \r\nX-B: 1\r\nx-b: 2\r\n", "X-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: http\r\n"},
		{"GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 1.2.3.4\r\nx-forwarded-proto: https\r\nForwarded: for=1.2.3.4\r\nTE: trailers\r\nConnection: TE\r\n", ""},
		{"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: h2c\r\nHTTP2-Settings: AAA\r\nConnection: Upgrade, HTTP2-Settings\r\n", ""},
	} {
		seen := make(chan string, 1)
		_, route := meshOf(t, scripted(t, seen, ok), intercept.HTTPKnown, httpAgent(t, named("machine")), nil)
		conn, br := sendRaw(t, route.Listen, c.request+"\r\n")
		want := c.request + c.want + "\r\n"
		switch {
		case strings.Contains(c.request, "1.2.3.4"):
			want = strings.Replace(want, "For: 1.2.3.4", "For: 1.2.3.4, 127.0.0.1", 1)
			want = strings.Replace(want, "for=1.2.3.4", "for=1.2.3.4, for=127.0.0.1;proto=http", 1)
		case strings.Contains(c.request, "h2c"):
			want = "GET / HTTP/1.1\r\nHost: x\r\nX-Forwarded-For: 127.0.0.1\r\nX-Forwarded-Proto: http\r\n\r\n"
		}
		if got := <-seen; got != want {
			t.Errorf("sent  %q\ngot   %q\nwant  %q", c.request, got, want)
		}
		b := make([]byte, len(ok))
		if _, err := io.ReadFull(br, b); string(b) != ok || err != nil {
			t.Errorf("got %q, %v", b, err)
		}
		conn.Close()
	}
}

// TestMeshRefuses: a bad request is answered, and reaches nobody.
func TestMeshRefuses(t *testing.T) {
	t.Parallel()
	seen := make(chan string, 1)
	_, route := meshOf(t, scripted(t, seen, ""), intercept.HTTPKnown, httpAgent(t, named("machine")), nil)
	for _, c := range []struct {
		text   string
		status int
	}{
		{"GET / HTTP/1.1\r\n\r\n", 400},
		{"\r\nPOST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET / HTTP/1.1\r\n", 400},
		{"GET / HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("x", 70<<10) + "\r\n\r\n", 431},
	} {
		_, br := sendRaw(t, route.Listen, c.text)
		if resp, _ := readResponse(t, br, "GET"); resp.StatusCode != c.status || !resp.Close {
			t.Errorf("%.60q: status %d", c.text, resp.StatusCode)
		}
	}
	if len(seen) > 0 {
		t.Errorf("the origin saw %q", <-seen)
	}
}

// TestMeshLargeHead passes.
func TestMeshLargeHead(t *testing.T) {
	t.Parallel()
	value := strings.Repeat("x", 50<<10)
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { w.Header().Set("A", r.Header.Get("A")) })
	_, route := meshOf(t, httpOrigin(t, echo), intercept.HTTPKnown, httpAgent(t, echo), nil)
	for _, mark := range []string{"", "a"} {
		_, br := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\nVersion: "+mark+"\r\nA: "+value+"\r\n\r\n")
		if resp, _ := readResponse(t, br, "GET"); resp.Header.Get("A") != value {
			t.Errorf("%d, and the value has %d bytes", resp.StatusCode, len(resp.Header.Get("A")))
		}
	}
}

// TestMeshStreams: large bodies both ways, chunked and with trailers, in little memory.
func TestMeshStreams(t *testing.T) {
	t.Parallel()
	const size = 32 << 20
	mirror := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Sum")
		if r.ContentLength > 0 {
			w.Header().Set("Content-Length", fmt.Sprint(r.ContentLength))
		}
		_ = http.NewResponseController(w).EnableFullDuplex()
		sum := sha256.New()
		io.Copy(w, io.TeeReader(r.Body, sum))
		w.Header().Set("Sum", fmt.Sprintf("%x %s", sum.Sum(nil), r.Trailer.Get("End")))
	})
	_, route := meshOf(t, httpOrigin(t, mirror), intercept.HTTPSniff, httpAgent(t, mirror), nil)
	client := oneConn(t)
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	for i, mark := range []string{"", "a", "", "a"} {
		sum := sha256.New()
		r, _ := http.NewRequest("POST", fmt.Sprintf("http://127.0.0.1:%d/", route.Listen), io.TeeReader(io.LimitReader(rand.NewChaCha8([32]byte{}), size), sum))
		r.Header.Set("VERSION", mark)
		if i < 2 {
			r.ContentLength = size
		} else {
			r.Trailer = http.Header{"End": {"ended"}}
		}
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		got := sha256.New()
		n, err := io.Copy(got, resp.Body)
		resp.Body.Close()
		if n != size || err != nil || !bytes.Equal(got.Sum(nil), sum.Sum(nil)) {
			t.Fatalf("%d bytes, %v", n, err)
		}
		if want := fmt.Sprintf("%x ended", sum.Sum(nil)); i >= 2 && resp.Trailer.Get("Sum") != want {
			t.Errorf("trailer %q, want %q", resp.Trailer.Get("Sum"), want)
		}
	}
	runtime.ReadMemStats(&after)
	if n := (after.TotalAlloc - before.TotalAlloc) >> 20; n > 128 {
		t.Errorf("%d MiB were allocated to move %d", n, 8*size>>20)
	}
}

// TestMeshContinue: 100 is the server's to say, and a final response may come instead.
func TestMeshContinue(t *testing.T) {
	t.Parallel()
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/no" {
			w.WriteHeader(http.StatusExpectationFailed)
			return
		}
		named("server").ServeHTTP(w, r)
	})
	_, route := meshOf(t, httpOrigin(t, handler), intercept.HTTPSniff, httpAgent(t, handler), nil)
	for _, mark := range []string{"", "a"} {
		head := "POST /%s HTTP/1.1\r\nHost: x\r\nVersion: " + mark + "\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n"
		c, br := sendRaw(t, route.Listen, fmt.Sprintf(head, "yes"))
		for range 2 {
			if line, err := br.ReadString('\n'); line != "HTTP/1.1 100 Continue\r\n" || err != nil {
				t.Fatalf("%q, %v", line, err)
			}
			br.ReadString('\n')
			io.WriteString(c, "hello")
			if _, got := readResponse(t, br, "POST"); got != "server POST hello" {
				t.Errorf("answer %q", got)
			}
			fmt.Fprintf(c, head, "yes") // on the same connection
		}
		_, br = sendRaw(t, route.Listen, fmt.Sprintf(head, "no"))
		if resp, _ := readResponse(t, br, "POST"); resp.StatusCode != 417 || !resp.Close {
			t.Errorf("status %d, closes %t", resp.StatusCode, resp.Close)
		}
	}
}

// TestMeshUpgrades: a WebSocket to either, which holds when the other's state changes
// and ends with its member.
func TestMeshUpgrades(t *testing.T) {
	t.Parallel()
	echo := func(name string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			up := websocket.Upgrader{CheckOrigin: func(*http.Request) bool { return true }}
			c, err := up.Upgrade(w, r, nil)
			if err != nil {
				return
			}
			defer c.Close()
			for {
				kind, b, err := c.ReadMessage()
				if err != nil || c.WriteMessage(kind, append([]byte(name+" "), b...)) != nil {
					return
				}
			}
		})
	}
	g, route := meshOf(t, httpOrigin(t, echo("origin")), intercept.HTTPSniff, httpAgent(t, echo("machine")), nil)
	conns := map[string]*websocket.Conn{}
	for name, mark := range map[string]string{"origin": "", "machine": "a"} {
		c, _, err := websocket.DefaultDialer.Dial(fmt.Sprintf("ws://127.0.0.1:%d/", route.Listen), http.Header{"VERSION": {mark}})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		conns[name] = c
	}
	say := func(name string) {
		t.Helper()
		c := conns[name]
		c.WriteMessage(websocket.TextMessage, []byte("hello"))
		if _, b, err := c.ReadMessage(); string(b) != name+" hello" || err != nil {
			t.Errorf("%q, %v", b, err)
		}
	}
	say("origin")
	say("machine")
	if m := g.status().Routes[0].Members[0]; m.Open != 1 || m.Requests != 1 {
		t.Errorf("counted %+v", m)
	}
	g.push(meshState(2, route))
	if _, _, err := conns["machine"].ReadMessage(); err == nil {
		t.Error("the machine's stays")
	}
	say("origin")
}

// TestMeshEvents: each event of a stream passes at once, and its client's end is told.
func TestMeshEvents(t *testing.T) {
	t.Parallel()
	next, gone := make(chan bool), make(chan bool, 2)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for {
			select {
			case <-r.Context().Done():
				gone <- true
				return
			case <-next:
				io.WriteString(w, "event\n")
				w.(http.Flusher).Flush()
			}
		}
	})
	_, route := meshOf(t, httpOrigin(t, handler), intercept.HTTPSniff, httpAgent(t, handler), nil)
	for _, mark := range []string{"", "a"} {
		c, br := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\nVersion: "+mark+"\r\n\r\n")
		next <- true
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewReader(resp.Body)
		for i := range 3 {
			if line, err := lines.ReadString('\n'); line != "event\n" || err != nil {
				t.Fatalf("event %d: %q, %v", i, line, err)
			}
			next <- true
		}
		c.Close()
		<-gone
	}
}

// TestMeshLostMachine: a request that waits for a machine which cannot be reached any
// more gets its error.
func TestMeshLostMachine(t *testing.T) {
	t.Parallel()
	a := startAgent(t, func(intercept.Header, *net.TCPConn) {})
	g := startGate(t, Config{}, func(x *timing) { x.lost = 300 * time.Millisecond })
	route := meshRoute(t, httpOrigin(t, named("origin")), intercept.HTTPKnown)
	g.push(meshState(1, route, meshMember("a", a, "header:VERSION=a")))
	g.memberIs(intercept.Accepted)
	_, br := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\nVERSION: a\r\n\r\n")
	<-a.seen
	a.l.Close()
	a.mu.Lock()
	a.conns[0].Close() // the watch
	a.mu.Unlock()
	if resp, got := readResponse(t, br, "GET"); resp.StatusCode != http.StatusBadGateway || !strings.Contains(got, "user-a") {
		t.Errorf("%d %q", resp.StatusCode, got)
	}
}

// TestMeshSendsAgain: a machine's kept connection that ends as the request comes costs
// nobody anything.
func TestMeshSendsAgain(t *testing.T) {
	t.Parallel()
	var conns atomic.Int32
	a := startAgent(t, func(_ intercept.Header, c *net.TCPConn) {
		defer c.Close()
		conns.Add(1)
		br := bufio.NewReader(c)
		if r, err := http.ReadRequest(br); err == nil {
			io.Copy(io.Discard, r.Body)
			io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			http.ReadRequest(br) // and ends without an answer
		}
	})
	_, route := meshOf(t, httpOrigin(t, named("origin")), intercept.HTTPKnown, a, nil)
	client := oneConn(t)
	for range 4 {
		if _, got := get(t, client, route.Listen, "GET", "a", ""); got != "ok" {
			t.Errorf("answer %q", got)
		}
	}
	if n := conns.Load(); n != 4 {
		t.Errorf("%d connections", n)
	}
	if resp, _ := get(t, client, route.Listen, "POST", "a", "x"); resp.StatusCode != http.StatusBadGateway {
		t.Errorf("a POST is sent twice: %d", resp.StatusCode)
	}
}

// TestMeshTruncated: a response that ends too early does not look whole.
func TestMeshTruncated(t *testing.T) {
	t.Parallel()
	for _, answer := range []string{"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n"} {
		origin := serve(t, func(c *net.TCPConn) {
			c.Read(make([]byte, 1000))
			io.WriteString(c, answer)
			c.Close()
		})
		_, route := meshOf(t, origin, intercept.HTTPSniff, httpAgent(t, named("machine")), nil)
		_, br := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		if _, err := io.ReadAll(br); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("not a reset: %v", err)
		}
	}
	origin := serve(t, func(c *net.TCPConn) {
		c.Read(make([]byte, 1000))
		io.WriteString(c, "HTTP/1.1 200 OK\r\n\r\nhello")
		c.Close()
	})
	_, route := meshOf(t, origin, intercept.HTTPSniff, httpAgent(t, named("machine")), nil)
	_, br := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, got := readResponse(t, br, "GET"); got != "hello" || !resp.Close {
		t.Errorf("until its end: %q", got)
	}
}
