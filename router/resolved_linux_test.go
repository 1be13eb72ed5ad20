package router

import (
	"context"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/test/netlab"
)

// unpackResolved returns a directory with Debian's systemd-resolved in it.
func unpackResolved(t *testing.T) string {
	t.Helper()
	dir, err := netlab.UnpackResolved()
	if err != nil {
		t.Skip(err) // without a network, or not Debian
	}
	return dir
}

// nameserver answers every A question with its own address, and remembers the questions.
type nameserver struct {
	mu     sync.Mutex
	names  []string
	answer string
}

func (n *nameserver) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	name := q.Question[0].Name
	n.mu.Lock()
	n.names = append(n.names, strings.ToLower(name))
	n.mu.Unlock()
	if q.Question[0].Qtype == dns.TypeA {
		rr, _ := dns.NewRR(name + " 5 IN A " + n.answer)
		m.Answer = append(m.Answer, rr)
	}
	w.WriteMsg(m)
}

func (n *nameserver) asked(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Contains(n.names, name)
}

// serveDNS starts a nameserver in the calling thread's namespace.
func serveDNS(t *testing.T, addr, answer string) *nameserver {
	t.Helper()
	n := &nameserver{answer: answer}
	c, err := net.ListenPacket("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{PacketConn: c, Handler: n}, {Listener: l, Handler: n}} {
		go s.ActivateAndServe()
		t.Cleanup(func() { s.Shutdown() })
	}
	return n
}

// start runs a program until the test ends or stop is called.
func start(t *testing.T, args ...string) (stop func()) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() { cmd.Process.Kill(); cmd.Wait() })
	t.Cleanup(stop)
	return stop
}

