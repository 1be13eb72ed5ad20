//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"
)

// talkService has ports of all sorts, before the pods of the cart.
const talkService = `
apiVersion: v1
kind: Service
metadata: {name: talk, namespace: shop}
spec:
  selector: {app: cart}
  ports:
  - {name: front, port: 80, targetPort: 8080}
  - {name: calls, port: 9005, targetPort: 9005, appProtocol: grpc}
  - {name: greeting, port: 9006, targetPort: 9006}
  - {name: secure, port: 8443, targetPort: 8443}
`

// TestMeshProtocols: real clients of all that HTTP can do, with and without the mark;
// what is no HTTP passes to the origin.
func TestMeshProtocols(t *testing.T) {
	unchangedShop(t)
	apply(t, talkService)
	t.Cleanup(func() { kubectl(t, "-n", "shop", "delete", "service", "talk") })
	alice := aliceAt(t)
	alice.connect(t)
	alice.serve(t, "127.0.0.1")
	alice.intercept(t, "mesh", "talk", "--expose", "8080:80,9005,9006,8443", "--version-mark", "alice")
	ip := clusterIP(t, "talk")
	meshed(t, ip+":80", "alice", 3*time.Second, "VERSION:alice")

	// run has testapp say in JSON what came of something.
	run := func(t *testing.T, args ...string) (got struct {
		Server, Protocol, Code, Sum string
		Servers                     map[string]int
		Status, Events              int
		Sent, Received, Messages    int64
		Length                      int64
		SHA256                      string
		SentSum                     string `json:"sent_sha256"`
		Interim                     []int
		Whole                       bool
		Trailers                    map[string][]string
		Body                        string
		Head                        float64             `json:"head_ms"`
		Took                        float64             `json:"took_ms"`
		Gap                         float64             `json:"gap_ms"`
		Trailer                     map[string][]string // of gRPC
		Seen                        struct {
			Deadline float64 `json:"deadline_ms"`
			Messages int
		}
	}) {
		t.Helper()
		r := fromPod(clients[0], append([]string{"--json"}, args...)...)
		if err := json.Unmarshal([]byte(r.Stdout), &got); r.Code != 0 || err != nil {
			t.Errorf("testapp %v: %v, %v", args, err, r)
		}
		return got
	}
	for name, header := range map[string]string{"alice": "version:alice", "cart-*": "version:nobody"} {
		mark := []string{"--header", header}
		ask := func(t *testing.T, path string, more ...string) {
			t.Helper()
			got := run(t, append(append([]string{"ask", "http://" + ip + path}, mark...), more...)...)
			if !serves(got.Server, name) || got.Status != 200 {
				t.Errorf("%s %v is answered by %s with %d, want %s", path, more, got.Server, got.Status, name)
			}
		}
		t.Run("to "+strings.TrimSuffix(name, "-*"), func(t *testing.T) {
			for _, h2 := range []string{"--http2=false", "--http2"} {
				ask(t, "/who", h2)
				ask(t, "/hints", h2)
				got := run(t, append([]string{"ask", "http://" + ip + "/chunked?n=5000", h2}, mark...)...)
				if !serves(got.Server, name) || len(got.Trailers["X-Sha256"]) != 1 || got.Trailers["X-Sha256"][0] != got.SHA256 || got.Trailers["X-Pieces"][0] != "5000" {
					t.Errorf("an answer in pieces, of %d bytes and %s, has trailers %v", got.Length, got.SHA256, got.Trailers)
				}
				got = run(t, append([]string{"ask", "http://" + ip + "/head?q=%20", "--method", "POST", "--body", "20000000", h2}, mark...)...)
				var seen struct {
					Server, URI, Protocol, SHA256 string
					Length                        int64
					Headers                       map[string][]string
				}
				if err := json.Unmarshal([]byte(got.Body), &seen); err != nil || seen.Length != 20000000 || seen.SHA256 != got.SentSum || seen.URI != "/head?q=%20" {
					t.Errorf("a large body arrives as %+v, %v; sent was %s", seen, err, got.SentSum)
				}
				if len(seen.Headers["X-Forwarded-For"]) != 1 || seen.Headers["X-Forwarded-Proto"][0] != "http" {
					t.Errorf("the server does not know its client: %v", seen.Headers)
				}
				got = run(t, append([]string{"ask", "http://" + ip + "/head", "--method", "PUT", "--body", "100000", "--chunked", h2}, mark...)...)
				var trailed struct {
					SHA256   string
					Trailers map[string][]string
				}
				if err := json.Unmarshal([]byte(got.Body), &trailed); err != nil || trailed.SHA256 != got.SentSum || len(trailed.Trailers["X-Sha256"]) != 1 || trailed.Trailers["X-Sha256"][0] != got.SentSum {
					t.Errorf("a body with a trailer: %+v, %v; sent was %s", trailed, err, got.SentSum)
				}
				if events := run(t, append([]string{"sse", "http://" + ip + "/sse?n=5&every=300ms", h2}, mark...)...); events.Events != 5 || events.Gap < 100 || !events.Whole || !serves(events.Server, name) {
					t.Errorf("server-sent events: %+v", events)
				}
			}
			if got := run(t, append([]string{"ask", "http://" + ip + "/head", "--method", "POST", "--body", "1000", "--expect"}, mark...)...); len(got.Interim) == 0 || got.Interim[0] != 100 || got.Status != 200 {
				t.Errorf("100-continue: %+v", got)
			}
			got := run(t, append([]string{"ws", "ws://" + ip + "/ws", "--conns", "3", "--count", "20"}, mark...)...)
			for server := range got.Servers {
				if !serves(server, name) || got.Messages < 60 {
					t.Errorf("WebSockets: %+v", got)
				}
			}
			for _, call := range []string{"unary", "server", "client", "both"} {
				got := run(t, append([]string{"grpc", ip + ":9005", call, "--count", "20", "--every", "5ms"}, mark...)...)
				sent, back, counted := int64(1), int64(1), "1" // messages, and how many the server says that it got
				if call == "client" || call == "both" {
					sent, counted = 20, "20"
				}
				if call == "server" || call == "both" {
					back = 20
				}
				if got.Code != "OK" || !serves(got.Server, name) || got.Sent != sent || got.Received != back || len(got.Trailer["x-count"]) != 1 || got.Trailer["x-count"][0] != counted {
					t.Errorf("gRPC %s: %+v, want %s", call, got, name)
				}
				if known := got.Seen.Deadline; (call == "unary" || call == "client") && (known < 1000 || known > 30000) {
					t.Errorf("gRPC %s: its deadline arrives as %v ms", call, known)
				}
			}
			for how, version := range map[string]string{"--http1.1": "1.1", "--http2-prior-knowledge": "2", "--http2": "2"} {
				r := alice.Run(alice.user, "curl", "-sS", how, "-w", "in HTTP/%{http_version}", "-H", header, "http://"+ip+"/who")
				who, _, _ := strings.Cut(strings.TrimSpace(r.Stdout), " ")
				if r.Code != 0 || !serves(who, name) || !strings.HasSuffix(r.Stdout, "in HTTP/"+version) {
					t.Errorf("curl %s -H %q: %v", how, header, r)
				}
			}
		})
	}
	t.Run("no HTTP", func(t *testing.T) {
		served(t, "greet", ip+":9006", "cart-*")
		r := alice.Run(alice.user, "curl", "-sSk", "-H", "version: alice", fmt.Sprintf("https://%s:8443/who", ip))
		who, _, _ := strings.Cut(strings.TrimSpace(r.Stdout), " ")
		if r.Code != 0 || !serves(who, "cart-*") {
			t.Errorf("TLS: %v", r)
		}
	})
}
