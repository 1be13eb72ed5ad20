package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// maxForwarded bounds the connections that are open at once; more wait in the
// kernel's queue.
const maxForwarded = 1024

func (a *app) forwardCommand() *cobra.Command {
	var addresses []string
	cmd := &cobra.Command{
		Use:   "forward SERVICE|IP|KIND/NAME[:PORT] [[LOCAL:]REMOTE]...",
		Short: "Make a Service or pod available at a port of this machine",
		Long: `Forward listens at local ports and leads each connection to a Service, a pod or
an IP of the cluster: through the session, where one is connected, else by a
port-forward to the Service's ready pods in turn. It runs until it is interrupted.

REMOTE is a port's number or name. Where the target has one port, or PORT names
it, a number alone is the local port.`,
		Example: examples(a.name, `
culvert forward tomcat 6060
culvert forward tomcat 6060:8080
culvert forward web.shop 8080:http 9090:metrics
culvert forward web:http 8080
culvert forward pod/db-0 5432
culvert forward 10.96.12.7:80 8080`),
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
			defer stop()
			ips, err := listenAddresses(addresses)
			if err != nil {
				return err
			}
			return a.forward(ctx, args[0], args[1:], ips)
		},
	}
	cmd.Flags().StringSliceVar(&addresses, "address", nil, "IPs of this machine to listen at (default 127.0.0.1 and ::1)")
	complete(cmd, "address", fixedCompletion("127.0.0.1", "0.0.0.0"))
	return cmd
}

// listenAddresses reads --address; none is loopback in both families.
func listenAddresses(given []string) (ips []netip.Addr, err error) {
	for _, text := range given {
		if text == "localhost" {
			return nil, nil
		}
		ip, err := netip.ParseAddr(strings.Trim(text, "[]"))
		if err != nil {
			return nil, usageErrorf("as in --address 0.0.0.0", "--address %q is no IP address", text)
		}
		ips = append(ips, ip)
	}
	return ips, nil
}

// mapping is one local port and the port of the target that it leads to.
type mapping struct {
	local  uint16 // 0: a free one
	remote cluster.BackendPort
}

// splitPort takes NAME:PORT and IP:PORT apart. An IPv6 address with a port needs
// brackets.
func splitPort(target string) (name, port string) {
	if _, err := netip.ParseAddr(strings.Trim(target, "[]")); err == nil {
		return target, ""
	}
	if i := strings.LastIndexByte(target, ':'); i > 0 {
		return strings.Trim(target[:i], "[]"), target[i+1:]
	}
	return target, ""
}

// mappings reads the arguments after the target; port is what stood behind its
// colon.
func mappings(b *cluster.Backend, port string, args []string) (all []mapping, err error) {
	if port != "" {
		remote, err := b.Port(port)
		switch {
		case err != nil:
			return nil, err
		case len(args) > 1:
			return nil, usageErrorf("leave :"+port+" out and name pairs LOCAL:REMOTE", "%s:%s is one port, and %d were given for it", b.Name, port, len(args))
		case len(args) == 0:
			return []mapping{{remote.Number, remote}}, nil
		}
		local, err := localPort(args[0])
		return []mapping{{local, remote}}, err
	}
	one := len(b.Ports) == 1
	if len(args) == 0 {
		if !one {
			return nil, usageErrorf("it has "+b.PortList(), "which port of %s is meant? Name it: LOCAL:REMOTE", b.Name)
		}
		return []mapping{{b.Ports[0].Number, b.Ports[0]}}, nil
	}
	for _, arg := range args {
		m, err := oneMapping(b, arg, one && len(args) == 1)
		if err != nil {
			return nil, err
		}
		if m.local != 0 && slices.ContainsFunc(all, func(o mapping) bool { return o.local == m.local }) {
			return nil, usageErrorf("", "local port %d is named twice", m.local)
		}
		all = append(all, m)
	}
	return all, nil
}

// oneMapping reads [LOCAL:]REMOTE, or LOCAL where there is no choice.
func oneMapping(b *cluster.Backend, arg string, noChoice bool) (m mapping, err error) {
	if local, remote, ok := strings.Cut(arg, ":"); ok {
		if local != "" {
			if m.local, err = localPort(local); err != nil {
				return m, err
			}
		}
		m.remote, err = b.Port(remote)
		return m, err
	}
	if noChoice && isNumber(arg) {
		m.local, err = localPort(arg)
		m.remote = b.Ports[0]
		return m, err
	}
	if m.remote, err = b.Port(arg); err != nil {
		if isNumber(arg) && !b.Undeclared {
			return m, usageErrorf("it has "+b.PortList(), "%s has no port %s; to listen at %s, name what it leads to: %s:REMOTE", b.Name, arg, arg, arg)
		}
		return m, err
	}
	m.local = m.remote.Number
	return m, nil
}

