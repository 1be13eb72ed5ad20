package netlab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// busConfig lets everybody own and ask everything: the bus is the test's alone.
const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=%s</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_destination="*"/><allow send_type="signal"/>
<allow send_requested_reply="true" send_type="method_return"/><allow send_requested_reply="true" send_type="error"/>
<allow receive_type="method_call"/><allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/></policy></busconfig>
`

// runResolved gives systemd-resolved the user that its package would have made,
// a /run that the host can read, and the laptop's router as its upstream.
const runResolved = `set -e
mount --bind "$1/passwd" /etc/passwd
mount --bind "$1/group" /etc/group
mount --bind "$1/run" /run
dbus-daemon --config-file="$1/bus.conf" --nofork --nopidfile & 
for i in $(seq 100); do [ -S "$1/bus" ] && break; sleep 0.05; done
DBUS_SYSTEM_BUS_ADDRESS="unix:path=$1/bus" "$2/lib/systemd/systemd-resolved" &
wait`

// Resolved is systemd-resolved with a D-Bus of its own, in the laptop's network
// namespace. It is the laptop's resolver as long as it runs.
type Resolved struct {
	Bus string // D-Bus address: DBUS_SYSTEM_BUS_ADDRESS for who shall see it

	root    string // of the unpacked package
	machine *Machine
	cmd     *exec.Cmd
	exited  chan struct{}
}

// StartResolved starts systemd-resolved and makes the laptop's resolv.conf its
// stub's. The daemon should not run meanwhile, and be started with the bus.
func (m *Machine) StartResolved() (*Resolved, error) {
	root, err := UnpackResolved()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(m.Dir, "resolved")
	if err := os.MkdirAll(filepath.Join(dir, "run", "systemd", "resolved.conf.d"), 0o755); err != nil {
		return nil, err
	}
	passwd, err := os.ReadFile(filepath.Join(m.Dir, "etc", "passwd"))
	if err != nil {
		return nil, err
	}
	group, err := os.ReadFile(filepath.Join(m.Dir, "etc", "group"))
	if err != nil {
		return nil, err
	}
	if !strings.Contains(string(passwd), "systemd-resolve:") {
		passwd = append(passwd, "systemd-resolve:x:995:995::/:/usr/sbin/nologin\n"...)
		group = append(group, "systemd-resolve:x:995:\n"...)
	}
	bus := filepath.Join(dir, "bus")
	for path, text := range map[string]string{
		"passwd": string(passwd), "group": string(group), "bus.conf": fmt.Sprintf(busConfig, bus),
		"run/systemd/resolved.conf.d/lab.conf": "[Resolve]\nDNS=192.168.50.1\nDNSSEC=no\nLLMNR=no\nMulticastDNS=no\n",
	} {
		if err := os.WriteFile(filepath.Join(dir, path), []byte(text), 0o644); err != nil {
			return nil, err
		}
	}
	r := &Resolved{Bus: "unix:path=" + bus, root: root, machine: m, exited: make(chan struct{})}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return nil, err
	}
	defer log.Close()
	r.cmd = m.Command(context.Background(), Root, "/bin/sh", "-c", runResolved, "sh", dir, root)
	r.cmd.Stdout, r.cmd.Stderr = log, log
	r.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := r.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = r.cmd.Wait()
		close(r.exited)
	}()
	stub := filepath.Join(dir, "run", "systemd", "resolve", "stub-resolv.conf")
	for range 200 {
		if _, err := os.Stat(stub); err == nil {
			return r, os.Symlink(stub, filepath.Join(m.Dir, "etc", "resolv.conf"))
		}
		select {
		case <-r.exited:
		case <-time.After(50 * time.Millisecond):
			continue
		}
		break
	}
	text, _ := os.ReadFile(log.Name())
	return nil, errors.Join(fmt.Errorf("systemd-resolved did not start:\n%s", text), r.Close())
}

// Resolvectl asks it as root.
func (r *Resolved) Resolvectl(args ...string) Result {
	return r.machine.Run(Root, "env", append([]string{"DBUS_SYSTEM_BUS_ADDRESS=" + r.Bus, filepath.Join(r.root, "usr/bin/resolvectl"), "--no-pager"}, args...)...)
}

// Close ends it and gives the laptop its resolv.conf back.
func (r *Resolved) Close() error {
	_ = syscall.Kill(-r.cmd.Process.Pid, syscall.SIGKILL) // the group is the command's own
	<-r.exited
	err := os.Remove(filepath.Join(r.machine.Dir, "etc", "resolv.conf"))
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, os.RemoveAll(filepath.Join(r.machine.Dir, "resolved")))
}

// UnpackResolved returns a directory with Debian's systemd-resolved in it. It is
// never installed: its package would take over the machine's DNS.
func UnpackResolved() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	dir := filepath.Join(cache, "culvert-test", "systemd-resolved")
	if _, err := os.Stat(filepath.Join(dir, "lib/systemd/systemd-resolved")); err == nil {
		return dir, nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return "", err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "get")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(tmp)
	get := exec.Command("apt-get", "download", "systemd-resolved")
	get.Dir = tmp
	if out, err := get.CombinedOutput(); err != nil {
		return "", fmt.Errorf("downloading systemd-resolved: %w\n%s", err, out)
	}
	debs, _ := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if len(debs) != 1 {
		return "", fmt.Errorf("downloading systemd-resolved: want one package, have %v", debs)
	}
	if out, err := exec.Command("dpkg", "-x", debs[0], filepath.Join(tmp, "root")).CombinedOutput(); err != nil {
		return "", fmt.Errorf("unpacking systemd-resolved: %w\n%s", err, out)
	}
	if err := os.Rename(filepath.Join(tmp, "root"), dir); err != nil && !os.IsExist(err) {
		return "", err
	}
	return dir, nil
}
