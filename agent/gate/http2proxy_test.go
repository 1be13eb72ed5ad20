package gate

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// http2Client speaks HTTP/2 by prior knowledge, by as few connections as it can, which
// it counts.
func http2Client(t testing.TB) (*http.Client, *atomic.Int64) {
	dialled := new(atomic.Int64)
	p := new(http.Protocols)
	p.SetUnencryptedHTTP2(true)
	tr := &http.Transport{Protocols: p, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		dialled.Add(1)
		return new(net.Dialer).DialContext(ctx, network, addr)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}, dialled
}

// telling answers with its name and what it was asked.
func telling(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Name", name)
		w.Header().Set("X-Uri", r.RequestURI)
		w.Header().Set("X-Host", r.Host)
		w.Header().Set("X-For", r.Header.Get("X-Forwarded-For"))
		w.Header().Set("X-Te", r.Header.Get("Te"))
		w.Header().Set("Trailer", "Sum")
		h := sha256.New()
		n, _ := io.Copy(h, r.Body)
		fmt.Fprintf(w, "%s %s %s %d", name, r.Proto, r.Method, n)
		w.Header().Set("Sum", hex.EncodeToString(h.Sum(nil)))
	})
}

// TestHTTP2Routed: each stream goes by its own header, on one connection, and nothing
// of it is lost.
func TestHTTP2Routed(t *testing.T) {
	for _, how := range []string{intercept.HTTPSniff, intercept.HTTPKnown} {
		t.Run(how, func(t *testing.T) {
			g, route := meshOf(t, httpOrigin(t, telling("origin")), how, httpAgent(t, telling("machine")), func(m *intercept.Member) { m.TagResponses = true })
			client, dialled := http2Client(t)
			for i := range 20 {
				name, mark := "origin", ""
				if i%2 == 1 {
					name, mark = "machine", "a"
				}
				body := strings.Repeat("x", i*1000)
				r, _ := http.NewRequest("POST", fmt.Sprintf("http://127.0.0.1:%d/a%%2Fb//c?q=%%20", route.Listen), strings.NewReader(body))
				r.Host = "shop.example"
				r.URL.Opaque = "//shop.example/a%2Fb//c"
				r.Header.Set("Version", mark)
				r.Header.Set("TE", "trailers")
				r.Header.Set("X-Forwarded-For", "192.0.2.1")
				resp, err := client.Do(r)
				if err != nil {
					t.Fatal(err)
				}
				b, err := io.ReadAll(resp.Body)
				resp.Body.Close()
				sum := sha256.Sum256([]byte(body))
				if want := fmt.Sprintf("%s HTTP/2.0 POST %d", name, len(body)); err != nil || string(b) != want || resp.Trailer.Get("Sum") != hex.EncodeToString(sum[:]) {
					t.Errorf("%q, %v, trailers %v; want %q", b, err, resp.Trailer, want)
				}
				h := resp.Header
				if h.Get("X-Uri") != "/a%2Fb//c?q=%20" || h.Get("X-Host") != "shop.example" || h.Get("X-For") != "192.0.2.1, 127.0.0.1" || h.Get("X-Te") != "trailers" {
					t.Errorf("arrived as %v", h)
				}
				if tag := h.Get(intercept.ServedByHeader); (tag == "user-a") != (name == "machine") {
					t.Errorf("the response of the %s has the tag %q", name, tag)
				}
			}
			if n := dialled.Load(); n != 1 {
				t.Errorf("%d connections", n)
			}
			eventually(t, "all are counted and over", func() bool {
				s := g.status().Routes[0]
				return s.RequestsToOrigin == 10 && s.Members[0].Requests == 10 && s.Members[0].Open == 0
			})
		})
	}
}

// TestHTTP2Streams: both sides speak at the same time, and a cancellation arrives.
func TestHTTP2Streams(t *testing.T) {
	gone := make(chan struct{}, 2)
	echo := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(200)
		w.(http.Flusher).Flush()
		b := make([]byte, 100)
		for {
			n, err := r.Body.Read(b)
			w.Write(b[:n])
			w.(http.Flusher).Flush()
			if err != nil {
				break
			}
		}
		if r.Context().Err() != nil {
			gone <- struct{}{}
		}
	})
	_, route := meshOf(t, httpOrigin(t, echo), intercept.HTTPSniff, httpAgent(t, echo), nil)
	client, _ := http2Client(t)
	for _, mark := range []string{"", "a"} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		in, out := io.Pipe()
		r, _ := http.NewRequestWithContext(ctx, "POST", fmt.Sprintf("http://127.0.0.1:%d/", route.Listen), in)
		r.Header.Set("Version", mark)
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		for i := range 10 {
			text := fmt.Sprint("message ", i)
			io.WriteString(out, text)
			b := make([]byte, len(text))
			if _, err := io.ReadFull(resp.Body, b); err != nil || string(b) != text {
				t.Fatalf("%q came back as %q, %v", text, b, err)
			}
		}
		cancel()
		out.Close()
		resp.Body.Close()
		<-gone
	}
}

