package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

var update = flag.Bool("update", false, "write the golden files anew")

// golden compares a text with testdata/NAME.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s:\n%s\nwant:\n%s", name, got, want)
	}
}

var noon = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)

func sampleSession() api.Session {
	return api.Session{
		ID: "k3x9", UID: 1000, User: "jane", Context: "staging", Server: "https://10.0.0.5:6443", Namespace: "shop",
		State: api.Connected, Since: noon.Add(-75 * time.Second), Started: noon.Add(-80 * time.Second), PID: 4711, AtBoot: true,
		Device:    "culvert0",
		Addresses: []netip.Prefix{netip.MustParsePrefix("198.18.0.1/32"), netip.MustParsePrefix("fd12::1/128")},
		Routes: []api.Route{
			{Prefix: netip.MustParsePrefix("10.96.0.0/16"), Source: "ServiceCIDR kubernetes"},
			{Prefix: netip.MustParsePrefix("10.244.0.0/24"), Source: "node node1"},
		},
		Excluded: []api.Route{{Prefix: netip.MustParsePrefix("10.0.0.5/32"), Source: "API server"}},
		DNS:      api.DNSStatus{Mode: "resolved", Server: "198.18.0.1", ClusterDomain: "cluster.local", Domains: []string{"~cluster.local", "~svc"}},
		Agent:    api.AgentStatus{Namespace: "shop", Pod: "culvert-agent-k3x9-abcde", Node: "node1", Image: "culvert-agent:v1", Version: "v1"},
		Carrier:  api.CarrierStatus{SentRate: 3400, ReceivedRate: 12, Others: []api.OtherCarrier{{Name: "pods/proxy", Reason: "RBAC: get pods/proxy is not allowed"}}, Name: "port-forward (WebSocket)", RTT: 812 * time.Microsecond, Redials: 1, Sent: 1234567, Received: 999},
		Notes:    []string{"nodes are not visible to you: pod ranges come from the pods of namespace shop"},
	}
}

func brokenSession() api.Session {
	return api.Session{
		ID: "p0", UID: 1000, Context: "production\x1b[2J", State: api.Reconnecting, Cause: "the API server\ncut the stream", Since: noon.Add(-2 * time.Hour),
		Device: "culvert1",
	}
}

func TestStatusText(t *testing.T) {
	for name, c := range map[string]struct {
		sessions []api.Session
		wide     bool
	}{
		"status-none.txt":  {nil, false},
		"status.txt":       {[]api.Session{sampleSession(), brokenSession()}, false},
		"status-wide.txt":  {[]api.Session{sampleSession()}, true},
		"status-ended.txt": {[]api.Session{{Context: "dev", State: api.Disconnected, Since: noon, Error: &api.Error{Code: api.CodeImage, Message: "the image cannot be pulled", Hint: "culvert connect --image IMAGE"}}}, false},
		"status-users.txt": {[]api.Session{sampleSession(), {UID: 1001, Context: "dev", State: api.Connecting, Step: "starting the agent", Since: noon}}, false},
	} {
		var b bytes.Buffer
		a := &app{name: "culvert", output: "text"}
		if err := a.printSessions(&b, c.sessions, c.wide, noon); err != nil {
			t.Fatal(err)
		}
		golden(t, name, b.String())
	}
}

// TestStatusJSON: the JSON is the API's own types, and a list when it is empty.
func TestStatusJSON(t *testing.T) {
	a := &app{name: "culvert", output: "json"}
	var b bytes.Buffer
	want := []api.Session{sampleSession(), brokenSession()}
	if err := a.printSessions(&b, want, false, noon); err != nil {
		t.Fatal(err)
	}
	var got []api.Session
	if err := json.Unmarshal(b.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, want %+v", got, want)
	}
	golden(t, "status.json", b.String())
	b.Reset()
	if err := a.printSessions(&b, nil, false, noon); err != nil || b.String() != "[]\n" {
		t.Errorf("no sessions: %q, %v", b.String(), err)
	}
}

func TestSummary(t *testing.T) {
	var b bytes.Buffer
	a := &app{name: "kubectl culvert", output: "text"}
	s := sampleSession()
	a.summary(&b, s, 2340*time.Millisecond)
	golden(t, "summary.txt", b.String())

	for i := range 20 {
		s.Routes = append(s.Routes, api.Route{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 1, byte(i), 0}), 24), Source: "node"})
	}
	b.Reset()
	a.summary(&b, s, time.Second)
	if n := strings.Count(b.String(), "/24"); n != summaryRoutes-1 {
		t.Errorf("%d routes of the 21 /24 are listed:\n%s", n, b.String())
	}
	if !strings.Contains(b.String(), "and 14 more: kubectl culvert status -o wide") {
		t.Errorf("nothing says that there are more:\n%s", b.String())
	}
}

func TestPingStats(t *testing.T) {
	var p pingStats
	if got := p.String("x"); got != "--- x: 0 probes, 0 answers, 100% lost" {
		t.Error(got)
	}
	for _, r := range []api.PingReply{{RTT: 2 * time.Millisecond}, {Error: "no answer"}, {RTT: 1 * time.Millisecond}, {RTT: 3 * time.Millisecond}} {
		p.add(r)
	}
	if got, want := p.String("x"), "--- x: 4 probes, 3 answers, 25% lost; min/avg/max 1.000 ms/2.000 ms/3.000 ms"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestProgressPlain(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b, false)
	for _, s := range []string{"one", "one", "", "two"} {
		p.Step(s)
	}
	p.Close(true)
	p.Close(false)
	if got := b.String(); got != "one\ntwo\n" {
		t.Errorf("%q", got)
	}
}

func TestProgressTerminal(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b, true)
	p.Step("one")
	p.Step("two")
	p.Close(false)
	p.Close(false)
	got := b.String()
	if !strings.Contains(got, "\r\x1b[K✓ one (") || !strings.Contains(got, "\r\x1b[K✗ two (") || strings.Count(got, "\n") != 2 {
		t.Errorf("%q", got)
	}
}

func TestTexts(t *testing.T) {
	for d, want := range map[time.Duration]string{
		812 * time.Microsecond: "0.8 ms", 250 * time.Millisecond: "250 ms", 2340 * time.Millisecond: "2.3 s",
		75 * time.Second: "1m15s", 2*time.Hour + 3*time.Minute: "2h03m", 72 * time.Hour: "3d",
	} {
		if got := took(d); got != want {
			t.Errorf("took(%v) = %q, want %q", d, got, want)
		}
	}
	for n, want := range map[uint64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 1234567: "1.2 MB", 999999999: "1.0 GB"} {
		if got := bytesText(n); got != want {
			t.Errorf("bytesText(%d) = %q, want %q", n, got, want)
		}
	}
	for in, want := range map[string]string{"kubectl-culvert": "kubectl culvert", "/usr/local/bin/culvert": "culvert", "/tmp/main.test": "culvert"} {
		if got := displayName(in); got != want {
			t.Errorf("displayName(%q) = %q, want %q", in, got, want)
		}
	}
	for _, c := range [][3]string{
		{"web", "", "web"}, {"web", "shop", "web.shop"}, {"web.other", "shop", "web.other"}, {"svc/web", "shop", "svc/web.shop"},
		{"10.0.0.1", "shop", "10.0.0.1"}, {"fd00::1", "shop", "fd00::1"}, {"10.0.0.1:80", "shop", "10.0.0.1:80"},
	} {
		if got := qualified(c[0], c[1]); got != c[2] {
			t.Errorf("qualified(%q, %q) = %q, want %q", c[0], c[1], got, c[2])
		}
	}
}
