package tun

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const cloneDevice = "/dev/net/tun"

// offloads are what the kernel may leave to us: checksums and the cutting of
// TCP. Not USO: a UDP super-packet is not one datagram.
const offloads = unix.TUN_F_CSUM | unix.TUN_F_TSO4 | unix.TUN_F_TSO6 | unix.TUN_F_TSO_ECN

// Create makes the device, up, without addresses; closing the file deletes it.
// It must run as root. Errors are *api.Error with code tun.
func Create(cfg Config) (*os.File, error) {
	if len(cfg.Name) == 0 || len(cfg.Name) >= unix.IFNAMSIZ {
		return nil, fail(fmt.Sprintf("TUN device name %q must have 1 to %d bytes", cfg.Name, unix.IFNAMSIZ-1), "")
	}
	f, err := attach(cfg.Name)
	if err != nil {
		return nil, err
	}
	if err := configure(f, cfg); err != nil {
		f.Close()
		return nil, fail(fmt.Sprintf("setting up TUN device %s: %v", cfg.Name, err), "")
	}
	return f, nil
}

// attach opens the clone device and makes the interface.
func attach(name string) (*os.File, error) {
	fd, err := unix.Open(cloneDevice, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return nil, fail("there is no "+cloneDevice,
			"load the kernel module with: sudo modprobe tun (in a container, start it with --device /dev/net/tun --cap-add NET_ADMIN)")
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return nil, fail(fmt.Sprintf("opening %s: %v", cloneDevice, err),
			"culvertd must run as root: sudo systemctl start culvertd (in a container, start it with --device /dev/net/tun --cap-add NET_ADMIN)")
	case err != nil:
		return nil, fail(fmt.Sprintf("opening %s: %v", cloneDevice, err), "")
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		unix.Close(fd)
		return nil, fail(fmt.Sprintf("TUN device name %q: %v", name, err), "")
	}
	// EXCL: never join a device that is there, whose owner somebody may have set.
	req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
	switch err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); {
	case errors.Is(err, unix.EPERM):
		unix.Close(fd)
		return nil, fail(fmt.Sprintf("making TUN device %s: %v", name, err),
			"culvertd must run as root with CAP_NET_ADMIN: sudo systemctl start culvertd")
	case errors.Is(err, unix.EBUSY):
		unix.Close(fd)
		return nil, fail(fmt.Sprintf("TUN device %s is in use", name), "remove what a dead daemon left behind with: sudo culvertd cleanup")
	case err != nil:
		unix.Close(fd)
		return nil, fail(fmt.Sprintf("making TUN device %s: %v", name, err), "")
	}
	// Only now does the descriptor take part in polling.
	return os.NewFile(uintptr(fd), cloneDevice), nil
}

func configure(f *os.File, cfg Config) error {
	var err error
	if e := control(f, func(fd int) {
		err = unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0)
		if err == nil {
			err = unix.IoctlSetPointerInt(fd, unix.TUNSETVNETHDRSZ, HeaderLen)
		}
		if err == nil {
			err = unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, offloads)
		}
	}); e != nil {
		return e
	}
	if err != nil {
		return fmt.Errorf("setting offloads: %w", err)
	}
	link, err := netlink.LinkByName(cfg.Name)
	if err != nil {
		return fmt.Errorf("finding the device: %w", err)
	}
	if err := netlink.LinkSetMTU(link, cfg.MTU); err != nil {
		return fmt.Errorf("setting MTU %d: %w", cfg.MTU, err)
	}
	if err := netlink.LinkSetTxQLen(link, queueLen); err != nil {
		return fmt.Errorf("setting the queue length: %w", err)
	}
	// Kernels before 6.3 have no gso_max_size for IPv4 of its own and old ones do
	// not let it be set; their 65,536 fits too, but for the longest packets, which
	// Device.Read then reports as truncated.
	_ = netlink.LinkSetGSOMaxSize(link, gsoMaxSize)
	_ = netlink.LinkSetGSOIPv4MaxSize(link, gsoMaxSize)
	// No link-local address: the device has the session's own addresses only.
	_ = netlink.LinkSetIP6AddrGenMode(link, nl6AddrGenNone)
	for _, s := range []struct{ path, value string }{
		{"ipv4/conf/" + cfg.Name + "/forwarding", "0"},
		{"ipv4/conf/" + cfg.Name + "/rp_filter", "1"},
		{"ipv4/conf/" + cfg.Name + "/accept_redirects", "0"},
		{"ipv4/conf/" + cfg.Name + "/send_redirects", "0"},
		{"ipv6/conf/" + cfg.Name + "/forwarding", "0"},
		{"ipv6/conf/" + cfg.Name + "/accept_ra", "0"},
		{"ipv6/conf/" + cfg.Name + "/accept_redirects", "0"},
	} {
		if err := sysctl(s.path, s.value); err != nil {
			return err
		}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bringing the device up: %w", err)
	}
	return nil
}

const nl6AddrGenNone = 1 // IN6_ADDR_GEN_MODE_NONE, linux/if_link.h

// sysctl writes one setting below net. That it does not exist is no error: the
// kernel may lack IPv6, and then lacks what it would protect.
func sysctl(path, value string) error {
	err := os.WriteFile(filepath.Join("/proc/sys/net", path), []byte(value), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		// A container's /proc/sys may be read-only and right already.
		have, e := os.ReadFile(filepath.Join("/proc/sys/net", path))
		if e == nil && string(have) == value+"\n" {
			return nil
		}
		return fmt.Errorf("setting net/%s to %s: %w", path, value, err)
	}
	return nil
}

// Available says why Create could not work, nil if it could. It makes a device
// for a moment and leaves nothing.
func Available() error {
	// The kernel counts the name up; a fixed one might be in use.
	f, err := attach("culvprobe%d")
	if err != nil {
		return err
	}
	return f.Close()
}

// Delete deletes the TUN device of that name. A descriptor that was passed on
// can make its device persistent, so that closing it is not enough. It is no
// error when there is none; a device of another kind is left alone.
func Delete(name string) error {
	link, err := netlink.LinkByName(name)
	if errors.As(err, new(netlink.LinkNotFoundError)) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("finding TUN device %s: %w", name, err)
	}
	if link.Type() != "tuntap" && link.Type() != "tun" {
		return fmt.Errorf("deleting TUN device %s: it is a %s", name, strconv.Quote(link.Type()))
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("deleting TUN device %s: %w", name, err)
	}
	return nil
}

// control runs f on the descriptor of file without making it blocking, as Fd
// would.
func control(file *os.File, f func(fd int)) error {
	rc, err := file.SyscallConn()
	if err != nil {
		return err
	}
	return rc.Control(func(fd uintptr) { f(int(fd)) })
}
