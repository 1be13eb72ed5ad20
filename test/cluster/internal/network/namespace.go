// Package network lays the site's cables: network namespaces, links,
// addresses, routes and packet filters. The host's own namespace gets nothing.
package network

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Namespace is an open network namespace that has a name.
type Namespace struct {
	*netlink.Handle
	path string
	fd   netns.NsHandle
}

// Create makes a network namespace held by the file at path, as "ip netns add"
// would, with its loopback device up.
func Create(path string) (*Namespace, error) {
	var f *os.File
	for range 100 { // another site's end may take the empty directory away in between
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return nil, fmt.Errorf("make the directory of network namespaces: %w", err)
		}
		var err error
		if f, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0o444); err == nil {
			break
		} else if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		return nil, fmt.Errorf("make network namespace: %w", err)
	}
	if f == nil {
		return nil, fmt.Errorf("make network namespace: %s is taken away all the time", filepath.Dir(path))
	}
	f.Close()
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		done <- unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), path, "", unix.MS_BIND, "")
	}()
	if err := <-done; err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", path, err)
	}
	n, err := Open(path)
	if err != nil {
		return nil, err
	}
	return n, n.up("lo")
}

// Open opens a network namespace.
func Open(path string) (*Namespace, error) {
	fd, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("open network namespace %s: %w", path, err)
	}
	h, err := netlink.NewHandleAt(fd, unix.NETLINK_ROUTE)
	if err != nil {
		fd.Close()
		return nil, fmt.Errorf("open a netlink socket in %s: %w", path, err)
	}
	return &Namespace{h, path, fd}, nil
}

// Close lets go of the namespace; it stays.
func (n *Namespace) Close() {
	n.Handle.Close()
	n.fd.Close()
}

// Remove takes a namespace's name away. The namespace itself ends with its last process.
func Remove(path string) error {
	for { // a namespace mounted twice needs two
		err := unix.Unmount(path, unix.MNT_DETACH)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
			break
		}
		if err != nil {
			return fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove network namespace: %w", err)
	}
	return nil
}

// Do runs f on a thread that is in the namespace; processes it starts are, too.
func (n *Namespace) Do(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock
		if err := netns.Set(n.fd); err != nil {
			done <- fmt.Errorf("enter %s: %w", n.path, err)
			return
		}
		done <- f()
	}()
	return <-done
}

// Run runs a program in the namespace and returns what it prints.
func (n *Namespace) Run(stdin string, command ...string) (string, error) {
	var out bytes.Buffer
	err := n.Do(func() error {
		cmd := exec.Command(command[0], command[1:]...)
		cmd.Stdin = strings.NewReader(stdin)
		cmd.Stdout, cmd.Stderr = &out, &out
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		return cmd.Run()
	})
	if err != nil {
		return out.String(), fmt.Errorf("%s in %s: %w: %s", command[0], n.path, err, strings.TrimSpace(out.String()))
	}
	return out.String(), nil
}

// Sysctl sets kernel values, given as "net.ipv4.ip_forward=1".
func (n *Namespace) Sysctl(settings ...string) error {
	return n.Do(func() error {
		for _, s := range settings {
			name, value, _ := strings.Cut(s, "=")
			// /proc/sys/net shows the namespace of the thread that opens it.
			file := "/proc/sys/" + strings.ReplaceAll(name, ".", "/")
			if err := os.WriteFile(file, []byte(value), 0o644); err != nil {
				return fmt.Errorf("set %s in %s: %w", s, n.path, err)
			}
		}
		return nil
	})
}

// Nft loads an nftables script.
func (n *Namespace) Nft(script string) error {
	_, err := n.Run(script, "nft", "-f", "-")
	return err
}

func (n *Namespace) up(name string) error {
	l, err := n.LinkByName(name)
	if err == nil {
		err = n.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("bring up %s in %s: %w", name, n.path, err)
	}
	return nil
}
