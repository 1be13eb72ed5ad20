package gate

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// mount writes a state as the kubelet does: into a folder of its own, to which
// the link ..data is swapped.
func mount(t *testing.T, dir string, s intercept.State) {
	t.Helper()
	folder := fmt.Sprintf("..%d", s.Generation)
	write(t, filepath.Join(dir, folder, "generation"), fmt.Sprint(s.Generation))
	for key, e := range s.Entries {
		b, _ := json.Marshal(e)
		write(t, filepath.Join(dir, folder, key+".json"), string(b))
	}
	link := filepath.Join(dir, "..data_tmp")
	if err := os.Symlink(folder, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(link, filepath.Join(dir, "..data")); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// TestNewestState: of mounted, kept and pushed the largest generation is in
// force.
func TestNewestState(t *testing.T) {
	t.Parallel()
	old, newer := serve(t, lines("old")), serve(t, lines("new"))
	for _, c := range []struct {
		name          string
		mounted, kept int64 // 0: none
		push          int64
		want          int64
	}{
		{"mounted alone", 3, 0, 0, 3},
		{"kept alone", 0, 4, 0, 4},
		{"kept is newer", 3, 4, 0, 4},
		{"mounted is newer", 5, 4, 0, 5},
		{"pushed is newer", 5, 4, 6, 6},
		{"pushed is older", 5, 4, 3, 5},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			route := tcpRoute(t, old, nil)
			state := func(generation int64) intercept.State {
				r := route
				if generation == c.want {
					r.Origin = newer
				}
				return stateOf(generation, r)
			}
			if c.mounted > 0 {
				mount(t, dir, state(c.mounted))
			}
			keep := filepath.Join(t.TempDir(), "state.json")
			if c.kept > 0 {
				b, _ := json.Marshal(state(c.kept))
				write(t, keep, string(b))
			}
			g := startGate(t, Config{StateDir: dir, KeepFile: keep}, nil)
			if c.push > 0 {
				g.push(state(c.push))
			}
			if s := g.status(); s.Generation != c.want || len(s.Routes) != 1 {
				t.Fatalf("status %+v", s)
			}
			if got := ask(t, dial(t, route.Listen), "x"); got != "new: x\n" {
				t.Errorf("answer %q", got)
			}
		})
	}
}

