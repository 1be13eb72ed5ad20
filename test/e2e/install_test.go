//go:build e2e

package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// TestInstall: `make install DESTDIR=…` makes what a package would, `make
// uninstall` takes all of it away.
func TestInstall(t *testing.T) {
	dest := t.TempDir()
	run := func(target string) {
		t.Helper()
		cmd := exec.Command("make", "--no-print-directory", target, "DESTDIR="+dest, "PREFIX=/usr")
		cmd.Dir = lab.Repo
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("make %s: %v\n%s", target, err, out)
		}
	}
	files := func() (list []string) {
		t.Helper()
		err := filepath.WalkDir(dest, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				list = append(list, strings.TrimPrefix(path, dest))
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return list
	}
	run("install")
	run("install") // an upgrade
	have := files()
	for _, want := range []string{
		"/usr/bin/culvert", "/usr/bin/culvertd", "/usr/bin/kubectl-culvert", "/usr/lib/systemd/system/culvertd.service",
		"/usr/lib/sysusers.d/culvert.conf", "/usr/share/bash-completion/completions/culvert",
	} {
		if !slices.Contains(have, want) {
			t.Errorf("%s is not installed; there is %v", want, have)
		}
	}
	unit, err := os.ReadFile(dest + "/usr/lib/systemd/system/culvertd.service")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"ExecStart=/usr/bin/culvertd\n", "ExecStopPost=/usr/bin/culvertd cleanup\n"} {
		if !strings.Contains(string(unit), want) {
			t.Errorf("the unit has no %q", want)
		}
	}
	if out, err := exec.Command(dest+"/usr/bin/kubectl-culvert", "version").CombinedOutput(); err != nil {
		t.Errorf("the installed plugin: %v\n%s", err, out)
	}
	run("uninstall")
	if left := files(); len(left) > 0 {
		t.Errorf("uninstall leaves %v", left)
	}
}

// TestBoot: a machine that starts has a daemon before it has a network. What was
// asked for at boot is tried until the API server answers; meanwhile the
// machine's names and routes are its own. A stop by the unit's commands leaves
// nothing but the wish.
func TestBoot(t *testing.T) {
	before := listMachine(t)
	connect(t, "--at-boot")
	if err := lab.StopDaemon(); err != nil { // shutdown: ExecStop, then ExecStopPost
		t.Fatal(err)
	}
	if diff := compare(before, listMachine(t)); diff != "" {
		t.Errorf("left after the unit stopped:\n%s", diff)
	}
	link(t, "--cut", "on")
	if err := lab.StartDaemon(); err != nil {
		t.Fatal(err)
	}
	// It has begun, and cannot.
	eventually(t, 30*time.Second, func() error { return logged("connecting at boot: will try again") })
	if s := status(t, netlab.Alice); len(s) > 0 && s[0].State == api.Connected {
		t.Errorf("connected without a network: %+v", s[0])
	}
	link(t, "--cut", "off")
	s := waitState(t, netlab.Alice, api.Connected, 60*time.Second)
	if !s.AtBoot || s.UID != netlab.Alice.UID {
		t.Errorf("not the session that was asked for: %+v", s)
	}
	fresh(t, 5*time.Second)
	sh(t, "getent hosts echo.demo")
	// After a crash instead of a stop, too.
	if err := lab.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := lab.Cleanup(); err != nil { // ExecStopPost
		t.Fatal(err)
	}
	if diff := compare(before, listMachine(t)); diff != "" {
		t.Errorf("left after the daemon was killed and cleaned up:\n%s", diff)
	}
	if err := lab.StartDaemon(); err != nil { // Restart=on-failure
		t.Fatal(err)
	}
	waitState(t, netlab.Alice, api.Connected, 60*time.Second)
	fresh(t, 5*time.Second)
}

// logged tells whether the daemon that runs now has logged some words.
func logged(words string) error {
	text := lab.Tail(1 << 20)
	if i := strings.LastIndex(text, "culvertd is ready"); i >= 0 {
		text = text[i:]
	}
	if !strings.Contains(text, words) {
		return fmt.Errorf("no %q in the daemon's log:\n%s", words, text)
	}
	return nil
}
