package peer

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestCheckName(t *testing.T) {
	for _, name := range []string{"a", "Phone", "my-mac_2", "0", strings.Repeat("x", MaxName)} {
		if err := CheckName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"", "-x", "_x", "a b", "a.b", "a/b", "ä", "x\n", strings.Repeat("x", MaxName+1)} {
		if CheckName(name) == nil {
			t.Errorf("%q is taken for a name", name)
		}
	}
}

// TestClient: what a client makes of answers, also of those that no agent gives.
func TestClient(t *testing.T) {
	var answer func(w http.ResponseWriter, r *http.Request)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { answer(w, r) }))
	defer server.Close()
	c := &Client{Secret: "s3cret", Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "tcp", server.Listener.Addr().String())
	}}
	answer = func(w http.ResponseWriter, r *http.Request) {
		if r.Method != "PUT" || r.URL.Path != Path+"/phone" || r.Header.Get("Authorization") != "Bearer s3cret" {
			t.Errorf("%s %s %v", r.Method, r.URL, r.Header)
		}
		io.WriteString(w, `{"instance":"i","peers":[{"name":"phone"}],"unknown":1}`)
	}
	if st, err := c.Add(t.Context(), "phone", Ask{}); err != nil || st.Instance != "i" || len(st.Peers) != 1 {
		t.Errorf("%+v, %v", st, err)
	}
	var r *Refusal
	answer = func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(409)
		io.WriteString(w, `{"reason":"taken"}`)
	}
	if _, err := c.Add(t.Context(), "x", Ask{}); !errors.As(err, &r) || r.Status != 409 || r.Reason != "taken" {
		t.Errorf("a refusal: %v", err)
	}
	answer = http.NotFound // an agent that knows nothing of peers
	if _, err := c.Get(t.Context()); !errors.As(err, &r) || r.Status != 404 || !strings.Contains(r.Reason, "404") {
		t.Errorf("not found: %v", err)
	}
	answer = func(w http.ResponseWriter, _ *http.Request) { io.Copy(w, io.LimitReader(zeros{}, 1<<20)) }
	if _, err := c.Get(t.Context()); err == nil {
		t.Error("an endless answer is taken")
	}
	want := errors.New("no way")
	c.Dial = func(context.Context) (net.Conn, error) { return nil, want }
	if _, err := c.Remove(t.Context(), "x"); !errors.Is(err, want) {
		t.Errorf("without a way: %v", err)
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
