package router

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

func itoa(n int) string { return strconv.Itoa(n) }

func prefixes(s ...string) []netip.Prefix {
	var res []netip.Prefix
	for _, p := range s {
		res = append(res, netip.MustParsePrefix(p))
	}
	return res
}

func config() *Config {
	return &Config{
		MTU:       9000,
		Addresses: prefixes("100.64.9.1/32", "fd12::9:1/128"),
		Routes:    prefixes("10.244.0.0/16", "10.96.0.0/12", "fd00:10:244::/56", "fd00:10:96::/112"),
		Excluded:  prefixes("10.244.3.0/24", "10.244.8.8/32", "fd00:10:244:3::/64", "fd00:10:244:8::8/128"),
	}
}

// wantDevice asks the kernel where a packet would go.
func wantDevice(t *testing.T, cases map[string]string) {
	t.Helper()
	for dst, device := range cases {
		if out := run(t, "ip", "route", "get", dst); !strings.Contains(out, " dev "+device+" ") {
			t.Errorf("%s does not go to %s: %s", dst, device, out)
		}
	}
}

var usual = map[string]string{
	"10.244.0.0": "culvert0", "10.244.255.255": "culvert0", "10.96.0.10": "culvert0", "10.111.255.254": "culvert0",
	"10.244.2.255": "culvert0", "10.244.4.0": "culvert0", "10.244.8.7": "culvert0", "10.244.8.9": "culvert0",
	"10.244.3.0": "lan0", "10.244.3.255": "lan0", "10.244.8.8": "lan0", "10.245.0.1": "lan0", "10.112.0.1": "lan0", "1.1.1.1": "lan0",
	"fd00:10:244::1": "culvert0", "fd00:10:244:2:ffff::1": "culvert0", "fd00:10:244:4::": "culvert0", "fd00:10:244:8::9": "culvert0", "fd00:10:96::a": "culvert0",
	"fd00:10:244:3::5": "lan0", "fd00:10:244:8::8": "lan0", "fd00:10:245::1": "lan0", "2001:db8:2::1": "lan0",
}

func TestRoutes(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	tun := openTUN(t, "culvert0", false)
	command, inside := neighbour(t)
	r := New(0, "culvert0")
	if err := r.Set(config()); err != nil {
		t.Fatal(err)
	}
	wantDevice(t, usual)

	// Real traffic to excluded addresses reaches the neighbour and comes back.
	for _, a := range []string{"10.244.3.5/32", "10.244.8.8/32", "fd00:10:244:3::5/128", "fd00:10:244:8::8/128"} {
		command("ip", "addr", "add", a, "dev", "lo", "nodad")
	}
	waitFor(t, "the neighbour's addresses in its local table", func() bool {
		return strings.Count(command("ip", "-6", "route", "show", "table", "local"), "local fd00:10:244:") == 2
	})
	for _, a := range []string{"10.244.3.5:700", "10.244.8.8:700", "[fd00:10:244:3::5]:700", "[fd00:10:244:8::8]:700"} {
		inside(func() { echo(t, a) })
		waitFor(t, "an answer from excluded "+a, func() bool { // UDP: the first may be lost
			c, err := net.Dial("udp", a)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			c.Write([]byte("hello"))
			c.SetDeadline(time.Now().Add(500 * time.Millisecond))
			b := make([]byte, 16)
			n, err := c.Read(b)
			return err == nil && string(b[:n]) == "hello"
		})
	}
	// Traffic to routed ones comes out of the device, from its own address.
	for dst, src := range map[string]string{"10.244.9.9:700": "100.64.9.1", "[fd00:10:244:9::9]:700": "fd12::9:1"} {
		c, err := net.Dial("udp", dst)
		if err != nil {
			t.Fatal(err)
		}
		if host, _, _ := net.SplitHostPort(c.LocalAddr().String()); host != src {
			t.Errorf("source to %s is %s, want %s", dst, host, src)
		}
		c.Write([]byte("hello"))
		c.Close()
		tun.SetDeadline(time.Now().Add(3 * time.Second))
		for {
			b := make([]byte, 2048)
			n, err := tun.Read(b)
			if err != nil {
				t.Fatalf("nothing to %s on the device: %v", dst, err)
			}
			if strings.HasSuffix(string(b[:n]), "hello") {
				break
			}
		}
	}

	table := run(t, "ip", "route", "show", "table", itoa(Table(0)))
	for _, want := range []string{"throw 10.244.3.0/24", "mtu 9000", "advmss 8960", "rto_min lock 400ms", "src 100.64.9.1"} {
		if !strings.Contains(table, want) {
			t.Errorf("no %q in\n%s", want, table)
		}
	}
	six := run(t, "ip", "-6", "route", "show", "table", itoa(Table(0)))
	for _, want := range []string{"throw fd00:10:244:3::/64", "mtu 9000", "advmss 8940", "rto_min lock 400ms", "src fd12::9:1"} {
		if !strings.Contains(six, want) {
			t.Errorf("no %q in\n%s", want, six)
		}
	}
	if b, _ := os.ReadFile("/proc/sys/net/ipv4/tcp_available_congestion_control"); strings.Contains(string(b), congestion) {
		if r.Congestion() != congestion || strings.Count(table, "congctl bbr") != 2 || strings.Count(six, "congctl bbr") != 2 {
			t.Errorf("congestion control %q, routes\n%s%s", r.Congestion(), table, six)
		}
	}
	if out := run(t, "ip", "addr", "show", "dev", "culvert0"); strings.Count(out, "inet") != 2 || strings.Contains(out, "fe80") {
		t.Errorf("not only our own addresses:\n%s", out)
	}
	if main := run(t, "ip", "route") + run(t, "ip", "-6", "route"); strings.Contains(main, "culvert0") {
		t.Errorf("the main table has our device:\n%s", main)
	}
}

