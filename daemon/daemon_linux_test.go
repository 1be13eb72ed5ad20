package daemon

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"golang.org/x/sys/unix"
)

// startDaemon runs a daemon as a process of its own.
func startDaemon(t *testing.T, dir string) *exec.Cmd {
	t.Helper()
	needRoot(t)
	cmd := exec.Command(testBinary, "daemon", dir)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	return cmd
}

// After kill -9 of the daemon the guard gives the names back within 2 s and
// removes the rest; the next daemon starts on a clean machine.
func TestDaemonKilled(t *testing.T) {
	dir := workdir(t)
	cmd := startDaemon(t, dir)
	c := api.New(filepath.Join(dir, "culvert.sock"))
	s := mustConnect(t, c, request("a", "dns=cluster.local"))
	if text, _ := os.ReadFile("/etc/resolv.conf"); string(text) == originalResolvConf {
		t.Fatal("resolv.conf is not changed")
	}
	killed := time.Now()
	cmd.Process.Kill()
	cmd.Wait()
	wait(t, "resolv.conf given back", func() bool {
		text, _ := os.ReadFile("/etc/resolv.conf")
		return string(text) == originalResolvConf
	})
	if took := time.Since(killed); took > 2*time.Second {
		t.Errorf("names came back after %v", took)
	}
	wait(t, "device gone", func() bool { _, err := net.InterfaceByName("culvert0"); return err != nil })
	wait(t, "session process gone", func() bool { return !alive(s.PID) || zombie(s.PID) })
	wait(t, "rules gone", func() bool { return !strings.Contains(ip(t, "rule"), "5180") })
	checkClean(t)
	c, _ = daemonOn(t, dir, nil) // in spite of the stale socket
	mustConnect(t, c, request("a", "dns=cluster.local"))
}

func zombie(pid int) bool {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return strings.Contains(string(stat), ") Z ")
}

// Without a guard, cleanup and the next start do it; they leave a living
// daemon alone.
func TestCleanup(t *testing.T) {
	dir := workdir(t)
	cmd := startDaemon(t, dir)
	c := api.New(filepath.Join(dir, "culvert.sock"))
	mustConnect(t, c, request("a", "dns=cluster.local"))
	if _, err := New(testConfig(dir)).Cleanup(t.Context()); asAPI(err).Code != api.CodeDaemon {
		t.Errorf("cleanup beside a living daemon: %v", err)
	}
	if err := New(testConfig(dir)).Run(t.Context()); asAPI(err).Code != api.CodeDaemon {
		t.Errorf("a second daemon: %v", err)
	}
	guard := guardOf(cmd.Process.Pid)
	if guard == 0 {
		t.Fatal("no guard runs")
	}
	unix.Kill(guard, unix.SIGTERM) // must survive that
	time.Sleep(50 * time.Millisecond)
	if !alive(guard) || zombie(guard) {
		t.Error("the guard does not survive SIGTERM")
	}
	unix.Kill(guard, unix.SIGKILL)
	cmd.Process.Kill()
	cmd.Wait()
	removed, err := New(testConfig(dir)).Cleanup(t.Context())
	if err != nil || len(removed) == 0 {
		t.Errorf("removed %v, %v", removed, err)
	}
	checkClean(t)
}

// guardOf finds the guard of a daemon's process, 0 if there is none.
func guardOf(daemon int) (guard int) {
	out, _ := exec.Command("pgrep", "-P", fmt.Sprint(daemon), "-f", "guard").Output()
	fmt.Sscan(string(out), &guard)
	return guard
}

