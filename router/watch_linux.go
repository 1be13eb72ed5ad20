package router

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"reflect"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

const (
	// settle batches events: one restart of a network manager is hundreds.
	settle = 250 * time.Millisecond

	// burst and refill bound how often Watch reports a removal of ours. Against a
	// manager that deletes foreign rules on each of its events, we lose the fight
	// slowly instead of burning the CPU on both sides.
	burst  = 10
	refill = 5 * time.Second

	// watchBuffer in bytes of the subscription's socket: some 10,000 events. When
	// it overflows the kernel says ENOBUFS, and both kinds of change are reported.
	watchBuffer = 4 << 20
)

// Watch calls changed, from the calling goroutine, whenever somebody removed
// what a Router had set, or the machine's own addresses, routes or links became
// others than at the last call; it batches and rate-limits the former. It
// returns when ctx is done (with its error) or the kernel's events cannot be read.
func Watch(ctx context.Context, changed func(Change)) error {
	sock, err := nl.Subscribe(unix.NETLINK_ROUTE,
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE)
	if err != nil {
		return fmt.Errorf("subscribing to network changes: %w", err)
	}
	if sock.SetReceiveBufferSize(watchBuffer, true) != nil {
		_ = sock.SetReceiveBufferSize(watchBuffer, false) // an unprivileged watcher gets what it may have
	}
	w := &watcher{devices: map[int]bool{}}
	if w.last, w.devices, err = network(); err != nil {
		sock.Close()
		return err
	}
	events := make(chan Change, 1) // of one: a pending one is merged with the next
	failed := make(chan error, 1)
	received := make(chan struct{})
	go func() {
		defer close(received)
		failed <- w.receive(ctx, sock, events)
	}()
	defer func() {
		sock.Close()
		<-received
	}()
	return w.report(ctx, events, failed, changed)
}

type watcher struct {
	last    *Facts       // the machine's network at the last report
	devices map[int]bool // our own devices; receive's after the start
}

// receive classifies events until the socket is closed.
func (w *watcher) receive(ctx context.Context, sock *nl.NetlinkSocket, events chan Change) error {
	for {
		msgs, from, err := sock.Receive()
		var c Change
		switch {
		case errors.Is(err, unix.ENOBUFS):
			c = Change{Ours: true, Network: true}
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("reading network changes: %w", err)
		case from.Pid != nl.PidKernel:
			continue
		}
		for _, m := range msgs {
			e := w.classify(m)
			c.Ours, c.Network = c.Ours || e.Ours, c.Network || e.Network
		}
		if c == (Change{}) {
			continue
		}
		select {
		case old := <-events:
			c.Ours, c.Network = c.Ours || old.Ours, c.Network || old.Network
		default:
		}
		events <- c // has room: only this goroutine sends
	}
}

// classify tells what one event means. An event of ours that is no removal means nothing.
func (w *watcher) classify(m syscall.NetlinkMessage) Change {
	switch m.Header.Type {
	case unix.RTM_NEWRULE, unix.RTM_DELRULE:
		return Change{Ours: m.Header.Type == unix.RTM_DELRULE && ourTable(tableOf(m.Data, unix.SizeofRtMsg, nl.FRA_TABLE))}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if ourTable(tableOf(m.Data, unix.SizeofRtMsg, unix.RTA_TABLE)) {
			return Change{Ours: m.Header.Type == unix.RTM_DELROUTE}
		}
		return Change{Network: true}
	case unix.RTM_NEWADDR, unix.RTM_DELADDR:
		if len(m.Data) < unix.SizeofIfAddrmsg {
			return Change{}
		}
		if w.devices[int(nl.DeserializeIfAddrmsg(m.Data).Index)] {
			return Change{Ours: m.Header.Type == unix.RTM_DELADDR}
		}
		return Change{Network: true}
	case unix.RTM_NEWLINK, unix.RTM_DELLINK:
		link, err := netlink.LinkDeserialize(nil, m.Data)
		if err != nil {
			return Change{Network: true}
		}
		attrs := link.Attrs()
		if !deviceName.MatchString(attrs.Name) {
			return Change{Network: true}
		}
		if m.Header.Type == unix.RTM_DELLINK {
			delete(w.devices, attrs.Index)
			return Change{Ours: true}
		}
		w.devices[attrs.Index] = true
		// IPv4 routes vanish without an event when their device goes down.
		return Change{Ours: attrs.Flags&net.FlagUp == 0}
	}
	return Change{}
}

// tableOf reads the table of a route or rule message.
func tableOf(data []byte, header int, attr uint16) int {
	if len(data) < header {
		return 0
	}
	attrs, err := nl.ParseRouteAttr(data[header:])
	if err != nil {
		return 0
	}
	for _, a := range attrs {
		if a.Attr.Type == attr && len(a.Value) >= 4 {
			return int(binary.NativeEndian.Uint32(a.Value))
		}
	}
	return 0
}

// report batches events, drops those that changed nothing, and calls changed.
func (w *watcher) report(ctx context.Context, events <-chan Change, failed <-chan error, changed func(Change)) error {
	tokens := newBucket(burst, refill)
	for {
		var c Change
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return err
		case c = <-events:
		}
		wait := settle
		if c.Ours {
			wait = max(wait, tokens.take(time.Now()))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		select {
		case more := <-events:
			c.Ours, c.Network = c.Ours || more.Ours, c.Network || more.Network
		default:
		}
		if c.Network {
			// Router advertisements and Wi-Fi statistics are events too: compare.
			if now, _, err := network(); err == nil {
				c.Network = !reflect.DeepEqual(now, w.last)
				w.last = now
			}
		}
		if c != (Change{}) {
			changed(c)
		}
	}
}
