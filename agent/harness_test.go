package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/tun"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/netstack"
)

// The tests run in a network namespace of their own, where the "cluster" is a
// veth pair: target and target6 are addresses of the namespace itself, and
// silent is a neighbour that never answers.
var (
	target  = netip.MustParseAddr("10.77.0.1")
	target6 = netip.MustParseAddr("fd77::1")
	silent  = netip.MustParseAddr("10.77.0.200")
	nowhere = netip.MustParseAddr("10.88.0.1") // an unreachable route
	closed  = netip.MustParseAddr("10.89.0.1") // a prohibited one

	tunnel4  = netip.MustParseAddr("198.18.7.1")
	tunnel6  = netip.MustParseAddr("fdc0::1")
	agent4   = netip.MustParseAddr("198.18.7.2")
	agent6   = netip.MustParseAddr("fdc0::2")
	inbound4 = netip.MustParseAddr("198.18.7.3")
	inbound6 = netip.MustParseAddr("fdc0::3")
)

const inNamespace = "CULVERT_TEST_NAMESPACE"

func TestMain(m *testing.M) {
	// A fuzz test's workers talk over descriptors of this very process.
	fuzzing := slices.ContainsFunc(os.Args, func(arg string) bool { return strings.HasPrefix(arg, "-test.fuzz") })
	if os.Getenv(inNamespace) != "" || os.Geteuid() != 0 || fuzzing {
		if os.Getenv(inNamespace) != "" {
			if err := prepareNamespace(); err != nil {
				fmt.Fprintln(os.Stderr, "preparing the namespace:", err)
				os.Exit(1)
			}
		}
		os.Exit(m.Run())
	}
	// A network namespace belongs to a thread: only a new process has all its
	// threads in it.
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), inNamespace+"=1")
	c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	err := c.Run()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func prepareNamespace() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	pair := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "pod0"}, PeerName: "pod1"}
	if err := netlink.LinkAdd(pair); err != nil {
		return err
	}
	peer, err := netlink.LinkByName("pod1")
	if err != nil {
		return err
	}
	pod, err := netlink.LinkByName("pod0")
	if err != nil {
		return err
	}
	for _, l := range []netlink.Link{lo, peer, pod} {
		if err := netlink.LinkSetUp(l); err != nil {
			return err
		}
	}
	for _, s := range []string{"10.77.0.1/24", "fd77::1/64"} {
		addr, err := netlink.ParseAddr(s)
		if err != nil {
			return err
		}
		if addr.IP.To4() == nil {
			addr.Flags = syscall.IFA_F_NODAD
		}
		if err := netlink.AddrAdd(pod, addr); err != nil {
			return err
		}
	}
	if err := netlink.NeighAdd(&netlink.Neigh{LinkIndex: pod.Attrs().Index, IP: silent.AsSlice(),
		HardwareAddr: net.HardwareAddr{2, 0, 0, 0, 0, 99}, State: netlink.NUD_PERMANENT}); err != nil {
		return err
	}
	for dst, kind := range map[string]int{"10.88.0.0/16": syscall.RTN_UNREACHABLE, "10.89.0.0/16": syscall.RTN_PROHIBIT} {
		_, n, _ := net.ParseCIDR(dst)
		if err := netlink.RouteAdd(&netlink.Route{Dst: n, Type: kind}); err != nil {
			return err
		}
	}
	return os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0o644)
}

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for a network namespace")
	}
}

