package gate

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// testKey is a certificate of its own for names.
func testKey(t *testing.T, names ...string) (intercept.TLSKey, tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: names[0]}, DNSNames: names,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	k := intercept.TLSKey{
		Certificate: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		Key:         string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private})),
	}
	pair, err := tls.X509KeyPair([]byte(k.Certificate), []byte(k.Key))
	if err != nil {
		t.Fatal(err)
	}
	return k, pair
}

// tlsOrigin is an HTTPS server.
func tlsOrigin(t *testing.T, h http.Handler, cert tls.Certificate, protocols ...string) string {
	t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: protocols})
	if err != nil {
		t.Fatal(err)
	}
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetHTTP2(slices.Contains(protocols, alpnHTTP2))
	s := &http.Server{Handler: h, Protocols: p}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// about answers with its name, and how it was asked.
func about(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		w.Header().Set("Trailer", "X-Sum")
		fmt.Fprintf(w, "%s %s %s %d tls=%v", name, r.Proto, r.Header.Get("X-Forwarded-Proto"), n, r.TLS != nil)
		w.Header().Set("X-Sum", "sum")
	})
}

// tlsClient trusts one certificate, and speaks HTTP/2 or HTTP/1.
func tlsClient(t *testing.T, cert tls.Certificate, two bool) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(cert.Leaf)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "web.demo"}, ForceAttemptHTTP2: two}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	key, cert := testKey(t, "web.demo")
	_, programs := testKey(t, "localhost")
	agents := map[string]func(t *testing.T) *fakeAgent{
		"a program without TLS": func(t *testing.T) *fakeAgent { return httpAgent(t, about("machine")) },
		"a program with TLS": func(t *testing.T) *fakeAgent {
			return tlsAgent(t, about("machine"), programs)
		},
	}
	for name, agent := range agents {
		for _, two := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", HTTP/2 ", two), func(t *testing.T) {
				origin := tlsOrigin(t, about("origin"), cert, alpnHTTP2, alpnHTTP1)
				g := startGate(t, Config{}, nil)
				route := meshRoute(t, origin, intercept.HTTPTLS)
				state := meshState(1, route, meshMember("a", agent(t), "header:VERSION=a"))
				state.Keys = map[string]intercept.TLSKey{"web": key}
				if s := g.push(state); len(s.Failed) > 0 || !slices.Equal(s.Keys, []string{"web"}) {
					t.Fatalf("status %+v", s)
				}
				g.memberIs(intercept.Accepted)
				client := tlsClient(t, cert, two)
				for mark, server := range map[string]string{"a": "machine", "b": "origin"} {
					for _, size := range []int{0, 300000} {
						req, _ := http.NewRequest("POST", fmt.Sprintf("https://127.0.0.1:%d/", route.Listen), bytes.NewReader(make([]byte, size)))
						req.Header.Set("VERSION", mark)
						resp, err := client.Do(req)
						if err != nil {
							t.Fatalf("%s: %v", mark, err)
						}
						b, err := io.ReadAll(resp.Body)
						resp.Body.Close()
						want := fmt.Sprintf("%s HTTP/%d", server, map[bool]int{true: 2, false: 1}[two])
						if err != nil || !strings.HasPrefix(string(b), want) || !strings.Contains(string(b), fmt.Sprintf(" https %d ", size)) || resp.Trailer.Get("X-Sum") != "sum" {
							t.Errorf("%s of %d bytes: %d %s %v, %v; want %s", mark, size, resp.StatusCode, b, resp.Trailer, err, want)
						}
					}
				}
				// Nowhere but in memory.
				if kept, err := os.ReadFile(g.cfg.KeepFile); err != nil || bytes.Contains(kept, []byte("PRIVATE")) || !bytes.Contains(kept, []byte("VERSION")) {
					t.Errorf("the kept state is %s, %v", kept, err)
				}
				client.CloseIdleConnections()
				eventually(t, "connections with TLS end", func() bool { return g.tlsConns.Load() == 0 })
			})
		}
	}
}

// tlsAgent is an agent behind which an HTTPS server is.
func tlsAgent(t *testing.T, h http.Handler, cert tls.Certificate) *fakeAgent {
	t.Helper()
	l := newHandedListener()
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetHTTP2(true)
	s := &http.Server{Handler: h, Protocols: p}
	go s.Serve(tls.NewListener(l, &tls.Config{Certificates: []tls.Certificate{cert}, NextProtos: []string{alpnHTTP2, alpnHTTP1}}))
	t.Cleanup(func() { s.Close(); l.Close() })
	return startAgent(t, func(_ intercept.Header, c *net.TCPConn) { l.conns <- c })
}

// Without the key TLS passes as it is, and what is no TLS is routed.
func TestTLSWithoutKey(t *testing.T) {
	t.Parallel()
	key, cert := testKey(t, "web.demo")
	_, other := testKey(t, "web.demo")
	origin := tlsOrigin(t, about("origin"), other, alpnHTTP1)
	g, route := meshOf(t, origin, intercept.HTTPTLS, httpAgent(t, about("machine")), nil)
	url := fmt.Sprintf("https://127.0.0.1:%d/", route.Listen)
	req, _ := http.NewRequest("GET", url, nil)
	req.Header.Set("VERSION", "a")
	resp, err := tlsClient(t, other, false).Do(req) // who shows the origin's own certificate
	if err != nil {
		t.Fatal(err)
	}
	b, _ := io.ReadAll(resp.Body)
	resp.Body.Close()
	if !strings.HasPrefix(string(b), "origin") {
		t.Errorf("TLS is answered by %s", b)
	}

	// With a key that is not the origin's the gate would be fooled by anybody.
	state := meshState(2, route, meshMember("a", httpAgent(t, about("machine")), "header:VERSION=a"))
	state.Keys = map[string]intercept.TLSKey{"web": key}
	g.push(state)
	resp, err = tlsClient(t, cert, false).Get(url)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("an origin with another certificate: %s", resp.Status)
	}
	if got := g.reach(t.Context(), g.state.Entries["web"], g.keyOf("web"), false); len(got) != 1 || !strings.Contains(got[0].Error, "certificate") {
		t.Errorf("its reach is %+v", got)
	}
	// The entry's end is the key's.
	g.push(intercept.State{Generation: 3, Entries: map[string]intercept.Entry{}})
	if k := g.keyOf("web"); k != nil {
		t.Error("the key outlives its entry")
	}
}
