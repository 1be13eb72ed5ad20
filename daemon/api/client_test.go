package api

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"
)

// serve answers on a socket with h until the test ends.
func serve(t *testing.T, path string, h http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h}
	go s.Serve(l)
	t.Cleanup(func() { s.Close() })
}

func code(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Code
	}
	return ""
}

func TestNoDaemon(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	began := time.Now()
	_, err := New(path).Version(t.Context())
	if code(err) != CodeDaemon || !strings.Contains(err.Error(), "systemctl start culvertd") || !strings.Contains(err.Error(), path) {
		t.Errorf("no socket: %v", err)
	}
	if took := time.Since(began); took < startWait || took > startWait+time.Second {
		t.Errorf("gave up after %v", took)
	}
	// A caller who has no time does not wait for it.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	began = time.Now()
	if _, err := New(path).Version(ctx); err == nil || time.Since(began) > time.Second {
		t.Errorf("cancelled: %v after %v", err, time.Since(began))
	}
}

func TestDaemonStarting(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	// First a socket of a dead daemon, then a living one.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	time.AfterFunc(200*time.Millisecond, func() {
		os.Remove(path)
		serve(t, path, func(w http.ResponseWriter, r *http.Request) { w.Write([]byte(`{"version":"v"}`)) })
	})
	if v, err := New(path).Version(t.Context()); err != nil || v.Version != "v" {
		t.Errorf("%v %v", v, err)
	}
}

func TestNotInTheGroup(t *testing.T) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		t.Skip("needs root, to become somebody else")
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	serve(t, path, func(http.ResponseWriter, *http.Request) {})
	os.Chmod(path, 0o600)
	err := New(path).explain(&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EACCES)})
	if code(err) != CodeDenied || !strings.Contains(err.Error(), "usermod -aG culvert") {
		t.Errorf("%v", err)
	}
}

func TestStreams(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	lines := ""
	serve(t, path, func(w http.ResponseWriter, r *http.Request) {
		if r.Host != Host || r.Header.Get("Origin") != "" {
			t.Errorf("host %q", r.Host)
		}
		w.Write([]byte(lines))
	})
	c := New(path)
	lines = `{"event":{"session":{"id":"1","state":"connecting"}}}` + "\n\n" + `{"event":{"session":{"id":"1","state":"connected"}}}` + "\n" + `{"end":true}` + "\n"
	n := 0
	if s, err := c.Connect(t.Context(), ConnectRequest{}, func(Event) { n++ }); err != nil || s.State != Connected || n != 2 {
		t.Errorf("%v, %v after %d events", s.State, err, n)
	}
	lines = `{"error":{"code":"image","message":"m","hint":"h"}}` + "\n"
	if _, err := c.Connect(t.Context(), ConnectRequest{}, nil); code(err) != CodeImage || err.Error() != "m\nh" {
		t.Errorf("%v", err)
	}
	lines = `{"event":{"session":{"id":"1"}}}` + "\n" // and cut
	if err := c.Disconnect(t.Context(), DisconnectRequest{}, nil); code(err) != CodeDaemon {
		t.Errorf("a cut stream: %v", err)
	}
	lines = "x\n"
	if err := c.Watch(t.Context(), func(Event) {}); err == nil {
		t.Error("nonsense is taken")
	}
}
