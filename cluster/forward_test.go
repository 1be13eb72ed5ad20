package cluster

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/culvert-dev/culvert/daemon/api"
)

// oldServer is an API server that knows port-forward by SPDY only, on
// Kubernetes' own server code: the data stream echoes, port 9 is refused.
type oldServer struct {
	*httptest.Server
	webSockets atomic.Int32
	upgrades   atomic.Int32
}

func newOldServer(t *testing.T) *oldServer {
	s := &oldServer{}
	s.Server = httptest.NewTLSServer(http.HandlerFunc(s.serve))
	t.Cleanup(s.Close)
	return s
}

func (s *oldServer) serve(w http.ResponseWriter, req *http.Request) {
	switch {
	case req.Header.Get("Authorization") != "Bearer t":
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusUnauthorized)
		fmt.Fprint(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":"Unauthorized","reason":"Unauthorized","code":401}`)
		return
	case req.URL.Path != "/api/v1/namespaces/demo/pods/p/portforward":
		http.NotFound(w, req)
		return
	case strings.EqualFold(req.Header.Get("Upgrade"), "websocket"):
		s.webSockets.Add(1)
		http.Error(w, "unable to upgrade: unable to negotiate protocol", http.StatusBadRequest)
		return
	}
	s.upgrades.Add(1)
	if _, err := httpstream.Handshake(req, w, []string{portForwardProtocol}); err != nil {
		return
	}
	streams := make(chan httpstream.Stream, 2)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, req, func(stream httpstream.Stream, replied <-chan struct{}) error {
		streams <- stream
		return nil
	})
	if conn == nil {
		return
	}
	defer conn.Close()
	byType := map[string]httpstream.Stream{}
	for range 2 {
		select {
		case stream := <-streams:
			byType[stream.Headers().Get("streamType")] = stream
		case <-conn.CloseChan():
			return
		}
	}
	data, trouble := byType["data"], byType["error"]
	if data.Headers().Get("port") == "9" {
		data.Close() // first, as containerd does
		fmt.Fprint(trouble, "dial tcp4 127.0.0.1:9: connect: connection refused")
		trouble.Close()
		<-conn.CloseChan()
		return
	}
	go io.Copy(data, data)
	<-conn.CloseChan()
}

// open makes a Cluster for the server, through a proxy if one is given.
func (s *oldServer) open(t *testing.T, token, proxy string) *Cluster {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: x
clusters: [{name: x, cluster: {server: %q, certificate-authority-data: %q, proxy-url: %q}}]
users: [{name: x, user: {token: %q}}]
contexts: [{name: x, context: {cluster: x, user: x}}]
`, s.URL, base64.StdEncoding.EncodeToString(ca), proxy, token)
	c, err := Open(api.Options{Kubeconfig: writeKubeconfig(t, text)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var testPod = &Agent{Namespace: "demo", Pod: "p"}

// newProxy is an HTTP proxy that counts its CONNECTs.
func newProxy(t *testing.T, connects *atomic.Int32) string {
	var wg sync.WaitGroup
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		connects.Add(1)
		to, err := net.Dial("tcp", req.Host)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		from, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			to.Close()
			return
		}
		fmt.Fprint(from, "HTTP/1.1 200 OK\r\n\r\n")
		for _, pair := range [][2]net.Conn{{from, to}, {to, from}} {
			wg.Go(func() {
				io.Copy(pair[0], pair[1])
				pair[0].Close()
			})
		}
	}))
	t.Cleanup(func() { s.Close(); wg.Wait() })
	return s.URL
}

func TestPortForwardFallsBackToSPDY(t *testing.T) {
	for _, proxied := range []bool{false, true} {
		t.Run(fmt.Sprintf("proxy %v", proxied), func(t *testing.T) {
			s := newOldServer(t)
			var connects atomic.Int32
			proxy := ""
			if proxied {
				proxy = newProxy(t, &connects)
			}
			p := s.open(t, "t", proxy).PortForward(testPod, 7531)
			conn, err := p.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if p.Name() != "port-forward (SPDY)" {
				t.Error(p.Name())
			}
			if proxied && connects.Load() != 2 {
				t.Errorf("%d connections through the proxy, want one for each try", connects.Load())
			}
			data := make([]byte, 3<<20+17)
			rand.Read(data)
			go func() {
				for rest, n := data, 1; len(rest) > 0; n = n*3 + 1 { // odd sizes, small to large
					part := rest[:min(n, len(rest))]
					if m, err := conn.Write(part); err != nil || m != len(part) {
						t.Errorf("wrote %d of %d: %v", m, len(part), err)
						return
					}
					rest = rest[len(part):]
				}
			}()
			back := make([]byte, len(data))
			if _, err := io.ReadFull(conn, back); err != nil || !bytes.Equal(back, data) {
				t.Fatalf("echo: %v, equal %v", err, bytes.Equal(back, data))
			}
			released := make(chan error)
			go func() {
				_, err := conn.Read(back)
				released <- err
			}()
			time.Sleep(20 * time.Millisecond)
			conn.Close()
			conn.Close()
			if err := <-released; err == nil {
				t.Error("a Read after Close")
			}
			// The next dial does not try WebSocket again.
			conn, err = p.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			if n := s.webSockets.Load(); n != 1 {
				t.Errorf("%d tries of WebSocket", n)
			}
		})
	}
}

func TestPortForwardSaysWhy(t *testing.T) {
	s := newOldServer(t)
	conn, err := s.open(t, "t", "").PortForward(testPod, 9).Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("%v", err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "connection refused") {
		t.Errorf("the second Read: %v", err)
	}
	_, err = s.open(t, "stale", "").PortForward(testPod, 7531).Dial(t.Context())
	var e *api.Error
	if !errors.As(err, &e) || e.Code != api.CodeCredentials {
		t.Errorf("%v", err)
	}
}

func TestPortForwardDialEndsWithContext(t *testing.T) {
	// Takes connections and says nothing.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := newOldServer(t)
	c := s.open(t, "t", "http://"+l.Addr().String())
	for _, spdyOnly := range []bool{false, true} {
		p := c.PortForward(testPod, 7531)
		p.spdy = spdyOnly
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		start := time.Now()
		_, err := p.Dial(ctx)
		cancel()
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeUnreachable || time.Since(start) > 5*time.Second {
			t.Errorf("SPDY %v: %v after %v", spdyOnly, err, time.Since(start))
		}
	}
}

// writeCounter stands for the WebSocket below the frames.
type writeCounter struct {
	net.Conn
	writes int
}

func (w *writeCounter) Write(p []byte) (int, error) {
	w.writes++
	return len(p), nil
}

func TestOneWritePerFrame(t *testing.T) {
	below := &writeCounter{}
	s := &stream{Conn: below, buf: make([]byte, frameHeader+maxPayload)}
	for _, size := range []int{0, 1, maxPayload} {
		below.writes = 0
		if n, err := s.Write(make([]byte, size)); n != size || err != nil || below.writes != 1 {
			t.Errorf("%d bytes: %d, %v, in %d writes", size, n, err, below.writes)
		}
	}
	allocs := testing.AllocsPerRun(10, func() { s.Write(s.buf[:1000]) })
	if allocs > 0 {
		t.Errorf("%v allocations for a frame", allocs)
	}
}