// startAgent runs an agent whose times are those of edit, and ends it with t.
func startAgent(t testing.TB, c Config, edit func(*timing)) *Agent {
	t.Helper()
	needRoot(t)
	c.ControlAddr, c.MetricsAddr = freeAddr(), freeAddr()
	if c.MemoryLimit == 0 {
		c.MemoryLimit = 8 << 30 // the client and the targets live in this process too
	}
	if c.Log == nil {
		c.Log = slog.New(slog.NewTextHandler(testWriter{t}, nil))
	}
	a := New(c)
	if edit != nil {
		edit(&a.times)
	}
	ran := make(chan error, 1)
	go func() { ran <- a.Run(context.Background()) }()
	eventually(t, "the agent is ready", func() bool { return CheckHealth(context.Background(), a.cfg.MetricsAddr, true) == nil })
	t.Cleanup(func() {
		a.Close()
		if err := <-ran; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return a
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	if testing.Verbose() && os.Getenv("CULVERT_TEST_LOG") != "" {
		fmt.Fprint(os.Stderr, string(b))
	}
	return len(b), nil
}

// lastPort counts the agents' own ports, from below those that the kernel gives
// to listeners at port 0: the agent refuses connections to its own port on all
// addresses of the namespace, and a target could otherwise have it.
var lastPort atomic.Uint32

func freeAddr() string { return fmt.Sprintf("127.0.0.1:%d", 20000+lastPort.Add(1)) }

// client is a machine behind a session: a stack where an application would have
// its kernel.
type client struct {
	t        testing.TB
	hello    carrier.Hello
	key      wire.Key
	endpoint *netstack.Endpoint
	stack    *stack.Stack
	device   tun.Device // the endpoint, or what stands before it
	bind     *carrier.Bind
	tunnel   *wire.Tunnel
	welcome  carrier.Welcome
}

func newHello(gso bool) (carrier.Hello, wire.Key) {
	key := wire.NewPrivateKey()
	h := carrier.Hello{
		Protocol: carrier.Protocol, Version: "test", Session: "s1", Secret: strings.Repeat("s", 44),
		PublicKey: key.Public().String(),
		Tunnel:    []netip.Addr{tunnel4, tunnel6}, Agent: []netip.Addr{agent4, agent6}, Inbound: []netip.Addr{inbound4, inbound6},
		MTU: 1420,
	}
	if gso {
		h.Features = []string{carrier.FeatureGSO}
	}
	return h, key
}

func connect(t testing.TB, a *Agent, gso bool) *client {
	t.Helper()
	return connectBy(t, a, gso, func(e *netstack.Endpoint) tun.Device { return e })
}

func connectBy(t testing.TB, a *Agent, gso bool, by func(*netstack.Endpoint) tun.Device) *client {
	t.Helper()
	c := &client{t: t}
	c.hello, c.key = newHello(gso)
	c.endpoint = netstack.New(netstack.Config{MTU: 1420, GSO: gso})
	c.device = by(c.endpoint)
	s, err := netstack.NewStack(c.endpoint)
	if err != nil {
		t.Fatal(err)
	}
	c.stack = s
	for _, addr := range slices.Concat(c.hello.Tunnel, c.hello.Inbound) {
		if err := s.AddProtocolAddress(netstack.NIC, tcpip.ProtocolAddress{Protocol: protocolOf(addr),
			AddressWithPrefix: tcpip.AddrFromSlice(addr.AsSlice()).WithPrefix()}, stack.AddressProperties{}); err != nil {
			t.Fatal(err)
		}
	}
	c.bind = carrier.NewBind(carrier.BindConfig{})
	c.introduce(a)
	t.Cleanup(func() {
		c.endpoint.Close()
		c.tunnel.Close()
		s.Destroy()
	})
	return c
}

// introduce dials the agent and attaches the stream, with c.hello and c.key.
func (c *client) introduce(a *Agent) {
	c.t.Helper()
	conn, err := net.Dial("tcp", a.cfg.ControlAddr)
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, w, err := carrier.Dial(ctx, conn, c.hello)
	if err != nil {
		c.t.Fatalf("introducing the session: %v", err)
	}
	c.welcome = w
	if c.tunnel == nil {
		if c.tunnel, err = wire.New(wire.Config{Device: c.device, PrivateKey: c.key, Bind: c.bind}); err != nil {
			c.t.Fatal(err)
		}
	}
	c.bind.Attach(s)
	peer, err := wire.ParseKey(w.PublicKey)
	if err != nil {
		c.t.Fatal(err)
	}
	everything := []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0")}
	if err := c.tunnel.SetPeer(peer, everything); err != nil {
		c.t.Fatal(err)
	}
}

func full(addr netip.Addr, port uint16) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: netstack.NIC, Addr: tcpip.AddrFromSlice(addr.AsSlice()), Port: port}
}

