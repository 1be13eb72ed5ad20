package cluster

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/queue"
)

// proxyServer is an API server whose pods/proxy hands connections to serve.
func proxyServer(t *testing.T, proxy string, serve func(w http.ResponseWriter, req *http.Request)) *PodProxy {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch {
		case req.Header.Get("Authorization") != "Bearer t":
			http.Error(w, "Unauthorized", http.StatusUnauthorized)
		case req.Method != http.MethodGet || req.URL.Path != "/api/v1/namespaces/demo/pods/p:7533/proxy/" ||
			req.Header.Get("Upgrade") != carrier.ProxyUpgrade || !strings.EqualFold(req.Header.Get("Connection"), "upgrade"):
			http.NotFound(w, req)
		default:
			serve(w, req)
		}
	}))
	t.Cleanup(s.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	c, err := Open(api.Options{Kubeconfig: writeKubeconfig(t, fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: x
clusters: [{name: x, cluster: {server: %q, certificate-authority-data: %q, proxy-url: %q}}]
users: [{name: x, user: {token: t}}]
contexts: [{name: x, context: {cluster: x, user: x}}]
`, s.URL, base64.StdEncoding.EncodeToString(ca), proxy))})
	if err != nil {
		t.Fatal(err)
	}
	return c.PodProxy(testPod, 7533)
}

// hijacked is the server's side of the connection, with what it read already.
type hijacked struct {
	net.Conn
	r io.Reader
}

func (h hijacked) Read(p []byte) (int, error) { return h.r.Read(p) }

// TestPodProxy: the agent's own end answers the request that was made, through
// an HTTP proxy too, and the secret is in no header.
func TestPodProxy(t *testing.T) {
	secret := carrier.NewSecret()
	for _, proxied := range []bool{false, true} {
		t.Run(fmt.Sprintf("proxy %v", proxied), func(t *testing.T) {
			var connects atomic.Int32
			proxy := ""
			if proxied {
				proxy = newProxy(t, &connects)
			}
			streams := make(chan *carrier.Stream, 1)
			p := proxyServer(t, proxy, func(w http.ResponseWriter, req *http.Request) {
				var head strings.Builder
				_ = req.Write(&head)
				if strings.Contains(head.String(), base64.StdEncoding.EncodeToString(secret)) || strings.Contains(head.String(), string(secret)) {
					t.Error("the secret is in a header")
				}
				conn, _, err := w.(http.Hijacker).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				s, err := carrier.Verify(context.Background(), hijacked{conn, io.MultiReader(strings.NewReader(head.String()), conn)}, secret)
				if err != nil {
					t.Error(err)
				}
				streams <- s
			})
			if p.Name() != "pods/proxy" {
				t.Error(p.Name())
			}
			conn, err := p.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			s, err := carrier.Prove(t.Context(), conn, secret, queue.Sparse)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if theirs := <-streams; theirs != nil {
				defer theirs.Close()
			}
			if proxied != (connects.Load() == 1) {
				t.Errorf("%d connections through the proxy", connects.Load())
			}
		})
	}
}

func TestPodProxyRefused(t *testing.T) {
	status := func(code int, reason, message string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(code)
			fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","message":%q,"reason":%q,"code":%d}`, message, reason, code)
		}
	}
	for name, c := range map[string]struct {
		serve      func(http.ResponseWriter, *http.Request)
		code, text string
	}{
		"RBAC": {status(403, "Forbidden", `pods "p:7533" is forbidden: User "u" cannot get resource "pods/proxy" in API group "" in the namespace "demo"`),
			api.CodeForbidden, "RBAC"},
		"refused port": {status(503, "ServiceUnavailable", "error trying to reach service: dial tcp 10.1.1.1:7533: connect: connection refused"),
			api.CodeUnreachable, "connection refused"},
		"no upgrade": {func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "hello") }, api.CodeInternal, ""},
	} {
		_, err := proxyServer(t, "", c.serve).Dial(t.Context())
		var e *api.Error
		if !errors.As(err, &e) || e.Code != c.code || !strings.Contains(e.Message, c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestPodProxyClose: Close releases a read and a write that block.
func TestPodProxyClose(t *testing.T) {
	done := make(chan struct{})
	p := proxyServer(t, "", func(w http.ResponseWriter, _ *http.Request) {
		conn, rw, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprintf(rw, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: culvert\r\n\r\n")
		_ = rw.Flush()
		<-done // reads nothing, says nothing
	})
	defer close(done)
	conn, err := p.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 2)
	go func() { _, err := bufio.NewReader(conn).ReadByte(); ended <- err }()
	go func() {
		for {
			if _, err := conn.Write(make([]byte, 1<<20)); err != nil {
				ended <- err
				return
			}
		}
	}()
	time.Sleep(200 * time.Millisecond)
	conn.Close()
	for range 2 {
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Fatal("Close does not release who reads or writes")
		}
	}
}
