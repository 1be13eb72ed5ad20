package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/cluster"
)

func TestForwardMappings(t *testing.T) {
	one := &cluster.Backend{Name: "Service a/one", Ports: []cluster.BackendPort{{Number: 8080, Name: "http"}}}
	two := &cluster.Backend{Name: "Service a/two", Ports: []cluster.BackendPort{{Number: 80, Name: "http"}, {Number: 443, Name: "https"}}}
	pod := &cluster.Backend{Name: "Pod a/p", Undeclared: true, Ports: []cluster.BackendPort{{Number: 5432, Name: "pg"}, {Number: 9187}}}
	ip := &cluster.Backend{Name: "10.1.2.3", Undeclared: true}
	for _, x := range []struct {
		b    *cluster.Backend
		args string // of the command after the target; a first one with ":" is the target's port
		want string // LOCAL:REMOTE ..., or part of the error
	}{
		{one, "", "8080:8080"},
		{one, "6060", "6060:8080"},
		{one, "6060:8080", "6060:8080"},
		{one, "6060:http", "6060:8080"},
		{one, ":http", "0:8080"},
		{one, "0:8080", "0:8080"},
		{one, "http", "8080:8080"},
		{one, "6060:81", `no TCP port "81"`},
		{one, "1 2", "has no port 1"},
		{one, "70000", `local port "70000"`},
		{one, "x:http", `local port "x"`},
		{one, "-1", `local port "-1"`},
		{one, "", "8080:8080"},
		{two, "", "which port of Service a/two is meant?"},
		{two, "80", "80:80"},
		{two, "8080", "name what it leads to: 8080:REMOTE"},
		{two, "8080:http 8443:https", "8080:80 8443:443"},
		{two, "8080:http 8080:https", "local port 8080 is named twice"},
		{two, ":http :https", "0:80 0:443"},
		{two, "nothing", `no TCP port "nothing"`},
		{two, "@http 8080", "8080:80"},
		{two, "@443", "443:443"},
		{two, "@http 8080 8081", "is one port, and 2 were given"},
		{two, "@http 8080:80", `local port "8080:80"`},
		{two, "@x", `no TCP port "x"`},
		{pod, "5432", "5432:5432"},
		{pod, "1234", "1234:1234"},
		{pod, "1:pg", "1:5432"},
		{ip, "8080", "8080:8080"},
		{ip, "@80 8080", "8080:80"},
		{ip, "8080:http", `no TCP port "http"`},
		{ip, "", "which port of 10.1.2.3"},
	} {
		port, args := "", strings.Fields(x.args)
		if len(args) > 0 && args[0][0] == '@' {
			port, args = args[0][1:], args[1:]
		}
		all, err := mappings(x.b, port, args)
		var got []string
		for _, m := range all {
			got = append(got, fmt.Sprintf("%d:%d", m.local, m.remote.Number))
		}
		if err != nil {
			if !strings.Contains(err.Error(), x.want) {
				t.Errorf("%s %q: %v, want %q", x.b.Name, x.args, err, x.want)
			}
		} else if strings.Join(got, " ") != x.want {
			t.Errorf("%s %q: %q, want %q", x.b.Name, x.args, got, x.want)
		}
	}
}

func TestForwardSplitPort(t *testing.T) {
	for target, want := range map[string][2]string{
		"web": {"web", ""}, "web:80": {"web", "80"}, "web.ns:http": {"web.ns", "http"}, "pod/x:1": {"pod/x", "1"},
		"10.1.2.3": {"10.1.2.3", ""}, "10.1.2.3:80": {"10.1.2.3", "80"}, "fd00::1": {"fd00::1", ""}, "[fd00::1]:80": {"fd00::1", "80"}, "[fd00::1]": {"[fd00::1]", ""},
	} {
		if name, port := splitPort(target); [2]string{name, port} != want {
			t.Errorf("%s: %q %q", target, name, port)
		}
	}
}

func TestForwardAddresses(t *testing.T) {
	for _, x := range []struct {
		given []string
		n     int
		ok    bool
	}{{nil, 0, true}, {[]string{"localhost"}, 0, true}, {[]string{"0.0.0.0", "[::1]"}, 2, true}, {[]string{"eth0"}, 0, false}} {
		if ips, err := listenAddresses(x.given); len(ips) != x.n || (err == nil) != x.ok {
			t.Errorf("%q: %v, %v", x.given, ips, err)
		}
	}
}