// A guard that was killed is replaced, so that the next death of the daemon is
// as harmless as the first.
func TestGuardKilled(t *testing.T) {
	dir := workdir(t)
	cmd := startDaemon(t, dir)
	c := api.New(filepath.Join(dir, "culvert.sock"))
	mustConnect(t, c, request("a", "dns=cluster.local"))
	first := guardOf(cmd.Process.Pid)
	if first == 0 {
		t.Fatal("no guard runs")
	}
	unix.Kill(first, unix.SIGKILL)
	wait(t, "another guard", func() bool {
		g := guardOf(cmd.Process.Pid)
		return g != 0 && g != first && !zombie(g)
	})
	// One that hangs delays the end of the session, and no more.
	unix.Kill(guardOf(cmd.Process.Pid), unix.SIGSTOP)
	if err := c.Disconnect(t.Context(), api.DisconnectRequest{}, nil); err != nil {
		t.Fatal(err)
	}
	if g := guardOf(cmd.Process.Pid); g != 0 {
		t.Errorf("guard %d is left", g)
	}
	mustConnect(t, c, request("a", "dns=cluster.local"))
	wait(t, "the guard's program", func() bool { return guardOf(cmd.Process.Pid) != 0 })
	cmd.Process.Kill()
	cmd.Wait()
	wait(t, "resolv.conf given back", func() bool {
		text, _ := os.ReadFile("/etc/resolv.conf")
		return string(text) == originalResolvConf
	})
	wait(t, "device gone", func() bool { _, err := net.InterfaceByName("culvert0"); return err != nil })
}

// SIGTERM ends everything in order, and the connect at boot survives it.
func TestAtBoot(t *testing.T) {
	dir := workdir(t)
	cmd := startDaemon(t, dir)
	c := api.New(filepath.Join(dir, "culvert.sock"))
	req := request("boot", "dns=cluster.local")
	req.AtBoot, req.Env = true, []string{"SECRET=x"}
	if s := mustConnect(t, c, req); !s.AtBoot {
		t.Error("not marked as at boot")
	}
	watched := make(chan error, 1)
	go func() { watched <- c.Watch(context.Background(), func(api.Event) {}) }()
	cmd.Process.Signal(unix.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("the daemon ended with %v", err)
	}
	if err := <-watched; asAPI(err).Code != api.CodeDaemon {
		t.Errorf("a watcher was told %v", err)
	}
	checkClean(t)
	files, _ := filepath.Glob(filepath.Join(dir, "state", "boot", "*"))
	if len(files) != 1 {
		t.Fatalf("remembered %v", files)
	}
	if text, _ := os.ReadFile(files[0]); strings.Contains(string(text), "SECRET") {
		t.Errorf("the environment is on disk: %s", text)
	}
	if st, _ := os.Stat(files[0]); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}

	// The machine boots.
	c, stop := daemonOn(t, dir, nil)
	var s api.Session
	wait(t, "session at boot", func() bool {
		list, _ := c.Sessions(t.Context())
		if len(list) == 1 {
			s = list[0]
		}
		return s.State == api.Connected
	})
	self := selfOf(t, c, s.ID)
	if self.UID != alice || s.UID != alice || strings.Contains(strings.Join(self.Env, " "), "SECRET") || !strings.Contains(strings.Join(self.Env, " "), "HOME=/run/home/alice") {
		t.Errorf("at boot: uid %d, env %q", self.UID, self.Env)
	}
	if err := c.Disconnect(t.Context(), api.DisconnectRequest{Context: "boot"}, nil); err != nil {
		t.Fatal(err)
	}
	stop()
	if files, _ := filepath.Glob(filepath.Join(dir, "state", "boot", "*")); len(files) != 0 {
		t.Errorf("disconnect left %v", files)
	}
}

// A session at boot is tried again until the network is there.
func TestAtBootRetries(t *testing.T) {
	needRoot(t)
	dir := workdir(t)
	store := newBootStore(filepath.Join(dir, "state"))
	record := bootRecord{UID: alice, Options: request("x", "do=fail").Options}
	if err := store.save(record); err != nil {
		t.Fatal(err)
	}
	c, _ := daemonOn(t, dir, nil)
	wait(t, "first attempt", func() bool {
		err := c.Logs(t.Context(), "", false, io.Discard)
		return asAPIorNil(err) == nil
	})
	if !store.has(record) {
		t.Error("given up after one attempt")
	}
	if err := c.Disconnect(t.Context(), api.DisconnectRequest{Context: "x"}, nil); err != nil {
		t.Fatal(err)
	}
	if store.has(record) {
		t.Error("disconnect did not end the attempts")
	}
}

