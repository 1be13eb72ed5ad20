package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func logOf(t *testing.T, c *api.Client, id string) string {
	t.Helper()
	var b bytes.Buffer
	if err := c.Logs(t.Context(), id, false, &b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// selfOf returns what the session's last process said of itself.
func selfOf(t *testing.T, c *api.Client, id string) (self struct {
	UID, GID        int
	Groups          []int
	NNP, NoCaps     bool
	Cwd             string
	Leader, Network bool
	Env, FDs        []string
	Restart         int
	Remembered      json.RawMessage
}) {
	t.Helper()
	lines := strings.Split(logOf(t, c, id), "\n")
	for _, l := range slices.Backward(lines) {
		if text, ok := strings.CutPrefix(l, "self "); ok {
			if err := json.Unmarshal([]byte(text), &self); err != nil {
				t.Fatal(err)
			}
			return self
		}
	}
	t.Fatalf("no word of itself in %q", lines)
	return
}

func ip(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("ip", args...).CombinedOutput()
	if err != nil {
		t.Fatalf("ip %v: %v\n%s", args, err, out)
	}
	return string(out)
}

// clean checks that nothing of culvert is on the machine.
func checkClean(t *testing.T) {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "culvert") {
			t.Errorf("device %s is left", l.Attrs().Name)
		}
	}
	if rules := ip(t, "rule") + ip(t, "-6", "rule"); strings.Contains(rules, "5180") {
		t.Errorf("a rule is left:\n%s", rules)
	}
	if text, _ := os.ReadFile("/etc/resolv.conf"); string(text) != originalResolvConf {
		t.Errorf("resolv.conf is %q", text)
	}
}

func TestConnectRunsAsTheUser(t *testing.T) {
	dir := workdir(t)
	daemonOn(t, dir, nil)
	c := api.New(dir + "/culvert.sock")
	req := request("a")
	req.AsUID = 0
	req.Env = []string{"LD_PRELOAD=/x", "KUBECONFIG=/k", "HOME=/h", "NOTIFY_SOCKET=/n"}
	r := as(t, alice, []uint32{group, 4101}, dir+"/culvert.sock", "connect", req)
	if r.Error != nil {
		t.Fatal(r.Error)
	}
	s := r.Session
	if s.State != api.Connected || s.UID != alice || s.User != "alice" || s.ID == "forged" || s.PID == 0 || s.Device != "culvert0" {
		t.Errorf("session %+v", s)
	}
	self := selfOf(t, c, s.ID)
	slices.Sort(self.Groups)
	if self.UID != alice || self.GID != alice || !slices.Equal(self.Groups, []int{group, 4101}) {
		t.Errorf("runs as uid %d gid %d groups %v", self.UID, self.GID, self.Groups)
	}
	if !self.NNP || !self.NoCaps || !self.Leader || self.Cwd != "/run/home/alice" {
		t.Errorf("no_new_privs %v, no capabilities %v, session leader %v, cwd %s", self.NNP, self.NoCaps, self.Leader, self.Cwd)
	}
	if want := []string{"KUBECONFIG=/k", "HOME=/h"}; !slices.Equal(slices.DeleteFunc(self.Env, func(kv string) bool { return strings.HasPrefix(kv, "PWD=") }), want) {
		t.Errorf("environment %q", self.Env)
	}
	if len(self.FDs) != 4 { // stdin, stdout, stderr, link
		t.Errorf("inherited %q", self.FDs)
	}
	// What status says is what the kernel does.
	if got := ip(t, "route", "get", "10.244.1.1"); !strings.Contains(got, "dev culvert0") {
		t.Errorf("10.244.1.1 goes by %s", got)
	}
	for _, addr := range []string{"10.244.9.1", "203.0.113.9", "192.168.77.9"} {
		if got := ip(t, "route", "get", addr); !strings.Contains(got, "dev lan0") {
			t.Errorf("%s goes by %s", addr, got)
		}
	}
	if len(s.Routes) != 2 || !slices.ContainsFunc(s.Excluded, func(r api.Route) bool { return r.Prefix == netip.MustParsePrefix(lan) }) {
		t.Errorf("routes %v excluded %v", s.Routes, s.Excluded)
	}

	// Nobody else sees or stops it.
	for _, id := range []string{"", s.ID} {
		if r := as(t, bob, []uint32{group}, dir+"/culvert.sock", "disconnect", api.DisconnectRequest{ID: id}); id != "" && (r.Error == nil || r.Error.Code != api.CodeNotFound) {
			t.Errorf("bob's disconnect %q: %v", id, r.Error)
		}
	}
	if r := as(t, bob, []uint32{group}, dir+"/culvert.sock", "sessions", nil); len(r.Sessions) != 0 || r.Error != nil {
		t.Errorf("bob sees %v, %v", r.Sessions, r.Error)
	}
	if r := as(t, bob, []uint32{group}, dir+"/culvert.sock", "logs", s.ID); r.Error == nil || r.Error.Code != api.CodeNotFound {
		t.Errorf("bob reads the log: %v", r.Error)
	}
	if r := as(t, bob, []uint32{group}, dir+"/culvert.sock", "connect", api.ConnectRequest{AsUID: alice}); r.Error == nil || r.Error.Code != api.CodeDenied {
		t.Errorf("bob connects as alice: %v", r.Error)
	}
	if r := as(t, mallet, nil, dir+"/culvert.sock", "sessions", nil); r.Error == nil || r.Error.Code != api.CodeDenied || !strings.Contains(r.Error.Hint, "usermod") {
		t.Errorf("mallet, not in the group: %v", r.Error)
	}
	if r := as(t, alice, []uint32{group}, dir+"/culvert.sock", "disconnect", api.DisconnectRequest{}); r.Error != nil {
		t.Error(r.Error)
	}
	checkClean(t)
	if alive(s.PID) {
		t.Error("the session process is left")
	}
}