// TestMountedChanges: the files are looked at again, and what is broken changes
// nothing.
func TestMountedChanges(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	g := startGate(t, Config{StateDir: dir}, func(x *timing) { x.reload = 10 * time.Millisecond })
	generation := func() int64 { return g.status().Generation }
	if err := g.ready(); err == nil || !strings.Contains(err.Error(), "no state") {
		t.Errorf("ready: %v", err)
	}
	route := tcpRoute(t, serve(t, lines("origin")), nil)
	mount(t, dir, stateOf(1, route))
	eventually(t, "the first is in force", func() bool { return generation() == 1 })
	if err := g.ready(); err != nil {
		t.Errorf("ready: %v", err)
	}
	open := dial(t, route.Listen)
	ask(t, open, "x")

	bad := tcpRoute(t, "", nil)
	bad.Protocol = "SCTP"
	mount(t, dir, stateOf(2, route, bad))
	time.Sleep(50 * time.Millisecond)
	if generation() != 1 {
		t.Error("a broken state is in force")
	}
	second := tcpRoute(t, serve(t, lines("second")), nil)
	mount(t, dir, stateOf(3, route, second))
	eventually(t, "the third is in force", func() bool { return generation() == 3 })
	if got := ask(t, dial(t, second.Listen), "x"); got != "second: x\n" {
		t.Errorf("answer %q", got)
	}
	// An entry of another gate may be as it likes.
	other := stateOf(4, second)
	other.Entries["other"] = intercept.Entry{Gate: "culvert-gate-other", Routes: []intercept.Route{bad}}
	mount(t, dir, other)
	eventually(t, "the fourth is in force", func() bool { return generation() == 4 })
	eventually(t, "the first port is closed", func() bool {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", route.Listen))
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	if got := ask(t, open, "y"); got != "origin: y\n" {
		t.Errorf("what was open: %q", got)
	}
}

// TestRestart: a container that is restarted serves what was pushed before.
func TestRestart(t *testing.T) {
	t.Parallel()
	keep := filepath.Join(t.TempDir(), "state.json")
	g := startGate(t, Config{KeepFile: keep}, nil)
	route := tcpRoute(t, serve(t, lines("origin")), nil)
	g.push(stateOf(7, route))
	g.Close()
	again := startGate(t, Config{KeepFile: keep}, nil)
	if s := again.status(); s.Generation != 7 {
		t.Fatalf("status %+v", s)
	}
	if got := ask(t, dial(t, route.Listen), "x"); got != "origin: x\n" {
		t.Errorf("answer %q", got)
	}
	left, _ := os.ReadDir(filepath.Dir(keep))
	if len(left) != 1 {
		t.Errorf("files: %v", left)
	}
}

// TestPush: what is refused changes nothing.
func TestPush(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	route := tcpRoute(t, serve(t, lines("origin")), nil)
	g.push(stateOf(5, route))
	with := func(change func(*intercept.Route)) string {
		r := route
		change(&r)
		b, _ := json.Marshal(stateOf(9, r))
		return string(b)
	}
	for _, c := range []struct{ name, body, want string }{
		{"nothing", "", "unexpected end"},
		{"no JSON", "generation: 9", "invalid"},
		{"no generation", "{}", "generation 0"},
		{"an array", "[]", "cannot unmarshal"},
		{"no port", with(func(r *intercept.Route) { r.Listen = 0 }), "no port"},
		{"a protocol", with(func(r *intercept.Route) { r.Protocol = "tcp" }), `"tcp"`},
		{"an origin", with(func(r *intercept.Route) { r.Origin = "web" }), "origin"},
		{"no agent", with(func(r *intercept.Route) { r.Machine = &intercept.Machine{ID: "x"} }), "agent"},
		{"an agent", with(func(r *intercept.Route) { r.Machine = &intercept.Machine{Agents: []string{"10.0.0.1"}} }), "agent"},
		{"too long", `{"generation": 9, "entries": {"` + strings.Repeat("x", maxState) + `": {}}}`, "too large"},
	} {
		code, answer := g.do(http.MethodPut, "/v1/state", []byte(c.body))
		if code != http.StatusBadRequest || !strings.Contains(string(answer), c.want) {
			t.Errorf("%s: %d %s", c.name, code, answer)
		}
	}
	// The same again, and an older one: the answer is what is in force.
	for _, generation := range []int64{5, 4} {
		if s := g.push(stateOf(generation)); s.Generation != 5 || len(s.Routes) != 1 {
			t.Errorf("generation %d: %+v", generation, s)
		}
	}
	code, answer := g.do(http.MethodGet, "/v1/state", nil)
	var s intercept.GateStatus
	if err := json.Unmarshal(answer, &s); code != http.StatusOK || err != nil || s.Generation != 5 {
		t.Errorf("status %d %s", code, answer)
	}
	if got := ask(t, dial(t, route.Listen), "x"); got != "origin: x\n" {
		t.Errorf("answer %q", got)
	}
	// Nothing for this gate is a state too.
	if s := g.push(intercept.State{Generation: 6}); s.Generation != 6 || len(s.Routes) != 0 || len(s.Failed) != 0 || g.ready() != nil {
		t.Errorf("%+v", s)
	}
}

// TestPortConflict: a port that another has is reported, and taken when it is free.
func TestPortConflict(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, func(x *timing) { x.reload = 20 * time.Millisecond })
	busy, err := net.Listen("tcp", ":0")
	if err != nil {
		t.Fatal(err)
	}
	defer busy.Close()
	origin := serve(t, lines("origin"))
	taken := intercept.Route{Listen: uint16(busy.Addr().(*net.TCPAddr).Port), Protocol: "TCP", Port: 80, Origin: origin}
	route := tcpRoute(t, origin, nil)
	s := g.push(stateOf(1, route, taken))
	if want := fmt.Sprintf("port %d/TCP: address in use", taken.Listen); len(s.Failed) != 1 || s.Failed[0] != want {
		t.Errorf("failed: %q", s.Failed)
	}
	if err := g.ready(); err == nil || !strings.Contains(err.Error(), "address in use") {
		t.Errorf("ready: %v", err)
	}
	if got := ask(t, dial(t, route.Listen), "x"); got != "origin: x\n" {
		t.Errorf("answer %q", got)
	}
	busy.Close()
	eventually(t, "the gate is ready", func() bool { return g.ready() == nil })
	if got := ask(t, dial(t, taken.Listen), "x"); got != "origin: x\n" {
		t.Errorf("answer %q", got)
	}
	// Two entries want one port.
	two := stateOf(2, route)
	two.Entries["zweite"] = two.Entries["web"]
	if s := g.push(two); len(s.Failed) != 1 || !strings.Contains(s.Failed[0], "asked for by web and zweite") {
		t.Errorf("failed: %q", s.Failed)
	}
	if err := g.ready(); err != nil {
		t.Errorf("for the other Services: %v", err)
	}
}

// TestReach: the origins of an entry are dialled.
func TestReach(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, func(x *timing) { x.reach = 300 * time.Millisecond })
	origins := []string{serve(t, lines("x")), fmt.Sprintf("127.0.0.1:%d", freePort(t)), deaf(t), ""}
	var routes []intercept.Route
	for i, origin := range origins {
		r := tcpRoute(t, origin, nil)
		r.Port = int32(i)
		routes = append(routes, r)
	}
	// Pods that do not answer, before an origin that no node knows yet.
	hidden := tcpRoute(t, origins[1], nil)
	hidden.Port, hidden.Backends = 4, []string{deaf(t)}
	routes = append(routes, hidden)
	g.push(stateOf(1, append(routes, udpRoute(t, "127.0.0.1:9", nil))...))
	code, b := g.do(http.MethodPost, "/v1/reach", []byte(`{"key": "web"}`))
	var got []intercept.Reached
	if err := json.Unmarshal(b, &got); err != nil || code != http.StatusOK || len(got) != 4 {
		t.Fatalf("%d %s", code, b)
	}
	if got[0].Error != "" || got[1].Error != "refused" || !strings.Contains(got[2].Error, "timeout") || got[2].Port != 2 || got[2].Origin != origins[2] || !strings.Contains(got[3].Error, "timeout") {
		t.Errorf("%+v", got)
	}
	for body, want := range map[string]int{`{"key": "nobody"}`: http.StatusNotFound, `x`: http.StatusBadRequest} {
		if code, _ := g.do(http.MethodPost, "/v1/reach", []byte(body)); code != want {
			t.Errorf("%s: %d", body, code)
		}
	}
}