func isNumber(s string) bool {
	_, err := strconv.Atoi(s)
	return err == nil
}

func localPort(s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, usageErrorf("ports are numbers from 1 to 65535; 0 takes a free one", "local port %q is none", s)
	}
	return uint16(n), nil
}

func (a *app) forward(ctx context.Context, target string, args []string, ips []netip.Addr) error {
	c, err := a.openCluster(ctx)
	if err != nil {
		return err
	}
	name, port := splitPort(target)
	sessions := &sessionRoutes{client: api.New(a.socket), context: c.Context(), server: c.Server(), uid: os.Getuid()}
	b, err := a.backendOf(ctx, c, name, sessions)
	if err != nil {
		return err
	}
	all, err := mappings(b, port, args)
	if err != nil {
		return err
	}
	f := &forwarder{backend: b, sessions: sessions, report: a.reporter(), slots: make(chan struct{}, maxForwarded)}
	defer f.Close()
	for _, m := range all {
		at, err := f.listen(m, ips)
		if err != nil {
			return err
		}
		a.printForward(b, m, at, f.way(ctx))
	}
	if slices.ContainsFunc(ips, func(ip netip.Addr) bool { return !ip.IsLoopback() }) {
		a.notice("others who reach this machine reach the target too: --address is not loopback")
	}
	f.Run(ctx)
	return nil
}

// backendOf finds the target. An IP that the session leads to need not be known
// to the user otherwise.
func (a *app) backendOf(ctx context.Context, c *cluster.Cluster, name string, sessions *sessionRoutes) (*cluster.Backend, error) {
	ip, ipErr := netip.ParseAddr(name)
	b, err := c.Backend(ctx, name, a.namespace)
	if err != nil && ipErr == nil && sessions.lead(ctx, ip) {
		return &cluster.Backend{Name: name, IPs: []netip.Addr{ip.Unmap()}, Undeclared: true}, nil
	}
	return b, err
}

func (a *app) printForward(b *cluster.Backend, m mapping, at []string, way string) {
	if a.json() {
		a.printJSONLine(a.out, map[string]any{"listening": at, "target": b.Name, "port": m.remote.Number, "way": way})
		return
	}
	fmt.Fprintf(a.out, "%s leads to %s, port %s, %s. Ctrl-C ends it.\n", strings.Join(at, " and "), printable(b.Name), printable(m.remote.String()), way)
}

// reporter tells about connections that failed: the same text once in 5 s.
func (a *app) reporter() func(error) {
	var mu sync.Mutex
	last, when := "", time.Time{}
	return func(err error) {
		mu.Lock()
		defer mu.Unlock()
		if text := err.Error(); text != last || time.Since(when) > 5*time.Second {
			last, when = text, time.Now()
			a.notice("a connection failed: " + printable(text))
		}
	}
}

// forwarder accepts connections at local ports and relays each of them.
type forwarder struct {
	backend  *cluster.Backend
	sessions *sessionRoutes
	report   func(error)
	slots    chan struct{} // one per open connection
	turn     atomic.Uint64 // round robin
	open     []listening   // not changed while Run runs
	closing  sync.Once
}

type listening struct {
	net.Listener
	mapping mapping
}

// listen opens the mapping's port at each address, and returns them. Without
// addresses it is loopback; a machine without IPv6 does without ::1.
func (f *forwarder) listen(m mapping, ips []netip.Addr) (at []string, err error) {
	loopback := len(ips) == 0
	if loopback {
		ips = []netip.Addr{netip.AddrFrom4([4]byte{127, 0, 0, 1}), netip.IPv6Loopback()}
	}
	port := m.local
	for _, ip := range ips {
		address := netip.AddrPortFrom(ip, port).String()
		l, err := net.Listen("tcp", address)
		switch {
		case err == nil:
		case loopback && ip.Is6() && (m.local == 0 || !errors.Is(err, syscall.EADDRINUSE)):
			continue
		case errors.Is(err, syscall.EADDRINUSE):
			return nil, &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("local port %s is in use by another program", address), Hint: fmt.Sprintf("name another one: LOCAL:%d; `ss -ltnp` shows whose it is", m.remote.Number)}
		case errors.Is(err, syscall.EACCES):
			return nil, usageErrorf(fmt.Sprintf("name a port of 1024 or more: LOCAL:%d", m.remote.Number), "this user may not listen at %s", address)
		default:
			return nil, usageErrorf("--address names an IP of this machine", "listening at %s: %v", address, innermost(err))
		}
		f.open = append(f.open, listening{l, m})
		port = l.Addr().(*net.TCPAddr).AddrPort().Port()
		at = append(at, l.Addr().String())
	}
	return at, nil
}

