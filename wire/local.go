package wire

import (
	"errors"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	wgtun "golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/tun"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/queue"
)

const (
	// localBatch is how many packets one Read brings at most: WireGuard's maximum.
	localBatch = 128
	// readLimit ends a batch, in bytes. A batch is encrypted by one core and
	// written at once; two super-packets keep both cores and the writer busy.
	readLimit = 128 << 10
	// sideLimit is the share of a batch of what the session itself sends.
	sideLimit = 64 << 10
	// maxPacket is the longest packet that WireGuard's 65,535-byte buffer takes
	// with its header, padding, authenticator and the gate's tag.
	maxPacket = 65535 - 16 - 15 - 16 - 16
	// queueBytes bounds the memory of the packets that wait for the tunnel. One TCP
	// connection of Linux has at most 4 MiB in flight (tcp_wmem); two of them fit,
	// and with more the longest loses a packet, which is how it learns to slow down.
	queueBytes = 8 << 20
)

// LocalConfig describes the session's end.
type LocalConfig struct {
	TUN     *tun.Device  // owned by the Local from NewLocal on
	Tunnel  []netip.Addr // the session's addresses, on the TUN device
	Agent   []netip.Addr // the agent's addresses in the tunnel
	Inbound []netip.Addr // where the session's own netstack answers the cluster
	MTU     int
	// Split says how long packets may be, headers included, at the moment; 0: the
	// peer and the path take super-packets (carrier.FeatureGSO). It is asked for
	// each batch.
	Split func() int
	Log   *slog.Logger
}

// Local is the session's end of the tunnel, a tun.Device for WireGuard: the
// kernel's TUN device behind a filter, echo probes, and a netstack for
// connections from the cluster.
type Local struct {
	tun     *tun.Device
	filter  *filter
	own     []netip.Addr
	inAddrs []netip.Addr
	mtu     int
	limit   func() int
	log     *slog.Logger
	events  chan wgtun.Event
	side    *side
	pings   pings
	drops   [reasons]atomic.Uint64

	// Of the one goroutine in Read.
	views     [localBatch][]byte
	sizes     [localBatch]int
	flows     [localBatch]int // in the queue's count, of what was read
	scratch   []byte          // a super-packet that is being split; nil until there is one
	split     tun.Splitter    //
	pending   bool            // split has more
	splitFlow int             // of what is being split
	queue     *queue.Queue[*queue.Buffer]
	buffers   queue.Buffers
	memory    int // of what is in the queue
	again     *time.Timer
	shed      atomic.Uint64

	inbound atomic.Pointer[inbound]

	mu     sync.Mutex
	closed bool
}

var _ carrier.Source = (*Local)(nil)

// NewLocal makes the session's end. It lets the open connections of the machine
// at the Tunnel addresses through at once (see OpenFlows).
func NewLocal(cfg LocalConfig) *Local {
	l := &Local{
		tun: cfg.TUN, filter: newFilter(cfg.Tunnel), own: cfg.Tunnel, inAddrs: cfg.Inbound,
		mtu: cfg.MTU, limit: cfg.Split, log: cfg.Log, events: make(chan wgtun.Event, 1),
		queue: queue.New[*queue.Buffer](),
	}
	l.again = time.AfterFunc(time.Hour, l.Wake)
	l.again.Stop()
	if l.log == nil {
		l.log = slog.New(slog.DiscardHandler)
	}
	l.side = newSide(l.tun.Wake)
	if l.limit == nil {
		l.limit = func() int { return 0 }
	}
	l.Seed(OpenFlows(cfg.Tunnel))
	l.events <- wgtun.EventUp
	return l
}

// Seed opens the filter for flows that exist already.
func (l *Local) Seed(flows []Flow) { l.filter.seed(flows) }

// Drops counts packets from the tunnel that were not written, by reason.
func (l *Local) Drops() map[string]uint64 {
	m := make(map[string]uint64)
	for r := pass + 1; r < reasons; r++ {
		if n := l.drops[r].Load(); n > 0 {
			m[reasonNames[r]] = n
		}
	}
	return m
}

// Read implements tun.Device for WireGuard: packets for the agent.
func (l *Local) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	for {
		if n, err := l.Pull(bufs, sizes, offset, everything{}); n > 0 || err != nil {
			return n, err
		}
	}
}

// everything admits all.
type everything struct{}