func alive(pid int) bool { return unix.Kill(pid, 0) == nil }

func TestRootIsNobody(t *testing.T) {
	c := testDaemon(t)
	req := request("a")
	req.AsUID = 0
	_, err := c.Connect(t.Context(), req, nil)
	if e := asAPI(err); e.Code != api.CodeDenied || !strings.Contains(e.Hint, "culvert connect") {
		t.Errorf("got %v", err)
	}
	req.AsUID = 5555
	if _, err := c.Connect(t.Context(), req, nil); asAPI(err).Code != api.CodeDenied {
		t.Errorf("a uid that nobody has: %v", err)
	}
	req.AsUID = alice
	req.Env = []string{"HOME=/root", "SUDO_UID=1", "XDG_RUNTIME_DIR=/run/user/0", "KUBECONFIG=/k"}
	s := mustConnect(t, c, req)
	self := selfOf(t, c, s.ID)
	slices.Sort(self.Groups)
	if self.UID != alice || !slices.Contains(self.Groups, 4101) || slices.Contains(self.Groups, 0) {
		t.Errorf("uid %d groups %v", self.UID, self.Groups)
	}
	for _, kv := range []string{"HOME=/run/home/alice", "USER=alice", "KUBECONFIG=/k"} {
		if !slices.Contains(self.Env, kv) {
			t.Errorf("%s is not in %q", kv, self.Env)
		}
	}
	if slices.ContainsFunc(self.Env, func(kv string) bool { return strings.HasPrefix(kv, "SUDO_") || strings.HasPrefix(kv, "XDG_") }) {
		t.Errorf("root's own login is in %q", self.Env)
	}
}

