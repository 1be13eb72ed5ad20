package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/wire/carrier"
)

// daemon is the other end of a session's link: it notes what it is told.
type daemon struct {
	mu       sync.Mutex
	statuses []api.Session
	excluded []netip.Addr
}

func newPair(t *testing.T) (*Session, *daemon) {
	t.Helper()
	ours, theirs, err := link.Pair()
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{}
	ours.Handle(link.MethodStatus, func(_ context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var s api.Session
		if err := json.Unmarshal(in, &s); err != nil {
			return nil, nil, err
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.statuses = append(d.statuses, s)
		return nil, nil, nil
	})
	ours.Handle(link.MethodExclude, func(_ context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		var e link.Exclude
		if err := json.Unmarshal(in, &e); err != nil {
			return nil, nil, err
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		d.excluded = e.Addrs
		return nil, nil, nil
	})
	sock, err := net.FileConn(theirs)
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	conn := link.New(sock.(*net.UnixConn), 8)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = ours.Run(ctx) })
	wg.Go(func() { _ = conn.Run(ctx) })
	t.Cleanup(func() { cancel(); ours.Close(); conn.Close(); wg.Wait() })
	s := newSession(conn)
	s.log = slog.New(slog.DiscardHandler)
	return s, d
}

func (d *daemon) last() api.Session {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.statuses) == 0 {
		return api.Session{}
	}
	return d.statuses[len(d.statuses)-1]
}

func TestStatusTellsEachChange(t *testing.T) {
	s, d := newPair(t)
	s.status.step("one")
	first := d.last()
	if first.State != api.Connecting || first.Step != "one" || first.Since.IsZero() {
		t.Errorf("want connecting, step one, and since when: %+v", first)
	}
	s.status.step("two")
	if now := d.last(); now.Step != "two" || !now.Since.Equal(first.Since) {
		t.Errorf("a step is no new state: %+v after %+v", now, first)
	}
	s.setConnected()
	if now := d.last(); now.State != api.Connected || now.Step != "" || now.Since.Equal(first.Since) {
		t.Errorf("want connected, without a step, since now: %+v", now)
	}
}

func TestExplain(t *testing.T) {
	s, d := newPair(t)
	s.explain(errors.New("dial tcp: timeout"))
	if now := d.last(); now.State != api.Reconnecting || now.Cause != "dial tcp: timeout" {
		t.Errorf("any error is a cause of reconnecting: %+v", now)
	}
	s.explain(fmt.Errorf("asking: %w", &api.Error{Code: api.CodeCredentials, Message: "expired", Hint: "culvert connect"}))
	if now := d.last(); now.State != api.NeedsLogin || now.Cause != "expired; culvert connect" {
		t.Errorf("refused credentials need a login: %+v", now)
	}
}

func TestEndSaysWhy(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		last api.State
		code string
	}{
		{"asked to", errDisconnect, api.Disconnected, ""},
		{"user error", &api.Error{Code: api.CodeImage, Message: "no such image"}, api.Disconnected, api.CodeImage},
		{"time is over", fmt.Errorf("waiting: %w", context.DeadlineExceeded), api.Disconnected, api.CodeTimeout},
		{"anything", errors.New("broken"), api.Disconnected, api.CodeInternal},
		{"killed", errKilled, "", ""}, // another process takes over: no last word
	} {
		t.Run(c.name, func(t *testing.T) {
			s, d := newPair(t)
			s.end(c.err)
			now := d.last()
			if now.State != c.last {
				t.Errorf("state %q, want %q", now.State, c.last)
			}
			if code := ""; now.Error != nil {
				if code = now.Error.Code; code != c.code {
					t.Errorf("code %q, want %q", code, c.code)
				}
			} else if c.code != "" {
				t.Errorf("no error, want %q", c.code)
			}
		})
	}
}

// TestEndWaitsForLoops: what a loop still does is over before the agent goes.
func TestEndWaitsForLoops(t *testing.T) {
	s, d := newPair(t)
	ended := false
	s.loops.Go(func() {
		time.Sleep(100 * time.Millisecond)
		ended = true
	})
	s.end(errDisconnect)
	if !ended || d.last().State != api.Disconnected {
		t.Errorf("the loop ended: %v, last word %q", ended, d.last().State)
	}
}