// TestWeb: what `culvert-agent health` and Prometheus ask.
func TestWeb(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	get := func(page string) (int, string) {
		t.Helper()
		resp, err := http.Get("http://" + g.cfg.MetricsAddr + page)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, _ := io.ReadAll(resp.Body)
		return resp.StatusCode, string(b)
	}
	if code, text := get("/healthz"); code != http.StatusOK {
		t.Errorf("healthz: %d %s", code, text)
	}
	if code, text := get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(text, "no state") {
		t.Errorf("readyz: %d %s", code, text)
	}
	a := startAgent(t, nil)
	route := tcpRoute(t, "", a.machine())
	g.push(stateOf(3, route))
	g.machineIs(intercept.Accepted)
	if code, text := get("/readyz"); code != http.StatusOK {
		t.Errorf("readyz: %d %s", code, text)
	}
	ask(t, dial(t, route.Listen), "1234567")
	_, text := get("/metrics")
	for _, want := range []string{
		"culvert_gate_generation 3\n",
		`culvert_gate_connections{port="80",protocol="TCP",service="web",to="machine"} 1`,
		`culvert_gate_connections_total{port="80",protocol="TCP",service="web",to="origin"} 0`,
		`culvert_gate_bytes_total{direction="up",port="80",protocol="TCP",service="web"} 8`,
		`culvert_gate_bytes_total{direction="down",port="80",protocol="TCP",service="web"} 17`,
		`culvert_gate_machine_here{port="80",protocol="TCP",service="web"} 1`,
		`culvert_gate_refused_total{port="80",protocol="TCP",service="web"} 0`,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	g.stop()
	eventually(t, "it is unready at once", func() bool { code, _ := get("/readyz"); return code == http.StatusServiceUnavailable })
	if err := <-g.stopped; err != nil {
		t.Errorf("Run: %v", err)
	}
}

// TestSecondGateOfAPort: what cannot listen for control does not run.
func TestSecondGateOfAPort(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	if err := New(Config{ControlAddr: g.cfg.ControlAddr}).Run(context.Background()); err == nil || !strings.Contains(err.Error(), "listening for states") {
		t.Errorf("Run: %v", err)
	}
}
