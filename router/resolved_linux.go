package router

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	resolvedName    = "org.freedesktop.resolve1"
	resolvedPath    = "/org/freedesktop/resolve1"
	resolvedManager = resolvedName + ".Manager"

	// busTimeout bounds each call: a broken polkit or a hanging resolved must
	// not hang the daemon.
	busTimeout = time.Second

	// busRetry is how often a lost bus is tried again.
	busRetry = 2 * time.Second
)

// dialBus connects to a D-Bus, the system's if address is "".
func dialBus(address string) (*dbus.Conn, error) {
	ctx, cancel := context.WithCancel(context.Background())
	timer := time.AfterFunc(busTimeout, cancel) // closes the connection under the handshake
	var conn *dbus.Conn
	var err error
	if address == "" {
		conn, err = dbus.ConnectSystemBus(dbus.WithContext(ctx))
	} else {
		conn, err = dbus.Connect(address, dbus.WithContext(ctx))
	}
	if err == nil && !timer.Stop() {
		conn.Close()
		err = context.DeadlineExceeded
	}
	if err != nil {
		timer.Stop()
		cancel()
		return nil, fmt.Errorf("connecting to D-Bus: %w", err)
	}
	return conn, nil
}

// call calls a method of resolved's manager.
func call(ctx context.Context, conn *dbus.Conn, method string, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	if err := conn.Object(resolvedName, resolvedPath).CallWithContext(ctx, resolvedManager+"."+method, 0, args...).Err; err != nil {
		return fmt.Errorf("asking systemd-resolved to %s: %w", method, err)
	}
	return nil
}

// property reads one of resolved's manager's.
func property(conn *dbus.Conn, name string, into any) error {
	ctx, cancel := context.WithTimeout(context.Background(), busTimeout)
	defer cancel()
	c := conn.Object(resolvedName, resolvedPath).CallWithContext(ctx, "org.freedesktop.DBus.Properties.Get", 0, resolvedManager, name)
	if c.Err != nil {
		return c.Err
	}
	var v dbus.Variant
	if err := c.Store(&v); err != nil {
		return err
	}
	return v.Store(into)
}

// pingResolved tells why resolved cannot be used. It may start it, where the
// bus activates services.
func (e Env) pingResolved() error {
	conn, err := dialBus(e.BusAddress)
	if err != nil {
		return fmt.Errorf("systemd-resolved cannot be asked: %w", err)
	}
	defer conn.Close()
	var stub string
	if err := property(conn, "DNSStubListener", &stub); err != nil {
		return fmt.Errorf("systemd-resolved does not answer: %w", err)
	}
	return nil
}

type linkServer struct {
	ifindex int
	addr    netip.AddrPort
}

// resolvedServers returns the servers that resolved knows, none without resolved.
func (e Env) resolvedServers() []linkServer {
	conn, err := dialBus(e.BusAddress)
	if err != nil {
		return nil
	}
	defer conn.Close()
	var running bool
	ctx, cancel := context.WithTimeout(context.Background(), busTimeout)
	defer cancel()
	err = conn.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.NameHasOwner", 0, resolvedName).Store(&running)
	if err != nil || !running {
		return nil // reading facts starts nothing
	}
	var raw []struct {
		Ifindex int32
		Family  int32
		Address []byte
		Port    uint16
		Name    string
	}
	if property(conn, "DNSEx", &raw) != nil {
		return nil
	}
	var res []linkServer
	for _, r := range raw {
		if a, ok := netip.AddrFromSlice(r.Address); ok {
			port := r.Port
			if port == 0 {
				port = 53
			}
			res = append(res, linkServer{int(r.Ifindex), netip.AddrPortFrom(a, port)})
		}
	}
	return res
}

// resolved sets per-link DNS in systemd-resolved, which forgets it by itself
// when the device goes: nothing is left after a crash.
type resolved struct {
	bus string
	log *slog.Logger

	// mu is held over the bus calls, whose timeouts bound it: settings must
	// reach resolved in the order in which they were wanted.
	mu      sync.Mutex
	conn    *dbus.Conn // nil until needed and while lost
	wanted  []SessionDNS
	applied map[int]SessionDNS // by ifindex
	stop    context.CancelFunc // of run, which starts with the first session
	done    chan struct{}
	closed  bool
}

func (r *resolved) set(ctx context.Context, sessions []SessionDNS) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errors.New("already closed")
	}
	r.wanted = slices.Clone(sessions)
	if len(sessions) == 0 && len(r.applied) == 0 {
		return nil
	}
	if r.stop == nil {
		var runCtx context.Context
		runCtx, r.stop = context.WithCancel(context.Background())
		r.done = make(chan struct{})
		go r.run(runCtx)
	}
	return r.applyLocked(ctx)
}

