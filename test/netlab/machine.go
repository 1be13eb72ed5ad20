// Package netlab is the laptop of the test cluster, or its neighbour, as a whole
// machine: its users and groups, an installed culvert, a running daemon, and
// programs that its users start. Everything happens in the machine's network
// namespace with a private view of /etc; the host's own network and files stay as
// they are.
package netlab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// User is somebody on the laptop.
type User struct {
	Name   string
	UID    int
	Groups []int // beside his own, which has his UID's number
}

// groupID is the group "culvert" of the laptop.
const groupID = 4700

// The laptop's users. Mallory is not in the group culvert.
var (
	Root    = User{Name: "root"}
	Alice   = User{Name: "alice", UID: 4701, Groups: []int{groupID}}
	Bob     = User{Name: "bob", UID: 4702, Groups: []int{groupID}}
	Mallory = User{Name: "mallory", UID: 4703}
)

// Machine is the laptop, or another that has a culvert of its own.
type Machine struct {
	Host   string // which: "laptop" or "lan", its neighbour
	Dir    string // its own files: bin, etc, home, run, state; root's
	Repo   string // the checkout
	Name   string // of the cluster whose `testcluster exec` leads here; empty: the first
	Socket string
	Config string // the daemon's configuration file; it may be missing

	daemon *exec.Cmd
	log    *os.File
	exited chan struct{}
}

// Lab is the prefix of the test cluster's namespaces: "culvert", or what
// CULVERT_LAB says, so that several labs can run on one machine, each with a
// cluster and a laptop of its own.
func Lab() string {
	if lab := os.Getenv("CULVERT_LAB"); lab != "" {
		return lab
	}
	return "culvert"
}

// labFlags are the flags of `testcluster` that choose the lab.
func labFlags() []string {
	if Lab() == "culvert" {
		return nil
	}
	return []string{"--prefix", Lab(), "--state", "/var/lib/" + Lab() + "-testcluster"}
}

// Repo finds the checkout above the working directory.
func Repo() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for ; dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "test", "netlab", "machine.go")); err == nil {
			return dir, nil
		}
	}
	return "", errors.New("not inside a culvert checkout")
}

// New makes the laptop's files below a fresh directory; see NewAt.
func New() (*Machine, error) { return newOn("laptop") }

// NewNeighbour makes a second machine on the laptop's own network, with the same
// users: another developer's. The laptop's cable is not its own.
func NewNeighbour() (*Machine, error) { return newOn("lan") }

func newOn(host string) (*Machine, error) {
	dir, err := os.MkdirTemp("/var/lib", "culvert-lab-")
	if err != nil {
		return nil, fmt.Errorf("making the laptop's directory (root is needed): %w", err)
	}
	return newAt(host, dir)
}

// NewAt makes the laptop's files in dir, which only root may change (the daemon
// starts no session binary from elsewhere), and installs what the checkout's bin
// holds.
func NewAt(dir string) (*Machine, error) { return newAt("laptop", dir) }

func newAt(host, dir string) (*Machine, error) {
	repo, err := Repo()
	if err != nil {
		return nil, err
	}
	m := &Machine{Host: host, Dir: dir, Repo: repo, Socket: filepath.Join(dir, "run", "culvert.sock"), Config: filepath.Join(dir, "etc", "culvertd.yaml")}
	for _, d := range []string{"bin", "etc", "home", "run", "state"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	for _, b := range []string{"culvert", "culvertd"} {
		if err := copyFile(filepath.Join(repo, "bin", b), filepath.Join(dir, "bin", b)); err != nil {
			return nil, fmt.Errorf("installing %s (run `make build` first): %w", b, err)
		}
	}
	if err := os.Symlink("culvert", filepath.Join(dir, "bin", "kubectl-culvert")); err != nil {
		return nil, err
	}
	return m, m.addUsers()
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o755)
}

// without returns the lines of a passwd or group file that are not of these
// names: the host may have culvert installed, or an Alice.
func without(text []byte, names ...string) (kept []byte) {
	for line := range bytes.Lines(text) {
		name, _, _ := strings.Cut(string(line), ":")
		if !slices.Contains(names, name) {
			kept = append(kept, line...)
		}
	}
	return kept
}

// addUsers writes the laptop's own passwd and group: the host's and ours.
func (m *Machine) addUsers() error {
	passwd, err := os.ReadFile("/etc/passwd")
	if err != nil {
		return err
	}
	group, err := os.ReadFile("/etc/group")
	if err != nil {
		return err
	}
	ours := []string{Alice.Name, Bob.Name, Mallory.Name, "culvert"}
	passwd, group = without(passwd, ours...), without(group, ours...)
	members := []string{}
	for _, u := range []User{Alice, Bob, Mallory} {
		home := m.Home(u)
		passwd = fmt.Appendf(passwd, "%s:x:%d:%d::%s:/bin/sh\n", u.Name, u.UID, u.UID, home)
		group = fmt.Appendf(group, "%s:x:%d:\n", u.Name, u.UID)
		if len(u.Groups) > 0 {
			members = append(members, u.Name)
		}
		if err := os.Mkdir(home, 0o700); err != nil {
			return err
		}
		if err := os.Chown(home, u.UID, u.UID); err != nil {
			return err
		}
	}
	group = fmt.Appendf(group, "culvert:x:%d:%s\n", groupID, strings.Join(members, ","))
	if err := os.WriteFile(filepath.Join(m.Dir, "etc", "passwd"), passwd, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(m.Dir, "etc", "group"), group, 0o644)
}