// bind lays a file over another, in this mount namespace only.
func bind(t *testing.T, path, content string) {
	t.Helper()
	source := filepath.Join(t.TempDir(), "file")
	write(t, source, content)
	if err := unix.Mount(source, path, "", unix.MS_BIND, ""); err != nil {
		t.Fatalf("binding %s: %v", path, err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
}

const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow send_type="signal"/>
<allow send_requested_reply="true" send_type="method_return"/><allow send_requested_reply="true" send_type="error"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/></policy></busconfig>`

func TestResolved(t *testing.T) {
	const inside = "CULVERT_ROUTER_TEST_RESOLVED"
	root := os.Getenv(inside)
	if root == "" {
		root = unpackResolved(t) // needs the machine's own network
		t.Setenv(inside, root)
	}
	if !inNamespace(t) {
		return
	}
	resolvectl := func(args ...string) string {
		t.Helper()
		return run(t, append([]string{filepath.Join(root, "usr/bin/resolvectl"), "--no-pager"}, args...)...)
	}
	_, inNeighbour := neighbour(t)
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	os.Mkdir("/run/dbus", 0o755)
	os.Mkdir("/run/systemd", 0o755)
	bind(t, "/etc/resolv.conf", "nameserver 192.0.2.1\n")
	passwd, group := content(t, "/etc/passwd"), content(t, "/etc/group")
	if !strings.Contains(passwd, "systemd-resolve:") {
		bind(t, "/etc/passwd", passwd+"systemd-resolve:x:995:995::/:/usr/sbin/nologin\n")
		bind(t, "/etc/group", group+"systemd-resolve:x:995:\n")
	}
	conf := filepath.Join(t.TempDir(), "bus.conf")
	write(t, conf, busConfig)
	stopBus := start(t, "dbus-daemon", "--config-file="+conf, "--nofork", "--nopidfile")
	waitFor(t, "bus", func() bool { _, err := os.Stat("/run/dbus/system_bus_socket"); return err == nil })

	env := confEnv(t, "nameserver 127.0.0.53\n")
	env.BusAddress = "unix:path=/run/dbus/system_bus_socket"
	env.ResolvedConf = "/run/systemd/resolve/resolv.conf"
	if mode, why := env.withDefaults().decide(); mode != DNSResolvConf || !strings.Contains(why, "does not answer") {
		t.Errorf("without resolved: %s, %s", mode, why)
	}
	ping := func() bool { return env.pingResolved() == nil }
	stopResolved := start(t, filepath.Join(root, "lib/systemd/systemd-resolved"))
	waitFor(t, "systemd-resolved", ping)

	var machine, cluster *nameserver
	inNeighbour(func() { machine = serveDNS(t, "192.0.2.1:53", "192.0.2.1") })
	openTUN(t, "culvert0", false)
	c := config()
	c.Excluded = nil
	if err := New(0, "culvert0").Set(c); err != nil {
		t.Fatal(err)
	}
	d, err := NewDNS(DNSAuto, env)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close(context.Background()) })
	if d.Mode() != DNSResolved || !strings.Contains(d.Why(), "stub") {
		t.Fatalf("mode %s: %s", d.Mode(), d.Why())
	}
	server := d.Listen(0, []netip.Addr{c.Addresses[0].Addr(), c.Addresses[1].Addr()})
	cluster = serveDNS(t, server.String(), "10.96.0.7")
	link, err := net.InterfaceByName("culvert0")
	if err != nil {
		t.Fatal(err)
	}
	s := SessionDNS{Device: "culvert0", Ifindex: link.Index, Server: server,
		Domains: []string{"cluster.local", "demo.svc", "svc"}, Search: []string{"default.svc.cluster.local"}}
	set(t, d, []SessionDNS{s})

	wantDomains := func() {
		t.Helper()
		waitFor(t, "per-link settings", func() bool {
			out, err := exec.Command(filepath.Join(root, "usr/bin/resolvectl"), "--no-pager", "domain", "culvert0").CombinedOutput()
			return err == nil && strings.Contains(string(out), ": default.svc.cluster.local ~cluster.local ~demo.svc ~svc")
		})
	}
	wantDomains()
	status := resolvectl("status", "culvert0")
	for _, want := range []string{"-DefaultRoute", "-LLMNR", "-mDNS", "-DNSOverTLS", "DNSSEC=no", "DNS Servers: 100.64.9.1"} {
		if !strings.Contains(status, want) {
			t.Errorf("no %q in\n%s", want, status)
		}
	}
	ask := func(network, name string) string {
		t.Helper()
		m := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA)
		r, _, err := (&dns.Client{Net: network, Timeout: 5 * time.Second}).Exchange(m, "127.0.0.53:53")
		if err != nil {
			t.Errorf("asking for %s: %v", name, err)
			return ""
		}
		if len(r.Answer) == 0 {
			return dns.RcodeToString[r.Rcode]
		}
		return r.Answer[0].(*dns.A).A.String()
	}
	for _, q := range []struct{ network, name, want string }{
		{"udp", "web.default.svc.cluster.local", "10.96.0.7"}, {"tcp", "web2.default.svc.cluster.local", "10.96.0.7"},
		{"udp", "web.demo.svc", "10.96.0.7"}, {"udp", "www.example.com", "192.0.2.1"}, {"tcp", "go.dev", "192.0.2.1"},
	} {
		if got := ask(q.network, q.name); got != q.want {
			t.Errorf("%s is %s, want %s", q.name, got, q.want)
		}
	}
	if cluster.asked("www.example.com.") || cluster.asked("go.dev.") || machine.asked("web.default.svc.cluster.local.") {
		t.Errorf("names went to the wrong server: cluster %q, machine %q", cluster.names, machine.names)
	}

	// The machine's own servers are known, ours is not one of them.
	f, err := env.Local()
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(f.DNS, []netip.AddrPort{netip.MustParseAddrPort("192.0.2.1:53")}) {
		t.Errorf("nameservers %v", f.DNS)
	}

	// A restarted resolved is told again, and so is one behind a restarted bus. It
	// keeps links' settings in /run itself, which must not help it here.
	forget := func() {
		t.Helper()
		stopResolved()
		if err := os.RemoveAll("/run/systemd/resolve/netif"); err != nil {
			t.Fatal(err)
		}
	}
	forget()
	stopResolved = start(t, filepath.Join(root, "lib/systemd/systemd-resolved"))
	waitFor(t, "systemd-resolved again", ping)
	wantDomains()
	forget()
	stopBus()
	os.Remove("/run/dbus/system_bus_socket")
	start(t, "dbus-daemon", "--config-file="+conf, "--nofork", "--nopidfile")
	waitFor(t, "bus again", func() bool { _, err := os.Stat("/run/dbus/system_bus_socket"); return err == nil })
	start(t, filepath.Join(root, "lib/systemd/systemd-resolved"))
	waitFor(t, "systemd-resolved on the new bus", ping)
	wantDomains()
	// It may refuse while it starts.
	waitFor(t, "names after the restarts", func() bool { return ask("udp", "web3.default.svc.cluster.local") == "10.96.0.7" })

	// Another port, fewer domains, and then nothing.
	other := s
	other.Server = netip.AddrPortFrom(server.Addr(), 5353)
	other.Domains, other.Search = []string{"cluster.local"}, nil
	elsewhere := serveDNS(t, other.Server.String(), "10.96.0.8")
	set(t, d, []SessionDNS{other})
	if out := resolvectl("domain", "culvert0"); !strings.HasSuffix(strings.TrimSpace(out), "): ~cluster.local") {
		t.Errorf("domains %s", out)
	}
	if got := ask("udp", "web4.default.svc.cluster.local"); got != "10.96.0.8" || !elsewhere.asked("web4.default.svc.cluster.local.") {
		t.Errorf("on another port: %s", got)
	}
	set(t, d, nil)
	if out := resolvectl("domain", "culvert0"); strings.Contains(out, "cluster") {
		t.Errorf("still there: %s", out)
	}
	set(t, d, []SessionDNS{s})
	wantDomains()
	if err := d.Close(context.Background()); err != nil {
		t.Error(err)
	}
	if out := resolvectl("domain", "culvert0") + resolvectl("dns", "culvert0"); strings.Contains(out, "cluster") || strings.Contains(out, "100.64") {
		t.Errorf("still there after Close: %s", out)
	}
	if d.Set(context.Background(), []SessionDNS{s}) == nil {
		t.Error("Set after Close")
	}
}