// applyLocked makes resolved match wanted, with what applied says it has.
func (r *resolved) applyLocked(ctx context.Context) error {
	if r.conn == nil || !r.conn.Connected() {
		conn, err := dialBus(r.bus)
		if err != nil {
			return err
		}
		r.conn = conn
	}
	var errs []error
	keep := map[int]bool{}
	changed := false
	for _, s := range r.wanted {
		keep[s.Ifindex] = true
		if have, ok := r.applied[s.Ifindex]; ok && reflect.DeepEqual(have, s) {
			continue
		}
		changed = true
		if err := setLink(ctx, r.conn, s); err != nil {
			errs = append(errs, fmt.Errorf("device %s: %w", s.Device, err))
			delete(r.applied, s.Ifindex)
			continue
		}
		r.applied[s.Ifindex] = s
	}
	for index, s := range r.applied {
		if keep[index] {
			continue
		}
		changed = true
		err := call(ctx, r.conn, "RevertLink", int32(index))
		if err != nil && !noSuchLink(err) {
			errs = append(errs, fmt.Errorf("device %s: %w", s.Device, err))
			continue
		}
		delete(r.applied, index)
	}
	if changed {
		// Best effort: answers from before the change would live on for their TTL.
		_ = call(ctx, r.conn, "FlushCaches")
	}
	return errors.Join(errs...)
}

func noSuchLink(err error) bool {
	var e dbus.Error
	return errors.As(err, &e) && (e.Name == resolvedName+".NoSuchLink" || e.Name == "org.freedesktop.DBus.Error.ServiceUnknown")
}

type linkDomain struct {
	Name        string
	RoutingOnly bool
}

// setLink gives one link its server and domains. The types are those of
// org.freedesktop.resolve1(5).
func setLink(ctx context.Context, conn *dbus.Conn, s SessionDNS) error {
	index := int32(s.Ifindex)
	family := int32(unix.AF_INET)
	if s.Server.Addr().Is6() {
		family = unix.AF_INET6
	}
	var err error
	if s.Server.Port() == 53 {
		type server struct {
			Family  int32
			Address []byte
		}
		err = call(ctx, conn, "SetLinkDNS", index, []server{{family, s.Server.Addr().AsSlice()}})
	} else {
		type server struct {
			Family  int32
			Address []byte
			Port    uint16
			Name    string
		}
		err = call(ctx, conn, "SetLinkDNSEx", index, []server{{family, s.Server.Addr().AsSlice(), s.Server.Port(), ""}})
	}
	if err != nil {
		return err
	}
	var domains []linkDomain
	seen := map[string]bool{}
	add := func(names []string, routing bool) {
		for _, n := range names {
			if n = strings.ToLower(strings.Trim(n, ".")); n != "" && !seen[n] {
				seen[n] = true
				domains = append(domains, linkDomain{n, routing})
			}
		}
	}
	add(s.Search, false) // a search domain routes too
	add(s.Domains, true)
	if err := call(ctx, conn, "SetLinkDomains", index, domains); err != nil {
		return err
	}
	// Without this the link would be asked for every other name as well.
	if err := call(ctx, conn, "SetLinkDefaultRoute", index, false); err != nil {
		return err
	}
	// Best effort: older versions or builds lack some. The forwarder speaks plain
	// DNS and cluster zones are not signed.
	for _, method := range []string{"SetLinkLLMNR", "SetLinkMulticastDNS", "SetLinkDNSSEC", "SetLinkDNSOverTLS"} {
		_ = call(ctx, conn, method, index, "no")
	}
	return nil
}

// run applies the settings again when resolved or the bus was restarted.
func (r *resolved) run(ctx context.Context) {
	defer close(r.done)
	for ctx.Err() == nil {
		if err := r.follow(ctx); err != nil && ctx.Err() == nil {
			r.log.Warn("systemd-resolved cannot be followed", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(busRetry):
		}
	}
}

// follow watches resolved's name on one connection of its own until that is lost.
func (r *resolved) follow(ctx context.Context) error {
	conn, err := dialBus(r.bus)
	if err != nil {
		return err
	}
	defer conn.Close()
	signals := make(chan *dbus.Signal, 16) // one per restart of resolved; godbus drops what is too much
	conn.Signal(signals)
	matchCtx, cancel := context.WithTimeout(ctx, busTimeout)
	err = conn.AddMatchSignalContext(matchCtx,
		dbus.WithMatchSender("org.freedesktop.DBus"), dbus.WithMatchInterface("org.freedesktop.DBus"),
		dbus.WithMatchMember("NameOwnerChanged"), dbus.WithMatchArg(0, resolvedName))
	cancel()
	if err != nil {
		return fmt.Errorf("watching systemd-resolved: %w", err)
	}
	// What happened while nobody watched is unknown, so this sets all again.
	r.again(ctx)
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-conn.Context().Done():
			return errors.New("D-Bus connection lost")
		case sig, ok := <-signals:
			if !ok {
				return errors.New("D-Bus connection lost")
			}
			var name, old, owner string
			if dbus.Store(sig.Body, &name, &old, &owner) == nil && name == resolvedName && owner != "" {
				r.log.Info("systemd-resolved was restarted, setting DNS again")
				r.again(ctx)
			}
		}
	}
}

// again sets everything, whatever was set before.
func (r *resolved) again(ctx context.Context) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || len(r.wanted) == 0 {
		return
	}
	clear(r.applied)
	if err := r.applyLocked(ctx); err != nil {
		r.log.Warn("DNS not set again in systemd-resolved", "err", err)
	}
}

func (r *resolved) close(ctx context.Context) error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return nil
	}
	r.closed = true
	r.wanted = nil
	var err error
	if len(r.applied) > 0 {
		err = r.applyLocked(ctx)
	}
	if r.conn != nil {
		r.conn.Close()
	}
	stop, done := r.stop, r.done
	r.mu.Unlock()
	if stop != nil {
		stop()
		<-done
	}
	return err
}
