package gate

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// meshMember is a developer whose requests have a mark, at an agent.
func meshMember(session string, a *fakeAgent, match ...string) intercept.Member {
	m := intercept.Member{Holder: intercept.Holder{Session: session, User: "user-" + session}}
	for _, text := range match {
		c, err := intercept.ParseCondition(text)
		if err != nil {
			panic(err)
		}
		m.Match = append(m.Match, c)
	}
	machine := *a.machine()
	machine.ID = "i-" + session
	m.Ports = []intercept.MemberPort{{Port: 80, Machine: machine}}
	return m
}

func meshState(generation int64, route intercept.Route, members ...intercept.Member) intercept.State {
	return intercept.State{Generation: generation, Entries: map[string]intercept.Entry{
		"web": {Kind: intercept.Mesh, Service: "web", Gate: intercept.GateName, Routes: []intercept.Route{route}, Members: members},
	}}
}

func meshRoute(t testing.TB, origin, how string) intercept.Route {
	r := tcpRoute(t, origin, nil)
	r.HTTP = how
	return r
}

// httpAgent is an agent behind which an HTTP server is.
func httpAgent(t *testing.T, h http.Handler) *fakeAgent {
	t.Helper()
	l := newHandedListener()
	s := &http.Server{Handler: h, Protocols: bothProtocols()}
	go s.Serve(l)
	t.Cleanup(func() { s.Close(); l.Close() })
	return startAgent(t, func(_ intercept.Header, c *net.TCPConn) { l.conns <- c })
}

func httpOrigin(t *testing.T, h http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, Protocols: bothProtocols()}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

// bothProtocols are HTTP/1 and HTTP/2 by prior knowledge.
func bothProtocols() *http.Protocols {
	p := new(http.Protocols)
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	return p
}

// named answers with its name, the method, and the body.
func named(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		fmt.Fprintf(w, "%s %s %s", name, r.Method, b)
	})
}

// meshOf is a gate with one mesh of one member, VERSION: a.
func meshOf(t *testing.T, origin string, how string, a *fakeAgent, change func(*intercept.Member)) (*testGate, intercept.Route) {
	t.Helper()
	g := startGate(t, Config{Drain: 2 * time.Second}, func(x *timing) { x.keepAlive = 300 * time.Millisecond })
	route := meshRoute(t, origin, how)
	m := meshMember("a", a, "header:VERSION=a")
	if change != nil {
		change(&m)
	}
	if s := g.push(meshState(1, route, m)); len(s.Failed) > 0 {
		t.Fatalf("status %+v", s)
	}
	g.memberIs(intercept.Accepted)
	return g, route
}

// memberIs waits until the gate knows how a member's machine is.
func (g *testGate) memberIs(s intercept.Status) {
	g.t.Helper()
	eventually(g.t, "the member's machine is "+s.String(), func() bool {
		for _, r := range g.status().Routes {
			for _, m := range r.Members {
				if m.Machine == s.String() {
					return true
				}
			}
		}
		return false
	})
}