// serve accepts connections on loopback and gives each to f.
func serve(t *testing.T, f func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go f(c.(*net.TCPConn))
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

// relayed starts a relay at a port and returns where, and what it reports.
func relayed(t *testing.T, ways func() ways) (netip.AddrPort, chan error) {
	t.Helper()
	ended := make(chan error, 16)
	return serve(t, func(c *net.TCPConn) { ended <- relay(t.Context(), c, ways()) }), ended
}

func only(dials ...dialFunc) func() ways {
	return func() ways {
		return func(yield func(dialFunc, error) bool) {
			for _, d := range dials {
				if !yield(d, nil) {
					return
				}
			}
		}
	}
}

func dial(t *testing.T, at netip.AddrPort) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", at.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return c.(*net.TCPConn)
}

func isReset(err error) bool {
	return err != nil && (strings.Contains(err.Error(), "reset") || strings.Contains(err.Error(), "broken pipe"))
}

// The end of what a client says gets through, and what comes back after it.
func TestForwardHalfClose(t *testing.T) {
	at := serve(t, func(c *net.TCPConn) {
		defer c.Close()
		all, _ := io.ReadAll(c)
		fmt.Fprintf(c, "%d bytes", len(all))
	})
	proxy, ended := relayed(t, only(direct(at)))
	c := dial(t, proxy)
	if _, err := c.Write(bytes.Repeat([]byte("x"), 300_000)); err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	if got, err := io.ReadAll(c); err != nil || string(got) != "300000 bytes" {
		t.Errorf("%q, %v", got, err)
	}
	c.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	// The other direction first.
	heard := make(chan string, 1)
	at = serve(t, func(c *net.TCPConn) {
		defer c.Close()
		fmt.Fprint(c, "hello")
		_ = c.CloseWrite()
		all, _ := io.ReadAll(c)
		heard <- string(all)
	})
	proxy, _ = relayed(t, only(direct(at)))
	c = dial(t, proxy)
	if got, err := io.ReadAll(c); err != nil || string(got) != "hello" {
		t.Errorf("%q, %v", got, err)
	}
	fmt.Fprint(c, "still here")
	_ = c.CloseWrite()
	if got := <-heard; got != "still here" {
		t.Errorf("%q", got)
	}
}

// A large echo is not stopped by its own queues.
func TestForwardLargeEcho(t *testing.T) {
	at := serve(t, func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) })
	proxy, _ := relayed(t, only(direct(at)))
	c := dial(t, proxy)
	data := bytes.Repeat([]byte("0123456789abcdef"), 1<<19)
	go func() { c.Write(data); c.CloseWrite() }()
	time.Sleep(50 * time.Millisecond) // nobody reads yet: everything fills up
	if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%d of %d bytes, %v", len(got), len(data), err)
	}
}

