package router

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const original = "# made by a test\nsearch corp.example lan\nnameserver 192.0.2.53\nnameserver 2001:db8::53\noptions timeout:1 trust-ad\nsortlist 10.0.0.0\n"

// confEnv is an Env in a directory of its own, with the content in resolv.conf.
func confEnv(t *testing.T, content string) Env {
	t.Helper()
	dir := t.TempDir()
	env := Env{ResolvConf: filepath.Join(dir, "etc", "resolv.conf"), StateDir: filepath.Join(dir, "state"),
		NSSwitch: filepath.Join(dir, "nsswitch.conf"), ResolvedConf: filepath.Join(dir, "uplink"), BusAddress: "unix:path=/nonexistent"}
	if err := os.Mkdir(filepath.Dir(env.ResolvConf), 0o755); err != nil {
		t.Fatal(err)
	}
	if content != "" {
		write(t, env.ResolvConf, content)
	}
	return env
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func newDNS(t *testing.T, env Env) *DNS {
	t.Helper()
	d, err := NewDNS(DNSResolvConf, env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close(context.Background()) })
	return d
}

func sessions(slots ...int) []SessionDNS {
	var res []SessionDNS
	for _, slot := range slots {
		res = append(res, SessionDNS{Server: netip.AddrPortFrom(loopback(slot), 53), Domains: []string{"cluster.local"},
			Search: []string{"default.svc.cluster.local", "corp.example."}})
	}
	return res
}

func set(t *testing.T, d *DNS, s []SessionDNS) {
	t.Helper()
	if err := d.Set(context.Background(), s); err != nil {
		t.Fatal(err)
	}
}

func lines(s, first string) (res []string) {
	for line := range strings.Lines(s) {
		if strings.HasPrefix(line, first) {
			res = append(res, strings.TrimSpace(line))
		}
	}
	return res
}

func wantServers(t *testing.T, d *DNS, want ...string) {
	t.Helper()
	var got []string
	for _, s := range d.MachineDNS() {
		got = append(got, s.String())
	}
	if !slices.Equal(got, want) {
		t.Errorf("the machine's nameservers are %q, want %q", got, want)
	}
}

