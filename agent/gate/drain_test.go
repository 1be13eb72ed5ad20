package gate

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// raw is a server of exact bytes: for each request head that it reads it writes
// the next of its answers; "" closes the connection.
func raw(t *testing.T, answers ...string) string {
	return serve(t, func(c *net.TCPConn) {
		br := bufio.NewReader(c)
		for _, a := range answers {
			for line := ""; line != "\r\n"; {
				var err error
				if line, err = br.ReadString('\n'); err != nil {
					c.Close()
					return
				}
			}
			if a == "" {
				break
			}
			for i, part := range strings.Split(a, "|") { // a pause
				if i > 0 {
					time.Sleep(20 * time.Millisecond)
				}
				io.WriteString(c, part)
			}
			if strings.HasSuffix(a, "until EOF") {
				break
			}
			if strings.Contains(a, "101 ") {
				answerLines("upgraded", struct {
					io.Reader
					net.Conn
				}{br, c}.Conn)
			}
		}
		c.Close()
	})
}

// TestLastResponse: of any framing, and its connection is closed with it.
func TestLastResponse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, method, answer string
		want                 string // "": answer with Connection: close
	}{
		{"length", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX-lower: a\r\n\r\nhello", ""},
		{"length in pieces", "GET", "HTTP/1.1 20|0 OK\r\nContent-Len|gth: 5\r\n|\r\nhe|llo", ""},
		{"keep-alive", "GET", "HTTP/1.1 200 OK\r\nConnection: Keep-Alive\r\nKeep-Alive: timeout=5\r\nContent-Length: 0\r\n\r\n",
			"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"},
		{"HEAD", "HEAD", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", ""},
		{"HEAD, chunked", "HEAD", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", ""},
		{"204", "DELETE", "HTTP/1.1 204 No Content\r\n\r\n", ""},
		{"304", "GET", "HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n", ""},
		{"chunked", "POST", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n| world\r\n0\r\n\r\n", ""},
		{"trailers", "POST", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X\r\n\r\n5\r\nhello\r\n0\r\n|X: 1\r\n|\r\n", ""},
		{"until the end", "GET", "HTTP/1.0 200 OK\r\n\r\nhello|, until EOF", ""},
		{"100", "PUT", "HTTP/1.1 100 Continue\r\n\r\n|HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
			"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"},
		{"103", "GET", "HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
			"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"},
		{"newlines alone", "GET", "HTTP/1.1 200 OK\nContent-Length: 2\n\nok", "HTTP/1.1 200 OK\nContent-Length: 2\nConnection: close\r\n\nok"},
		{"large", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n" + strings.Repeat("x", 3000000), ""},
		{"a long head", "GET", "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 30000) + "\r\nContent-Length: 2\r\n\r\nok", ""},
		{"cut", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\nhello, until EOF", "reset"},
		{"cut in the head", "GET", "HTTP/1.1 200 OK\r\nContent-Length: 500, until EOF", "HTTP/1.1 200 OK\r\nContent-Length: 500, until EOF"},
		{"nothing", "GET", "", "\x00"},
		{"no HTTP at all", "GET", "+OK Redis, until EOF", "+OK Redis, until EOF"},
		{"nonsense", "GET", "HTTP/1.1 abc\r\n\r\nxyz, until EOF", "HTTP/1.1 abc\r\n\r\nxyz, until EOF"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := startGate(t, Config{Drain: 5 * time.Second}, nil)
			const first = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfirst"
			route := tcpRoute(t, raw(t, first, c.answer, "HTTP/1.1 500 one too many\r\n\r\n"), nil)
			s := stateOf(1, route)
			g.push(s)
			conn := dial(t, route.Listen)
			if got := ask(t, conn, "GET /1 HTTP/1.1\r\nHost: x\r\n\r"); got != first {
				t.Fatalf("the first answer: %q", got)
			}
			g.push(draining(s))
			time.Sleep(30 * time.Millisecond)
			io.WriteString(conn, c.method+" /2 HTTP/1.1\r\nHost: x\r\n\r\n")
			got, err := io.ReadAll(conn)
			want := c.want
			if want == "" {
				want = strings.ReplaceAll(c.answer, "|", "")
				head, body, _ := strings.Cut(want, "\r\n\r\n")
				want = head + "\r\nConnection: close\r\n\r\n" + body
			}
			switch want {
			case "reset":
				if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("a response that was cut ended with %v", err)
				}
			case "\x00":
				if err != nil || len(got) > 0 {
					t.Errorf("%q, %v", got, err)
				}
			default:
				if err != nil || string(got) != want {
					t.Errorf("got\n%.300q, %v, instead of\n%.300q", got, err, want)
				}
			}
			conn.Close()
			eventually(t, "it is forgotten", func() bool { return g.status().Routes[0].OpenToOrigin == 0 })
		})
	}
}

// TestDrainInFlight: a request that was on its way when the drain began gets its
// whole answer, and the next one the last.
func TestDrainInFlight(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{Drain: 5 * time.Second}, nil)
	slow := "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n" + strings.Repeat("|x", 10)
	route := tcpRoute(t, raw(t, slow, slow), nil)
	s := stateOf(1, route)
	g.push(s)
	conn := dial(t, route.Listen)
	io.WriteString(conn, "GET /1 HTTP/1.1\r\n\r\n")
	time.Sleep(60 * time.Millisecond)
	g.push(draining(s))
	br := bufio.NewReader(conn)
	for i, closes := range []bool{false, true} {
		if i > 0 {
			io.WriteString(conn, "GET /2 HTTP/1.1\r\n\r\n")
		}
		resp, err := http.ReadResponse(br, nil)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		if err != nil || len(b) != 10 || resp.Close != closes {
			t.Errorf("response %d: %d bytes, close %t, %v", i+1, len(b), resp.Close, err)
		}
	}
	if _, err := br.ReadByte(); err != io.EOF {
		t.Errorf("then: %v", err)
	}
}

// TestDrainPipelined: a request that comes before the answer to another is ended
// is not the last, and nothing is held back.
func TestDrainPipelined(t *testing.T) {
	t.Parallel()
	accepted := make(chan *net.TCPConn, 1)
	g := startGate(t, Config{Drain: 5 * time.Second}, nil)
	route := tcpRoute(t, serve(t, func(c *net.TCPConn) { accepted <- c }), nil)
	s := stateOf(1, route)
	g.push(s)
	conn := dial(t, route.Listen)
	server := <-accepted
	expect := func(c *net.TCPConn, text string) {
		t.Helper()
		b := make([]byte, len(text))
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.ReadFull(c, b); err != nil || string(b) != text {
			t.Fatalf("%q, %v instead of %q", b, err, text)
		}
	}
	request := "GET / HTTP/1.1\r\n\r\n"
	head := "HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"
	io.WriteString(conn, request)
	expect(server, request)
	io.WriteString(server, head+"01234")
	expect(conn, head+"01234")
	g.push(draining(s))
	io.WriteString(conn, request)
	expect(server, request)
	io.WriteString(server, "567")
	expect(conn, "567")
	io.WriteString(server, "89"+head+"0123456789")
	expect(conn, "89"+head+"0123456789")
}

// TestDrainBody: what follows 100 Continue is no request.
func TestDrainBody(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{Drain: 5 * time.Second}, nil)
	body := make(chan string, 1)
	route := tcpRoute(t, serve(t, func(c *net.TCPConn) {
		r, err := http.ReadRequest(bufio.NewReader(c))
		if err != nil {
			body <- err.Error()
			return
		}
		io.WriteString(c, "HTTP/1.1 100 Continue\r\n\r\n")
		b, _ := io.ReadAll(r.Body)
		body <- string(b)
		io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	}), nil)
	s := stateOf(1, route)
	g.push(s)
	conn := dial(t, route.Listen)
	br := bufio.NewReader(conn)
	io.WriteString(conn, "PUT / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 8\r\n\r\n")
	if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != 100 {
		t.Fatalf("%v, %v", resp, err)
	}
	g.push(draining(s))
	for _, part := range []string{"abcd", "efgh"} {
		io.WriteString(conn, part)
		time.Sleep(30 * time.Millisecond)
	}
	if resp, err := http.ReadResponse(br, nil); err != nil || resp.StatusCode != 200 {
		t.Fatalf("%v, %v", resp, err)
	}
	if got := <-body; got != "abcdefgh" {
		t.Errorf("body %q", got)
	}
}

// TestDrainOthers: connections of other protocols end when they are idle, busy
// ones at the limit; of HTTP/1 idle ones end then, with a FIN.
func TestDrainOthers(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, say, echo string
		busy            bool
		from, to        time.Duration // when it ends
		reset           bool
	}{
		{"idle", "\x00\x01", "\x00\x01", false, 450 * time.Millisecond, 1400 * time.Millisecond, false},
		{"busy", "\x00\x01", "\x00\x01", true, 1450 * time.Millisecond, 3 * time.Second, true},
		{"idle HTTP/1", "GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", false, 1450 * time.Millisecond, 3 * time.Second, false},
		{"nothing said", "", "", false, 1450 * time.Millisecond, 3 * time.Second, false},
		{"HTTP/1 without an answer", "GET / HTTP/1.1\r\n\r\n", "never", true, 1450 * time.Millisecond, 3 * time.Second, true},
		{"upgraded", "GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\n\r\n", false, 450 * time.Millisecond, 1400 * time.Millisecond, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			g := startGate(t, Config{Drain: 1500 * time.Millisecond}, func(x *timing) { x.lull = 500 * time.Millisecond })
			route := tcpRoute(t, serve(t, func(s *net.TCPConn) {
				b := make([]byte, 100)
				for {
					n, err := s.Read(b)
					if err != nil {
						s.Close()
						return
					}
					switch {
					case strings.HasPrefix(c.echo, "HTTP"):
						io.WriteString(s, c.echo)
					case c.echo != "never":
						s.Write(b[:n])
					}
				}
			}), nil)
			s := stateOf(1, route)
			g.push(s)
			conn := dial(t, route.Listen)
			if c.say != "" {
				io.WriteString(conn, c.say)
			} else {
				eventually(t, "it is served", func() bool { return g.status().Routes[0].OpenToOrigin == 1 })
			}
			if c.echo != "" && c.echo != "never" {
				if _, err := io.ReadFull(conn, make([]byte, len(c.echo))); err != nil {
					t.Fatal(err)
				}
			}
			begin := time.Now()
			g.push(draining(s))
			// The error is told once, to who asks first.
			writing := make(chan error, 1)
			if c.busy {
				go func() {
					for sleep(t.Context(), 20*time.Millisecond) {
						if _, err := conn.Write([]byte{1}); err != nil {
							writing <- err
							return
						}
					}
				}()
			}
			_, err := io.Copy(io.Discard, conn)
			if err == nil && c.busy {
				err = <-writing
			}
			if d := time.Since(begin); d < c.from || d > c.to {
				t.Errorf("ended after %s", d)
			}
			if c.reset != errors.Is(err, syscall.ECONNRESET) || !c.reset && err != nil {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

// TestGoAway: it stands between two frames, wherever the server pauses, and not
// in a header block.
func TestGoAway(t *testing.T) {
	t.Parallel()
	frame := func(kind, flags byte, n int) string {
		b := binary.BigEndian.AppendUint32(nil, uint32(n)<<8|uint32(kind))
		return string(append(b, flags, 0, 0, 0, 1)) + strings.Repeat("p", n)
	}
	settings, data := frame(4, 0, 12), frame(0, 0, 100)
	headers, more, last := frame(1, 0, 20), frame(9, 0, 20), frame(9, 4, 20)
	all := settings + headers + more + last + data + data
	goAway := string(goAwayFrame)
	end := len(settings + headers + more + last)
	for _, c := range []struct {
		name  string
		first int // bytes before the drain begins
		want  int // where GOAWAY stands
	}{
		{"before anything", 0, len(settings)},
		{"after settings", len(settings), len(settings)},
		{"in a frame's head", len(settings) + 5, end},
		{"in a payload", len(settings) + 15, end},
		{"in a header block", len(settings + headers), end},
		{"in a continuation", len(settings+headers) + 3, end},
		{"after the block", end, end},
		{"in data", end + 50, end + len(data)},
		{"after all", len(all), len(all)},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			accepted := make(chan *net.TCPConn, 1)
			g := startGate(t, Config{Drain: 5 * time.Second}, nil)
			route := tcpRoute(t, serve(t, func(c *net.TCPConn) { accepted <- c }), nil)
			s := stateOf(1, route)
			g.push(s)
			conn := dial(t, route.Listen)
			server := <-accepted
			// A server may speak before the client's preface.
			io.WriteString(server, all[:c.first])
			io.ReadFull(conn, make([]byte, c.first))
			io.WriteString(conn, http2Preface)
			io.ReadFull(server, make([]byte, len(http2Preface)))
			g.push(draining(s))
			time.Sleep(20 * time.Millisecond)
			io.WriteString(server, all[c.first:])
			time.Sleep(20 * time.Millisecond)
			server.CloseWrite()
			got, err := io.ReadAll(conn)
			want := all[c.first:c.want] + goAway + all[c.want:]
			if err != nil || string(got) != want {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

// TestStreams: a connection of HTTP/2 is done when all streams are.
func TestStreams(t *testing.T) {
	const client, server = clientEnded, serverEnded
	type step struct {
		side, kind, flags byte
		id                uint32
		open              int
	}
	for name, steps := range map[string][]step{
		"a request": {{client, frameHeaders, 5, 1, 1}, {server, frameHeaders, 4, 1, 1}, {server, frameData, 1, 1, 0}},
		"a body":    {{client, frameHeaders, 4, 1, 1}, {client, frameData, 1, 1, 1}, {server, frameHeaders, 5, 1, 0}},
		"an early answer, and the rest": {{client, frameHeaders, 4, 1, 1}, {server, frameHeaders, 5, 1, 1}, {client, frameData, 0, 1, 1},
			{client, frameData, 1, 1, 0}},
		"reset by the server":                {{client, frameHeaders, 4, 1, 1}, {server, frameReset, 0, 1, 0}, {client, frameData, 1, 1, 0}, {client, frameReset, 0, 1, 0}},
		"reset by the client":                {{client, frameHeaders, 4, 1, 1}, {client, frameReset, 0, 1, 0}, {server, frameData, 1, 1, 0}},
		"two":                                {{client, frameHeaders, 5, 1, 1}, {client, frameHeaders, 5, 3, 2}, {server, frameData, 1, 1, 1}, {server, frameHeaders, 5, 3, 0}},
		"the end is seen before the begin":   {{server, frameHeaders, 5, 1, 1}, {client, frameHeaders, 5, 1, 0}},
		"a reset is seen before the begin":   {{server, frameReset, 0, 1, 1}, {client, frameHeaders, 4, 1, 0}, {client, frameData, 1, 1, 0}},
		"an answer is seen before the begin": {{server, frameHeaders, 4, 1, 0}, {client, frameHeaders, 5, 1, 1}, {server, frameData, 1, 1, 0}},
		"not streams":                        {{client, 4, 1, 0, 0}, {server, 8, 0, 0, 0}, {server, framePushPromise, 4, 2, 0}, {server, frameHeaders, 5, 2, 0}, {client, 8, 0, 1, 0}},
	} {
		var s streams
		s.leave()
		for i, x := range steps {
			s.frame(x.kind, x.flags, x.id, x.side)
			if len(s.open) != x.open || s.left() != (x.open == 0) {
				t.Errorf("%s, step %d: %d open", name, i, len(s.open))
			}
		}
	}
	var s streams
	for i := range uint32(maxStreams + 1) {
		s.clientFrame(frameHeaders, 5, 2*i+1)
	}
	for i := range uint32(maxStreams + 1) {
		s.serverFrame(frameHeaders, 5, 2*i+1)
	}
	if s.leave(); s.left() || len(s.open) > maxStreams {
		t.Error("too many streams, and all are known")
	}
}

func TestProtocolOf(t *testing.T) {
	for text, want := range map[string]int32{
		"":                              protoUnknown,
		"G":                             protoUnknown,
		"GET":                           protoUnknown,
		"GET ":                          protoUnknown,
		"GET /":                         protoHTTP1,
		"GET /a/long/path/which/is/cut": protoHTTP1,
		"VERSION-CONTROL /":             protoHTTP1,
		"OPTIONS * HTTP/1.1":            protoHTTP1,
		"GET http://x/":                 protoHTTP1,
		"CONNECT x:443 HTTP/1.1":        protoOther,
		"P":                             protoUnknown,
		"PRI * HTTP/2.0\r\n\r\nSM":      protoHTTP2,
		http2Preface + "more":           protoHTTP2,
		"PRI * HTTP/3":                  protoHTTP1, // and then its response is looked at
		"get /":                         protoOther,
		" /":                            protoOther,
		"\x16\x03\x01":                  protoOther,
		"*1\r\n$4\r\nPING":              protoOther,
		"AAAAAAAAAAAAAAAAAAAAAAAAAAAAA": protoOther,
	} {
		if got := protocolOf([]byte(text)); got != want {
			t.Errorf("%q: %d instead of %d", text, got, want)
		}
	}
}

// TestAcceptsWhileLeaving: new connections are served after SIGTERM, since other
// nodes hear of it late, and none is accepted at the end.
func TestAcceptsWhileLeaving(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{Drain: 5 * time.Second}, nil)
	route := tcpRoute(t, httpServer(t, "origin"), nil)
	u := udpRoute(t, udpServer(t, "origin"), nil)
	g.push(stateOf(1, route, u))
	open := dial(t, route.Listen) // keeps the gate up
	io.WriteString(open, "\x00")
	begin := time.Now()
	g.stop()
	time.Sleep(100 * time.Millisecond)
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", route.Listen))
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(resp.Body); string(b) != "origin " || err != nil || !resp.Close {
		t.Errorf("%q, %v, close %t", b, err, resp.Close)
	}
	if got := exchange(t, udpClient(t, u.Listen), "x", time.Second); got != "origin: x" {
		t.Errorf("UDP: %q", got)
	}
	if err := <-g.stopped; err != nil {
		t.Errorf("Run: %v", err)
	}
	if d := time.Since(begin); d < 300*time.Millisecond || d > 2*time.Second {
		t.Errorf("ended after %s", d)
	}
	if _, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", route.Listen)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("afterwards: %v", err)
	}
}

// TestDrainOver: what is open to a session that is dead is reset at once, and what
// is open to the origin is not.
func TestDrainOver(t *testing.T) {
	a := startAgent(t, nil)
	g := startGate(t, Config{}, nil)
	toMachine := tcpRoute(t, "", a.machine())
	toOrigin := tcpRoute(t, serve(t, lines("origin")), nil)
	s := stateOf(1, toMachine, toOrigin)
	g.push(s)
	g.machineIs(intercept.Accepted)
	machine, origin := dial(t, toMachine.Listen), dial(t, toOrigin.Listen)
	if got := ask(t, machine, "x"); got != "machine: x\n" {
		t.Fatalf("answer %q", got)
	}
	if got := ask(t, origin, "x"); got != "origin: x\n" {
		t.Fatalf("answer %q", got)
	}
	s = draining(s)
	e := s.Entries["web"]
	e.Over = true
	s.Entries["web"] = e
	g.push(s)
	_ = machine.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := machine.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("open to the dead session: %v", err)
	}
	if got := ask(t, origin, "y"); got != "origin: y\n" {
		t.Errorf("answer %q", got)
	}
}

// TestEndsWithItsLastEntry: after SIGTERM a gate does not wait for connections that
// its state says nobody makes any more, whether it is told before or after.
func TestEndsWithItsLastEntry(t *testing.T) {
	for _, before := range []bool{true, false} {
		g := startGate(t, Config{}, func(x *timing) { x.linger = time.Minute })
		g.push(stateOf(1, tcpRoute(t, "", nil)))
		empty := intercept.State{Generation: 2, Entries: map[string]intercept.Entry{}}
		if before {
			g.push(empty)
		}
		g.stop()
		if !before {
			select {
			case err := <-g.stopped:
				t.Fatalf("ended with an entry: %v", err)
			case <-time.After(100 * time.Millisecond):
			}
			g.push(empty)
		}
		select {
		case err := <-g.stopped:
			if err != nil {
				t.Errorf("told before %v: %v", before, err)
			}
		case <-time.After(10 * time.Second):
			t.Errorf("told before %v: it goes on", before)
		}
	}
}

// TestLeavesAtOnce: a gate whose last intercept ended a while ago does not wait for
// clients that cannot come any more.
func TestLeavesAtOnce(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		change func(intercept.State) intercept.State
		wait   time.Duration
		linger bool
	}{
		"active":         {func(s intercept.State) intercept.State { return s }, 700 * time.Millisecond, true},
		"just drained":   {draining, 0, true},
		"drained before": {draining, 700 * time.Millisecond, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := startGate(t, Config{Drain: 5 * time.Second}, func(x *timing) { x.linger = 600 * time.Millisecond })
			s := stateOf(1, tcpRoute(t, httpServer(t, "origin"), nil))
			g.push(s)
			s = c.change(s)
			g.push(s)
			time.Sleep(c.wait)
			s.Generation++ // what else changes meanwhile does not count
			g.push(s)
			begin := time.Now()
			g.stop()
			if err := <-g.stopped; err != nil {
				t.Errorf("Run: %v", err)
			}
			if d := time.Since(begin); d >= 500*time.Millisecond != c.linger {
				t.Errorf("ended after %s", d)
			}
		})
	}
}

// TestDrainLimit: a gate ends though a client does not.
func TestDrainLimit(t *testing.T) {
	t.Parallel()
	g := startGate(t, Config{Drain: 500 * time.Millisecond}, nil)
	route := tcpRoute(t, serve(t, func(c *net.TCPConn) { io.Copy(c, c) }), nil)
	g.push(stateOf(1, route))
	c := dial(t, route.Listen)
	io.WriteString(c, "\x00")
	go func() {
		for sleep(t.Context(), 20*time.Millisecond) {
			if _, err := c.Write([]byte{0}); err != nil {
				return
			}
		}
	}()
	begin := time.Now()
	g.stop()
	if err := <-g.stopped; err != nil {
		t.Errorf("Run: %v", err)
	}
	if d := time.Since(begin); d < 450*time.Millisecond || d > 2*time.Second {
		t.Errorf("ended after %s", d)
	}
}