func TestForwardReset(t *testing.T) {
	server := make(chan *net.TCPConn, 4)
	at := serve(t, func(c *net.TCPConn) { server <- c })
	proxy, ended := relayed(t, only(direct(at)))
	// The server's reset reaches its client, and no other.
	other, c := dial(t, proxy), dial(t, proxy)
	for _, conn := range []*net.TCPConn{other, c} {
		if _, err := conn.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	a, b := <-server, <-server
	buf := make([]byte, 8)
	for _, conn := range []*net.TCPConn{a, b} {
		if _, err := conn.Read(buf); err != nil { // so that nobody writes when the reset comes
			t.Fatal(err)
		}
	}
	reset(a)
	<-ended
	errs := map[bool]int{}
	_, _ = b.Write([]byte("y"))
	for _, conn := range []*net.TCPConn{other, c} {
		_, err := conn.Read(buf)
		errs[isReset(err)]++
	}
	if errs[true] != 1 || errs[false] != 1 {
		t.Errorf("%v were reset", errs)
	}
	// The client's reset reaches the server.
	for _, conn := range []*net.TCPConn{other, c} {
		reset(conn)
	}
	_ = b.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := b.Read(buf); !isReset(err) {
		t.Errorf("the server sees %v", err)
	}
}

// refusing is a port-forward to a port at which nothing listens.
type refusing struct {
	net.Conn
	until  chan struct{} // Read waits for it
	closed atomic.Bool
}

func (r *refusing) Read([]byte) (int, error) {
	<-r.until
	return 0, errors.New("the kubelet says: failed to connect to localhost:9 inside namespace: connect: connection refused")
}
func (r *refusing) Write(p []byte) (int, error) {
	if r.closed.Load() {
		return 0, net.ErrClosed
	}
	return len(p), nil
}
func (r *refusing) CloseWrite() error { return nil }
func (r *refusing) Close() error      { r.closed.Store(true); return nil }

// What a client said to a pod that could not be reached is said to the next.
func TestForwardNextPod(t *testing.T) {
	at := serve(t, func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) })
	failing := func(context.Context) (net.Conn, error) { return nil, errors.New("no such pod") }
	for _, ended := range []bool{false, true} {
		until := make(chan struct{})
		refused := func(context.Context) (net.Conn, error) { return &refusing{until: until}, nil }
		proxy, result := relayed(t, only(failing, refused, refused, direct(at)))
		c := dial(t, proxy)
		fmt.Fprint(c, "first ")
		if ended {
			_ = c.CloseWrite()
		}
		time.Sleep(20 * time.Millisecond)
		close(until)
		want := "first "
		if !ended {
			fmt.Fprint(c, "second")
			_ = c.CloseWrite()
			want = "first second"
		}
		if got, err := io.ReadAll(c); err != nil || string(got) != want {
			t.Errorf("ended %v: %q, %v", ended, got, err)
		}
		c.Close()
		if err := <-result; err != nil {
			t.Error(err)
		}
	}
	// More than can be kept is not said twice.
	until := make(chan struct{})
	refused := func(context.Context) (net.Conn, error) { return &refusing{until: until}, nil }
	proxy, _ := relayed(t, only(refused, direct(at)))
	c := dial(t, proxy)
	if _, err := c.Write(make([]byte, 2*maxKept)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(50 * time.Millisecond)
	close(until)
	if n, err := io.Copy(io.Discard, c); n != 0 || !isReset(err) {
		t.Errorf("%d bytes, %v", n, err)
	}
}

func TestForwardNobody(t *testing.T) {
	closed := make(chan struct{})
	close(closed)
	refused := func(context.Context) (net.Conn, error) { return &refusing{until: closed}, nil }
	for name, w := range map[string]func() ways{
		"refused": only(refused, refused),
		"nothing": only(),
		"an error": func() ways {
			return func(yield func(dialFunc, error) bool) { yield(nil, errors.New("no pod is ready")) }
		},
	} {
		proxy, result := relayed(t, w)
		// The reset may come while the connection is being made.
		c, err := net.Dial("tcp", proxy.String())
		if err == nil {
			defer c.Close()
			if _, err = fmt.Fprint(c, "x"); err == nil {
				_, err = io.ReadAll(c)
			}
		}
		if !isReset(err) {
			t.Errorf("%s: %v", name, err)
		}
		if err := <-result; err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// A port that is taken is named, a second address gets the first one's port, and
// the end of the context ends all.
func TestForwardListen(t *testing.T) {
	at := serve(t, func(c *net.TCPConn) { defer c.Close(); io.Copy(c, c) })
	remote := cluster.BackendPort{Number: 80}
	f := &forwarder{backend: &cluster.Backend{}, slots: make(chan struct{}, 2)}
	defer f.Close()
	if _, err := f.listen(mapping{at.Port(), remote}, nil); err == nil || !strings.Contains(err.Error(), "is in use") {
		t.Errorf("%v", err)
	}
	addresses, err := f.listen(mapping{0, remote}, nil)
	if err != nil || len(addresses) == 0 {
		t.Fatalf("%q, %v", addresses, err)
	}
	_, first, _ := net.SplitHostPort(addresses[0])
	if _, last, _ := net.SplitHostPort(addresses[len(addresses)-1]); last != first {
		t.Errorf("%q", addresses)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { f.Run(ctx); close(done) }()
	time.Sleep(50 * time.Millisecond) // until it waits for connections
	cancel()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Error("it goes on")
	}
}
