package session

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// netlinkBuffer holds what the kernel says at once; when it says more, the
// socket's queue overflows (ENOBUFS), which is news enough.
const netlinkBuffer = 64 << 10

// watchNetwork calls changed whenever an address, a route or a link of this
// machine changes, until ctx is done. It needs no privilege: rtnetlink(7) lets
// everybody listen.
func watchNetwork(ctx context.Context, changed func()) error {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("opening a netlink socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), "netlink")
	defer f.Close()
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: unix.RTMGRP_LINK |
		unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR | unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE}); err != nil {
		return fmt.Errorf("listening to netlink: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	defer stop()
	buf := make([]byte, netlinkBuffer)
	for {
		n, err := f.Read(buf)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			changed()
		case err != nil:
			return fmt.Errorf("reading from netlink: %w", err)
		case aboutNetwork(buf[:n]):
			changed()
		}
	}
}

// aboutNetwork tells whether one of the messages is of a link, an address or a
// route: netlink(7), struct nlmsghdr.
func aboutNetwork(b []byte) bool {
	for len(b) >= unix.SizeofNlMsghdr {
		length := int(binary.NativeEndian.Uint32(b))
		switch binary.NativeEndian.Uint16(b[4:]) {
		case unix.RTM_NEWLINK, unix.RTM_DELLINK, unix.RTM_NEWADDR, unix.RTM_DELADDR, unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
			return true
		}
		if length < unix.SizeofNlMsghdr || length > len(b) {
			return false
		}
		b = b[min(len(b), (length+3)&^3):]
	}
	return false
}