// get makes a request with a mark, empty for none.
func get(t *testing.T, client *http.Client, port uint16, method, mark, body string) (*http.Response, string) {
	t.Helper()
	r, err := http.NewRequest(method, fmt.Sprintf("http://127.0.0.1:%d/x?q=1", port), strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body == "" {
		r.Body = nil
	}
	if mark != "" {
		r.Header.Set("version", mark)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

// oneConn is a client that uses one connection, and fails when it would need another.
func oneConn(t *testing.T) *http.Client {
	dialled := false
	tr := &http.Transport{MaxConnsPerHost: 1, Dial: func(network, addr string) (net.Conn, error) {
		if dialled {
			t.Error("a second connection is dialled")
		}
		dialled = true
		return net.Dial(network, addr)
	}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 10 * time.Second}
}

// TestMeshAlternates: on one connection each request goes where its header says.
func TestMeshAlternates(t *testing.T) {
	t.Parallel()
	for _, how := range []string{intercept.HTTPSniff, intercept.HTTPKnown} {
		a := httpAgent(t, named("machine"))
		g, route := meshOf(t, httpOrigin(t, named("origin")), how, a, func(m *intercept.Member) { m.TagResponses = true })
		client := oneConn(t)
		for i := range 20 {
			mark, want := "", "origin"
			if i%2 == 1 {
				mark, want = "a", "machine"
			}
			for _, method := range []string{"GET", "POST", "HEAD"} {
				body := ""
				if method == "POST" {
					body = fmt.Sprint(i)
				}
				wanted := want + " " + method + " " + body
				if method == "HEAD" {
					wanted = ""
				}
				resp, got := get(t, client, route.Listen, method, mark, body)
				if got != wanted {
					t.Fatalf("answer %q, want %q", got, wanted)
				}
				if by := resp.Header.Get(intercept.ServedByHeader); (by == "user-a") != (want == "machine") {
					t.Errorf("served by %q", by)
				}
			}
		}
		if len(a.seen) != 1 {
			t.Errorf("%d connections to the machine", len(a.seen))
		}
		eventually(t, "the last one is over", func() bool { return len(g.askLog()) == 30 && g.status().Routes[0].Members[0].Open == 0 })
		r := g.status().Routes[0]
		if r.RequestsToOrigin != 30 || r.OpenToOrigin != 1 || len(r.Members) != 1 || r.Members[0].Requests != 30 || r.Members[0].Open != 0 {
			t.Errorf("counted %+v", r)
		}
		log := g.askLog()
		if log[0].Session != "a" || log[0].Path != "/x" || log[0].Status != 200 || log[0].Duration <= 0 || log[0].Origin {
			t.Errorf("logged %d: %+v", len(log), log)
		}
		get(t, client, route.Listen, "GET", "", "")
		eventually(t, "a request to the origin is logged", func() bool {
			log = g.askLog()
			return len(log) == 31 && log[30].Session == "" && log[30].Origin
		})
	}
}

func (g *testGate) askLog() []intercept.Request { return g.requests.since("web", 0) }

// sendRaw sends text to a route and returns a reader of what comes.
func sendRaw(t *testing.T, port uint16, text string) (*net.TCPConn, *bufio.Reader) {
	t.Helper()
	c := dial(t, port)
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	return c, bufio.NewReader(c)
}

// readResponse reads one, with its body.
func readResponse(t *testing.T, br *bufio.Reader, method string) (*http.Response, string) {
	t.Helper()
	resp, err := http.ReadResponse(br, &http.Request{Method: method})
	if err != nil {
		t.Fatalf("reading a response: %v", err)
	}
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("reading a body: %v", err)
	}
	return resp, string(b)
}

// TestMeshPipelining: ten requests in one write, with different marks.
func TestMeshPipelining(t *testing.T) {
	t.Parallel()
	a := httpAgent(t, named("machine"))
	_, route := meshOf(t, httpOrigin(t, named("origin")), intercept.HTTPSniff, a, nil)
	var text strings.Builder
	for i := range 10 {
		fmt.Fprintf(&text, "POST /%d HTTP/1.1\r\nHost: x\r\nvErSiOn: %c\r\nContent-Length: 1\r\n\r\n%d", i, "ab"[i%2], i)
	}
	_, br := sendRaw(t, route.Listen, text.String())
	for i := range 10 {
		want := fmt.Sprintf("%s POST %d", []string{"machine", "origin"}[i%2], i)
		if _, got := readResponse(t, br, "POST"); got != want {
			t.Errorf("answer %q, want %q", got, want)
		}
	}
}

// TestMeshSniffs: what is no HTTP passes to the origin byte for byte.
func TestMeshSniffs(t *testing.T) {
	t.Parallel()
	a := httpAgent(t, named("machine"))
	_, route := meshOf(t, serve(t, lines("origin")), intercept.HTTPSniff, a, nil)
	for _, first := range []string{"\x16\x03\x01\x02\x00\x01\x00", "\xda\xbb\xc2\x00", "STATS me\n", "GET something\n", "PING / \n", "p", "GET / HTTP/1.1\n"} {
		if got := ask(t, dial(t, route.Listen), first); got != "origin: "+first+"\n" {
			t.Errorf("%q: answer %q", first, got)
		}
	}
	c, _ := sendRaw(t, route.Listen, "GE")
	c.CloseWrite()
	if got, err := io.ReadAll(c); string(got) != "origin: GE" || err != nil {
		t.Errorf("a client that ended early: %q, %v", got, err)
	}

	_, route = meshOf(t, serve(t, func(c *net.TCPConn) { io.WriteString(c, "greeting"); answerLines("mysql", c) }), intercept.HTTPSniff, a, nil)
	s := dial(t, route.Listen)
	b := make([]byte, 8)
	if _, err := io.ReadFull(s, b); string(b) != "greeting" || err != nil {
		t.Errorf("a server that speaks first: %q, %v", b, err)
	}
	if got := ask(t, s, "GET / HTTP/1.1\r\n"); got != "mysql: GET / HTTP/1.1\r\n\n" {
		t.Errorf("answer %q", got)
	}

	_, route = meshOf(t, httpOrigin(t, named("origin")), intercept.HTTPSniff, a, nil)
	slow := dial(t, route.Listen)
	for _, x := range []byte("GET / HTTP/1.1\r\nHost: x\r\nVersion: a\r\n\r\n") {
		slow.Write([]byte{x})
		time.Sleep(time.Millisecond)
	}
	if _, got := readResponse(t, bufio.NewReader(slow), "GET"); got != "machine GET " {
		t.Errorf("a slow client: %q", got)
	}
}

// TestMeshFailsOpen: a machine that is gone gives its requests to the origin, or fails
// them where that is wanted.
func TestMeshFailsOpen(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		say       intercept.Status
		onGone    string
		onRefused string
		noOrigin  bool
		status    int
		want      string
	}{
		{intercept.Away, "", "", false, 200, "origin"},
		{intercept.Refused, "", "", false, 200, "origin"},
		{0, "", "", false, 200, "origin"},
		{intercept.Away, intercept.GoneFails, "", false, 503, "user-a"},
		{intercept.Refused, "", intercept.RefusedToClient, false, 502, "port 8080 of the machine of user-a"},
		{intercept.Away, "", "", true, 503, "no origin"},
	} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			t.Parallel()
			a := httpAgent(t, named("machine"))
			a.say.Store(int32(c.say))
			origin := ""
			if !c.noOrigin {
				origin = httpOrigin(t, named("origin"))
			}
			g, route := meshOf(t, origin, intercept.HTTPKnown, a, func(m *intercept.Member) {
				m.OnGone = c.onGone
				m.Ports[0].Machine.OnRefused = c.onRefused
			})
			client := oneConn(t)
			for range 2 {
				resp, got := get(t, client, route.Listen, "POST", "a", "body")
				if resp.StatusCode != c.status || !strings.Contains(got, c.want) {
					t.Errorf("%d %q", resp.StatusCode, got)
				}
			}
			m := g.status().Routes[0].Members[0]
			if m.Requests != 0 || m.Open != 0 || m.ToOrigin+m.Failed != 2 || (m.Failed == 2) != (c.status != 200 && !c.noOrigin) {
				t.Errorf("counted %+v", m)
			}
		})
	}
}

