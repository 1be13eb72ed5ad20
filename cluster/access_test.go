package cluster

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

// guard is an API server that only looks at who comes.
type guard struct {
	*httptest.Server
	mu    sync.Mutex
	seen  []string // "list TOKEN", "port-forward TOKEN", "pods/proxy TOKEN"
	valid string   // another token is answered with 401; empty: any will do
}

func newGuard(t *testing.T) *guard {
	g := &guard{}
	g.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token := strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")
		what := "list"
		for path, name := range map[string]string{"/portforward": "port-forward", "/proxy/": "pods/proxy"} {
			if strings.HasSuffix(r.URL.Path, path) {
				what = name
			}
		}
		g.mu.Lock()
		defer g.mu.Unlock()
		g.seen = append(g.seen, what+" "+token)
		if g.valid != "" && token != g.valid {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, `{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[]}`)
	}))
	t.Cleanup(g.Close)
	return g
}

// only is the token that all requests had since the last call.
func (g *guard) only(t *testing.T) string {
	t.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	tokens := map[string]bool{}
	kinds := map[string]bool{}
	token := ""
	for _, s := range g.seen {
		kind, t, _ := strings.Cut(s, " ")
		token, tokens[t], kinds[kind] = t, true, true
	}
	if len(tokens) != 1 || len(kinds) != 3 {
		t.Errorf("requests %q", g.seen)
	}
	g.seen = nil
	return token
}

// TestCredentialsRenewed: whatever way a kubeconfig has its token from, the next
// request and the next carrier take the new one.
func TestCredentialsRenewed(t *testing.T) {
	const text = `{"kind":"Config","current-context":"c","clusters":[{"name":"c","cluster":{"server":%q,"insecure-skip-tls-verify":true}}],
		"contexts":[{"name":"c","context":{"cluster":"c","user":"u"}}],"users":[{"name":"u","user":%s}]}`
	use := func(t *testing.T, c *Cluster) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, _ = c.client.Pods("x").List(ctx, metav1.ListOptions{})
		agent := &Agent{Namespace: "x", Pod: "p"}
		for _, d := range []interface{ Name() string }{c.PortForward(agent, 1), c.PodProxy(agent, 1)} {
			switch d := d.(type) {
			case *PortForward:
				_, _ = d.Dial(ctx)
			case *PodProxy:
				_, _ = d.Dial(ctx)
			}
		}
	}
	setup := func(t *testing.T, user string) (g *guard, c *Cluster, path string) {
		t.Helper()
		g = newGuard(t)
		path = writeKubeconfig(t, fmt.Sprintf(text, g.URL, user))
		c, err := Open(api.Options{Kubeconfig: path})
		if err != nil {
			t.Fatal(err)
		}
		return g, c, path
	}
	write := func(t *testing.T, path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("in the kubeconfig", func(t *testing.T) {
		g, c, path := setup(t, `{"token":"old"}`)
		use(t, c)
		if got := g.only(t); got != "old" {
			t.Error(got)
		}
		for _, broken := range []string{"{", "", fmt.Sprintf(text, "https://192.0.2.1:6443", `{"token":"another's"}`)} {
			write(t, path, broken)
			use(t, c)
			if got := g.only(t); got != "old" {
				t.Errorf("with the kubeconfig %q the token is %q", broken, got)
			}
		}
		write(t, path, fmt.Sprintf(text, g.URL, `{"token":"new"}`))
		use(t, c)
		if got := g.only(t); got != "new" {
			t.Error(got)
		}
	})
	t.Run("in a file", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "token")
		write(t, file, "old")
		g, c, _ := setup(t, fmt.Sprintf(`{"tokenFile":%q}`, file))
		use(t, c)
		if got := g.only(t); got != "old" {
			t.Error(got)
		}
		write(t, file, "new")
		// A carrier reads the file at each dial; requests have read it within the
		// last minute, as kubectl's would.
		_, _ = c.PodProxy(&Agent{Namespace: "x", Pod: "p"}, 1).Dial(t.Context())
		if got := g.seen; len(got) != 1 || got[0] != "pods/proxy new" {
			t.Errorf("%q", got)
		}
	})
	for _, how := range []string{"expires", "refused"} {
		t.Run("of a plugin that "+how, func(t *testing.T) {
			plugin := filepath.Join(t.TempDir(), "plugin")
			say := func(token string) {
				expires := ""
				if how == "expires" {
					expires = fmt.Sprintf(`,"expirationTimestamp":%q`, time.Now().Add(2*time.Second).Format(time.RFC3339))
				}
				write(t, plugin, fmt.Sprintf("#!/bin/sh\necho '{\"apiVersion\":\"client.authentication.k8s.io/v1\",\"kind\":\"ExecCredential\",\"status\":{\"token\":%q%s}}'\n", token, expires))
			}
			say("old")
			g, c, _ := setup(t, fmt.Sprintf(`{"exec":{"apiVersion":"client.authentication.k8s.io/v1","command":%q,"interactiveMode":"Never"}}`, plugin))
			use(t, c)
			if got := g.only(t); got != "old" {
				t.Error(got)
			}
			say("new")
			if how == "expires" {
				time.Sleep(2100 * time.Millisecond)
			} else {
				g.valid = "new"
				_, _ = c.PodProxy(&Agent{Namespace: "x", Pod: "p"}, 1).Dial(t.Context()) // is refused, and has the plugin asked again
				g.seen = nil
			}
			use(t, c)
			if got := g.only(t); got != "new" {
				t.Error(got)
			}
		})
	}
}
