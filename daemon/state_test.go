package daemon

import (
	"bytes"
	"context"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
)

func mustPrefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestNext(t *testing.T) {
	up := inputs{wanted: true, established: true, alive: true, reported: api.Connected}
	with := func(in inputs, change func(*inputs)) inputs { change(&in); return in }
	for _, x := range []struct {
		name string
		in   inputs
		want api.State
	}{
		{"asked for", inputs{wanted: true}, api.Connecting},
		{"process started", inputs{wanted: true, alive: true, reported: api.Connecting}, api.Connecting},
		{"needs login before it ever was connected", inputs{wanted: true, alive: true, reported: api.NeedsLogin}, api.Connecting},
		{"connected", up, api.Connected},
		{"carrier lost", with(up, func(i *inputs) { i.reported = api.Reconnecting }), api.Reconnecting},
		{"login needed", with(up, func(i *inputs) { i.reported = api.NeedsLogin }), api.NeedsLogin},
		{"process died", with(up, func(i *inputs) { i.alive = false }), api.Reconnecting},
		{"next process begins", with(up, func(i *inputs) { i.reported = "" }), api.Reconnecting},
		{"next process connects", with(up, func(i *inputs) { i.reported = api.Connecting }), api.Reconnecting},
		{"nonsense reported", with(up, func(i *inputs) { i.reported = "root" }), api.Reconnecting},
		{"disconnect", with(up, func(i *inputs) { i.wanted = false }), api.Disconnecting},
		{"failed", with(up, func(i *inputs) { i.failed = true }), api.Disconnecting},
		{"cancelled while connecting", inputs{alive: true}, api.Disconnecting},
		{"undone", inputs{undone: true, alive: true}, api.Disconnected},
	} {
		if got := next(x.in); got != x.want {
			t.Errorf("%s: %q, want %q", x.name, got, x.want)
		}
	}
}

func TestRing(t *testing.T) {
	r := newRing()
	line := strings.Repeat("x", 1023) + "\n"
	for range 3 * ringSize / len(line) {
		r.Write([]byte(line))
	}
	r.Write([]byte("last\x1b[31m\n"))
	if len(r.buf) > 2*ringSize || cap(r.buf) > 4*ringSize {
		t.Errorf("keeps %d of %d bytes", len(r.buf), cap(r.buf))
	}
	if got := r.lastLine(); got != "last[31m" {
		t.Errorf("last line %q", got)
	}
	var all bytes.Buffer
	done := make(chan error)
	go func() { done <- r.copyTo(context.Background(), &all, true) }()
	r.Write([]byte("more\n"))
	r.close()
	if err := <-done; err != nil || !strings.HasSuffix(all.String(), "more\n") || all.Len() < ringSize {
		t.Errorf("followed %d bytes, %v", all.Len(), err)
	}
}

func TestWatcherKeepsTheLastState(t *testing.T) {
	w := &watcher{wants: func(*api.Session) bool { return true }, more: make(chan struct{}, 1)}
	w.put(api.Session{ID: "b", State: api.Disconnected})
	for i := range 10 * maxQueue {
		w.put(api.Session{ID: "a", Restarts: i})
	}
	got := w.next(t.Context())
	if len(got) > maxQueue || got[len(got)-1].Restarts != 10*maxQueue-1 || got[0].ID != "b" {
		t.Errorf("%d queued, first %+v last %+v", len(got), got[0], got[len(got)-1])
	}
}

func TestReadFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.yaml")
	if f, err := ReadFile(path); err != nil || f.Group != "" {
		t.Errorf("a missing file: %+v, %v", f, err)
	}
	write := func(text string) {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("group: dev\nmaxSessions: 2\nallowPrefixes: [8.8.8.0/24]\nallowDomains: [corp.com]\n")
	f, err := ReadFile(path)
	if err != nil || f.Group != "dev" || f.MaxSessions != 2 || !slices.Equal(f.AllowPrefixes, []netip.Prefix{mustPrefix("8.8.8.0/24")}) || !slices.Equal(f.AllowDomains, []string{"corp.com"}) {
		t.Errorf("%+v, %v", f, err)
	}
	for _, bad := range []string{"grup: dev\n", "maxSessions: 1000\n", "allowPrefixes: [x]\n", "group: a\ngroup: b\n"} {
		write(bad)
		if _, err := ReadFile(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

// Root's program links neither Kubernetes nor WireGuard nor a network stack.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "../cmd/culvertd").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.Lines(string(out)) {
		for _, bad := range []string{"k8s.io/", "golang.zx2c4.com/wireguard", "gvisor.dev/", "github.com/miekg/dns", "github.com/gorilla/websocket"} {
			if strings.HasPrefix(dep, bad) {
				t.Errorf("culvertd links %s", dep)
			}
		}
	}
}

// The origin tells users and daemons apart and stays what it is.
func TestOrigin(t *testing.T) {
	a := Config{Socket: "/run/a"}
	b := Config{Socket: "/run/b"}
	if origin(a, 1) == "" {
		t.Skip("this machine has no " + machineID)
	}
	if origin(a, 1) != origin(a, 1) || origin(a, 1) == origin(a, 2) || origin(a, 1) == origin(b, 1) {
		t.Errorf("%s %s %s", origin(a, 1), origin(a, 2), origin(b, 1))
	}
}

func TestRingIsPlain(t *testing.T) {
	r := newRing()
	for _, part := range []string{"a\x1b[31m\tb\r\n", "\u00e9 \u4e2d \xc2", "\x9b31m\x7f\x00.\n"} {
		r.Write([]byte(part))
	}
	var b strings.Builder
	r.copyTo(t.Context(), &b, false)
	if got, want := b.String(), "a[31m\tb\n\u00e9 \u4e2d ?31m.\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// What a session or a request says ends on terminals, root's among them.
func TestNothingUnprintableIsShown(t *testing.T) {
	m := newMachine(Config{}.complete())
	n := link.Network{Identity: "i", Context: "c", MTU: 1420, DNS: &link.DNS{ClusterDomain: "cluster.local"}}
	if err := m.validate(n); err != nil {
		t.Fatal(err)
	}
	n.DNS.ClusterDomain = "x\x1b[31m"
	if err := m.validate(n); asAPI(err).Code != api.CodeUsage {
		t.Errorf("cluster domain with an escape: %v", err)
	}
	s := &session{options: api.Options{Context: "c\x1b[2J", Namespace: "n\x07"}}
	if v := s.snapshot(); v.Context != "c[2J" || v.Namespace != "n" {
		t.Errorf("shown as %q, %q", v.Context, v.Namespace)
	}
}

// Between the end of its process and the run goroutine's next step nobody is told
// that a session is connected.
func TestSnapshotWithoutProcess(t *testing.T) {
	s := &session{state: api.Connected, in: inputs{wanted: true, established: true, reported: api.Connected}, cause: "the session process ended: killed"}
	if v := s.snapshot(); v.State != api.Reconnecting || v.Cause != s.cause || v.PID != 0 {
		t.Errorf("a session without a process: %+v", v)
	}
	s.in.alive, s.proc = true, &process{pid: 7}
	if v := s.snapshot(); v.State != api.Connected || v.Cause != "" || v.PID != 7 {
		t.Errorf("a session with a process: %+v", v)
	}
}
