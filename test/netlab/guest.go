package netlab

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// Guest is a machine on the laptop's own network that has no culvert: a network
// namespace of its own, with an /etc/resolv.conf and a /run/wireguard that nobody
// else sees. What is in its Dir's bin comes first in PATH.
type Guest struct {
	Dir  string
	name string // of the namespace
	port string // its cable's end at the router
	init *exec.Cmd
}

// guestSetup makes the private files and waits until whoever started it is gone.
const guestSetup = `set -e
mount --make-rprivate /
mount --bind "$1/resolv.conf" /etc/resolv.conf
mkdir -p /run/wireguard
mount -t tmpfs none /run/wireguard
echo ready
exec cat`

// NewGuest plugs a machine in, at the address with this last number (10 to 250).
func (m *Machine) NewGuest(name string, number int) (*Guest, error) {
	g := &Guest{Dir: filepath.Join(m.Dir, name), name: Lab() + "-" + name, port: fmt.Sprint("guest", number)}
	if err := os.MkdirAll(filepath.Join(g.Dir, "bin"), 0o755); err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(g.Dir, "resolv.conf"), nil, 0o644); err != nil {
		return nil, err
	}
	// Not "ip netns add": the first one on a machine mounts /run/netns on itself, and
	// what the cluster had there can then no longer be removed.
	at := "/run/netns/" + g.name
	if err := os.WriteFile(at, nil, 0o444); err != nil {
		return nil, err
	}
	if out, err := exec.Command("unshare", "--net="+at, "true").CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("making the network namespace %s: %w: %s", g.name, err, out), os.Remove(at))
	}
	wan, n := Lab()+"-wan", strconv.Itoa(number)
	for _, args := range []string{
		"-n " + wan + " link add " + g.port + " type veth peer name eth0 netns " + g.name,
		"-n " + wan + " link set " + g.port + " master home up",
		"-n " + g.name + " link set lo up",
		"-n " + g.name + " link set eth0 up",
		"-n " + g.name + " address add 192.168.50." + n + "/24 dev eth0",
		"-n " + g.name + " address add fd00:192:168:50::" + n + "/64 dev eth0 nodad",
		"-n " + g.name + " route add default via 192.168.50.1",
		"-n " + g.name + " route add default via fd00:192:168:50::1",
	} {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return nil, errors.Join(fmt.Errorf("ip %s: %w: %s", args, err, out), g.Close())
		}
	}
	g.init = exec.Command("nsenter", "--net="+at, "unshare", "--mount", "/bin/sh", "-c", guestSetup, "sh", g.Dir)
	_, err := g.init.StdinPipe()
	if err != nil {
		return nil, errors.Join(err, g.Close())
	}
	out, err := g.init.StdoutPipe()
	if err == nil {
		err = g.init.Start()
	}
	if err == nil {
		_, err = out.Read(make([]byte, 16))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("starting the guest %s: %w", name, err), g.Close())
	}
	return g, nil
}

// Run runs a shell command on the guest as root, for at most a minute.
func (g *Guest) Run(command string) Result {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "nsenter", "--target", strconv.Itoa(g.init.Process.Pid), "--net", "--mount", "/bin/sh", "-c", command)
	cmd.Env = append(os.Environ(), "PATH="+filepath.Join(g.Dir, "bin")+":"+os.Getenv("PATH"))
	cmd.WaitDelay = time.Second // a daemon may have kept the output open
	return Run(cmd)
}

// Inside is Machine.Inside for the guest.
func (g *Guest) Inside(f func() error) error {
	ns, err := netns.GetFromName(g.name)
	if err != nil {
		return fmt.Errorf("the network namespace of %s: %w", g.name, err)
	}
	defer ns.Close()
	return inNamespace(ns, f)
}

// Close ends whatever runs on the guest and unplugs it.
func (g *Guest) Close() error {
	pids, _ := exec.Command("ip", "netns", "pids", g.name).Output() // nobody in a namespace that was not made
	for _, pid := range strings.Fields(string(pids)) {
		if n, err := strconv.Atoi(pid); err == nil && n != os.Getpid() {
			_ = syscall.Kill(n, syscall.SIGKILL) // it may have ended
		}
	}
	if g.init != nil && g.init.Process != nil {
		_ = g.init.Wait() // killed
	}
	_ = exec.Command("ip", "-n", Lab()+"-wan", "link", "del", g.port).Run() // the namespace's end takes it away too
	return errors.Join(exec.Command("ip", "netns", "del", g.name).Run(), os.RemoveAll(g.Dir))
}
