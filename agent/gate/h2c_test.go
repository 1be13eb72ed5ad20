package gate

import (
	"bufio"
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// offered makes a request that offers to go on in HTTP/2, and returns the answer's head.
func offered(t *testing.T, port uint16, mark string) (*net.TCPConn, *bufio.Reader, *http.Response) {
	t.Helper()
	c := dial(t, port)
	fmt.Fprintf(c, "GET /first HTTP/1.1\r\nHost: web\r\nVersion: %s\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: %s\r\n\r\n",
		mark, base64.RawURLEncoding.EncodeToString([]byte{0, 4, 0, 1, 0, 0}))
	br := bufio.NewReader(c)
	resp, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	return c, br, resp
}

// TestUpgradeHTTP2: the offer is taken where the server speaks HTTP/2, the request that
// made it is the first stream, and those that follow go by their own headers.
func TestUpgradeHTTP2(t *testing.T) {
	_, route := meshOf(t, httpOrigin(t, telling("origin")), intercept.HTTPSniff, httpAgent(t, telling("machine")), nil)
	for _, first := range []string{"a", "none"} {
		c, br, resp := offered(t, route.Listen, first)
		if resp.StatusCode != 101 || resp.Header.Get("Upgrade") != "h2c" {
			t.Fatalf("%d %v", resp.StatusCode, resp.Header)
		}
		io.WriteString(c, http2.ClientPreface)
		f := http2.NewFramer(c, br)
		f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
		f.WriteSettings()
		var block bytes.Buffer
		e := hpack.NewEncoder(&block)
		for _, h := range [][2]string{{":method", "GET"}, {":scheme", "http"}, {":path", "/second"}, {":authority", "web"}, {"version", "a"}} {
			e.WriteField(hpack.HeaderField{Name: h[0], Value: h[1]})
		}
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 3, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
		bodies := map[uint32]string{}
		ended := 0
		c.SetDeadline(time.Now().Add(10 * time.Second))
		for ended < 2 {
			frame, err := f.ReadFrame()
			if err != nil {
				t.Fatalf("%v; so far %v", err, bodies)
			}
			switch x := frame.(type) {
			case *http2.SettingsFrame:
				if !x.IsAck() {
					f.WriteSettingsAck()
				}
			case *http2.DataFrame:
				bodies[x.StreamID] += string(x.Data())
				if x.StreamEnded() {
					ended++
				}
			case *http2.MetaHeadersFrame:
				if x.StreamEnded() { // trailers
					ended++
				}
			}
		}
		want := map[string]string{"a": "machine", "none": "origin"}[first]
		if !strings.HasPrefix(bodies[1], want+" HTTP/2.0 GET") || !strings.HasPrefix(bodies[3], "machine HTTP/2.0 GET") {
			t.Errorf("streams %v, want the first of %s and the second of the machine", bodies, want)
		}
	}
}

// TestUpgradeLeftOut: where the server knows no HTTP/2, HTTP/1 goes on as if there had
// been no offer.
func TestUpgradeLeftOut(t *testing.T) {
	seen := make(chan http.Header, 4)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		seen <- r.Header
		io.WriteString(w, "old")
	})}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	_, route := meshOf(t, l.Addr().String(), intercept.HTTPSniff, httpAgent(t, telling("machine")), nil)
	for range 2 { // the second time it is known
		c, br, resp := offered(t, route.Listen, "none")
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 100))
		h := <-seen
		if resp.StatusCode != 200 || string(b) != "old" || h.Get("Upgrade") != "" || h.Get("Http2-Settings") != "" {
			t.Errorf("%d %q, the server saw %v", resp.StatusCode, b, h)
		}
		io.WriteString(c, "GET / HTTP/1.1\r\nHost: web\r\n\r\n")
		if resp, err = http.ReadResponse(br, nil); err != nil || resp.StatusCode != 200 {
			t.Errorf("the next request: %v, %v", resp, err)
		}
		<-seen
	}
	// One with a body is not taken either.
	c := dial(t, route.Listen)
	io.WriteString(c, "POST / HTTP/1.1\r\nHost: web\r\nVersion: a\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nContent-Length: 5\r\n\r\nhello")
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	if string(b) != "machine HTTP/1.1 POST 5" {
		t.Errorf("with a body: %d %q", resp.StatusCode, b)
	}
}