// TestHTTP2Large: bodies of any size pass, many at once.
func TestHTTP2Large(t *testing.T) {
	mirror := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { io.Copy(w, r.Body) })
	_, route := meshOf(t, httpOrigin(t, mirror), intercept.HTTPSniff, httpAgent(t, mirror), nil)
	client, dialled := http2Client(t)
	get(t, client, route.Listen, "POST", "", "so that there is a connection")
	const size = 4 << 20
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			source := rand.New(rand.NewSource(int64(i)))
			sent, got := sha256.New(), sha256.New()
			r, _ := http.NewRequest("POST", fmt.Sprintf("http://127.0.0.1:%d/", route.Listen), io.TeeReader(io.LimitReader(source, size), sent))
			if i%2 == 0 {
				r.Header.Set("Version", "a")
			}
			resp, err := client.Do(r)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if n, err := io.Copy(got, resp.Body); err != nil || n != size || string(got.Sum(nil)) != string(sent.Sum(nil)) {
				t.Errorf("%d bytes came back, %v", n, err)
			}
		})
	}
	all.Wait()
	if n := dialled.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestHTTP2Many: as many streams as a client may have at once wait side by side.
func TestHTTP2Many(t *testing.T) {
	var here atomic.Int64
	release := make(chan struct{})
	wait := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "HEAD" {
			here.Add(1)
			<-release
		}
		io.WriteString(w, "done")
	})
	_, route := meshOf(t, httpOrigin(t, wait), intercept.HTTPKnown, httpAgent(t, wait), nil)
	client, dialled := http2Client(t)
	get(t, client, route.Listen, "HEAD", "", "") // so that there is a connection
	var all sync.WaitGroup
	for i := range maxClientStreams {
		all.Go(func() {
			mark := ""
			if i%3 == 0 {
				mark = "a"
			}
			if _, b := get(t, client, route.Listen, "GET", mark, ""); b != "done" {
				t.Errorf("%q", b)
			}
		})
	}
	eventually(t, "all wait", func() bool { return here.Load() == maxClientStreams })
	close(release)
	all.Wait()
	if n := dialled.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// TestHTTP2FailOpen: a stream whose machine is away goes to the origin, or is told so
// in its own words.
func TestHTTP2FailOpen(t *testing.T) {
	for _, onGone := range []string{intercept.GoneToOrigin, intercept.GoneFails} {
		a := httpAgent(t, telling("machine"))
		g, route := meshOf(t, httpOrigin(t, telling("origin")), intercept.HTTPSniff, a, func(m *intercept.Member) { m.OnGone = onGone })
		client, _ := http2Client(t)
		if _, b := get(t, client, route.Listen, "GET", "a", ""); !strings.HasPrefix(b, "machine") {
			t.Fatalf("%q", b)
		}
		a.vanish()
		g.memberIs(intercept.Away)
		resp, b := get(t, client, route.Listen, "GET", "a", "")
		if onGone == intercept.GoneToOrigin {
			if !strings.HasPrefix(b, "origin") {
				t.Errorf("%d %q", resp.StatusCode, b)
			}
			continue
		}
		if resp.StatusCode != 503 || !strings.Contains(b, "user-a") {
			t.Errorf("%d %q", resp.StatusCode, b)
		}
		r, _ := http.NewRequest("POST", fmt.Sprintf("http://127.0.0.1:%d/pkg.Service/Call", route.Listen), strings.NewReader("\x00\x00\x00\x00\x00"))
		r.Header.Set("Version", "a")
		r.Header.Set("Content-Type", "application/grpc+proto")
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if h := resp.Header; resp.StatusCode != 200 || h.Get("Grpc-Status") != "14" || !strings.Contains(h.Get("Grpc-Message"), "user-a") || h.Get("Content-Type") != "application/grpc+proto" {
			t.Errorf("for gRPC: %d %v", resp.StatusCode, h)
		}
	}
}

// TestHTTP2Kept: a server that ends its connection while it is idle fails nobody.
func TestHTTP2Kept(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: telling("origin"), Protocols: bothProtocols(), IdleTimeout: 20 * time.Millisecond}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	_, route := meshOf(t, l.Addr().String(), intercept.HTTPSniff, httpAgent(t, telling("machine")), nil)
	client, _ := http2Client(t)
	for i := range 10 {
		if _, b := get(t, client, route.Listen, "GET", "", ""); !strings.HasPrefix(b, "origin") {
			t.Errorf("request %d: %q", i, b)
		}
		time.Sleep(time.Duration(i) * 5 * time.Millisecond)
	}
}

// TestHTTP2Drain: a mesh ends while requests come all the time: GOAWAY, and none fails.
func TestHTTP2Drain(t *testing.T) {
	slow := func(name string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			time.Sleep(5 * time.Millisecond)
			io.WriteString(w, name)
		})
	}
	a := httpAgent(t, slow("machine"))
	g, route := meshOf(t, httpOrigin(t, slow("origin")), intercept.HTTPSniff, a, nil)
	client, dialled := http2Client(t)
	stop, drained := make(chan struct{}), new(atomic.Bool)
	var all sync.WaitGroup
	var machine atomic.Int64
	for i := range 8 {
		all.Go(func() {
			mark := []string{"", "a"}[i%2]
			for {
				select {
				case <-stop:
					return
				default:
				}
				after := drained.Load()
				_, b := get(t, client, route.Listen, "GET", mark, "")
				if b == "machine" {
					machine.Add(1)
				}
				if b != "origin" && (b != "machine" || mark == "" || after) {
					t.Errorf("%q answers the mark %q, drained %v", b, mark, after)
				}
			}
		})
	}
	eventually(t, "the machine answers", func() bool { return machine.Load() > 20 })
	g.push(draining(meshState(1, route, meshMember("a", a, "header:VERSION=a"))))
	drained.Store(true)
	eventually(t, "the client has gone to another connection", func() bool { return dialled.Load() > 1 })
	close(stop)
	all.Wait()
}