// Close ends the listeners.
func (f *forwarder) Close() {
	f.closing.Do(func() {
		for _, l := range f.open {
			l.Close()
		}
	})
}

// Run serves until ctx ends, then resets what is open, and returns when all of it
// has ended.
func (f *forwarder) Run(ctx context.Context) {
	stop := context.AfterFunc(ctx, f.Close)
	defer stop()
	var running sync.WaitGroup
	defer running.Wait()
	for _, l := range f.open {
		running.Go(func() {
			for {
				select {
				case f.slots <- struct{}{}:
				case <-ctx.Done():
					return
				}
				conn, err := l.Accept()
				if err != nil {
					<-f.slots
					if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
						return
					}
					f.report(err)
					time.Sleep(100 * time.Millisecond) // out of descriptors, most likely
					continue
				}
				running.Go(func() {
					defer func() { <-f.slots }()
					if err := relay(ctx, conn.(*net.TCPConn), f.ways(ctx, l.mapping.remote)); err != nil && ctx.Err() == nil {
						f.report(err)
					}
				})
			}
		})
	}
}

// way says for people how connections go now.
func (f *forwarder) way(ctx context.Context) string {
	if len(f.backend.IPs) > 0 && f.sessions.lead(ctx, f.backend.IPs[0]) {
		return "through the session"
	}
	return "by port-forward, or through a session once one is connected"
}

// directTimeout bounds the dial through a session. The agent dials before it
// answers, so this is the time of both.
const directTimeout = 5 * time.Second

// ways yields, for one connection, what may be dialled, best first.
func (f *forwarder) ways(ctx context.Context, port cluster.BackendPort) ways {
	return func(yield func(dialFunc, error) bool) {
		for _, ip := range f.backend.IPs {
			if f.sessions.lead(ctx, ip) && !yield(direct(netip.AddrPortFrom(ip, port.Number)), nil) {
				return
			}
		}
		if f.backend.Undeclared && len(f.backend.IPs) > 0 {
			yield(nil, fmt.Errorf("%s is reached through a session only, and none is connected", f.backend.Name))
			return
		}
		all, err := f.backend.Endpoints(ctx, port)
		if err != nil {
			yield(nil, err)
			return
		}
		first := int(f.turn.Add(1) % uint64(len(all)))
		for i := range all {
			e := all[(first+i)%len(all)]
			if len(f.backend.IPs) == 0 && e.Addr.IsValid() && f.sessions.lead(ctx, e.Addr.Addr()) && !yield(direct(e.Addr), nil) {
				return
			}
			if !yield(func(ctx context.Context) (net.Conn, error) {
				conn, err := f.backend.Dial(ctx, e)
				if err != nil {
					f.backend.Forget()
				}
				return conn, err
			}, nil) {
				return
			}
		}
	}
}

func direct(address netip.AddrPort) dialFunc {
	return func(ctx context.Context) (net.Conn, error) {
		d := net.Dialer{Timeout: directTimeout}
		return d.DialContext(ctx, "tcp", address.String())
	}
}

// sessionRoutes knows to which addresses the caller's session of a context
// leads. The daemon is asked once a second at most.
type sessionRoutes struct {
	client          *api.Client
	context, server string
	uid             int

	// mu guards what was learnt when it was asked last.
	mu      sync.Mutex
	asked   time.Time
	in, out []api.Route
	away    time.Time // a daemon that does not answer is left alone until then
}

// daemonTimeout bounds the question whether there is a session, which a connection
// waits for; daemonPause is until the next one to a daemon that did not answer.
const (
	daemonTimeout = 300 * time.Millisecond
	daemonPause   = 10 * time.Second
)

func (s *sessionRoutes) lead(ctx context.Context, ip netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.asked) > time.Second && time.Now().After(s.away) {
		s.in, s.out = nil, nil
		// The client would wait for a daemon that may be starting.
		ctx, cancel := context.WithTimeout(ctx, daemonTimeout)
		sessions, err := s.client.Sessions(ctx)
		cancel()
		if err != nil {
			s.away = time.Now().Add(daemonPause)
		}
		for _, session := range sessions {
			if session.State == api.Connected && session.Context == s.context && session.Server == s.server && session.UID == s.uid {
				s.in, s.out = session.Routes, session.Excluded
			}
		}
		s.asked = time.Now()
	}
	has := func(routes []api.Route) bool {
		return slices.ContainsFunc(routes, func(r api.Route) bool { return r.Prefix.Contains(ip) })
	}
	return has(s.in) && !has(s.out)
}