func (everything) Admit(queue.Lane, int) bool { return true }
func (everything) Settle() time.Duration      { return 0 }

// Wake implements carrier.Source.
func (l *Local) Wake() { l.tun.Wake() }

// Pull implements carrier.Source. A packet that may go at once goes straight from
// the kernel into WireGuard's buffer; only one that may not is copied to the queue.
func (l *Local) Pull(bufs [][]byte, sizes []int, offset int, adm queue.Admission) (int, error) {
	now := time.Now()
	n := l.pop(bufs, sizes, offset, now, adm)
	if at := l.queue.Held(); n == 0 && !at.IsZero() {
		l.again.Reset(at.Sub(now)) // nothing else may come meanwhile
	}
	if n == len(bufs) || n == localBatch {
		return n, nil
	}
	from := n
	n += l.side.take(bufs[n:], sizes[n:], offset, sideLimit)
	for i := from; i < n; i++ {
		if p, ok := tun.Parse(bufs[i][offset : offset+sizes[i]]); ok {
			l.flows[i] = l.flow(&p, bufs[i][offset:])
		}
	}
	var k int
	var err error
	if limit := l.limit(); limit > 0 || l.pending {
		k, err = l.readSplit(bufs[n:], sizes[n:], l.flows[n:], offset, n == 0, limit)
	} else {
		k, err = l.readWhole(bufs[n:], sizes[n:], l.flows[n:], offset, n == 0)
	}
	n += k
	admitted := from
	now = time.Now()
	for i := from; i < n; i++ {
		if l.pass(l.flows[i], bufs[i][offset:offset+sizes[i]], now, adm) {
			admitted++
		} else {
			sizes[i] = 0
		}
	}
	if admitted > 0 {
		return n, nil
	}
	if err != nil && !errors.Is(err, tun.ErrWoken) {
		l.mu.Lock()
		closed := l.closed
		l.mu.Unlock()
		if closed {
			err = os.ErrClosed
		}
		return 0, err
	}
	return 0, nil
}

// pop takes what may go out of the queue, up to readLimit bytes.
func (l *Local) pop(bufs [][]byte, sizes []int, offset int, now time.Time, adm queue.Admission) int {
	n := 0
	for total := 0; n < len(bufs) && total < readLimit && l.queue.Len() > 0; n++ {
		b, size, ok := l.queue.Pop(now, adm)
		if !ok {
			break
		}
		sizes[n] = copy(bufs[n][offset:], b.Bytes())
		total += size
		l.free(b)
	}
	return n
}

// flow is the queue's number for a packet's flow. Fragments have no ports.
func (l *Local) flow(p *tun.Packet, packet []byte) int {
	var ports []byte
	if !p.Fragment() && (p.Proto == tun.ProtoTCP || p.Proto == tun.ProtoUDP) {
		ports = packet[p.L4:]
	}
	key := queue.MakeKey(p.Src, p.Dst, p.Proto, ports)
	return l.queue.Flow(&key)
}

// pass tells whether a packet that has just come may go at once; else it waits in
// the queue.
func (l *Local) pass(flow int, packet []byte, now time.Time, adm queue.Admission) bool {
	if len(packet) == 0 {
		return false
	}
	if l.queue.Pass(flow, len(packet), now, adm) {
		return true
	}
	b := l.buffers.Copy(packet)
	l.memory += b.Cap()
	l.queue.Push(flow, len(packet), b, now)
	for l.memory > queueBytes {
		if lost, ok := l.queue.Drop(); ok {
			l.free(lost)
			l.shed.Add(1)
		}
	}
	return false
}

func (l *Local) free(b *queue.Buffer) {
	l.memory -= b.Cap()
	l.buffers.Free(b)
}

// readWhole reads the kernel's packets straight into WireGuard's buffers: the
// virtio header lands where WireGuard writes its own.
func (l *Local) readWhole(bufs [][]byte, sizes, flows []int, offset int, block bool) (int, error) {
	k := min(len(bufs), localBatch)
	if k == 0 {
		return 0, nil
	}
	for i := range k {
		l.views[i] = bufs[i][offset-tun.HeaderLen : min(len(bufs[i]), offset+maxPacket)]
	}
	n, err := l.tun.ReadBatch(l.views[:k], l.sizes[:k], readLimit, block)
	l.filter.lock()
	for i := range n {
		size := l.sizes[i] - tun.HeaderLen
		p, ok := tun.Parse(bufs[i][offset : offset+size])
		if !ok || !l.filter.outbound(&p, bufs[i][offset:offset+size]) {
			size = 0 // WireGuard skips it
		} else {
			flows[i] = l.flow(&p, bufs[i][offset:offset+size])
		}
		sizes[i] = size
	}
	l.filter.mu.Unlock()
	return n, err
}