func TestSelectors(t *testing.T) {
	s, _ := newPair(t)
	n := &s.network
	if err := errors.Join(n.readSelectors(api.Options{
		IncludeIPs: []string{"10.1.2.3", "fd00:1::/64"}, ExcludeIPs: []string{"10.0.0.0/24,localhost"},
	}), n.resolveHosts(t.Context())); err != nil {
		t.Fatal(err)
	}
	if want := []api.Route{
		{Prefix: netip.MustParsePrefix("10.1.2.3/32"), Source: "--include-ips"},
		{Prefix: netip.MustParsePrefix("fd00:1::/64"), Source: "--include-ips"},
	}; !slices.Equal(n.include, want) {
		t.Errorf("include %v, want %v", n.include, want)
	}
	if want := (api.Route{Prefix: netip.MustParsePrefix("127.0.0.1/32"), Source: "--exclude-ips localhost"}); !slices.Contains(n.exclude, want) {
		t.Errorf("exclude %v, want %v in it", n.exclude, want)
	}
	before := len(n.exclude)
	if err := n.resolveHosts(t.Context()); err != nil {
		t.Fatal(err)
	}
	if len(n.exclude) != before {
		t.Errorf("resolving again makes %d exclusions of %d", len(n.exclude), before)
	}
	var e *api.Error
	err := errors.Join(n.readSelectors(api.Options{ExcludeIPs: []string{"no-such-host.invalid"}}), n.resolveHosts(t.Context()))
	if !errors.As(err, &e) || e.Code != api.CodeUsage {
		t.Errorf("a name that does not resolve: %v", err)
	}
}

// TestResumeKeepsWhatWasResolved: a process that takes over while names do not
// resolve excludes what the one before it excluded.
func TestResumeKeepsWhatWasResolved(t *testing.T) {
	s, _ := newPair(t)
	n := &s.network
	if err := n.readSelectors(api.Options{IncludeIPs: []string{"10.1.2.3"}, ExcludeIPs: []string{"git.example"}}); err != nil {
		t.Fatal(err)
	}
	route := func(p, source string) api.Route { return api.Route{Prefix: netip.MustParsePrefix(p), Source: source} }
	excluded := route("10.244.1.9/32", "--exclude-ips git.example")
	n.resume(&link.Network{
		Plan:     []api.Route{route("10.244.0.0/16", "node node1"), route("10.1.2.3/32", "--include-ips")},
		Excluded: []api.Route{excluded, route("172.30.0.10/32", serverSource)},
	}, &link.Granted{})
	if !slices.Equal(n.exclude, []api.Route{excluded}) {
		t.Errorf("excluded %v, want %v", n.exclude, excluded)
	}
	if want := []netip.Addr{netip.MustParseAddr("172.30.0.10")}; !slices.Equal(n.server, want) {
		t.Errorf("the API server is at %v, want %v", n.server, want)
	}
	if len(n.ranges.Routes) != 1 || len(n.include) != 1 {
		t.Errorf("ranges %v, include %v", n.ranges.Routes, n.include)
	}
}

func TestExcludeServer(t *testing.T) {
	s, d := newPair(t)
	want := []netip.Addr{netip.MustParseAddr("172.30.0.10"), netip.MustParseAddr("fd00::10")}
	if err := s.network.excludeServer(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !slices.Equal(d.excluded, want) {
		t.Errorf("the daemon excludes %v, want %v", d.excluded, want)
	}
}

func TestClusterDomain(t *testing.T) {
	for _, c := range []struct{ resolvConf, asked, want string }{
		{"search demo.svc.corp.internal svc.corp.internal corp.internal\nnameserver 10.96.0.10", "", "corp.internal"},
		{"search demo.svc.cluster.local svc.cluster.local cluster.local", "Other.Example.", "other.example"},
		{"nameserver 10.0.0.2", "", "cluster.local"},
	} {
		s, _ := newPair(t)
		if got := s.names.agentSays(c.resolvConf, c.asked); got != c.want {
			t.Errorf("agent says %q, asked for %q: domain %q, want %q", c.resolvConf, c.asked, got, c.want)
		}
	}
}

func TestReportKeepsNotes(t *testing.T) {
	s, d := newPair(t)
	s.network.dirty = make(chan struct{}, 1)
	s.network.setRanges(cluster.Ranges{Notes: []string{"pods are not visible"}})
	s.network.report(&api.Error{Code: api.CodeConflict, Message: "10.9.0.0/16 collides"})
	if got := d.last().Notes; len(got) != 2 || got[0] != "pods are not visible" {
		t.Errorf("notes %q", got)
	}
	s.network.report(nil)
	if got := d.last().Notes; len(got) != 1 {
		t.Errorf("a mended change leaves notes %q", got)
	}
}

func TestFatal(t *testing.T) {
	if fatal(errors.New("dial tcp: refused")) || !fatal(fmt.Errorf("introducing: %w", &carrier.ProtocolError{})) {
		t.Error("only two ends that do not fit are beyond a retry")
	}
}

func TestPingWithoutTunnel(t *testing.T) {
	s, _ := newPair(t)
	if _, err := s.ping(t.Context(), netip.MustParseAddr("10.0.0.1"), time.Second); err == nil {
		t.Error("an echo without a tunnel was answered")
	}
}