func TestSetTwiceChangesNothing(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	openTUN(t, "culvert0", false)
	neighbour(t)
	r := New(0, "culvert0")
	if err := r.Set(config()); err != nil {
		t.Fatal(err)
	}
	before := settled(t)
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	sock.SetReceiveTimeout(&unix.Timeval{Usec: 300_000})
	// A router that remembers nothing finds everything as it should be, too.
	for _, r := range []*Router{r, New(0, "culvert0")} {
		if err := r.Set(config()); err != nil {
			t.Fatal(err)
		}
	}
	if msgs, _, err := sock.Receive(); err == nil {
		t.Errorf("the second Set changed something: %d events, first type %d", len(msgs), msgs[0].Header.Type)
	}
	if after := listing(t); after != before {
		t.Errorf("before\n%s\nafter\n%s", before, after)
	}
}

func TestSetFollowsConfig(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	neighbour(t)
	empty := settled(t)
	tun := openTUN(t, "culvert0", false)
	r := New(0, "culvert0")
	if err := r.Set(config()); err != nil {
		t.Fatal(err)
	}
	// A route becomes excluded, an excluded one a route, one goes, the MTU shrinks.
	c := config()
	c.MTU = 1420
	c.Addresses = prefixes("100.64.9.2/32", "fd12::9:2/128")
	c.Routes = prefixes("10.244.0.0/16", "10.244.3.0/24", "fd00:10:244::/56", "fd00:10:244:3::/64")
	c.Excluded = prefixes("10.96.0.0/12", "fd00:10:96::/112")
	if err := r.Set(c); err != nil {
		t.Fatal(err)
	}
	wantDevice(t, map[string]string{
		"10.244.3.5": "culvert0", "10.244.8.8": "culvert0", "10.96.0.10": "lan0",
		"fd00:10:244:3::5": "culvert0", "fd00:10:244:8::8": "culvert0", "fd00:10:96::a": "lan0",
	})
	out := run(t, "ip", "route", "show", "table", itoa(Table(0)))
	if strings.Contains(out, "9000") || strings.Count(out, "mtu 1420 ") != 2 || strings.Contains(out, "100.64.9.1") || strings.Contains(out, "8.8") {
		t.Errorf("old state is left:\n%s", out)
	}
	// Special ranges fall through even inside a route that root allowed.
	c.Routes = prefixes("168.0.0.0/6", "fe00::/7")
	c.Excluded = nil
	if err := r.Set(c); err != nil {
		t.Fatal(err)
	}
	wantDevice(t, map[string]string{"169.253.0.1": "culvert0", "169.254.169.254": "lan0"})
	// What must not be is refused, and the rest is done.
	c.Addresses = append(c.Addresses, prefixes("10.7.0.1/24")...)
	c.Routes = prefixes("127.53.0.0/16", "10.50.0.0/16")
	err := r.Set(c)
	if err == nil || !strings.Contains(err.Error(), "127.53.0.0/16") || !strings.Contains(err.Error(), "10.7.0.1/24") {
		t.Errorf("error %v", err)
	}
	wantDevice(t, map[string]string{"10.50.1.1": "culvert0", "127.53.0.1": "lo", "10.7.0.2": "lan0"})

	for range 2 {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	tun.Close()
	if err := r.Set(nil); err != nil { // without the device, too
		t.Fatal(err)
	}
	waitFor(t, "nothing left", func() bool { return listing(t) == empty })
	if err := r.Set(config()); err == nil || !strings.Contains(err.Error(), "culvert0") {
		t.Errorf("without a device: %v", err)
	}
}

func TestSetWithoutIPv6(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	openTUN(t, "culvert0", false)
	neighbour(t)
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/culvert0/disable_ipv6", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	r := New(0, "culvert0")
	if err := r.Set(config()); err != nil {
		t.Fatal(err)
	}
	if len(r.Notes()) != 1 || !strings.Contains(r.Notes()[0], "IPv6") {
		t.Errorf("notes %q", r.Notes())
	}
	wantDevice(t, map[string]string{"10.244.1.1": "culvert0", "fd00:10:244::1": "lan0"})
}

// settled is the listing when it has stopped changing by itself.
func settled(t *testing.T) string {
	t.Helper()
	var last string
	waitFor(t, "settled", func() bool {
		last = listing(t)
		time.Sleep(300 * time.Millisecond)
		return listing(t) == last
	})
	return last
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	openTUN(t, "culvert0", false)
	neighbour(t)
	r := New(0, "culvert0")
	if err := r.Set(config()); err != nil {
		t.Fatal(err)
	}
	before := settled(t)
	ctx, cancel := context.WithCancel(context.Background())
	network := make(chan struct{}, 100)
	done := make(chan error)
	go func() {
		done <- Watch(ctx, func(c Change) {
			if c.Ours {
				if err := r.Set(config()); err != nil {
					t.Error(err)
				}
			}
			if c.Network {
				network <- struct{}{}
			}
		})
	}()
	time.Sleep(200 * time.Millisecond)
	for _, damage := range []string{
		"rule del priority " + itoa(RulePriority),
		"-6 rule del priority " + itoa(RulePriority),
		"route del 10.96.0.0/12 table " + itoa(Table(0)),
		"-6 route flush table " + itoa(Table(0)),
		"addr del 100.64.9.1/32 dev culvert0",
		"link set culvert0 down",
	} {
		run(t, append([]string{"ip"}, strings.Fields(damage)...)...)
		if listing(t) == before {
			t.Fatalf("ip %s did nothing", damage)
		}
		var now string
		defer func() {
			if t.Failed() {
				t.Logf("ip %s: before\n%s\nnow\n%s", damage, before, now)
			}
		}()
		waitFor(t, "healed after ip "+damage, func() bool { now = listing(t); return now == before })
	}
	wantDevice(t, usual)
	if len(network) > 0 {
		t.Errorf("%d changes of the machine's network reported for our own", len(network))
	}
	for _, change := range []string{"addr add 192.168.7.1/24 dev lan0", "route add 10.244.5.0/24 via 192.0.2.1", "route del default"} {
		run(t, append([]string{"ip"}, strings.Fields(change)...)...)
		select {
		case <-network:
		case <-time.After(5 * time.Second):
			t.Errorf("ip %s was not reported", change)
		}
	}
	cancel()
	if err := <-done; err != context.Canceled {
		t.Error(err)
	}
}

func TestCleanup(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	neighbour(t)
	dir := t.TempDir()
	env := Env{ResolvConf: filepath.Join(dir, "resolv.conf"), StateDir: filepath.Join(dir, "state"), BusAddress: "unix:path=/nonexistent"}
	os.WriteFile(env.ResolvConf, []byte("nameserver 192.0.2.1\n"), 0o644)
	// What is not ours, however near: it must stay.
	run(t, "ip", "link", "add", "culvert7", "type", "veth", "peer", "name", "other0")
	run(t, "ip", "rule", "add", "priority", itoa(RulePriority), "table", "777")
	run(t, "ip", "route", "add", "10.9.0.0/16", "via", "192.0.2.1", "table", "777")
	run(t, "ip", "tuntap", "add", "culvertx", "mode", "tun")
	before := settled(t)
	if left := env.Leftovers(); len(left) != 0 {
		t.Fatalf("leftovers before: %q", left)
	}
	var dns []*DNS
	for slot := range 2 {
		// Persistent, and the descriptor closed: what kill -9 leaves at worst.
		tun := openTUN(t, Device(slot), true)
		r := New(slot, Device(slot))
		c := config()
		c.Addresses = []netip.Prefix{single(netip.AddrFrom4([4]byte{100, 64, 9, byte(1 + slot)}))}
		if slot == 1 {
			c.Routes = prefixes("10.60.0.0/16", "fd00:60::/64")
		}
		if err := r.Set(c); err != nil {
			t.Fatal(err)
		}
		tun.Close()
	}
	d, err := NewDNS(DNSResolvConf, env)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Set(context.Background(), []SessionDNS{{Server: d.Listen(0, nil)}}); err != nil {
		t.Fatal(err)
	}
	d.driver.(*resolvConf).stop() // as dead as after kill -9
	dns = append(dns, d)
	_ = dns
	left := env.Leftovers()
	for _, want := range []string{"device culvert0", "device culvert1", "DNS settings in " + env.ResolvConf,
		"IPv4 rule 5180 for table " + itoa(Table(1)), "IPv6 rule 5180 for table " + itoa(Table(0)), "throw route 10.244.3.0/24 of table " + itoa(Table(0))} {
		if !slices.Contains(left, want) {
			t.Errorf("%q is not in the leftovers %q", want, left)
		}
	}
	removed, err := env.Cleanup(context.Background())
	if err != nil || !slices.Contains(removed, "device culvert1") {
		t.Errorf("removed %q, %v", removed, err)
	}
	waitFor(t, "everything as before", func() bool { return listing(t) == before })
	if b, _ := os.ReadFile(env.ResolvConf); string(b) != "nameserver 192.0.2.1\n" {
		t.Errorf("resolv.conf is %q", b)
	}
	if removed, err := env.Cleanup(context.Background()); err != nil || len(removed) != 0 {
		t.Errorf("the second cleanup removed %q, %v", removed, err)
	}
	if left := env.Leftovers(); len(left) != 0 {
		t.Errorf("leftovers after: %q", left)
	}
}

func TestLocal(t *testing.T) {
	t.Parallel()
	if !inNamespace(t) {
		return
	}
	openTUN(t, "culvert0", false)
	openTUN(t, "tun9", false)
	neighbour(t)
	run(t, "ip", "addr", "add", "10.8.0.2/32", "dev", "tun9")
	run(t, "ip", "link", "set", "tun9", "up")
	run(t, "ip", "route", "add", "10.244.7.0/24", "dev", "tun9", "table", "52")
	run(t, "ip", "route", "add", "10.0.0.0/8", "via", "192.0.2.254")
	run(t, "ip", "route", "add", "blackhole", "10.97.0.0/16")
	run(t, "ip", "-6", "route", "add", "fd00:10:244:7::/64", "via", "2001:db8:1::1")
	// What a dead daemon's table still has is no fact about the machine.
	run(t, "ip", "route", "add", "10.244.99.0/24", "dev", "lan0", "table", itoa(Table(5)))
	if err := New(0, "culvert0").Set(config()); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	env := Env{ResolvConf: filepath.Join(dir, "resolv.conf"), StateDir: filepath.Join(dir, "state"),
		ResolvedConf: filepath.Join(dir, "uplink"), BusAddress: "unix:path=/nonexistent"}
	os.WriteFile(env.ResolvConf, []byte("nameserver 10.96.0.53\nnameserver 127.0.0.53\n"), 0o644)
	os.WriteFile(env.ResolvedConf, []byte("nameserver fd00:10:96::53\n"), 0o644)
	f, err := env.Local()
	if err != nil {
		t.Fatal(err)
	}
	excluded := map[string]bool{}
	for _, r := range f.Always() {
		excluded[r.Prefix.String()+" "+r.Source] = true
	}
	for _, want := range []string{"192.0.2.0/24 connected lan0", "2001:db8:1::/64 connected lan0", "192.0.2.1/32 gateway lan0",
		"2001:db8:1::1/128 gateway lan0", "10.96.0.53/32 DNS server", "fd00:10:96::53/128 DNS server"} {
		if !excluded[want] {
			t.Errorf("%s is not always excluded: %v", want, excluded)
		}
	}
	var got []string
	for _, c := range f.Conflicts(plan("10.244.0.0/16", "10.96.0.0/12", "192.0.0.0/16", "fd00:10:244::/56", "10.16.0.0/12"), nil) {
		got = append(got, c.Prefix.String()+": "+c.Local+": "+c.Flag)
	}
	want := []string{
		"10.244.0.0/16: route 10.244.7.0/24 dev tun9 (another VPN: tun): --exclude-ips 10.244.7.0/24",
		"10.96.0.0/12: route 10.97.0.0/16 blackhole: --exclude-ips 10.97.0.0/16",
		"10.96.0.0/12: DNS server 10.96.0.53: --exclude-ips 10.96.0.53",
		"192.0.0.0/16: route 192.0.2.0/24 dev lan0 (connected network): --exclude-ips 192.0.2.0/24",
		"fd00:10:244::/56: route fd00:10:244:7::/64 dev lan0: --exclude-ips fd00:10:244:7::/64",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}