// Home is a user's home directory on the laptop.
func (m *Machine) Home(u User) string { return filepath.Join(m.Dir, "home", u.Name) }

// Testcluster is the program that runs the cluster.
func (m *Machine) Testcluster() string { return filepath.Join(m.Repo, "bin", "testcluster") }

// Testapp is the cluster's test program, as a client on the laptop.
func (m *Machine) Testapp() string {
	return filepath.Join(m.Repo, "test", "cluster", "bin", "testapp")
}

// Enter is the command line that runs what follows it as a user of the laptop,
// for a person to type.
func (m *Machine) Enter(u User) []string {
	cmd := m.Command(context.Background(), u, "env", "-i")
	return append(cmd.Args, cmd.Env...)
}

// enter runs what follows in the laptop, seeing its users, as one of them.
const enter = `set -e
mount --bind "$1/etc/passwd" /etc/passwd
mount --bind "$1/etc/group" /etc/group
[ ! -e "$1/etc/resolv.conf" ] || mount --bind "$1/etc/resolv.conf" /etc/resolv.conf
uid=$2 groups=$3; shift 3
[ "$uid" = 0 ] || exec setpriv --reuid "$uid" --regid "$uid" --groups "$groups" --inh-caps=-all -- "$@"
exec "$@"`

// Command prepares a program of a user on the laptop. Its environment is a
// fresh login's: HOME, USER, PATH, CULVERT_SOCKET; more can be appended to Env.
func (m *Machine) Command(ctx context.Context, u User, name string, args ...string) *exec.Cmd {
	groups := fmt.Sprint(u.UID)
	for _, g := range u.Groups {
		groups += fmt.Sprintf(",%d", g)
	}
	exe := slices.Concat([]string{"exec"}, labFlags(), []string{m.Host, "--", "/bin/sh", "-c", enter, "sh", m.Dir, fmt.Sprint(u.UID), groups, name}, args)
	cmd := exec.CommandContext(ctx, m.Testcluster(), exe...)
	home := m.Home(u)
	if u.UID == 0 {
		home = "/root"
	}
	cmd.Dir = "/"
	cmd.Env = []string{
		"HOME=" + home, "USER=" + u.Name, "LOGNAME=" + u.Name, "LANG=C.UTF-8",
		"PATH=" + filepath.Join(m.Dir, "bin") + ":/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
		"CULVERT_SOCKET=" + m.Socket,
	}
	// A cancelled command is a user's Ctrl-C first.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGINT) }
	cmd.WaitDelay = 15 * time.Second
	return cmd
}

// Result is what a program said and how it ended.
type Result struct {
	Stdout, Stderr string
	Code           int
	Took           time.Duration
}

func (r Result) String() string {
	return fmt.Sprintf("exit code %d after %v\nstdout: %s\nstderr: %s", r.Code, r.Took.Round(time.Millisecond), r.Stdout, r.Stderr)
}

// Run runs cmd to its end.
func Run(cmd *exec.Cmd) Result {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	begun := time.Now()
	err := cmd.Run()
	r := Result{Stdout: stdout.String(), Stderr: stderr.String(), Took: time.Since(begun)}
	var exit *exec.ExitError
	switch {
	case err == nil:
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	default:
		r.Code = -1
		r.Stderr += err.Error()
	}
	return r
}

// Run runs a program as a user of the laptop, for at most two minutes.
func (m *Machine) Run(u User, name string, args ...string) Result {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	return Run(m.Command(ctx, u, name, args...))
}

// Inside calls f on a thread in the machine's network namespace: sockets that f
// itself opens (with literal addresses, so that no other goroutine dials) are
// the machine's.
func (m *Machine) Inside(f func() error) error { return In(m.Host, f) }

// In is Inside for any machine of the test cluster: node1, lan, ...
func In(machine string, f func() error) error {
	ns, err := netns.GetFromName(Lab() + "-" + machine)
	if err != nil {
		return fmt.Errorf("the network namespace of %s: %w", machine, err)
	}
	defer ns.Close()
	return inNamespace(ns, f)
}

func inNamespace(ns netns.NsHandle, f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and with it the
		// namespace it was moved to.
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- f()
	}()
	return <-done
}

// Close stops the daemon and removes the laptop's files.
func (m *Machine) Close() error {
	err := m.StopDaemon()
	return errors.Join(err, os.RemoveAll(m.Dir))
}
