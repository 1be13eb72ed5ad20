package cluster

import (
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

func TestMountsBelow(t *testing.T) {
	text := "22 27 0:21 / /proc rw - proc proc rw\n30 1 0:5 / /s/a rw - x x rw\n31 30 0:5 / /s/a/b rw - x x rw\n32 1 0:5 / /s/ab rw - x x rw\n"
	if got := mountsBelow(text, "/s/a"); !reflect.DeepEqual(got, []string{"/s/a", "/s/a/b"}) {
		t.Errorf("got %v", got)
	}
}

func TestKeys(t *testing.T) {
	s := New(&plan.Site{State: t.TempDir()}, io.Discard)
	c := plan.All()[0]
	if err := s.writeKeys(c); err != nil {
		t.Fatal(err)
	}
	for _, u := range Users {
		info, err := os.Stat(s.Kubeconfig("a", u))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o644 {
			t.Errorf("%s: mode %v", u, info.Mode())
		}
	}
	if info, err := os.Stat(s.PKIDir("a")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("key directory: %v, %v", info.Mode(), err)
	}
}

func TestPlugin(t *testing.T) {
	s := New(&plan.Site{State: t.TempDir()}, io.Discard)
	if err := s.writeKeys(plan.All()[0]); err != nil {
		t.Fatal(err)
	}
	home := t.TempDir()
	cmd := exec.Command(filepath.Join(s.State, "a/users/execuser-plugin"))
	cmd.Env = []string{"HOME=" + home, "PATH=/usr/bin:/bin"}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := os.Stat(filepath.Join(home, ".culvert-exec-plugin")); err != nil {
		t.Errorf("the plugin left no trace: %v", err)
	}
}

func TestLock(t *testing.T) {
	s := New(&plan.Site{State: filepath.Join(t.TempDir(), "state")}, io.Discard)
	unlock, err := s.lock()
	if err != nil {
		t.Fatal(err)
	}
	locked := make(chan func())
	go func() {
		u, err := s.lock()
		if err != nil {
			t.Error(err)
		}
		locked <- u
	}()
	select {
	case <-locked:
		t.Fatal("two hold the lock")
	default:
	}
	os.RemoveAll(s.State) // as "down" does
	unlock()
	(<-locked)()
	if _, err := os.Stat(filepath.Join(s.State, "lock")); err != nil {
		t.Errorf("the second holds a lock without a name: %v", err)
	}
}
