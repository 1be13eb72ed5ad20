package main

import (
	"bytes"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestLoad(t *testing.T) {
	a := &app{name: "alice"}
	s := httptest.NewServer(a.handler())
	defer s.Close()
	for name, l := range map[string]*loader{
		"kept":  {keepalive: true},
		"new":   {},
		"posts": {keepalive: true, post: true},
	} {
		t.Run(name, func(t *testing.T) {
			l.url, l.rate, l.workers, l.timeout = s.URL+"/who", 200, 4, time.Second
			got := l.run(300 * time.Millisecond)
			if got.Failed != 0 || got.Servers["alice"] == nil || got.Servers["alice"].Count != got.Count {
				t.Fatalf("%v %v", got, got.Failures)
			}
			// The machine may be slow, but the rate is never more than asked for.
			if got.Count < 10 || got.Count > 60+l.workers {
				t.Errorf("%d answers in 0.3 s at 200/s", got.Count)
			}
			if kept := got.Dialled <= int64(l.workers); kept != l.keepalive {
				t.Errorf("%d connections for %d answers", got.Dialled, got.Count)
			}
		})
	}
}

// TestLoadStopped: a load ends when it is told to, and tells the same.
func TestLoadStopped(t *testing.T) {
	a := &app{name: "alice"}
	s := httptest.NewServer(a.handler())
	defer s.Close()
	stop := make(chan struct{})
	l := &loader{url: s.URL + "/who", rate: 200, workers: 4, timeout: time.Second, stop: stop}
	time.AfterFunc(100*time.Millisecond, func() { close(stop) })
	begun := time.Now()
	if got := l.run(time.Minute); got.Failed != 0 || got.Count == 0 || time.Since(begun) > 30*time.Second {
		t.Errorf("after %v: %v %v", time.Since(begun), got, got.Failures)
	}
}

// TestLoadFails: every kind of failure is counted, none ends the load.
func TestLoadFails(t *testing.T) {
	var n atomic.Int64
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch n.Add(1) % 3 {
		case 0:
			w.WriteHeader(http.StatusServiceUnavailable)
		case 1:
			c, _, _ := http.NewResponseController(w).Hijack()
			c.(*net.TCPConn).SetLinger(0)
			c.Close()
		default:
			time.Sleep(200 * time.Millisecond)
		}
	}))
	defer s.Close()
	l := &loader{url: s.URL, rate: 100, workers: 3, timeout: 100 * time.Millisecond, post: true}
	got := l.run(400 * time.Millisecond)
	if got.Count != 0 || got.Kinds["status 503"] == 0 || got.Kinds["reset"] == 0 || got.Kinds["timeout"] == 0 {
		t.Errorf("%v", got)
	}
}

func TestWho(t *testing.T) {
	a := &app{name: "alice"}
	client, server := net.Pipe()
	go func() {
		a.echo(server)
		server.Close()
	}()
	defer client.Close()
	io.WriteString(client, question)
	b := make([]byte, 64)
	n, _ := client.Read(b)
	if got := string(b[:n]); got != "alice pipe\n" {
		t.Errorf("the question is answered by %q", got)
	}
	// From then on it echoes, the question too.
	io.WriteString(client, question)
	if _, err := io.ReadFull(client, b[:len(question)]); err != nil || string(b[:len(question)]) != question {
		t.Errorf("a later question: %q, %v", b[:n], err)
	}
	r := httptest.NewRecorder()
	a.handler().ServeHTTP(r, httptest.NewRequest("GET", "/who", nil))
	if got := r.Body.String(); got != "alice 192.0.2.1:1234\n" || r.Header().Get(servedBy) != "alice" {
		t.Errorf("HTTP: %q, %v", got, r.Header())
	}
}

func TestProxyHeader(t *testing.T) {
	v4 := "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c\x0a\xf4\x01\x05\x0a\x60\x00\x01\x30\x39\x00\x50"
	v6 := "\r\n\r\n\x00\r\nQUIT\n\x21\x21\x00\x26" + "\xfd" + strings.Repeat("\x00", 14) + "\x05" + strings.Repeat("\x00", 16) + "\x30\x39\x00\x50\x04\x00" // with a TLV's beginning
	for name, c := range map[string]struct {
		bytes, want string
		bad         bool
	}{
		"IPv4":         {bytes: v4, want: "10.244.1.5:12345"},
		"IPv6 and TLV": {bytes: v6, want: "[fd00::5]:12345"},
		"LOCAL":        {bytes: "\r\n\r\n\x00\r\nQUIT\n\x20\x00\x00\x00"},
		"none":         {bytes: "GET / HTTP/1.1\r\n\r\n", bad: true},
		"cut":          {bytes: v4[:20], bad: true},
	} {
		r := bytes.NewReader([]byte(c.bytes + "GET"))
		if c.bad {
			r = bytes.NewReader([]byte(c.bytes))
		}
		addr, err := readProxyHeader(r)
		if (err != nil) != c.bad {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := ""
		if addr != nil {
			got = addr.String()
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
		if rest, _ := io.ReadAll(r); !c.bad && string(rest) != "GET" {
			t.Errorf("%s: %q is left to read", name, rest)
		}
	}
}