func TestProcessDiesAndComesBack(t *testing.T) {
	c := testDaemon(t)
	s := mustConnect(t, c, request("a", "dns=cluster.local"))
	before, err := net.InterfaceByName("culvert0")
	if err != nil {
		t.Fatal(err)
	}
	ask := func() (string, error) { return askUDP(s.DNS.Server, 3*time.Second) }
	if got, err := ask(); got != strconv.Itoa(s.PID) {
		t.Fatalf("the forwarder answered %q, %v", got, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	states := make(chan api.Session, 100)
	watching := make(chan struct{})
	go func() {
		defer close(watching)
		c.Watch(ctx, func(e api.Event) { states <- e.Session })
	}()
	<-states // the present one
	unix.Kill(s.PID, unix.SIGKILL)
	// A query while there is no process waits for the next one.
	if got, err := ask(); err != nil || got == strconv.Itoa(s.PID) {
		t.Errorf("the forwarder answered %q, %v", got, err)
	}
	var seen []api.State
	for now := range states {
		if len(seen) == 0 || seen[len(seen)-1] != now.State {
			seen = append(seen, now.State)
		}
		if now.State == api.Reconnecting && now.PID == 0 && !strings.Contains(now.Cause, "killed") {
			t.Errorf("cause %q", now.Cause)
		}
		if now.State == api.Connected && now.PID != s.PID {
			if now.ID != s.ID || now.Restarts != 1 || !slices.Equal(now.Addresses, s.Addresses) {
				t.Errorf("came back as %+v", now)
			}
			break
		}
	}
	if !slices.Contains(seen, api.Reconnecting) {
		t.Errorf("states %v", seen)
	}
	if after, err := net.InterfaceByName("culvert0"); err != nil || after.Index != before.Index {
		t.Errorf("the device was made again: %v, %v", after, err)
	}
	self := selfOf(t, c, s.ID)
	if self.Restart != 1 || !self.Network || string(self.Remembered) != fmt.Sprintf(`{"pid":%d}`, s.PID) {
		t.Errorf("the next process was told restart %d, network %v, remembered %s", self.Restart, self.Network, self.Remembered)
	}
	cancel()
	<-watching
	if err := c.Disconnect(t.Context(), api.DisconnectRequest{Context: "a"}, nil); err != nil {
		t.Fatal(err)
	}
	checkClean(t)
}

func askUDP(server string, timeout time.Duration) (string, error) {
	conn, err := net.Dial("udp", server)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(timeout))
	if _, err := conn.Write([]byte("who")); err != nil {
		return "", err
	}
	buf := make([]byte, 64)
	n, err := conn.Read(buf)
	return string(buf[:n]), err
}

// A session that does not come back gives the machine's names back after 2 s.
func TestNamesWithoutProcess(t *testing.T) {
	dir := workdir(t)
	session := dir + "/culvert"
	self, err := os.ReadFile(testBinary)
	if err != nil {
		t.Skip("needs root")
	}
	if err := os.WriteFile(session, self, 0o755); err != nil {
		t.Fatal(err)
	}
	c, _ := daemonOn(t, dir, func(cfg *Config) { cfg.SessionBinary = session })
	s := mustConnect(t, c, request("a", "dns=cluster.local"))
	if text, _ := os.ReadFile("/etc/resolv.conf"); !strings.Contains(string(text), "127.53.83.1") {
		t.Fatalf("resolv.conf is %q", text)
	}
	if err := os.Chmod(session, 0o777); err != nil { // may not be started any more
		t.Fatal(err)
	}
	killed := time.Now()
	unix.Kill(s.PID, unix.SIGKILL)
	wait(t, "resolv.conf given back", func() bool {
		text, _ := os.ReadFile("/etc/resolv.conf")
		return string(text) == originalResolvConf
	})
	if took := time.Since(killed); took < dnsHold/2 || took > dnsHold+time.Second {
		t.Errorf("names came back after %v", took)
	}
	list, err := c.Sessions(t.Context())
	if err != nil || len(list) != 1 || list[0].State != api.Reconnecting || !strings.Contains(list[0].Cause, "others than root may write it") {
		t.Errorf("sessions %+v, %v", list, err)
	}
	if got := ip(t, "route", "get", "10.244.1.1"); !strings.Contains(got, "dev culvert0") {
		t.Errorf("routes did not stay: %s", got)
	}
	if err := os.Chmod(session, 0o755); err != nil {
		t.Fatal(err)
	}
	wait(t, "session back", func() bool {
		list, _ := c.Sessions(t.Context())
		return len(list) == 1 && list[0].State == api.Connected
	})
	if got, err := askUDP(s.DNS.Server, time.Second); err != nil || got == "" {
		t.Errorf("no forwarder after the return: %q %v", got, err)
	}
}

func TestEndsOfConnecting(t *testing.T) {
	c := testDaemon(t)
	for _, x := range []struct{ do, code, message string }{
		{"fail", api.CodeForbidden, "pods is forbidden[31m"},
		{"crash", api.CodeInternal, "panic: the fake crashed"},
		{"orphan", api.CodeInternal, "left a child"},
		{"garbage", api.CodeInternal, "ended before it was connected"},
	} {
		var last api.Event
		_, err := c.Connect(t.Context(), request("a", "do="+x.do), func(e api.Event) { last = e })
		if e := asAPI(err); e.Code != x.code || !strings.Contains(e.Message, x.message) {
			t.Errorf("%s: %v", x.do, err)
		}
		if last.Session.State != api.Disconnected {
			t.Errorf("%s: ended in state %q", x.do, last.Session.State)
		}
		checkClean(t)
	}
	wait(t, "all processes of the user gone", func() bool {
		out, _ := exec.Command("ps", "-u", strconv.Itoa(alice), "-o", "stat=").Output()
		return !strings.ContainsAny(string(out), "RSD")
	})
	if !strings.Contains(logOf(t, c, ""), "self ") {
		t.Error("the log of the last session is gone")
	}
	// The session that does not keep its own time-out.
	req := request("a", "do=hang")
	req.Options.Timeout = 1 // and timeoutGrace
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	var pid int
	_, err := c.Connect(ctx, req, func(e api.Event) { pid = max(pid, e.Session.PID) })
	if err == nil {
		t.Error("cancelled and yet connected")
	}
	wait(t, "the cancelled session gone", func() bool {
		list, err := c.Sessions(t.Context())
		return err == nil && len(list) == 0
	})
	if pid == 0 || alive(pid) {
		t.Errorf("process %d of the cancelled session", pid)
	}
	checkClean(t)
}

// A network that appears inside a range while connected (Docker made one) stays
// the machine's own; session and its restarted process go on with the rest.
func TestNetworkAppears(t *testing.T) {
	c := testDaemon(t)
	s := mustConnect(t, c, request("a"))
	now := func() api.Session {
		t.Helper()
		list, err := c.Sessions(t.Context())
		if err != nil || len(list) != 1 {
			t.Fatal(list, err)
		}
		return list[0]
	}
	ip(t, "link", "add", "docker7", "type", "veth", "peer", "name", "docker8")
	defer exec.Command("ip", "link", "del", "docker7").Run()
	ip(t, "addr", "add", "10.244.7.1/24", "dev", "docker7")
	ip(t, "link", "set", "docker7", "up")
	ip(t, "route", "add", "10.244.8.0/24", "via", "192.168.77.9") // another VPN
	defer exec.Command("ip", "route", "del", "10.244.8.0/24").Run()
	local := func() bool {
		return strings.Contains(ip(t, "route", "get", "10.244.7.9"), "dev docker7") &&
			strings.Contains(ip(t, "route", "get", "10.244.8.9"), "dev lan0") &&
			strings.Contains(ip(t, "route", "get", "10.244.1.1"), "dev culvert0")
	}
	wait(t, "both networks the machine's", local)
	if notes := strings.Join(now().Notes, "\n"); !strings.Contains(notes, "10.244.7.0/24 stays this machine's") || !strings.Contains(notes, "10.244.8.0/24 stays") {
		t.Errorf("notes %q", notes)
	}
	unix.Kill(s.PID, unix.SIGKILL)
	wait(t, "another process connected", func() bool { n := now(); return n.PID != s.PID && n.State == api.Connected })
	if !local() {
		t.Errorf("after the restart 10.244.7.9 goes by %s", ip(t, "route", "get", "10.244.7.9"))
	}
	ip(t, "link", "del", "docker7")
	ip(t, "route", "del", "10.244.8.0/24")
	wait(t, "the range whole again", func() bool {
		return strings.Contains(ip(t, "route", "get", "10.244.7.9"), "dev culvert0") && len(now().Notes) == 0
	})
}

// What a user is told of a collision names no session of another user's.
func TestOthersStayUnnamed(t *testing.T) {
	dir := workdir(t)
	c, _ := daemonOn(t, dir, nil)
	a := mustConnect(t, c, request("secret-context"))
	req := request("b", "plan=10.244.1.0/24")
	req.AsUID = bob
	if r := as(t, bob, []uint32{group}, dir+"/culvert.sock", "connect", req); r.Error == nil || r.Error.Code != api.CodeConflict ||
		strings.Contains(r.Error.Message, a.ID) || strings.Contains(r.Error.Message, "secret") || !strings.Contains(r.Error.Message, "another user's session") {
		t.Errorf("bob is told %v", r.Error)
	}
	req.Options.Labels["identity"] = "secret-context"
	if r := as(t, bob, []uint32{group}, dir+"/culvert.sock", "connect", req); r.Error == nil || r.Error.Code != api.CodeExists || strings.Contains(r.Error.Message, a.ID) || strings.Contains(r.Error.Message, "secret") {
		t.Errorf("bob is told %v", r.Error)
	}
	if _, err := c.Connect(t.Context(), request("b", "plan=10.244.1.0/24"), nil); !strings.Contains(asAPI(err).Message, a.ID) {
		t.Errorf("alice is told %v", err)
	}
	req = request("b", "plan=10.50.0.0/16")
	req.AsUID = bob
	b := mustConnect(t, c, req)
	wait(t, "bob's session told of his own and no other", func() bool {
		return strings.Contains(logOf(t, c, b.ID), "sessions ["+b.ID+"]\n")
	})
}

// Whatever a process made in the cluster is taken away, also when the process
// died: another one does it.
func TestDeadProcessLeavesNothing(t *testing.T) {
	dir := workdir(t)
	session := dir + "/culvert"
	self, err := os.ReadFile(testBinary)
	if err != nil {
		t.Skip("needs root")
	}
	if err := os.WriteFile(session, self, 0o755); err != nil {
		t.Fatal(err)
	}
	c, _ := daemonOn(t, dir, func(cfg *Config) { cfg.SessionBinary = session })
	t.Run("while connecting", func(t *testing.T) {
		_, err := c.Connect(t.Context(), request("a", "do=crash-later"), nil)
		if e := asAPI(err); e.Code != api.CodeInternal || !strings.Contains(e.Message, "the fake crashed") {
			t.Errorf("the user is told %v", err)
		}
		if log := logOf(t, c, ""); strings.Count(log, "self ") != 2 || !strings.Contains(log, "told to disconnect") {
			t.Errorf("nobody was told to clean up: %s", log)
		}
	})
	t.Run("before it is started again", func(t *testing.T) {
		s := mustConnect(t, c, request("b"))
		if err := os.Chmod(session, 0o777); err != nil { // may not be started any more
			t.Fatal(err)
		}
		unix.Kill(s.PID, unix.SIGKILL)
		time.Sleep(2 * time.Second) // until the pauses between attempts are long
		if err := os.Chmod(session, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := c.Disconnect(t.Context(), api.DisconnectRequest{}, nil); err != nil {
			t.Fatal(err)
		}
		if log := logOf(t, c, s.ID); !strings.Contains(log, "told to disconnect") {
			t.Errorf("nobody was told to clean up: %s", log)
		}
	})
	checkClean(t)
}

// A user cannot take all sessions of a machine.
func TestOneUserLeavesRoom(t *testing.T) {
	c, _ := daemonOn(t, workdir(t), func(cfg *Config) { cfg.MaxSessions = 3 })
	mustConnect(t, c, request("a", "plan=10.50.0.0/16"))
	mustConnect(t, c, request("b", "plan=10.51.0.0/16"))
	if _, err := c.Connect(t.Context(), request("c", "plan=10.52.0.0/16"), nil); asAPI(err).Code != api.CodeUsage || !strings.Contains(err.Error(), "one user") {
		t.Errorf("a third session of alice's: %v", err)
	}
	req := request("c", "plan=10.52.0.0/16")
	req.AsUID = bob
	mustConnect(t, c, req)
	req = request("d", "plan=10.53.0.0/16")
	req.AsUID = mallet
	if _, err := c.Connect(t.Context(), req, nil); asAPI(err).Code != api.CodeUsage || !strings.Contains(err.Error(), "this machine") {
		t.Errorf("a fourth session: %v", err)
	}
}

// What a session answers ends on a terminal: no control characters in it.
func TestPingErrorIsPlain(t *testing.T) {
	c := testDaemon(t)
	mustConnect(t, c, request("a"))
	err := c.Ping(t.Context(), api.PingRequest{Target: "error"}, func(api.PingReply) {})
	if e := asAPI(err); e.Code != api.CodeNotFound || e.Message != "no[31m such target" {
		t.Errorf("got %q", err)
	}
}

// The daemon passes on what is said of peers, without control characters, and
// only to the session that is meant.
func TestPeers(t *testing.T) {
	c := testDaemon(t)
	if _, err := c.Peers(t.Context(), api.PeerRequest{}); asAPI(err).Code != api.CodeNotFound {
		t.Errorf("without a session: %v", err)
	}
	mustConnect(t, c, request("a"))
	if list, err := c.Peers(t.Context(), api.PeerRequest{Context: "a"}); err != nil || len(list) != 1 || list[0].Name != "phone" || list[0].From != "[31m1.2.3.4:5" {
		t.Errorf("list: %+v, %v", list, err)
	}
	if p, err := c.PeerAdd(t.Context(), api.PeerRequest{Name: "phone"}); err != nil || p.Endpoint != "[31m1.2.3.4:5" || p.Search[0] != "a" {
		t.Errorf("add: %+v, %v", p, err)
	}
	if p, err := c.PeerRemove(t.Context(), api.PeerRequest{Name: "phone"}); err != nil || p.Name != "phone" {
		t.Errorf("remove: %+v, %v", p, err)
	}
	if _, err := c.PeerAdd(t.Context(), api.PeerRequest{Name: "error"}); asAPI(err).Code != api.CodeExists || asAPI(err).Message != "no[31m such peer" {
		t.Errorf("a refusal: %q", err)
	}
	if _, err := c.Peers(t.Context(), api.PeerRequest{Context: "b"}); asAPI(err).Code != api.CodeNotFound {
		t.Errorf("of another context: %v", err)
	}
	mustConnect(t, c, request("b", "plan=10.97.0.0/16"))
	if _, err := c.PeerAdd(t.Context(), api.PeerRequest{Name: "phone"}); asAPI(err).Code != api.CodeUsage || !strings.Contains(asAPI(err).Hint, "--context") {
		t.Errorf("of which session: %v", err)
	}
}

// Somebody else at the address of a forwarder is no reason to go without names.
func TestForwarderAddressTaken(t *testing.T) {
	c := testDaemon(t)
	squatter, err := net.ListenPacket("udp", "127.53.83.1:53")
	if err != nil {
		t.Fatal(err)
	}
	defer squatter.Close()
	s := mustConnect(t, c, request("a", "dns=cluster.local"))
	if got, err := askUDP(s.DNS.Server, 3*time.Second); err != nil || got != strconv.Itoa(s.PID) {
		t.Errorf("%s answers %q, %v", s.DNS.Server, got, err)
	}
	host, _, _ := net.SplitHostPort(s.DNS.Server)
	if text, _ := os.ReadFile("/etc/resolv.conf"); !strings.Contains(string(text), "nameserver "+host+"\n") {
		t.Errorf("resolv.conf is %q, the forwarder at %s", text, host)
	}
	if err := c.Disconnect(t.Context(), api.DisconnectRequest{}, nil); err != nil {
		t.Fatal(err)
	}
	checkClean(t)
}

func TestTwoSessions(t *testing.T) {
	c := testDaemon(t)
	a := mustConnect(t, c, request("a", "dns=cluster.local"))
	if _, err := c.Connect(t.Context(), request("a2", "identity=a", "plan=10.50.0.0/16"), nil); asAPI(err).Code != api.CodeExists || !strings.Contains(err.Error(), a.ID) {
		t.Errorf("the same cluster again: %v", err)
	}
	if _, err := c.Connect(t.Context(), request("c", "plan=10.244.0.0/24"), nil); asAPI(err).Code != api.CodeConflict {
		t.Errorf("ranges of another session: %v", err)
	}
	if _, err := c.Connect(t.Context(), request("c", "plan="+lan), nil); asAPI(err).Code != api.CodeConflict {
		t.Errorf("the local network: %v", err)
	}
	for _, plan := range []string{"0.0.0.0/0", "127.0.0.0/8", "8.8.8.0/24", "169.254.0.0/16"} {
		if _, err := c.Connect(t.Context(), request("c", "plan="+plan), nil); asAPI(err).Code != api.CodeDenied {
			t.Errorf("plan %s: %v", plan, err)
		}
	}
	if _, err := c.Connect(t.Context(), request("c", "plan=10.50.0.0/16", "dns=com"), nil); asAPI(err).Code != api.CodeDenied {
		t.Errorf("a public domain: %v", err)
	}
	b := mustConnect(t, c, request("b", "plan=10.50.0.0/16", "dns=b.local"))
	if b.Device != "culvert1" || b.Addresses[0] == a.Addresses[0] {
		t.Errorf("a is %s %v, b is %s %v", a.Device, a.Addresses, b.Device, b.Addresses)
	}
	// Each is told of the other, and the older one has the machine's names.
	wait(t, "siblings told", func() bool {
		return strings.Contains(logOf(t, c, a.ID), `"domains":["b.local"]`) && strings.Contains(logOf(t, c, b.ID), `"domains":["cluster.local"]`)
	})
	if text, _ := os.ReadFile("/etc/resolv.conf"); !strings.Contains(string(text), "nameserver 127.53.83.1\n") {
		t.Errorf("resolv.conf is %q", text)
	}
	if err := c.Ping(t.Context(), api.PingRequest{Target: "x"}, func(api.PingReply) {}); asAPI(err).Code != api.CodeUsage {
		t.Errorf("ping with two sessions: %v", err)
	}
	var replies []api.PingReply
	if err := c.Ping(t.Context(), api.PingRequest{Target: "x", Context: "b", Count: 1}, func(p api.PingReply) { replies = append(replies, p) }); err != nil || len(replies) != 1 || replies[0].Seq != 1 || replies[0].Target != "x" {
		t.Errorf("ping: %v, %v", replies, err)
	}
	if err := c.Disconnect(t.Context(), api.DisconnectRequest{ID: a.ID}, nil); err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile("/etc/resolv.conf"); !strings.Contains(string(text), "nameserver 127.53.83.2\n") {
		t.Errorf("the other session has not taken over: %q", text)
	}
	if err := c.Disconnect(t.Context(), api.DisconnectRequest{}, nil); err != nil {
		t.Fatal(err)
	}
	checkClean(t)
	if err := c.Disconnect(t.Context(), api.DisconnectRequest{ID: a.ID}, nil); asAPI(err).Code != api.CodeNotFound {
		t.Errorf("disconnecting what is gone: %v", err)
	}
}