func (c *client) own(to netip.Addr) netip.Addr {
	if to.Is4() {
		return c.hello.Tunnel[0]
	}
	return c.hello.Tunnel[1]
}

func (c *client) dialTCP(to netip.AddrPort, timeout time.Duration) (*gonet.TCPConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return gonet.DialTCPWithBind(ctx, c.stack, full(c.own(to.Addr()), 0), full(to.Addr(), to.Port()), protocolOf(to.Addr()))
}

func (c *client) mustTCP(to netip.AddrPort) *gonet.TCPConn {
	c.t.Helper()
	conn, err := c.dialTCP(to, 10*time.Second)
	if err != nil {
		c.t.Fatalf("dialling %s: %v", to, err)
	}
	_ = conn.SetDeadline(time.Now().Add(2 * time.Minute)) // 20 MB in small packets, with the race detector, on a busy machine
	c.t.Cleanup(func() { conn.Close() })
	return conn
}

func (c *client) dialUDP(to netip.AddrPort) *gonet.UDPConn {
	c.t.Helper()
	local, remote := full(c.own(to.Addr()), 0), full(to.Addr(), to.Port())
	conn, err := gonet.DialUDP(c.stack, &local, &remote, protocolOf(to.Addr()))
	if err != nil {
		c.t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	c.t.Cleanup(func() { conn.Close() })
	return conn
}

// serve runs handle for each connection to a listener at addr.
func serve(t testing.TB, addr netip.Addr, handle func(*net.TCPConn)) netip.AddrPort {
	t.Helper()
	l, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			go handle(c)
		}
	}()
	return l.Addr().(*net.TCPAddr).AddrPort()
}

func echoTCP(c *net.TCPConn) {
	defer c.Close()
	// Plain, since the splice of two sockets keeps pipes for later.
	_, _ = io.Copy(struct{ io.Writer }{c}, struct{ io.Reader }{c})
}

// serveUDP answers each datagram at addr with what reply makes of it.
func serveUDP(t testing.TB, addr netip.AddrPort, reply func([]byte) []byte) netip.AddrPort {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	go func() {
		b := make([]byte, 65535)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			if answer := reply(b[:n]); answer != nil {
				_, _ = c.WriteToUDPAddrPort(answer, from)
			}
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not so after 10 s: %s", what)
}

// device is what one process of the session has of the client's stack: closing
// it leaves the stack's endpoint, as closing a TUN descriptor leaves the kernel.
type device struct {
	tun.Device
	packets <-chan []byte
	events  chan tun.Event
	done    chan struct{}
	once    sync.Once
}

func newDevice(e *netstack.Endpoint, packets <-chan []byte) *device {
	d := &device{Device: e, packets: packets, events: make(chan tun.Event, 1), done: make(chan struct{})}
	d.events <- tun.EventUp
	return d
}

func (d *device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	select {
	case p, ok := <-d.packets:
		if ok {
			sizes[0] = copy(bufs[0][offset:], p)
			return 1, nil
		}
	case <-d.done:
	}
	return 0, os.ErrClosed
}

func (d *device) Events() <-chan tun.Event { return d.events }

func (d *device) Close() error {
	d.once.Do(func() {
		close(d.done)
		close(d.events)
	})
	return nil
}

// pump reads e until it closes.
func pump(e *netstack.Endpoint) <-chan []byte {
	packets := make(chan []byte)
	go func() {
		defer close(packets)
		bufs, sizes := [][]byte{make([]byte, 65535)}, make([]int, 1)
		for {
			n, err := e.Read(bufs, sizes, 0)
			if err != nil {
				return
			}
			if n == 1 {
				packets <- append([]byte(nil), bufs[0][:sizes[0]]...)
			}
		}
	}()
	return packets
}

// listen accepts connections at addr of the client's stack, and says nothing.
func listen(t testing.TB, c *client, addr netip.Addr, port uint16) {
	t.Helper()
	l, err := gonet.ListenTCP(c.stack, full(addr, port), protocolOf(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
}
