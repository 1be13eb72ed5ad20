package session

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
)

// What a session notes is there for the next process of its id, for nobody else,
// and gone when nothing is left to undo.
func TestJournal(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", t.TempDir())
	s := newSession(nil)
	s.id = "1234"
	s.remembered.Agent = "culvert-agent-1234"
	j := s.journal()
	if e, err := j.read(); err != nil || len(e.Intercepts) != 0 {
		t.Fatalf("nothing noted: %+v, %v", e, err)
	}
	list := []saved{{ID: "a", Token: "secret", Namespace: "shop", Key: "cart", Service: "cart", Active: true,
		Request: api.InterceptRequest{Kind: api.KindExchange, Target: "cart", Expose: []string{"8080:80"}},
		Ports:   []api.InterceptPort{{Local: 8080, Port: 80, Protocol: "TCP"}}}}
	if err := s.writeJournal(list); err != nil {
		t.Fatal(err)
	}
	e, err := j.read()
	if err != nil || !reflect.DeepEqual(e.Intercepts, list) || e.Agent != "culvert-agent-1234" || e.Session != "1234" {
		t.Errorf("noted %+v, %v", e, err)
	}
	if st, _ := os.Stat(j.path); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	if files, _ := os.ReadDir(filepath.Dir(j.path)); len(files) != 1 {
		t.Errorf("files %v", files)
	}
	for range 2 {
		if err := j.remove(); err != nil {
			t.Fatal(err)
		}
	}
	if e, err := j.read(); err != nil || len(e.Intercepts) != 0 {
		t.Errorf("after its end: %+v, %v", e, err)
	}
	if err := os.WriteFile(j.path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := j.read(); err == nil {
		t.Error("half a journal is read without an error: what it says would never be undone")
	}
	t.Setenv("XDG_STATE_HOME", "/proc/nowhere")
	if err := s.writeJournal(list); err == nil {
		t.Error("a journal that cannot be written is no error: a crash could not be undone")
	}
}

func TestMeans(t *testing.T) {
	cart := &intercepted{saved: saved{Namespace: "shop", Service: "cart", Key: "cart", Request: api.InterceptRequest{Kind: api.KindExchange, Target: "deployment/cart"}}}
	scaled := &intercepted{saved: saved{Namespace: "shop", Service: "deployment/cart", Key: "scale.deployment.cart", Request: api.InterceptRequest{Kind: api.KindExchange, Target: "deploy/cart", Mode: api.ModeScale}}}
	ports := &intercepted{saved: saved{Namespace: "shop", Request: api.InterceptRequest{Kind: api.KindExpose}, Ports: []api.InterceptPort{{Port: 9091}}}}
	for _, c := range []struct {
		i    *intercepted
		req  api.LeaveRequest
		want bool
	}{
		{cart, api.LeaveRequest{Service: "cart"}, true},
		{cart, api.LeaveRequest{Service: "svc/cart"}, true},
		{cart, api.LeaveRequest{Service: "service/cart", Namespace: "shop"}, true},
		{cart, api.LeaveRequest{Service: "deployment/cart"}, true},
		{cart, api.LeaveRequest{Service: "cart", Namespace: "dev"}, false},
		{cart, api.LeaveRequest{Service: "car"}, false},
		{cart, api.LeaveRequest{}, false},
		{scaled, api.LeaveRequest{Service: "deployment/cart"}, true},
		{scaled, api.LeaveRequest{Service: "deploy/cart"}, true},
		{scaled, api.LeaveRequest{Service: "cart"}, false},
		{ports, api.LeaveRequest{Service: "9091"}, true},
		{ports, api.LeaveRequest{Service: "909"}, false},
	} {
		if got := c.i.means(c.req); got != c.want {
			t.Errorf("%s, %+v: %v", c.i.name(), c.req, got)
		}
	}
}