// TestMeshMemberLeaves: whoever goes gets nothing new, and what is under way ends.
func TestMeshMemberLeaves(t *testing.T) {
	t.Parallel()
	begun, end := make(chan bool), make(chan bool)
	a := httpAgent(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "machine ")
		w.(http.Flusher).Flush()
		begun <- true
		<-end
		io.WriteString(w, "ended")
	}))
	g, route := meshOf(t, httpOrigin(t, named("origin")), intercept.HTTPSniff, a, nil)
	client := oneConn(t)
	done := make(chan string)
	go func() {
		_, got := get(t, client, route.Listen, "GET", "a", "")
		done <- got
	}()
	<-begun
	g.push(meshState(2, route))
	time.Sleep(100 * time.Millisecond)
	end <- true
	if got := <-done; got != "machine ended" {
		t.Errorf("answer %q", got)
	}
	if _, got := get(t, client, route.Listen, "GET", "a", ""); got != "origin GET " {
		t.Errorf("answer %q", got)
	}
}

// TestMeshDrains: the last response says that the connection ends, and an idle one is
// closed.
func TestMeshDrains(t *testing.T) {
	t.Parallel()
	begun, end := make(chan bool, 1), make(chan bool)
	origin := httpOrigin(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			begun <- true
			<-end
		}
		io.WriteString(w, "origin")
	}))
	g, route := meshOf(t, origin, intercept.HTTPSniff, httpAgent(t, named("machine")), nil)
	_, idle := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	if resp, _ := readResponse(t, idle, "GET"); resp.Close {
		t.Error("it closes early")
	}
	_, slow := sendRaw(t, route.Listen, "GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
	<-begun
	g.push(draining(meshState(1, route, meshMember("a", httpAgent(t, named("machine")), "header:VERSION=a"))))
	if _, err := idle.ReadByte(); err != io.EOF {
		t.Errorf("the idle one: %v", err)
	}
	end <- true
	if resp, got := readResponse(t, slow, "GET"); !resp.Close || got != "origin" {
		t.Errorf("the last response closes %t: %q", resp.Close, got)
	}
	if _, err := slow.ReadByte(); err != io.EOF {
		t.Errorf("the other: %v", err)
	}
}

// TestMeshMirrorsOrigin: an origin that ends a kept connection ends the client's.
func TestMeshMirrorsOrigin(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: named("origin"), IdleTimeout: 200 * time.Millisecond}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	_, route := meshOf(t, l.Addr().String(), intercept.HTTPKnown, httpAgent(t, named("machine")), nil)
	_, br := sendRaw(t, route.Listen, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	readResponse(t, br, "GET")
	if _, err := br.ReadByte(); err != io.EOF {
		t.Errorf("its end: %v", err)
	}
}
