// Package rig puts data paths together from processes in network namespaces,
// without a cluster and without an API server: culvert's own over a plain TCP
// stream, and stock wireguard-go over UDP. The processes are the benchmark
// program itself in other roles, so Main must be the first thing that it calls.
package rig

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Namespace is an open network namespace.
type Namespace struct{ h netns.NsHandle }

// NewNamespace makes a namespace without a name, which ends with Close and its
// last process. Its loopback device is up.
func NewNamespace() (*Namespace, error) {
	n := &Namespace{}
	err := apart(func() (err error) {
		n.h, err = netns.New()
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("making a network namespace (root is needed): %w", err)
	}
	return n, n.Do(func() error { return up("lo") })
}

// OpenNamespace opens the namespace that a file like /proc/1/ns/net stands for.
func OpenNamespace(path string) (*Namespace, error) {
	h, err := netns.GetFromPath(path)
	if err != nil {
		return nil, fmt.Errorf("opening the network namespace %s: %w", path, err)
	}
	return &Namespace{h}, nil
}

// Close lets go of the namespace.
func (n *Namespace) Close() error { return n.h.Close() }

// Do runs f on a thread in the namespace.
func (n *Namespace) Do(f func() error) error {
	return apart(func() error {
		if err := netns.Set(n.h); err != nil {
			return fmt.Errorf("entering a network namespace: %w", err)
		}
		return f()
	})
}

// apart runs f on a thread that ends with it.
func apart(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

// Command prepares a program in the namespace.
func (n *Namespace) Command(name string, args ...string) *exec.Cmd {
	inside := fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), int(n.h))
	return exec.Command("nsenter", slices.Concat([]string{inside, "--", name}, args)...)
}

// Address gives a device further addresses.
func (n *Namespace) Address(device string, prefixes ...netip.Prefix) error {
	return n.Do(func() error { return configure(device, prefixes, nil) })
}

// Cable joins two namespaces by a pair of devices with this name and these
// addresses.
func Cable(name string, a, b *Namespace, at, bt netip.Prefix) error {
	err := a.Do(func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerNamespace: netlink.NsFd(b.h)})
	})
	if err == nil {
		err = errors.Join(a.Address(name, at), b.Address(name, bt))
	}
	if err != nil {
		return fmt.Errorf("laying a cable between namespaces: %w", err)
	}
	return nil
}

// configure brings a device of the thread's namespace up, with addresses and
// routes.
func configure(device string, addrs, routes []netip.Prefix) error {
	if err := up(device); err != nil {
		return err
	}
	link, err := netlink.LinkByName(device)
	if err != nil {
		return err
	}
	for _, p := range addrs {
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = syscall.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(link, a); err != nil {
			return fmt.Errorf("giving %s the address %s: %w", device, p, err)
		}
	}
	for _, p := range routes {
		if err := netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: ipNet(p)}); err != nil {
			return fmt.Errorf("routing %s to %s: %w", p, device, err)
		}
	}
	return nil
}

func up(device string) error {
	link, err := netlink.LinkByName(device)
	if err == nil {
		err = netlink.LinkSetUp(link)
	}
	if err != nil {
		return fmt.Errorf("bringing up %s: %w", device, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