// Who was put out of the group is not connected at boot any more, unless root
// asked for it.
func TestAtBootOutOfTheGroup(t *testing.T) {
	needRoot(t)
	for _, byRoot := range []bool{false, true} {
		dir := workdir(t)
		store := newBootStore(filepath.Join(dir, "state"))
		if err := store.save(bootRecord{UID: mallet, Options: request("x", "do=fail").Options, ByRoot: byRoot}); err != nil {
			t.Fatal(err)
		}
		c, stop := daemonOn(t, dir, nil)
		tried := func() bool { return c.Logs(t.Context(), "", false, io.Discard) == nil }
		if byRoot {
			wait(t, "an attempt", tried)
		} else if time.Sleep(time.Second); tried() {
			t.Error("mallet was connected at boot")
		}
		stop()
	}
}

func TestBootStoreIsBounded(t *testing.T) {
	store := newBootStore(t.TempDir())
	record := func(uid, i int) bootRecord {
		return bootRecord{UID: uid, Options: api.Options{Context: fmt.Sprint(i)}}
	}
	for i := range maxOwn {
		if err := store.save(record(alice, i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := store.save(record(alice, 0)); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if err := store.save(record(alice, maxOwn)); err == nil {
		t.Error("one user fills the store")
	}
	if err := store.save(record(bob, 0)); err != nil {
		t.Errorf("another user: %v", err)
	}
	long := record(bob, 1)
	long.Options.Namespace = strings.Repeat("x", maxRecord)
	if err := store.save(long); err == nil {
		t.Error("kept what could not be read again")
	}
	if list, err := store.list(); err != nil || len(list) != maxOwn+1 {
		t.Errorf("%d records, %v", len(list), err)
	}
}

func asAPIorNil(err error) *api.Error {
	if err == nil {
		return nil
	}
	return asAPI(err)
}

// send makes one raw request and returns its status.
func send(t *testing.T, socket, text string) (int, string) {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	go io.WriteString(conn, text)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body)
}

func TestRefusesBrowsersAndBadRequests(t *testing.T) {
	dir := workdir(t)
	daemonOn(t, dir, nil)
	socket := filepath.Join(dir, "culvert.sock")
	get := func(host, header string) string {
		return "GET /v1/version HTTP/1.1\r\nHost: " + host + "\r\n" + header + "Connection: close\r\n\r\n"
	}
	post := func(header, body string) string {
		return fmt.Sprintf("POST /v1/connect HTTP/1.1\r\nHost: culvert\r\n%sContent-Length: %d\r\nConnection: close\r\n\r\n%s", header, len(body), body)
	}
	asJSON := "Content-Type: application/json\r\n"
	for _, x := range []struct {
		name, text string
		want       int
	}{
		{"a program", get("culvert", ""), 200},
		{"another host", get("localhost", ""), 403},
		{"a host with port", get("culvert:80", ""), 403},
		{"Origin", get("culvert", "Origin: http://evil\r\n"), 403},
		{"null Origin", get("culvert", "Origin: null\r\n"), 403},
		{"empty Origin", get("culvert", "Origin:\r\n"), 403},
		{"Referer", get("culvert", "Referer: http://evil/\r\n"), 403},
		{"Sec-Fetch", get("culvert", "Sec-Fetch-Site: cross-site\r\n"), 403},
		{"a form", post("Content-Type: text/plain\r\n", `{}`), 400},
		{"no JSON", post(asJSON, `x`), 400},
		{"unknown field", post(asJSON, `{"kubeconfigPath":"/etc/shadow"}`), 400},
		{"too long", post(asJSON, `{"env":["`+strings.Repeat("A", maxBody)+`"]}`), 400},
		{"environment without =", post(asJSON, `{"asUID":4001,"env":["x"]}`), 400},
		{"long environment", post(asJSON, `{"asUID":4001,"env":["X=`+strings.Repeat("A", maxEnv)+`"]}`), 400},
		{"unknown path", "GET /v2 HTTP/1.1\r\nHost: culvert\r\nConnection: close\r\n\r\n", 404},
	} {
		if got, body := send(t, socket, x.text); got != x.want {
			t.Errorf("%s: status %d, want %d: %s", x.name, got, x.want, body)
		}
	}
	if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("socket: %v %v", st.Mode(), err)
	} else if s := st.Sys().(*syscall.Stat_t); s.Uid != 0 || s.Gid != group {
		t.Errorf("socket belongs to %d:%d", s.Uid, s.Gid)
	}
}

func TestFacts(t *testing.T) {
	c := testDaemon(t)
	f, err := c.Facts(t.Context(), []api.Route{{Prefix: mustPrefix(lan), Source: "ServiceCIDR"}})
	if err != nil {
		t.Fatal(err)
	}
	text, _ := json.Marshal(f)
	if f.TUN != "ok" || f.DNSMode != "resolvconf" || len(f.Conflicts) != 1 || !strings.HasSuffix(f.SessionPath, ": ok") || len(f.Leftovers) != 0 {
		t.Errorf("facts %s", text)
	}
}

func TestGroupMissing(t *testing.T) {
	dir := workdir(t)
	c, _ := daemonOn(t, dir, func(cfg *Config) { cfg.Group = "nobody-has-this" })
	if _, err := c.Sessions(t.Context()); err != nil {
		t.Errorf("root: %v", err)
	}
	if r := as(t, alice, []uint32{group}, filepath.Join(dir, "culvert.sock"), "sessions", nil); r.Error == nil || r.Error.Code != api.CodeDenied {
		t.Errorf("alice: %v", r.Error)
	}
}

func TestSessionBinaryIsChecked(t *testing.T) {
	needRoot(t)
	dir := workdir(t)
	path := filepath.Join(dir, "culvert")
	make := func(mode os.FileMode, uid int) {
		os.Remove(path)
		if err := errors.Join(os.WriteFile(path, []byte("#!/bin/sh\n"), 0o755), os.Chmod(path, mode), os.Chown(path, uid, 0)); err != nil {
			t.Fatal(err)
		}
	}
	check := func(name, want string) {
		t.Helper()
		_, err := checkBinary(path)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	check("missing", "no such file")
	make(0o755, 0)
	check("good", "")
	make(0o775, 0)
	check("group may write", "others than root")
	make(0o755, alice)
	check("alice's", "belongs to uid 4001")
	make(0o644, 0)
	check("not executable", "not executable")
	make(0o755, 0)
	os.Chmod(dir, 0o777)
	check("folder for all", "everybody may write")
	os.Chmod(dir, 0o777|os.ModeSticky)
	check("sticky folder", "")
	os.Chown(dir, alice, 0)
	check("folder of alice's", "the folder")
}

// What root allows is read from a file that only root can have written.
func TestConfigurationIsChecked(t *testing.T) {
	needRoot(t)
	path := filepath.Join(workdir(t), "culvertd.yaml")
	if f, err := ReadFile(path); err != nil || f.MaxSessions != 0 {
		t.Errorf("missing: %+v, %v", f, err)
	}
	for _, x := range []struct {
		name string
		mode os.FileMode
		uid  int
		want string
	}{
		{"root's", 0o644, 0, ""},
		{"alice's", 0o644, alice, "belongs to uid 4001"},
		{"group may write", 0o664, 0, "others than root"},
		{"everybody may write", 0o646, 0, "others than root"},
	} {
		os.Remove(path)
		if err := errors.Join(os.WriteFile(path, []byte("maxSessions: 3\n"), 0o600), os.Chmod(path, x.mode), os.Chown(path, x.uid, 0)); err != nil {
			t.Fatal(err)
		}
		f, err := ReadFile(path)
		if x.want == "" && (err != nil || f.MaxSessions != 3) || x.want != "" && (err == nil || !strings.Contains(err.Error(), x.want)) {
			t.Errorf("%s: %+v, %v", x.name, f, err)
		}
	}
}