// readSplit reads the kernel's packets and makes ordinary ones of them, of at
// most limit bytes if they can be cut; 0 only ends what was begun.
func (l *Local) readSplit(bufs [][]byte, sizes, flows []int, offset int, block bool, limit int) (int, error) {
	if l.scratch == nil {
		l.scratch = make([]byte, tun.HeaderLen+65535)
	}
	n := 0
	for n < len(bufs) {
		if !l.pending {
			if limit == 0 {
				break
			}
			l.views[0] = l.scratch
			k, err := l.tun.ReadBatch(l.views[:1], l.sizes[:1], 1, block && n == 0)
			if k == 0 {
				return n, err
			}
			packet := l.scratch[tun.HeaderLen:l.sizes[0]]
			p, ok := tun.Parse(packet)
			l.filter.lock()
			ok = ok && l.filter.outbound(&p, packet)
			l.filter.mu.Unlock()
			if !ok {
				continue
			}
			if l.split, err = tun.NewSplitter(l.scratch, packet); err != nil {
				continue
			}
			l.split.Limit(limit)
			l.pending, l.splitFlow = true, l.flow(&p, packet)
		}
		size := l.split.Next(bufs[n][offset:min(len(bufs[n]), offset+maxPacket)])
		if size == 0 {
			l.pending = false
			continue
		}
		sizes[n], flows[n] = size, l.splitFlow
		n++
	}
	return n, nil
}

// Write implements tun.Device for WireGuard: packets from the agent. It may be
// called by two goroutines at once, while one peer replaces another.
func (l *Local) Write(bufs [][]byte, offset int) (int, error) {
	var room [localBatch]tun.Joined
	for _, j := range tun.Join(room[:0], bufs, offset, l.mtu) {
		if r := l.write(j.Buf, offset, j.Segment); r != pass {
			l.drops[r].Add(1)
		}
	}
	return len(bufs), nil
}

// write takes one packet, of TCP segments that are segment bytes long if it is
// longer.
func (l *Local) write(b []byte, offset, segment int) reason {
	packet := b[offset:]
	p, ok := tun.Parse(packet)
	if !ok {
		return dropMalformed
	}
	for _, a := range l.inAddrs {
		if p.Dst == a {
			return l.deliver(&p, b, offset)
		}
	}
	if l.pings.reply(&p, packet) {
		return pass
	}
	l.filter.lock()
	r := l.filter.inbound(&p, packet)
	l.filter.mu.Unlock()
	if r != pass {
		return r
	}
	tun.Prepare(b[offset-tun.HeaderLen:offset], packet, segment)
	if _, err := l.tun.Write(b[offset-tun.HeaderLen:]); err != nil {
		return dropDevice
	}
	return pass
}

// deliver gives a packet for an Inbound address to the netstack.
func (l *Local) deliver(p *tun.Packet, b []byte, offset int) reason {
	in := l.inbound.Load()
	switch {
	case p.Routed:
		return dropRouted
	case !answers(p.Src) || l.filter.isOwn(p.Src):
		return dropSource
	case in == nil || p.Proto != tun.ProtoTCP:
		return dropUnasked
	}
	one := [1][]byte{b}
	_, _ = in.ep.Write(one[:], offset)
	return pass
}

// File implements tun.Device.
func (l *Local) File() *os.File { return l.tun.File() }

// MTU implements tun.Device.
func (l *Local) MTU() (int, error) { return l.mtu, nil }

// Name implements tun.Device.
func (l *Local) Name() (string, error) { return l.tun.Name(), nil }

// Events implements tun.Device.
func (l *Local) Events() <-chan wgtun.Event { return l.events }

// BatchSize implements tun.Device.
func (l *Local) BatchSize() int { return localBatch }

// Close implements tun.Device: it closes the TUN descriptor, which ends the
// device unless the daemon holds it too, and the connections from the cluster.
func (l *Local) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	l.mu.Unlock()
	l.again.Stop()
	l.side.close()
	if in := l.inbound.Load(); in != nil {
		in.close()
	}
	close(l.events)
	return l.tun.Close()
}
