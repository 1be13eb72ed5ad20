package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The test binary plays all parts: the session process (culvert session), a
// daemon that can be killed, its guard, and a client of another user. The tests
// run in a network and a mount namespace of their own, with a /run, a
// resolv.conf and a user database of their own.

const (
	alice  = 4001 // in the group culvert, and in the group 4101
	bob    = 4002 // in the group culvert
	mallet = 4003 // not in it
	group  = 4100
	lan    = "192.168.77.0/24"
)

const insideEnv = "CULVERT_TEST_INSIDE"

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "session":
			fakeSession()
			return
		case "daemon":
			daemonMain(os.Args[2])
			return
		case "guard":
			signal.Ignore(syscall.SIGTERM, syscall.SIGHUP, syscall.SIGINT)
			if err := New(testConfig(os.Args[2])).Guard(context.Background(), os.Stdin); err != nil {
				fmt.Fprintln(os.Stderr, err)
			}
			return
		case "client":
			clientMain(os.Args[2], os.Args[3], os.Args[4])
			return
		}
	}
	if os.Geteuid() == 0 && os.Getenv(insideEnv) == "" {
		os.Exit(enterNamespaces())
	}
	if os.Geteuid() == 0 {
		if err := prepare(); err != nil {
			fmt.Fprintln(os.Stderr, "preparing the test's namespaces:", err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// enterNamespaces runs the test binary again in namespaces of its own.
func enterNamespaces() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS,
		Pdeathsig:  syscall.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(cmd.ProcessState.ExitCode(), 1)
	}
	return 0
}

func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return err
	}
	for path, text := range map[string]string{
		"/etc/passwd": fmt.Sprintf("root:x:0:0:root:/root:/bin/bash\n"+
			"alice:x:%d:%d:Alice:/run/home/alice:/bin/bash\nbob:x:%d:%d::/nowhere:/bin/sh\nmallet:x:%d:%d::/:/bin/sh\n", alice, alice, bob, bob, mallet, mallet),
		"/etc/group":       fmt.Sprintf("root:x:0:\nalice:x:%d:\nculvert:x:%d:alice,bob\nextra:x:4101:alice\n", alice, group),
		"/etc/resolv.conf": originalResolvConf,
	} {
		real, err := filepath.EvalSymlinks(path)
		if err != nil { // a link into the /run that is hidden now
			if real, err = os.Readlink(path); err == nil && !filepath.IsAbs(real) {
				real = filepath.Join("/etc", real)
			}
			err = errors.Join(err, os.MkdirAll(filepath.Dir(real), 0o755), os.WriteFile(real, nil, 0o644))
		}
		if err != nil {
			return err
		}
		copy := filepath.Join("/run", filepath.Base(path))
		if err := os.WriteFile(copy, []byte(text), 0o644); err != nil {
			return err
		}
		if err := unix.Mount(copy, real, "", unix.MS_BIND, ""); err != nil {
			return err
		}
	}
	if err := os.MkdirAll("/run/home/alice", 0o755); err != nil {
		return err
	}
	if err := os.Chown("/run/home/alice", alice, alice); err != nil {
		return err
	}
	if err := os.Chmod("/run/home/alice", 0o700); err != nil {
		return err
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		return err
	}
	if err := os.MkdirAll("/run/bin", 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(testBinary, self, 0o755); err != nil {
		return err
	}
	return network()
}

const (
	testBinary         = "/run/bin/culvert"
	originalResolvConf = "# the machine's own\nnameserver 192.168.77.1\n"
)

// network makes a LAN with a default route.
func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lan0"}, PeerName: "lan1"}
	if err := netlink.LinkAdd(veth); err != nil {
		return err
	}
	for _, name := range []string{"lan0", "lan1"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
	}
	l, err := netlink.LinkByName("lan0")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("192.168.77.2/24")
	if err != nil {
		return err
	}
	if err := netlink.AddrAdd(l, addr); err != nil {
		return err
	}
	gw := netip.MustParseAddr("192.168.77.1")
	return netlink.RouteAdd(&netlink.Route{LinkIndex: l.Attrs().Index, Gw: gw.AsSlice()})
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, for namespaces and TUN devices")
	}
}

// testConfig is the configuration of a daemon whose files are in dir.
func testConfig(dir string) Config {
	cfg := Config{
		Socket:        filepath.Join(dir, "culvert.sock"),
		SessionBinary: testBinary,
		StateDir:      filepath.Join(dir, "state"),
		Guard:         []string{testBinary, "guard", dir},
		Log:           slog.New(slog.NewTextHandler(io.Discard, nil)),
	}
	if testing.Testing() && os.Getenv("CULVERT_TEST_LOG") != "" {
		cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
		cfg.Debug = true
	}
	return cfg
}

func daemonMain(dir string) {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := New(testConfig(dir)).Run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// workdir is a folder that every user may reach.
func workdir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "d")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// daemonOn runs a daemon in this process until the test ends.
func daemonOn(t *testing.T, dir string, change func(*Config)) (*api.Client, func()) {
	t.Helper()
	needRoot(t)
	cfg := testConfig(dir)
	if change != nil {
		change(&cfg)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- New(cfg).Run(ctx) }()
	stopped := false
	stop := func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the daemon ended with %v", err)
			}
		case <-time.After(15 * time.Second):
			t.Error("the daemon did not end")
		}
	}
	t.Cleanup(stop)
	c := api.New(cfg.Socket)
	if _, err := c.Version(t.Context()); err != nil {
		t.Fatal(err)
	}
	return c, stop
}

// testDaemon is daemonOn with a folder of its own.
func testDaemon(t *testing.T) *api.Client {
	c, _ := daemonOn(t, workdir(t), nil)
	return c
}

// request asks for a fake session of alice's that does what is said; see
// fakeSession.
func request(context string, labels ...string) api.ConnectRequest {
	req := api.ConnectRequest{AsUID: alice, Options: api.Options{Context: context, Labels: map[string]string{}}}
	for _, l := range labels {
		k, v, _ := strings.Cut(l, "=")
		req.Options.Labels[k] = v
	}
	return req
}

func mustConnect(t *testing.T, c *api.Client, req api.ConnectRequest) api.Session {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s, err := c.Connect(ctx, req, nil)
	if err != nil {
		t.Fatalf("connecting: %v", err)
	}
	return s
}

// wait polls until ok, for at most 10 s.
func wait(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// result is what the client role prints.
type result struct {
	Session  api.Session   `json:"session"`
	Sessions []api.Session `json:"sessions"`
	Error    *api.Error    `json:"error"`
}

// as runs one call of the client as another user.
func as(t *testing.T, uid int, groups []uint32, socket, verb string, in any) result {
	t.Helper()
	text, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(testBinary, "client", socket, verb, string(text))
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid), Groups: groups}}
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("client as uid %d: %v", uid, err)
	}
	var r result
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func clientMain(socket, verb, text string) {
	c := api.New(socket)
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	var r result
	var err error
	switch verb {
	case "connect":
		var req api.ConnectRequest
		json.Unmarshal([]byte(text), &req)
		r.Session, err = c.Connect(ctx, req, nil)
	case "sessions":
		r.Sessions, err = c.Sessions(ctx)
	case "disconnect":
		var req api.DisconnectRequest
		json.Unmarshal([]byte(text), &req)
		err = c.Disconnect(ctx, req, nil)
	case "logs":
		err = c.Logs(ctx, strings.Trim(text, `"`), false, io.Discard)
	}
	if err != nil {
		r.Error = asAPI(err)
	}
	json.NewEncoder(os.Stdout).Encode(r)
}
