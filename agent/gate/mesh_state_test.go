package gate

import (
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// TestMeshBadMember: one that cannot be served is told of, and the others are served.
func TestMeshBadMember(t *testing.T) {
	t.Parallel()
	a := httpAgent(t, named("machine"))
	g := startGate(t, Config{}, nil)
	route := meshRoute(t, httpOrigin(t, named("origin")), intercept.HTTPKnown)
	bad := func(session string, change func(*intercept.Member)) intercept.Member {
		m := meshMember(session, a, "header:VERSION="+session)
		change(&m)
		return m
	}
	s := g.push(meshState(1, route,
		bad("regex", func(m *intercept.Member) {
			m.Match[0] = intercept.Condition{On: "header", Key: "VERSION", How: "regex", Value: "("}
		}),
		bad("nothing", func(m *intercept.Member) { m.Match = nil }),
		bad("agent", func(m *intercept.Member) { m.Ports[0].Machine.Agents = []string{"nowhere"} }),
		bad("elsewhere", func(m *intercept.Member) { m.Ports[0].Port = 81 }),
		meshMember("good", a, "header:VERSION=good"),
	))
	if len(s.Failed) != 0 || len(s.Skipped) != 3 || !strings.Contains(s.Skipped[0], "member regex: ") || !strings.Contains(s.Skipped[1], "member nothing: ") || !strings.Contains(s.Skipped[2], "member agent: ") {
		t.Errorf("skipped %q", s.Skipped)
	}
	if len(s.Routes) != 1 || len(s.Routes[0].Members) != 1 || s.Routes[0].Members[0].Session != "good" {
		t.Errorf("routes %+v", s.Routes)
	}
	if err := g.ready(); err != nil {
		t.Errorf("not ready: %v", err)
	}
	client := oneConn(t)
	for mark, want := range map[string]string{"good": "machine", "agent": "origin", "elsewhere": "origin"} {
		if _, got := get(t, client, route.Listen, "GET", mark, ""); got != want+" GET " {
			t.Errorf("%s: %q", mark, got)
		}
	}
}

// TestMeshWatches: one watch for all members at an agent, with their proofs.
func TestMeshWatches(t *testing.T) {
	t.Parallel()
	a := httpAgent(t, named("machine"))
	a.bad.Store("i-new", true)
	g := startGate(t, Config{}, nil)
	route := meshRoute(t, httpOrigin(t, named("origin")), intercept.HTTPKnown)
	unknown := meshMember("new", a, "header:VERSION=new")
	unknown.Holder.Since = unknown.Holder.Since.AddDate(2000, 0, 0)
	g.push(meshState(1, route, meshMember("old", a, "header:VERSION=old"), unknown))
	g.memberIs(intercept.Accepted)
	if h := <-a.shown; h.ID != "i-new" {
		t.Errorf("the newest is not shown first: %+v", h)
	}
	if h := <-a.shown; h.ID != "i-old" || h.Token != "secret" {
		t.Errorf("shown %+v", h)
	}
	if n := len(g.watchers); n != 1 {
		t.Errorf("%d watchers", n)
	}
}

// TestMeshNever: bytes pass to the origin though they are HTTP.
func TestMeshNever(t *testing.T) {
	t.Parallel()
	a := httpAgent(t, named("machine"))
	_, route := meshOf(t, serve(t, lines("origin")), intercept.HTTPNever, a, nil)
	if got := ask(t, dial(t, route.Listen), "GET / HTTP/1.1\r\nVERSION: a\r\n"); !strings.HasPrefix(got, "origin: GET") {
		t.Errorf("answer %q", got)
	}
}

// TestMeshLog: who asks gets what is new of one entry, and no more is kept than said.
func TestMeshLog(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{}, nil)
	for i := range maxLogged + 10 {
		g.requests.put("web", intercept.Request{Session: "a", Path: strings.Repeat("x", 300)})
		if i%2 == 0 {
			g.requests.put("other", intercept.Request{})
		}
	}
	code, b := g.do(http.MethodGet, "/v1/requests?key=web&after=20", nil)
	var all []intercept.Request
	if err := json.Unmarshal(b, &all); err != nil || code != http.StatusOK {
		t.Fatalf("%d %s", code, b)
	}
	if len(all) != maxLogged-3 || len(all[0].Path) != maxLoggedPath || all[0].Seq != 21 || all[len(all)-1].Seq < all[0].Seq {
		t.Errorf("%d, the first %+v", len(all), all[0])
	}
	if code, _ := g.do(http.MethodGet, "/v1/requests?key=web&after=x", nil); code != http.StatusBadRequest {
		t.Errorf("status %d", code)
	}
}

// TestMeshMetrics are there by member.
func TestMeshMetrics(t *testing.T) {
	t.Parallel()
	a := httpAgent(t, named("machine"))
	g, route := meshOf(t, httpOrigin(t, named("origin")), intercept.HTTPKnown, a, nil)
	client := oneConn(t)
	get(t, client, route.Listen, "GET", "a", "")
	get(t, client, route.Listen, "GET", "", "")
	resp, err := http.Get("http://" + g.cfg.MetricsAddr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, _ := io.ReadAll(resp.Body)
	for _, want := range []string{
		`culvert_gate_requests_total{port="80",protocol="TCP",service="web",session="a",to="machine"} 1`,
		`culvert_gate_requests_total{port="80",protocol="TCP",service="web",session="",to="origin"} 1`,
		`culvert_gate_member_machine_here{port="80",protocol="TCP",service="web",session="a"} 1`,
	} {
		if !strings.Contains(string(b), want) {
			t.Errorf("%s is not there", want)
		}
	}
}
