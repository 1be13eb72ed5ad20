package gate

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// httpServer answers "NAME BODY" after 2 ms, chunked for POSTs.
func httpServer(t *testing.T, name string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: answerer(name)}
	s.Protocols = new(http.Protocols)
	s.Protocols.SetHTTP1(true)
	s.Protocols.SetUnencryptedHTTP2(true)
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return l.Addr().String()
}

func answerer(name string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		time.Sleep(2 * time.Millisecond)
		if r.Method == http.MethodPost {
			w.(http.Flusher).Flush() // no Content-Length then
		}
		fmt.Fprintf(w, "%s %s", name, b)
	})
}

// handedListener gives an HTTP server connections that came by another way.
type handedListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newHandedListener() *handedListener {
	return &handedListener{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (l *handedListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *handedListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *handedListener) Addr() net.Addr { return &net.TCPAddr{} }

// load is 8 closed-loop clients with keep-alive which make 200 requests a second
// together, half of them POSTs, which no client repeats.
type load struct {
	t      *testing.T
	stop   context.CancelFunc
	done   sync.WaitGroup
	total  atomic.Int64
	served sync.Map // by name
	failed atomic.Int64
}

func startLoad(t *testing.T, port uint16, http2 bool) *load {
	ctx, stop := context.WithCancel(context.Background())
	l := &load{t: t, stop: stop}
	t.Cleanup(func() { stop(); l.done.Wait() })
	for i := range 8 {
		tr := &http.Transport{MaxIdleConnsPerHost: 1, Protocols: new(http.Protocols)}
		tr.Protocols.SetHTTP1(!http2)
		tr.Protocols.SetUnencryptedHTTP2(http2)
		client := &http.Client{Transport: tr, Timeout: 10 * time.Second}
		l.done.Go(func() {
			defer tr.CloseIdleConnections()
			for n := 0; sleep(ctx, 40*time.Millisecond); n++ {
				l.request(client, port, i, n)
			}
		})
	}
	return l
}

func (l *load) request(client *http.Client, port uint16, i, n int) {
	method, body := http.MethodGet, ""
	if n%2 == 0 {
		method, body = http.MethodPost, fmt.Sprintf("%d-%d", i, n)
	}
	r, err := http.NewRequest(method, fmt.Sprintf("http://127.0.0.1:%d/x", port), strings.NewReader(body))
	if err != nil {
		l.t.Error(err)
		return
	}
	if body == "" {
		r.Body = nil
	}
	l.total.Add(1)
	resp, err := client.Do(r)
	if err == nil {
		defer resp.Body.Close()
		var b []byte
		b, err = io.ReadAll(resp.Body)
		name, got, _ := strings.Cut(string(b), " ")
		if err == nil && got != body {
			err = fmt.Errorf("body %q", got)
		}
		l.served.Store(name, true)
	}
	if err != nil {
		l.failed.Add(1)
		l.t.Errorf("%s: %v", method, err)
	}
}

func (l *load) seen(name string) bool { _, ok := l.served.Load(name); return ok }

// TestDrainUnderLoad: nobody loses a request when an entry is drained, the agent
// leaves, or the gate gets SIGTERM.
func TestDrainUnderLoad(t *testing.T) {
	for _, http2 := range []bool{false, true} {
		for _, how := range []string{"entry", "agent", "sigterm", "route"} {
			t.Run(fmt.Sprintf("%s, http2 %t", how, http2), func(t *testing.T) {
				t.Parallel()
				conns := newHandedListener()
				machine := &http.Server{Handler: answerer("machine"), Protocols: new(http.Protocols)}
				machine.Protocols.SetHTTP1(true)
				machine.Protocols.SetUnencryptedHTTP2(true)
				go machine.Serve(conns)
				t.Cleanup(func() { machine.Close() })
				a := startAgent(t, func(_ intercept.Header, c *net.TCPConn) { conns.conns <- c })
				origin := httpServer(t, "origin")
				g := startGate(t, Config{Drain: 5 * time.Second}, func(x *timing) { x.linger = time.Second })
				route := tcpRoute(t, origin, a.machine())
				s := stateOf(1, route)
				g.push(s)
				g.machineIs(intercept.Accepted)
				l := startLoad(t, route.Listen, http2)
				time.Sleep(500 * time.Millisecond)
				if !l.seen("machine") || l.seen("origin") {
					t.Fatal("the machine does not serve")
				}
				toMachine := func() int { return g.status().Routes[0].OpenToMachine }
				if n := toMachine(); n != 8 {
					t.Errorf("%d connections of 8 are open", n)
				}
				switch how {
				case "entry":
					g.push(draining(s))
				case "agent":
					a.say.Store(int32(intercept.Away))
					a.beat.Store(int32(intercept.Leaving))
				case "route": // from machine to origin
					route.Machine = nil
					g.push(stateOf(2, route))
				case "sigterm":
					begin := time.Now()
					g.stop()
					// Clients are led elsewhere in the time in which new connections are
					// accepted. Before, each has one response more from here.
					time.Sleep(700 * time.Millisecond)
					l.stop()
					l.done.Wait()
					if err := <-g.stopped; err != nil {
						t.Errorf("Run: %v", err)
					}
					if d := time.Since(begin); d > 4*time.Second {
						t.Errorf("ended after %s", d)
					}
					t.Logf("%d requests, %d failed", l.total.Load(), l.failed.Load())
					return
				}
				eventually(t, "no connection to the machine is open", func() bool { return toMachine() == 0 })
				time.Sleep(300 * time.Millisecond)
				if !l.seen("origin") {
					t.Error("the origin does not serve")
				}
				l.stop()
				l.done.Wait()
				t.Logf("%d requests, %d failed", l.total.Load(), l.failed.Load())
			})
		}
	}
}