func TestResolvConfFile(t *testing.T) {
	env := confEnv(t, original)
	if err := os.Chmod(env.ResolvConf, 0o664); err != nil {
		t.Fatal(err)
	}
	d := newDNS(t, env)
	wantServers(t, d, "192.0.2.53:53", "[2001:db8::53]:53")
	set(t, d, sessions(3, 4))
	ours := content(t, env.ResolvConf)
	if got := lines(ours, "nameserver"); !slices.Equal(got, []string{"nameserver 127.53.83.4"}) {
		t.Errorf("nameservers %q", got)
	}
	if got := lines(ours, "search"); !slices.Equal(got, []string{"search corp.example lan default.svc.cluster.local"}) {
		t.Errorf("search %q", got)
	}
	if got := append(lines(ours, "options"), lines(ours, "sortlist")...); !slices.Equal(got, []string{"options timeout:1 trust-ad", "sortlist 10.0.0.0"}) {
		t.Errorf("other lines %q", got)
	}
	if first, _, _ := strings.Cut(ours, "\n"); !strings.Contains(first, "culvertd owns") || !strings.Contains(ours, "culvertd cleanup") {
		t.Errorf("the file does not say whose it is:\n%s", ours)
	}
	wantServers(t, d, "192.0.2.53:53", "[2001:db8::53]:53")
	if mode, why := env.withDefaults().decide(); mode != DNSResolvConf || !strings.Contains(why, "already") {
		t.Errorf("decided %s: %s", mode, why)
	}

	// The same again writes nothing; another first session does.
	before := env.withDefaults().file().stamps()
	set(t, d, sessions(3, 4))
	if env.withDefaults().file().stamps() != before {
		t.Error("the same settings were written again")
	}
	set(t, d, sessions(4))
	if got := lines(content(t, env.ResolvConf), "nameserver"); !slices.Equal(got, []string{"nameserver 127.53.83.5"}) {
		t.Errorf("nameservers %q", got)
	}

	set(t, d, nil)
	if got := content(t, env.ResolvConf); got != original {
		t.Errorf("restored %q", got)
	}
	if info, _ := os.Stat(env.ResolvConf); info.Mode().Perm() != 0o664 {
		t.Errorf("mode %v", info.Mode())
	}
	if left, _ := os.ReadDir(env.StateDir); len(left) != 0 {
		t.Errorf("left in the state directory: %v", left)
	}
	if left, _ := os.ReadDir(filepath.Dir(env.ResolvConf)); len(left) != 1 {
		t.Errorf("left in etc: %v", left)
	}
	set(t, d, sessions(0)) // and again
	for range 2 {
		if err := d.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	if got := content(t, env.ResolvConf); got != original {
		t.Errorf("restored %q", got)
	}
	if d.Set(context.Background(), sessions(0)) == nil {
		t.Error("Set after Close")
	}
	bad := sessions(0)
	bad[0].Server = netip.MustParseAddrPort("127.53.83.1:5353")
	if newDNS(t, env).Set(context.Background(), bad) == nil {
		t.Error("a port that resolv.conf cannot name")
	}
}

func TestResolvConfSymlink(t *testing.T) {
	t.Parallel()
	env := confEnv(t, "")
	target := filepath.Join(filepath.Dir(env.ResolvConf), "../run-resolv.conf")
	write(t, target, original)
	if err := os.Symlink("../run-resolv.conf", env.ResolvConf); err != nil {
		t.Fatal(err)
	}
	d := newDNS(t, env)
	set(t, d, sessions(0))
	if got := content(t, target); got != original {
		t.Errorf("wrote through the link: %q", got)
	}
	wantServers(t, d, "192.0.2.53:53", "[2001:db8::53]:53")
	<-d.Changes() // of the start
	// The original's owner goes on writing it: a new Wi-Fi.
	write(t, target, "nameserver 198.51.100.53\nsearch cafe.example\n")
	select {
	case <-d.Changes():
	case <-time.After(5 * time.Second):
		t.Fatal("no change reported")
	}
	wantServers(t, d, "198.51.100.53:53")
	if got := lines(content(t, env.ResolvConf), "search"); !slices.Equal(got, []string{"search cafe.example default.svc.cluster.local corp.example"}) {
		t.Errorf("search %q", got)
	}
	// kill -9, then cleanup.
	d.driver.(*resolvConf).stop()
	if restored, err := RestoreDNS(env); !restored || err != nil {
		t.Errorf("restored %v, %v", restored, err)
	}
	if got, err := os.Readlink(env.ResolvConf); err != nil || got != "../run-resolv.conf" {
		t.Errorf("link to %q, %v", got, err)
	}
	if restored, err := RestoreDNS(env); restored || err != nil {
		t.Errorf("restored again %v, %v", restored, err)
	}
}

func TestResolvConfAbsent(t *testing.T) {
	env := confEnv(t, "")
	d := newDNS(t, env)
	set(t, d, sessions(0))
	wantServers(t, d)
	if err := d.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(env.ResolvConf); !os.IsNotExist(err) {
		t.Errorf("there is a file: %v", err)
	}
}

func TestResolvConfBindMount(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	env := confEnv(t, "")
	source := filepath.Join(env.StateDir, "../mounted")
	write(t, source, original)
	write(t, env.ResolvConf, "nobody sees this\n")
	if err := unix.Mount(source, env.ResolvConf, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(env.ResolvConf, 0) })
	d := newDNS(t, env)
	for range 2 {
		set(t, d, sessions(0))
		if got := content(t, source); !isOurs([]byte(got)) {
			t.Fatalf("the mounted file is %q", got)
		}
		wantServers(t, d, "192.0.2.53:53", "[2001:db8::53]:53")
		set(t, d, nil)
		if got := content(t, source); got != original {
			t.Errorf("restored %q", got)
		}
	}
	set(t, d, sessions(0))
	d.driver.(*resolvConf).stop()
	if restored, err := RestoreDNS(env); !restored || err != nil {
		t.Errorf("restored %v, %v", restored, err)
	}
	if got := content(t, source); got != original {
		t.Errorf("restored %q", got)
	}
}

func TestResolvConfTrampled(t *testing.T) {
	t.Parallel()
	env := confEnv(t, original)
	d := newDNS(t, env)
	set(t, d, sessions(0))
	<-d.Changes()
	ours := content(t, env.ResolvConf)
	back := func() bool {
		b, _ := os.ReadFile(env.ResolvConf)
		return isOurs(b) && slices.Equal(lines(string(b), "nameserver"), []string{"nameserver 127.53.83.1"})
	}
	// Somebody edits, empties or removes ours: it comes back, with the same original.
	write(t, env.ResolvConf, strings.Replace(ours, mark, "# edited", 1)+"options rotate\n")
	waitFor(t, "edited file back", back)
	write(t, env.ResolvConf, "")
	waitFor(t, "emptied file back", back)
	os.Remove(env.ResolvConf)
	waitFor(t, "removed file back", back)
	wantServers(t, d, "192.0.2.53:53", "[2001:db8::53]:53")
	// Somebody replaces it: that is the original from now on.
	theirs := "nameserver 203.0.113.7\n"
	tmp := env.ResolvConf + ".dhclient"
	write(t, tmp, theirs)
	if err := os.Rename(tmp, env.ResolvConf); err != nil {
		t.Fatal(err)
	}
	select {
	case <-d.Changes():
	case <-time.After(5 * time.Second):
		t.Fatal("no change reported")
	}
	waitFor(t, "replaced file back", back)
	wantServers(t, d, "203.0.113.7:53")
	if err := d.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := content(t, env.ResolvConf); got != theirs {
		t.Errorf("restored %q", got)
	}
}

