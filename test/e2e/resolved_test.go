//go:build e2e

package e2e

import (
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// TestSystemdResolved: the laptop's resolver is Debian's systemd-resolved. It
// gets per-link settings for two clusters, keeps the machine's own names, and
// has forgotten everything after disconnect and after kill -9 of the daemon.
func TestSystemdResolved(t *testing.T) {
	restartDaemon := func(before string) {
		t.Helper()
		if err := lab.StopDaemon(); err != nil {
			t.Fatal(err)
		}
		if err := lab.StartDaemonBehind(before); err != nil {
			t.Fatal(err)
		}
	}
	if err := lab.StopDaemon(); err != nil {
		t.Fatal(err)
	}
	r, err := lab.StartResolved()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		restartDaemon(":")
	})
	withBus := "export DBUS_SYSTEM_BUS_ADDRESS=" + r.Bus
	restartDaemon(withBus)

	wantNames := func(t *testing.T, names map[string]string) {
		t.Helper()
		for name, prefix := range names {
			// resolved takes new settings within a moment, and caches nothing of before.
			eventually(t, 5*time.Second, func() error {
				got := lab.Run(netlab.Alice, "/bin/sh", "-c", "getent ahostsv4 "+name+" | awk '{print $1; exit}'")
				if !strings.HasPrefix(got.Stdout, prefix) || got.Stdout == "" {
					return fmt.Errorf("%s is %q, want %s…", name, got.Stdout, prefix)
				}
				return nil
			})
		}
	}
	own := map[string]string{"www.example.test": "198.51.100.80", "go.dev": "198.51.100.80"}
	wantNames(t, own)
	// The stub listens until resolved ends; nothing else of the listing changes.
	before := listMachine(t)

	t.Run("two sessions", func(t *testing.T) {
		a := connect(t)
		b := connectAs(t, netlab.Alice, "b", "developer")
		for _, s := range []api.Session{a, b} {
			if s.DNS.Mode != "resolved" {
				t.Fatalf("DNS mode %q of %s, want resolved", s.DNS.Mode, s.Context)
			}
			status := r.Resolvectl("status", s.Device).Stdout
			for _, want := range []string{"-DefaultRoute", s.DNS.ClusterDomain} {
				if !strings.Contains(status, want) {
					t.Errorf("no %q in the settings of %s:\n%s", want, s.Device, status)
				}
			}
		}
		wantNames(t, own)
		wantNames(t, map[string]string{
			"echo.demo.svc.cluster.local": "10.96.", "echo.demo.svc.corp.internal": "10.97.",
			"web-0.web.demo.svc.cluster.local":     "10.244.",
			"echo.demo.svc.culvert-test.culvert":   "10.96.",
			"echo.demo.svc.culvert-test-b.culvert": "10.97.",
			"echo.demo.svc":                        "10.9", "echo.demo": "10.9", "echo": "10.9",
		})
		for _, q := range []string{"SRV _http._tcp.echo.demo.svc.cluster.local", "+tcp A echo.demo.svc.cluster.local"} {
			if got := sh(t, "dig +short +time=3 +tries=2 @127.0.0.53 "+q); got == "" {
				t.Errorf("dig %s: nothing", q)
			}
		}
		got := sh(t, "getent ahostsv4 echo.demo.svc.cluster.local | awk '{print $1; exit}'")
		echo(t, dial(t, "tcp", net.JoinHostPort(got, "9000")), []byte("through resolved"))
		if r := lab.Culvert(netlab.Alice, "disconnect", a.Context); r.Code != 0 {
			t.Fatal(r)
		}
		wantNames(t, map[string]string{"echo.demo.svc.corp.internal": "10.97.", "echo.demo": "10.97."})
	})
	left := func(t *testing.T) {
		t.Helper()
		if diff := compare(before, listMachine(t)); diff != "" {
			t.Errorf("left on the machine:\n%s", diff)
		}
		if got := r.Resolvectl("status").Stdout; strings.Contains(got, "culvert") || strings.Contains(got, "cluster.local") {
			t.Errorf("systemd-resolved still knows the cluster:\n%s", got)
		}
		wantNames(t, own)
	}
	left(t)
	t.Run("daemon killed", func(t *testing.T) {
		if r := lab.Culvert(netlab.Alice, "connect", "--kubeconfig", kubeconfig(t, "", "developer"), "--image", image); r.Code != 0 {
			t.Fatalf("connect: %v", r)
		}
		wantNames(t, map[string]string{"echo.demo.svc.cluster.local": "10.96."})
		if err := lab.KillDaemon(); err != nil {
			t.Fatal(err)
		}
		wantNames(t, own)
		if err := lab.StartDaemonBehind(withBus); err != nil {
			t.Fatal(err)
		}
		left(t)
	})
}
