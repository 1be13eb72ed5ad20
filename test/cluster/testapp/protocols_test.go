package main

import (
	"bytes"
	"encoding/json"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
)

// testServer serves HTTP on loopback until the test's process ends.
func testServer(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go (&app{name: "pod"}).serveHTTPAt(l)
	return l.Addr().String()
}

// client runs a command and reads the JSON that it prints.
func client[T any](t *testing.T, command func([]string) error, args ...string) (got T) {
	t.Helper()
	var b bytes.Buffer
	asJSON, out = true, &b
	defer func() { asJSON, out = false, os.Stdout }()
	if err := command(args); err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	if err := json.Unmarshal(b.Bytes(), &got); err != nil {
		t.Fatalf("%v: %v in %s", args, err, b.Bytes())
	}
	return got
}

// TestHeadRaw: names, their case, their order and the path come back as they were sent.
func TestHeadRaw(t *testing.T) {
	c, err := net.Dial("tcp", testServer(t))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	const head = "POST /head?a=%2f//x HTTP/1.1\r\nhOST: shop.test\r\nx-LOW: 1\r\nContent-Length: 3\r\nX-low:  2\r\nConnection: close"
	if _, err := io.WriteString(c, head+"\r\n\r\nabc"); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	_, body, _ := strings.Cut(string(b), "\r\n\r\n")
	var got seen
	if err := json.Unmarshal([]byte(body), &got); err != nil {
		t.Fatalf("%v in %s", err, b)
	}
	if got.Raw != head || got.URI != "/head?a=%2f//x" || got.Host != "shop.test" || got.Length != 3 || !slices.Equal(got.Headers["X-Low"], []string{"1", "2"}) {
		t.Errorf("the server saw %+v", got)
	}
}

// TestAsk: interim answers, bodies both ways at once and trailers both ways, in both
// protocols.
func TestAsk(t *testing.T) {
	url := "http://" + testServer(t)
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		run := func(path string, args ...string) asked {
			args = append([]string{url + path, "--header", "Version: alice"}, args...)
			if version == "HTTP/2.0" {
				args = append(args, "--http2")
			}
			got := client[asked](t, ask, args...)
			if got.Protocol != version || got.Server != "pod" {
				t.Errorf("%s: %s of %q, want %s of pod", path, got.Protocol, got.Server, version)
			}
			return got
		}
		var at seen
		got := run("/head", "--method", "PUT", "--body", "300000", "--chunked", "--expect")
		if err := json.Unmarshal([]byte(got.Body), &at); err != nil {
			t.Fatalf("%v in %q", err, got.Body)
		}
		if !slices.Contains(got.Interim, 100) || at.SHA256 != got.Sum || at.Length != 300000 || at.Trailers.Get("X-Sha256") != got.Sum || at.Headers.Get("Version") != "alice" {
			t.Errorf("%s: sent %+v, the server saw %+v", version, got, at)
		}
		if got := run("/duplex", "--method", "POST", "--body", "3000000"); got.Length != 3000000 || got.SHA256 != got.Sum {
			t.Errorf("%s: %d bytes came back, %s of %s", version, got.Length, got.SHA256, got.Sum)
		}
		if got := run("/chunked?n=7&size=9"); got.Length != 63 || got.Trailers.Get("X-Sha256") != got.SHA256 || got.Trailers.Get("X-Pieces") != "7" {
			t.Errorf("%s: the trailers are %v", version, got.Trailers)
		}
		if got := run("/hints"); !slices.Equal(got.Interim, []int{103}) || got.Status != 200 {
			t.Errorf("%s: hints: %v and %d", version, got.Interim, got.Status)
		}
	}
}

func TestWebSocketAndEvents(t *testing.T) {
	addr := testServer(t)
	w := client[wsResult](t, ws, "ws://"+addr+"/ws", "--conns", "3", "--count", "4", "--hold", "1ms")
	if w.Servers["pod"] != 3 || w.Messages != 15 {
		t.Errorf("WebSockets: %d messages, %v", w.Messages, w.Servers)
	}
	for _, more := range []string{"--http2", "--http2=false"} {
		if s := client[sseResult](t, sse, "http://"+addr+"/sse?n=6&every=1ms", more); s.Events != 6 || s.Server != "pod" || !s.Whole {
			t.Errorf("events %s: %+v", more, s)
		}
	}
}

func TestRPC(t *testing.T) {
	addr := testServer(t)
	for call, want := range map[string][2]int{"unary": {1, 1}, "server": {1, 6}, "client": {6, 1}, "both": {6, 6}} {
		r := client[grpcResult](t, rpc, addr, call, "--count", "6", "--header", "version:alice", "--deadline", "20s")
		if r.Code != "OK" || r.Server != "pod" || r.Sent != want[0] || r.Received != want[1] || len(r.Trailer.Get("x-count")) != 1 {
			t.Errorf("%s: %+v", call, r)
		}
		if r.Seen != nil && (r.Seen.Deadline <= 0 || r.Seen.Deadline > 20000 || r.Seen.Metadata.Get("version")[0] != "alice" || r.Seen.Messages != want[0]) {
			t.Errorf("%s: the server saw %+v", call, r.Seen)
		}
	}
	if err := rpc([]string{addr, "both", "--header", failHeader + ":9"}); err == nil || !strings.Contains(err.Error(), "FailedPrecondition") {
		t.Errorf("asked to fail: %v", err)
	}
	if err := rpc([]string{addr, "unary", "--header", waitHeader + ":1m", "--deadline", "50ms"}); err == nil || !strings.Contains(err.Error(), "DeadlineExceeded") {
		t.Errorf("beyond its deadline: %v", err)
	}
}

// TestLoadByServer: a client that goes at full speed counts by who answered.
func TestLoadByServer(t *testing.T) {
	url := "http://" + testServer(t) + "/who"
	for _, more := range []string{"--http2", "--http2=false"} {
		r := client[tally](t, load, url, "--rate", "0", "--workers", "2", "--seconds", "0.2", "--header", "Version:alice", more)
		if r.Failed != 0 || r.Count < 10 || r.Servers["pod"] == nil || r.Servers["pod"].Count != r.Count || r.Servers["pod"].P99 <= 0 || r.Dialled != 2 {
			t.Errorf("%s: %+v", more, &r)
		}
	}
}

// TestGreeting: a server that speaks first is known by what it says.
func TestGreeting(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err == nil {
			defer c.Close()
			(&app{name: "pod"}).greet(c)
		}
	}()
	if name, err := whoGreets(l.Addr().String()); err != nil || name != "pod" {
		t.Errorf("%q, %v", name, err)
	}
}