// A program that always writes again must not be fought without end.
func TestResolvConfTrampleLimit(t *testing.T) {
	t.Parallel()
	env := confEnv(t, original)
	d := newDNS(t, env)
	set(t, d, sessions(0))
	r := d.driver.(*resolvConf)
	r.stop()
	<-r.done
	taken := 0
	for i := range tramples + 3 {
		write(t, env.ResolvConf, "nameserver 203.0.113."+itoa(i+1)+"\n")
		r.look()
		if b := content(t, env.ResolvConf); isOurs([]byte(b)) {
			taken++
		}
	}
	if taken != tramples+1 { // the last borrows, and then it is calm
		t.Errorf("taken back %d times", taken)
	}
}

func TestRestoreLeavesOthersAlone(t *testing.T) {
	env := confEnv(t, original)
	d := newDNS(t, env)
	set(t, d, sessions(0))
	d.driver.(*resolvConf).stop()
	theirs := "nameserver 203.0.113.7\n"
	write(t, env.ResolvConf, theirs)
	if restored, err := RestoreDNS(env); restored || err != nil {
		t.Errorf("restored %v, %v", restored, err)
	}
	if got := content(t, env.ResolvConf); got != theirs {
		t.Errorf("theirs became %q", got)
	}
	if left, _ := os.ReadDir(env.StateDir); len(left) != 0 {
		t.Errorf("left in the state directory: %v", left)
	}
}

func TestRestoreWithoutSavedFile(t *testing.T) {
	env := confEnv(t, original)
	d := newDNS(t, env)
	set(t, d, sessions(0))
	d.driver.(*resolvConf).stop()
	if err := os.RemoveAll(env.StateDir); err != nil {
		t.Fatal(err)
	}
	wantServers(t, d, "192.0.2.53:53", "[2001:db8::53]:53")
	if restored, err := RestoreDNS(env); !restored || err != nil {
		t.Errorf("restored %v, %v", restored, err)
	}
	want := "nameserver 192.0.2.53\nnameserver 2001:db8::53\nsearch corp.example lan\noptions timeout:1 trust-ad\nsortlist 10.0.0.0\n"
	if got := content(t, env.ResolvConf); got != want {
		t.Errorf("restored %q", got)
	}
}

// A crash between any two steps leaves what the next restore needs.
func TestRestoreAfterCrashBetweenSteps(t *testing.T) {
	env := confEnv(t, original)
	f := env.withDefaults().file()
	if err := f.save(); err != nil { // saved, and the file not yet ours
		t.Fatal(err)
	}
	write(t, f.tmp(), "half")
	write(t, f.saved+".new", "half")
	if !f.leftover() {
		t.Error("a saved file is no leftover")
	}
	if restored, err := f.restore(); restored || err != nil {
		t.Errorf("restored %v, %v", restored, err)
	}
	if got := content(t, env.ResolvConf); got != original || f.leftover() {
		t.Errorf("resolv.conf %q, leftover %v", got, f.leftover())
	}
	// The next daemon starts without a cleanup, and finds the file its own already.
	d := newDNS(t, env)
	set(t, d, sessions(0))
	d.driver.(*resolvConf).stop()
	next := newDNS(t, env)
	set(t, next, sessions(1))
	wantServers(t, next, "192.0.2.53:53", "[2001:db8::53]:53")
	if err := next.Close(context.Background()); err != nil {
		t.Fatal(err)
	}
	if got := content(t, env.ResolvConf); got != original {
		t.Errorf("restored %q", got)
	}
}

func TestDecide(t *testing.T) {
	env := confEnv(t, original).withDefaults()
	check := func(mode, why string) {
		t.Helper()
		if m, w := env.decide(); m != mode || !strings.Contains(w, why) {
			t.Errorf("decided %s: %s, want %s: %s", m, w, mode, why)
		}
	}
	check(DNSResolvConf, "not this machine's resolver")
	write(t, env.ResolvConf, "nameserver 127.0.0.53\n")
	check(DNSResolvConf, "cannot be asked")
	write(t, env.ResolvConf, "nameserver 127.0.0.53\nnameserver 192.0.2.1\n")
	check(DNSResolvConf, "not this machine's resolver")
	write(t, env.NSSwitch, "passwd: files\nhosts: files resolve [!UNAVAIL=return] dns # resolve\n")
	check(DNSResolvConf, "cannot be asked")
	write(t, env.NSSwitch, "hosts: files dns resolve\n")
	check(DNSResolvConf, "not this machine's resolver")
	os.Remove(env.ResolvConf)
	os.Mkdir(env.ResolvConf, 0o755)
	check(DNSNone, "cannot be read")

	for mode, want := range map[string]string{DNSResolved: "systemd-resolved", "hosts": "unknown"} {
		if _, err := NewDNS(mode, env); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("mode %s: %v", mode, err)
		}
	}
	d, err := NewDNS(DNSNone, env)
	if err != nil || d.Mode() != DNSNone || d.Why() != "asked for" {
		t.Errorf("none: %v", err)
	}
	if err := d.Set(context.Background(), sessions(0)); err != nil {
		t.Error(err)
	}
	tunnel := []netip.Addr{netip.MustParseAddr("100.64.0.1"), netip.MustParseAddr("fd00::1")}
	if a := d.Listen(2, tunnel); a.String() != "100.64.0.1:53" {
		t.Errorf("none listens at %s", a)
	}
	if a := newDNS(t, env).Listen(2, tunnel); a.String() != "127.53.83.3:53" {
		t.Errorf("resolvconf listens at %s", a)
	}
}

