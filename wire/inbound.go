package wire

import (
	"context"
	"errors"
	"io"
	"maps"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/wire/netstack"
)

const (
	// dialLocal bounds the dial to a local address, which answers at once or is a
	// machine on the user's network.
	dialLocal = 10 * time.Second
	// maxOpening bounds connections whose local address has not answered yet.
	maxOpening = 1024
	// pumpBatch packets of 64 KiB are carried from the netstack at once.
	pumpBatch = 8
	// relayBuffer is half a super-packet each way: 64 KiB per connection.
	relayBuffer = 32 << 10
)

// inbound ends connections from the cluster in a netstack of the session's own
// and relays them to local addresses, dialled as the user that runs the process.
type inbound struct {
	l      *Local
	ep     *netstack.Endpoint
	stack  *stack.Stack
	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	once   sync.Once

	mu      sync.Mutex
	targets map[uint16]netip.AddrPort
}

// SetTargets says which TCP ports at the Inbound addresses lead to which local
// addresses; connections to other ports are refused. Open connections stay.
func (l *Local) SetTargets(targets map[uint16]netip.AddrPort) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return os.ErrClosed
	}
	in := l.inbound.Load()
	if in == nil {
		if len(targets) == 0 {
			return nil // no netstack until one is needed
		}
		ep := netstack.New(netstack.Config{MTU: l.mtu, GSO: true, Split: l.limit})
		s, err := netstack.NewStack(ep)
		if err != nil {
			return err
		}
		in = &inbound{l: l, ep: ep, stack: s}
		in.ctx, in.cancel = context.WithCancel(context.Background())
		s.SetTransportProtocolHandler(tcp.ProtocolNumber, tcp.NewForwarder(s, 0, maxOpening, in.accept).HandlePacket)
		in.wg.Add(1)
		go in.pump()
		l.inbound.Store(in)
	}
	in.mu.Lock()
	in.targets = maps.Clone(targets)
	in.mu.Unlock()
	return nil
}

// pump carries the netstack's packets to the side queue.
func (in *inbound) pump() {
	defer in.wg.Done()
	bufs, sizes := make([][]byte, pumpBatch), make([]int, pumpBatch)
	for i := range bufs {
		bufs[i] = make([]byte, 64<<10)
	}
	for {
		n, err := in.ep.Read(bufs, sizes, 0)
		if err != nil {
			return
		}
		for i := range n {
			if !in.l.side.push(bufs[i][:sizes[i]]) {
				return
			}
		}
	}
}

// accept dials first and answers afterwards, so a refused local port is a RST in
// the cluster. The forwarder calls it in a goroutine of its own.
func (in *inbound) accept(r *tcp.ForwarderRequest) {
	in.mu.Lock()
	target, ok := in.targets[r.ID().LocalPort]
	closing := in.ctx.Err() != nil
	if ok && !closing {
		in.wg.Add(1)
		defer in.wg.Done()
	}
	in.mu.Unlock()
	if !ok || closing {
		r.Complete(true)
		return
	}
	d := net.Dialer{Timeout: dialLocal}
	c, err := d.DialContext(in.ctx, "tcp", target.String())
	if err != nil {
		in.l.log.Debug("local target refused", "target", target, "err", err)
		r.Complete(true)
		return
	}
	defer c.Close()
	var wq waiter.Queue
	ep, terr := r.CreateEndpoint(&wq)
	if terr != nil {
		r.Complete(true)
		return
	}
	r.Complete(false)
	netstack.KeepAlive(ep)
	remote := gonet.NewTCPConn(&wq, ep)
	stop := context.AfterFunc(in.ctx, func() { ep.Abort(); c.Close() })
	defer stop()
	local := c.(*net.TCPConn)
	done := make(chan error, 1)
	go func() { done <- relay(local, remote) }()
	err = relay(remote, local)
	if err != nil { // not an end of file: the other direction ends too
		ep.Abort()
		_ = local.SetLinger(0)
		local.Close()
	}
	if err2 := <-done; err == nil && err2 != nil {
		ep.Abort()
		_ = local.SetLinger(0)
	}
	remote.Close()
}

type halfCloser interface {
	io.ReadWriter
	CloseWrite() error
}

// relay copies until the end of src, which it passes on. An error of either
// side ends both, so that the peer of the other one sees it too.
func relay(dst, src halfCloser) error {
	_, err := io.CopyBuffer(struct{ io.Writer }{dst}, struct{ io.Reader }{src}, make([]byte, relayBuffer))
	if err == nil {
		_ = dst.CloseWrite()
		return nil
	}
	if c, ok := src.(io.Closer); ok && !errors.Is(err, net.ErrClosed) {
		c.Close()
	}
	if c, ok := dst.(io.Closer); ok {
		c.Close()
	}
	return err
}

func (in *inbound) close() {
	in.once.Do(func() {
		in.mu.Lock()
		in.cancel()
		in.mu.Unlock()
		in.ep.Close()
		in.wg.Wait()
		in.stack.Destroy()
	})
}
