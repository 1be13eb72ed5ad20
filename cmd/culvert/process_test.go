package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

// The tests below run the program as a process: this test binary, which is the
// program when asked by the environment.
const beCulvert = "CULVERT_TEST_BE_CULVERT"

func TestMain(m *testing.M) {
	if os.Getenv(beCulvert) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// somebody is an ordinary user: connect refuses root.
const somebody = 4242

// machine is a directory with what a process of the CLI finds: a kubeconfig, a
// socket with a fake daemon behind it, an API server.
type machine struct {
	dir    string
	daemon *fakeDaemon
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("the processes run as users of their own, which takes root")
	}
	dir, err := os.MkdirTemp("", "culvert-cli")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	m := &machine{dir: dir}
	m.daemon = newFakeDaemon(t, filepath.Join(dir, "socket"))
	return m
}

// apiServer answers SelfSubjectReviews with a status. It speaks TLS: client-go
// sends no credentials otherwise, and runs no plugin.
func apiServer(t *testing.T, status int, user string) *httptest.Server {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if !strings.HasSuffix(r.URL.Path, "/selfsubjectreviews") {
			w.WriteHeader(http.StatusNotFound)
			return
		}
		w.WriteHeader(status)
		if status >= 400 {
			fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q,"message":"no"}`, status, http.StatusText(status))
			return
		}
		fmt.Fprintf(w, `{"kind":"SelfSubjectReview","apiVersion":"authentication.k8s.io/v1","status":{"userInfo":{"username":%q}}}`, user)
	}))
	t.Cleanup(s.Close)
	return s
}

// kubeconfig writes one with a context per name; user is the YAML of its
// credentials.
func (m *machine) kubeconfig(t *testing.T, server, user string, contexts ...string) string {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: v1\nkind: Config\ncurrent-context: %s\n", contexts[0])
	fmt.Fprintf(&b, "clusters:\n- name: c\n  cluster: {server: %q, insecure-skip-tls-verify: true}\nusers:\n- name: u\n  user: %s\ncontexts:\n", server, user)
	for _, c := range contexts {
		fmt.Fprintf(&b, "- name: %s\n  context: {cluster: c, user: u, namespace: shop}\n", c)
	}
	path := filepath.Join(m.dir, "config")
	if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

const token = "{token: abc}"

type result struct {
	code           int
	stdout, stderr string
}

func (r result) String() string {
	return fmt.Sprintf("exit code %d\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
}

func (m *machine) command(uid int, env []string, args ...string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Args[0] = "culvert"
	cmd.Dir = m.dir
	cmd.Env = append([]string{beCulvert + "=1", "PATH=" + os.Getenv("PATH"), "HOME=" + m.dir, "CULVERT_SOCKET=" + m.daemon.path}, env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	return cmd
}

func (m *machine) run(t *testing.T, uid int, env []string, args ...string) result {
	t.Helper()
	cmd := m.command(uid, env, args...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
}

func (r result) expect(t *testing.T, code int, words ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("want exit code %d: %v", code, r)
	}
	for _, w := range words {
		if !strings.Contains(r.stdout+r.stderr, w) {
			t.Errorf("want %q: %v", w, r)
		}
	}
}

// fakeDaemon speaks the daemon's API on a real Unix socket.
type fakeDaemon struct {
	path string

	mu          sync.Mutex
	sessions    []api.Session
	connects    []api.ConnectRequest
	disconnects []api.DisconnectRequest
	lines       []api.Line // what a connect answers
	hang        bool       // a connect never ends
	cancelled   bool       // a connect's client went away
	replies     []api.PingReply
	facts       api.Facts
	ended       string // the session of this ID ends just before its disconnect
}

func newFakeDaemon(t *testing.T, path string) *fakeDaemon {
	t.Helper()
	d := &fakeDaemon{path: path, facts: api.Facts{TUN: "ok", DNSMode: "resolvconf", DNSWhy: "no systemd-resolved"}}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o666); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, v any) { json.NewEncoder(w).Encode(v) }
	mux.HandleFunc(api.PathVersion, func(w http.ResponseWriter, _ *http.Request) { answer(w, api.Version{Version: "dev", PID: 7}) })
	mux.HandleFunc(api.PathSessions, func(w http.ResponseWriter, _ *http.Request) {
		d.mu.Lock()
		defer d.mu.Unlock()
		answer(w, d.sessions)
	})
	mux.HandleFunc(api.PathFacts, func(w http.ResponseWriter, _ *http.Request) { answer(w, d.facts) })
	mux.HandleFunc(api.PathLogs, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "log of %q\nsecond line\n", r.URL.Query().Get("id"))
	})
	mux.HandleFunc(api.PathPing, func(w http.ResponseWriter, _ *http.Request) {
		for _, r := range d.replies {
			answer(w, api.Line{Ping: &r})
		}
		answer(w, api.Line{End: true})
	})
	mux.HandleFunc(api.PathConnect, d.serveConnect)
	mux.HandleFunc(api.PathDisconnect, func(w http.ResponseWriter, r *http.Request) {
		var req api.DisconnectRequest
		json.NewDecoder(r.Body).Decode(&req)
		d.mu.Lock()
		defer d.mu.Unlock()
		d.disconnects = append(d.disconnects, req)
		for i, s := range d.sessions {
			if req.ID == s.ID && req.ID != d.ended {
				s.State, s.Step = api.Disconnecting, "removing the agent"
				answer(w, api.Line{Event: &api.Event{Session: s}})
				d.sessions = append(d.sessions[:i], d.sessions[i+1:]...)
				answer(w, api.Line{End: true})
				return
			}
		}
		answer(w, api.Line{Error: &api.Error{Code: api.CodeNotFound, Message: "no such session"}})
	})
	s := &http.Server{Handler: mux}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
	return d
}

func (d *fakeDaemon) serveConnect(w http.ResponseWriter, r *http.Request) {
	var req api.ConnectRequest
	if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	d.mu.Lock()
	d.connects = append(d.connects, req)
	lines, hang := d.lines, d.hang
	d.mu.Unlock()
	for _, l := range lines {
		json.NewEncoder(w).Encode(l)
		w.(http.Flusher).Flush()
	}
	if hang {
		<-r.Context().Done()
		d.mu.Lock()
		d.cancelled = true
		d.mu.Unlock()
	}
}

// connecting are the lines of a connect that ends well.
func connecting() []api.Line {
	s := sampleSession()
	step := func(text string) api.Line {
		c := api.Session{ID: s.ID, Context: s.Context, State: api.Connecting, Step: text}
		return api.Line{Event: &api.Event{Session: c}}
	}
	return []api.Line{step("looking for ranges"), step("starting the agent"), step("starting the agent"), {Event: &api.Event{Session: s}}, {End: true}}
}

func (d *fakeDaemon) lastConnect(t *testing.T) api.ConnectRequest {
	t.Helper()
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.connects) != 1 {
		t.Fatalf("%d connects, want 1", len(d.connects))
	}
	return d.connects[0]
}

func TestConnect(t *testing.T) {
	m := newMachine(t)
	m.daemon.lines = connecting()
	m.kubeconfig(t, apiServer(t, 201, "jane").URL, token, "staging")
	// A relative path must not depend on the session's working directory.
	r := m.run(t, somebody, []string{"HTTPS_PROXY=http://proxy"}, "connect", "-c", "config", "--exclude-ips", "10.1.0.0/16", "--at-boot")
	r.expect(t, 0, "looking for ranges\nstarting the agent\n", `"staging"`, "as jane", `namespace "shop"`, "Connected to staging", "10.96.0.0/16", "culvert disconnect")
	if strings.Contains(r.stdout, "starting the agent") {
		t.Errorf("steps on stdout: %v", r)
	}
	req := m.daemon.lastConnect(t)
	o := req.Options
	if o.Kubeconfig != filepath.Join(m.dir, "config") || o.Context != "staging" || o.Namespace != "shop" || o.ExcludeIPs[0] != "10.1.0.0/16" || !req.AtBoot || req.AsUID != 0 {
		t.Errorf("request: %+v", req)
	}
	if environment(req.Env).get("HTTPS_PROXY") != "http://proxy" {
		t.Errorf("the environment was not passed: %v", req.Env)
	}
}

func TestConnectJSON(t *testing.T) {
	m := newMachine(t)
	m.daemon.lines = connecting()
	config := m.kubeconfig(t, apiServer(t, 201, "jane").URL, token, "staging")
	r := m.run(t, somebody, nil, "connect", "-c", config, "-o", "json", "--skipCleanup")
	r.expect(t, 0)
	var events []api.Event
	for dec := json.NewDecoder(strings.NewReader(r.stdout)); ; {
		var e api.Event
		if err := dec.Decode(&e); err == io.EOF {
			break
		} else if err != nil {
			t.Fatalf("%v in %v", err, r)
		}
		events = append(events, e)
	}
	if len(events) != 4 || events[3].Session.State != api.Connected {
		t.Errorf("events: %+v", events)
	}
	var notice struct{ Notice string }
	if err := json.Unmarshal([]byte(r.stderr), &notice); err != nil || !strings.Contains(notice.Notice, "--skipCleanup") {
		t.Errorf("stderr is no JSON notice: %v", r)
	}
}

// TestKtConnectCommandLine is the line of kt-connect's own end-to-end test:
// switches and values before the command.
func TestKtConnectCommandLine(t *testing.T) {
	m := newMachine(t)
	m.daemon.lines = connecting()
	config := m.kubeconfig(t, apiServer(t, 201, "jane").URL, token, "staging")
	r := m.run(t, somebody, []string{"KUBECONFIG=" + config}, "-d", "-n", "ns", "-i", "img:1", "-f", "connect", "--mode", "tun2socks", "--dnsMode", "localDNS", "--dnsCacheTtl", "10", "--excludeIps", "172.17.0.1")
	r.expect(t, 0)
	if o := m.daemon.lastConnect(t).Options; o.Namespace != "ns" || o.Image != "img:1" || o.ImagePullPolicy != "Always" || o.DNS != "auto" || !o.Debug || o.ExcludeIPs[0] != "172.17.0.1" {
		t.Errorf("options: %+v", o)
	}
}

func TestConnectRefused(t *testing.T) {
	m := newMachine(t)
	good := apiServer(t, 201, "jane").URL
	plugin := filepath.Join(m.dir, "plugin")
	if err := os.WriteFile(plugin, []byte("#!/bin/sh\necho no login today >&2\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	always := fmt.Sprintf("{exec: {apiVersion: client.authentication.k8s.io/v1, command: %s, interactiveMode: Always}}", plugin)
	never := strings.Replace(always, "Always", "Never", 1)
	closed := httptest.NewTLSServer(nil)
	closed.Close()
	for _, c := range []struct {
		name         string
		server, user string
		args         []string
		env          []string
		uid          int
		code         int
		errCode      string
		words        []string
	}{
		{name: "no kubeconfig", env: []string{"KUBECONFIG="}, code: 1, errCode: api.CodeKubeconfig, words: []string{".kube/config", "--kubeconfig"}},
		{name: "missing kubeconfig", args: []string{"-c", "/nowhere/config"}, code: 1, errCode: api.CodeKubeconfig, words: []string{"/nowhere/config"}},
		{name: "unknown context", args: []string{"--context", "prod"}, code: 1, errCode: api.CodeKubeconfig, words: []string{"prod", "other", "staging"}},
		{name: "expired", server: apiServer(t, 401, "").URL, code: 1, errCode: api.CodeCredentials, words: []string{"401", "staging"}},
		{name: "anonymous", server: apiServer(t, 201, "system:anonymous").URL, code: 1, errCode: api.CodeCredentials, words: []string{"anonymous"}},
		{name: "unreachable", server: closed.URL, code: 1, errCode: api.CodeUnreachable, words: []string{closed.URL, "refused"}},
		{name: "plugin fails", user: never, code: 1, errCode: api.CodeCredentials, words: []string{"plugin", "exit code 3", "no login today"}},
		{name: "plugin needs a terminal", user: always, code: 1, errCode: api.CodeCredentials, words: []string{"interactiveMode: Always", "terminal"}},
		{name: "root", uid: -1, code: 1, errCode: api.CodeDenied, words: []string{"root", "sudo culvert connect"}},
		{name: "no daemon", args: []string{"--socket", "/nowhere/culvert.sock"}, code: 1, errCode: api.CodeDaemon, words: []string{"/nowhere/culvert.sock", "culvertd"}},
		{name: "default route", args: []string{"--include-ips", "0.0.0.0/0"}, code: 2, errCode: api.CodeUsage, words: []string{"0.0.0.0/0"}},
		{name: "unknown flag", args: []string{"--exclude-ip", "1.2.3.4"}, code: 2, errCode: api.CodeUsage, words: []string{"--exclude-ips"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			config := m.kubeconfig(t, or(c.server, good), or(c.user, token), "staging", "other")
			env := c.env
			if env == nil {
				env = []string{"KUBECONFIG=" + config}
			}
			uid := somebody
			if c.uid < 0 {
				uid = 0
			}
			r := m.run(t, uid, env, append([]string{"connect"}, c.args...)...)
			r.expect(t, c.code, c.words...)
			if !strings.Contains(r.stderr, "culvert: ") || r.stdout != "" {
				t.Errorf("not an error on stderr alone: %v", r)
			}
			r = m.run(t, uid, env, append([]string{"connect", "-o", "json"}, c.args...)...)
			last := r.stderr[strings.LastIndex(strings.TrimSpace(r.stderr), "\n")+1:]
			var e struct{ Error *api.Error }
			if err := json.Unmarshal([]byte(last), &e); err != nil || e.Error == nil || e.Error.Code != c.errCode || r.code != c.code {
				t.Errorf("want a JSON error %q: %v", c.errCode, r)
			}
			if len(m.daemon.connects) != 0 {
				t.Errorf("the daemon was asked %d times", len(m.daemon.connects))
			}
		})
	}
}

// TestPlugin: a working plugin runs before the daemon is asked, as the user.
func TestPlugin(t *testing.T) {
	m := newMachine(t)
	m.daemon.lines = connecting()
	plugin := filepath.Join(m.dir, "plugin")
	script := `#!/bin/sh
id -u > ` + m.dir + `/ran
echo '{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"abc"}}'
`
	if err := os.WriteFile(plugin, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	user := fmt.Sprintf("{exec: {apiVersion: client.authentication.k8s.io/v1, command: %s, interactiveMode: IfAvailable}}", plugin)
	config := m.kubeconfig(t, apiServer(t, 201, "jane").URL, user, "staging")
	m.run(t, somebody, nil, "connect", "-c", config).expect(t, 0, "Connected")
	if uid, err := os.ReadFile(filepath.Join(m.dir, "ran")); err != nil || strings.TrimSpace(string(uid)) != "4242" {
		t.Errorf("the plugin ran as %q: %v", uid, err)
	}
	// Behind sudo it runs as the user, too. 65534 is nobody, in every password file.
	os.Remove(filepath.Join(m.dir, "ran"))
	m.daemon.connects = nil
	r := m.run(t, 0, []string{"SUDO_UID=65534", "SUDO_GID=65534", "XDG_RUNTIME_DIR=/run/user/0"}, "connect", "-c", config)
	r.expect(t, 0, "Connected", "as jane")
	if uid, err := os.ReadFile(filepath.Join(m.dir, "ran")); err != nil || strings.TrimSpace(string(uid)) != "65534" {
		t.Errorf("behind sudo the plugin ran as %q: %v", uid, err)
	}
	req := m.daemon.lastConnect(t)
	if req.AsUID != 65534 || environment(req.Env).get("USER") != "nobody" || environment(req.Env).get("XDG_RUNTIME_DIR") != "" || environment(req.Env).get("HOME") == m.dir {
		t.Errorf("request behind sudo: %+v", req)
	}
}

func TestConnectFails(t *testing.T) {
	m := newMachine(t)
	m.daemon.lines = append(connecting()[:2], api.Line{Error: &api.Error{Code: api.CodeExists, Message: "already connected to this cluster as staging", Hint: "culvert disconnect staging"}})
	config := m.kubeconfig(t, apiServer(t, 201, "jane").URL, token, "staging")
	r := m.run(t, somebody, nil, "connect", "-c", config)
	r.expect(t, 1, "culvert: already connected to this cluster as staging\nculvert disconnect staging\n")
	if strings.Contains(r.stdout, "Connected") {
		t.Errorf("%v", r)
	}
}

// TestInterrupt: Ctrl-C while connecting cancels and waits for the undoing.
func TestInterrupt(t *testing.T) {
	m := newMachine(t)
	m.daemon.lines, m.daemon.hang = connecting()[:2], true
	m.daemon.sessions = []api.Session{{ID: "k3x9", UID: somebody, Context: "staging", State: api.Connecting}}
	config := m.kubeconfig(t, apiServer(t, 201, "jane").URL, token, "staging")
	cmd := m.command(somebody, nil, "connect", "-c", config)
	var out, errs bytes.Buffer
	cmd.Stdout = &out
	stderr, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	defer timer.Stop()
	buf := make([]byte, 4096)
	for signalled := false; ; {
		n, err := stderr.Read(buf)
		errs.Write(buf[:n])
		if !signalled && strings.Contains(errs.String(), "starting the agent") {
			signalled = true
			cmd.Process.Signal(os.Interrupt)
		}
		if err != nil {
			break
		}
	}
	cmd.Wait()
	r := result{cmd.ProcessState.ExitCode(), out.String(), errs.String()}
	r.expect(t, 1, "cancelled; nothing is left", "removing the agent")
	m.daemon.mu.Lock()
	defer m.daemon.mu.Unlock()
	if !m.daemon.cancelled || len(m.daemon.disconnects) != 1 || m.daemon.disconnects[0].ID != "k3x9" {
		t.Errorf("cancelled %v, disconnects %+v", m.daemon.cancelled, m.daemon.disconnects)
	}
}

func TestOtherCommands(t *testing.T) {
	m := newMachine(t)
	run := func(args ...string) result { return m.run(t, somebody, nil, args...) }

	run("status").expect(t, 0, "Nothing is connected", "culvert connect")
	run("disconnect").expect(t, 0, "Nothing is connected")
	run("logs").expect(t, 0, `log of ""`)
	run("version").expect(t, 0, "culvertd  dev")
	run("version", "--socket", "/nowhere").expect(t, 0, "not running")
	run("status", "--socket", "/nowhere").expect(t, 1, "culvertd is not running", "systemctl start culvertd")
	run("status", "extra").expect(t, 2)
	run("nonsense").expect(t, 2, "unknown command")
	run("--version").expect(t, 0, "culvert version dev")
	run("completion", "bash").expect(t, 0, "complete")
	run("connect", "--help").expect(t, 0, "--exclude-ips", "Examples:")

	s, other := sampleSession(), sampleSession()
	other.ID, other.Context = "zz", "dev"
	m.daemon.sessions = []api.Session{s, other}
	run("status").expect(t, 0, "staging", "connected", "dev")
	run("status", "-o", "wide").expect(t, 0, "ServiceCIDR kubernetes", "API server")
	run("logs", "dev").expect(t, 0, `log of "zz"`)
	run("logs", "dev", "-o", "json").expect(t, 0, `{"line":"second line"}`)
	run("logs", "prod").expect(t, 1, "prod", "staging, dev")
	run("disconnect", "prod").expect(t, 1, `"prod" is not connected`, "staging, dev")
	run("disconnect", "dev", "--context", "staging").expect(t, 2)
	run("disconnect", "dev").expect(t, 0, "removing the agent", "Disconnected from dev.")
	if len(m.daemon.sessions) != 1 {
		t.Errorf("sessions left: %+v", m.daemon.sessions)
	}
	run("__complete", "disconnect", "").expect(t, 0, "staging")

	// One that ends by itself meanwhile (a session that undoes what a dead one left)
	// does not keep the others.
	m.daemon.sessions, m.daemon.ended = []api.Session{other, s}, other.ID
	run("disconnect").expect(t, 0, "Disconnected from staging.")
	if len(m.daemon.sessions) != 1 || m.daemon.sessions[0].ID != other.ID {
		t.Errorf("sessions left: %+v", m.daemon.sessions)
	}
	m.daemon.sessions, m.daemon.ended = []api.Session{s}, ""
	config := m.kubeconfig(t, "http://127.0.0.1:1", token, "staging", "other")
	run("__complete", "--kubeconfig", config, "connect", "--context", "").expect(t, 0, "other\nstaging\n")

	run("ping", "web").expect(t, 1, "0 answers")
	m.daemon.replies = []api.PingReply{{Seq: 1, Target: "10.244.1.7 (pod shop/web), ICMP", RTT: time.Millisecond}, {Seq: 2, Target: "10.244.1.7 (pod shop/web), ICMP", Error: "no answer in 3 s"}}
	run("ping", "-c", "2", "web").expect(t, 0, "10.244.1.7 (pod shop/web), ICMP: seq=1 time=1.000 ms", "seq=2 no answer", "50% lost")
	run("ping", "-o", "json", "web").expect(t, 0, `{"seq":1,`)
	run("ping").expect(t, 2)

	kubectl := m.command(somebody, nil, "connect", "--help")
	kubectl.Args[0] = "kubectl-culvert"
	if out, err := kubectl.Output(); err != nil || !strings.Contains(string(out), "kubectl culvert connect [flags]") || !strings.Contains(string(out), "kubectl culvert connect --at-boot") {
		t.Errorf("as a plugin: %v\n%s", err, out)
	}
}

func TestDoctorMachine(t *testing.T) {
	m := newMachine(t)
	m.daemon.facts.Leftovers = []string{"device culvert0"}
	r := m.run(t, somebody, nil, "doctor")
	r.expect(t, 1, "ok    daemon", "warn  leftovers", "sudo culvertd cleanup", "fail  kubeconfig", "resolvconf will be used")
	r = m.run(t, somebody, nil, "doctor", "-o", "json")
	var report struct {
		OK       bool
		Findings []finding
	}
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || report.OK || len(report.Findings) < 5 || r.code != 1 {
		t.Errorf("%v: %v", err, r)
	}
	m.daemon.facts.TUN = "no /dev/net/tun"
	m.run(t, somebody, nil, "doctor").expect(t, 1, "fail  tun", "/dev/net/tun", "--device")
	m.run(t, somebody, nil, "doctor", "--socket", "/nowhere").expect(t, 1, "fail  daemon", "skip  names")
	m.run(t, 0, nil, "doctor").expect(t, 1, "fail  user", "sudo culvert connect")
	// Behind sudo everything is checked as the user.
	m.run(t, 0, []string{"SUDO_UID=65534"}, "doctor").expect(t, 1, "ok    daemon", "fail  kubeconfig")
}