// Whoever has no room left in /etc, or may not change it, gets his names back
// all the same, or keeps them.
func TestResolvConfFullDisk(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	for name, link := range map[string]bool{"a file": false, "a link": true} {
		t.Run(name, func(t *testing.T) {
			env := confEnv(t, "")
			etc := filepath.Dir(env.ResolvConf)
			// Inodes: the folder, resolv.conf, and one while it is replaced.
			if err := unix.Mount("tmpfs", etc, "tmpfs", 0, "nr_inodes=3"); err != nil {
				t.Fatal(err)
			}
			defer unix.Unmount(etc, unix.MNT_DETACH)
			target := filepath.Join(t.TempDir(), "target")
			write(t, target, original)
			if link {
				if err := os.Symlink(target, env.ResolvConf); err != nil {
					t.Fatal(err)
				}
			} else {
				write(t, env.ResolvConf, original)
			}
			d := newDNS(t, env)
			set(t, d, sessions(1))
			write(t, filepath.Join(etc, "full"), "")
			if err := os.WriteFile(filepath.Join(etc, "more"), nil, 0o644); err == nil {
				t.Fatal("the disk is not full")
			}
			set(t, d, nil)
			if got := content(t, env.ResolvConf); got != original {
				t.Errorf("restored %q", got)
			}
			if to, _ := os.Readlink(env.ResolvConf); (to == target) != link {
				t.Errorf("a link to %q", to)
			}
			if left, _ := os.ReadDir(env.StateDir); len(left) != 0 {
				t.Errorf("left in the state directory: %v", left)
			}
		})
	}
}

func TestResolvConfReadOnlyLink(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	env := confEnv(t, "")
	target := filepath.Join(t.TempDir(), "target")
	write(t, target, original)
	if err := os.Symlink(target, env.ResolvConf); err != nil {
		t.Fatal(err)
	}
	etc := filepath.Dir(env.ResolvConf)
	if err := unix.Mount(etc, etc, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(etc, unix.MNT_DETACH)
	if err := unix.Mount("", etc, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	d := newDNS(t, env)
	if err := d.Set(context.Background(), sessions(1)); err == nil || !strings.Contains(err.Error(), "read-only") {
		t.Errorf("taking a link in a read-only folder: %v", err)
	}
	if got := content(t, target); got != original {
		t.Errorf("wrote through the link: %q", got)
	}
	if err := d.Close(context.Background()); err != nil {
		t.Error(err)
	}
	if _, err := RestoreDNS(env); err != nil {
		t.Error(err)
	}
	if left, _ := os.ReadDir(env.StateDir); len(left) != 0 {
		t.Errorf("left in the state directory: %v", left)
	}
}

// Two daemons may share the folder and have a file of their own each: containers with
// one that is bind-mounted. Neither fails because of the other's new file.
func TestResolvConfSharedFolder(t *testing.T) {
	if !inNamespace(t) {
		return
	}
	dir := t.TempDir()
	var files []confFile
	for _, name := range []string{"one", "other"} {
		source, path := filepath.Join(t.TempDir(), name), filepath.Join(dir, name)
		write(t, source, original)
		write(t, path, "nobody sees this\n")
		if err := unix.Mount(source, path, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(path, 0) })
		files = append(files, confFile{path: path, saved: source + ".orig"})
	}
	var both sync.WaitGroup
	for k, f := range files {
		both.Go(func() {
			for n := range 200 {
				text := fmt.Sprintf("# %d of file %d\n", n, k)
				if err := f.write([]byte(text)); err != nil {
					t.Errorf("%d of file %d: %v", n, k, err)
					return
				}
				if got, err := os.ReadFile(f.path); err != nil || string(got) != text {
					t.Errorf("%d of file %d is %q, %v", n, k, got, err)
				}
			}
		})
	}
	both.Wait()
}
