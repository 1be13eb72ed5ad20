package gate

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
)

// parse is as the router reads a request: its head, and what is there of its body.
func parse(b []byte) (h *head, n, first int, complete bool, err error) {
	h = new(head)
	if n, err = headEnd(b, 0, true); err != nil || n == 0 {
		return h, 0, 0, false, err
	}
	if err = h.parseRequest(b[:n]); err != nil {
		return h, n, 0, false, err
	}
	body := requestBody(h)
	first, err = body.take(b[n:])
	return h, n, first, body.done, err
}

// TestRefusedRequests: what two readers could understand in two ways.
func TestRefusedRequests(t *testing.T) {
	host := "Host: x\r\n"
	for name, c := range map[string]struct {
		text   string
		status int
	}{
		"both lengths":           {"POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
		"both, the other way":    {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", 400},
		"two lengths":            {"POST / HTTP/1.1\r\n" + host + "Content-Length: 3\r\nContent-Length: 4\r\n\r\n", 400},
		"two ways to write one":  {"POST / HTTP/1.1\r\n" + host + "Content-Length: 5\r\nContent-Length: 05\r\n\r\n", 400},
		"a list of lengths":      {"POST / HTTP/1.1\r\n" + host + "Content-Length: 3, 3\r\n\r\n", 400},
		"a signed length":        {"POST / HTTP/1.1\r\n" + host + "Content-Length: +3\r\n\r\n", 400},
		"a huge length":          {"POST / HTTP/1.1\r\n" + host + "Content-Length: 99999999999999999999\r\n\r\n", 400},
		"an empty length":        {"POST / HTTP/1.1\r\n" + host + "Content-Length:\r\n\r\n", 400},
		"gzip, chunked":          {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: gzip, chunked\r\n\r\n", 501},
		"chunked twice":          {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 501},
		"xchunked":               {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n", 501},
		"vertical tab":           {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: \x0bchunked\r\n\r\n", 400},
		"chunked in 1.0":         {"POST / HTTP/1.0\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n", 400},
		"a folded line":          {"GET / HTTP/1.1\r\n" + host + "A: b\r\n c\r\n\r\n", 400},
		"a folded first line":    {"GET / HTTP/1.1\r\n " + host + "\r\n", 400},
		"space before the colon": {"GET / HTTP/1.1\r\n" + host + "A : b\r\n\r\n", 400},
		"no colon":               {"GET / HTTP/1.1\r\n" + host + "A\r\n\r\n", 400},
		"no name":                {"GET / HTTP/1.1\r\n" + host + ": b\r\n\r\n", 400},
		"a bare CR in a value":   {"GET / HTTP/1.1\r\n" + host + "A: b\rc\r\n\r\n", 400},
		"a bare CR in a line":    {"GET /\r HTTP/1.1\r\n" + host + "\r\n", 400},
		"a bare LF":              {"GET / HTTP/1.1\nHost: x\r\n\r\n", 400},
		"a bare LF at the end":   {"GET / HTTP/1.1\r\nHost: x\r\n\n", 400},
		"NUL in a value":         {"GET / HTTP/1.1\r\n" + host + "A: b\x00\r\n\r\n", 400},
		"NUL in a name":          {"GET / HTTP/1.1\r\n" + host + "A\x00: b\r\n\r\n", 400},
		"no host":                {"GET / HTTP/1.1\r\n\r\n", 400},
		"two hosts":              {"GET / HTTP/1.1\r\n" + host + host + "\r\n", 400},
		"no version":             {"GET /\r\n" + host + "\r\n", 400},
		"HTTP/2.0":               {"GET / HTTP/2.0\r\n" + host + "\r\n", 505},
		"HTTP/1.1 in small":      {"GET / http/1.1\r\n" + host + "\r\n", 400},
		"two spaces":             {"GET  / HTTP/1.1\r\n" + host + "\r\n", 400},
		"a space in the target":  {"GET /a b HTTP/1.1\r\n" + host + "\r\n", 400},
		"no path":                {"GET x HTTP/1.1\r\n" + host + "\r\n", 400},
		"a bad method":           {"G(T / HTTP/1.1\r\n" + host + "\r\n", 400},
		"CONNECT":                {"CONNECT x:1 HTTP/1.1\r\n" + host + "\r\n", 405},
		"chunk: no size":         {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n\r\n", 400},
		"chunk: 0x3":             {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n", 400},
		"chunk: 0 0":             {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0 0\r\n\r\n", 400},
		"chunk: -1":              {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400},
		"chunk: huge":            {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n", 400},
		"chunk: LF":              {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n3\nabc\r\n0\r\n\r\n", 400},
		"chunk: too long":        {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n0\r\n\r\n", 400},
		"chunk: LF in extension": {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n3;a\nb\r\nabc\r\n0\r\n\r\n", 400},
		"trailer: folded":        {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\n a: b\r\n\r\n", 400},
		"trailer: LF":            {"POST / HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\n\r\n0\r\na: b\n\r\n", 400},
	} {
		_, _, _, _, err := parse([]byte(c.text))
		var bad *badMessage
		if !errors.As(err, &bad) || bad.status != c.status {
			t.Errorf("%s: %v, want status %d", name, err, c.status)
		}
	}
}

// TestTakenRequests: where they end, whatever part of them is there.
func TestTakenRequests(t *testing.T) {
	for _, text := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"OPTIONS * HTTP/1.1\r\nhost:x\r\nA:\r\nB:\t c \t\r\n\r\n",
		"GET http://x/y?z HTTP/1.1\r\nHost: x\r\n\r\n",
		"GET /\xc3\xbc?%zz|\"^ HTTP/1.0\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: Chunked\r\n\r\n5;a=\"b\"\r\nhello\r\n00a \r\n0123456789\r\n0\r\nA: b\r\nC: d\r\n\r\n",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
	} {
		b := []byte(text + "GET /next HTTP/1.1\r\n\r\n")
		_, n, first, done, err := parse(b)
		if err != nil || !done || n+first != len(text) {
			t.Errorf("%q: %d of %d bytes, done %t, %v", text, n+first, len(text), done, err)
		}
		// A byte at a time.
		h := new(head)
		if err := h.parseRequest(b[:n]); err != nil {
			t.Fatal(err)
		}
		body := requestBody(h)
		for i := n; !body.done; i++ {
			if k, err := body.take(b[i : i+1]); k != 1 || err != nil {
				t.Fatalf("%q at %d: %d, %v", text, i, k, err)
			}
		}
		for i := range n {
			if _, n, _, _, err := parse(b[:i]); n != 0 || err != nil {
				t.Fatalf("%q at %d: %d, %v", text, i, n, err)
			}
		}
	}
}

// FuzzRequest: what is accepted, net/http accepts too, and sees it end at the same byte.
// It is stricter about what a target may be, which is for the server to judge.
func FuzzRequest(f *testing.F) {
	for _, text := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		"POST /a?b HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
		"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nA: b\r\n\r\n",
		"POST / HTTP/1.0\r\nContent-Length: 0\r\nUpgrade: h2c\r\n\r\n",
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, n, first, done, err := parse(b)
		if err != nil || !done {
			return
		}
		target := h.text(h.target)
		if strings.ContainsAny(target, "%*:[]@") || target[0] != '/' || h.method() == "PRI" {
			return
		}
		br := bufio.NewReaderSize(bytes.NewReader(b), len(b)+16)
		r, err := http.ReadRequest(br)
		if err != nil {
			t.Fatalf("accepted %q: %v", b, err)
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			if h.chunked && n+first < len(b)+1 && strings.Contains(err.Error(), "malformed MIME") {
				return // net/http looks at trailers' names
			}
			t.Fatalf("accepted the body of %q: %v", b, err)
		}
		if left := br.Buffered(); left != len(b)-n-first && br.Size() > len(b) {
			t.Fatalf("%q: %d bytes are left, and %d with net/http", b, len(b)-n-first, left)
		}
	})
}
