package agent

import (
	"math"
	"os"
	"path"
	"runtime"
	runtimemetrics "runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
)

// governor keeps the queues of all TCP connections together within the memory
// limit, by two rules:
//
//   - What all queues together may still grow by is a fifth of the limit, shared
//     evenly. A connection alone may queue 4 MiB each way, which is what a fast
//     one on a long path needs; with a thousand each has 32 KiB. The share follows
//     the number of connections, and no queue takes more than its share; one that
//     holds more already drains.
//   - A new connection is refused, with a RST, while more than three quarters of
//     the limit are in use.
//
// So the memory in use never exceeds 95 % of the limit: what was in use when
// the last connection was admitted, and everybody's share.
type governor struct {
	node  *node
	heap  []runtimemetrics.Sample // of run
	limit int64
	full  atomic.Bool // above three quarters

	mu    sync.Mutex
	share int64
}

const (
	// minQueue is what any connection may queue each way: the least that gVisor
	// takes. MaxTCP times it, twice, is within the shared fifth.
	minQueue = 4 << 10
	// startQueue is what a connection begins with where the share is larger; it
	// grows with what is in flight.
	startQueue = 1 << 20
	maxQueue   = 4 << 20
	// collectEvery bounds how often the governor collects garbage to see what is
	// really in use: often, since nobody is admitted meanwhile.
	collectEvery = 500 * time.Millisecond
)

func newGovernor(n *node) *governor {
	g := &governor{
		node:  n,
		heap:  []runtimemetrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"}},
		limit: n.agent.cfg.MemoryLimit,
	}
	return g
}

func (g *governor) run() {
	t := time.NewTicker(g.node.agent.times.governor)
	defer t.Stop()
	var collected time.Time
	for {
		select {
		case <-g.node.ctx.Done():
			return
		case <-t.C:
		}
		full := g.used() > g.limit*3/4
		if full && time.Since(collected) > collectEvery {
			collected = time.Now()
			runtime.GC() // most of it may have been garbage
			full = g.used() > g.limit*3/4
		}
		if g.full.Swap(full) != full {
			g.node.agent.log.Warn("memory", "full", full, "limit", g.limit)
		}
		g.fit(g.node.tcp.total())
	}
}

func (g *governor) used() int64 {
	runtimemetrics.Read(g.heap)
	return int64(g.heap[0].Value.Uint64() + g.heap[1].Value.Uint64())
}

// admits tells whether there is memory for another connection.
func (g *governor) admits() bool { return !g.full.Load() }

// fit makes the share that of n connections: a power of two, so that it seldom
// changes. A smaller share holds for everybody at once, a larger one when there
// is twice the room.
func (g *governor) fit(n int) {
	share := shareOf(g.limit, n)
	g.mu.Lock()
	defer g.mu.Unlock()
	if share == g.share || share > g.share && g.share > 0 && shareOf(g.limit, n+n/4) < share {
		return
	}
	before := g.share
	g.share = share
	// The maximum binds the stack's own tuning of connections that there are.
	start := min(share, startQueue)
	send := tcpip.TCPSendBufferSizeRangeOption{Min: minQueue, Default: int(start), Max: int(share)}
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: minQueue, Default: int(start), Max: int(share)}
	for _, option := range []tcpip.SettableTransportProtocolOption{&send, &receive} {
		if err := g.node.stack.SetTransportProtocolOption(tcp.ProtocolNumber, option); err != nil {
			g.node.agent.log.Warn("sharing memory", "error", err.String())
		}
	}
	if share < before {
		g.node.tcp.each(func(r *relay) { clamp(r, share) })
	}
}

// clamp takes a connection's queues down to share. Without notice: the stack
// would never tune them again.
func clamp(r *relay, share int64) {
	o := r.ep.SocketOptions()
	if o.GetSendBufferSize() > share {
		o.SetSendBufferSize(share, false)
	}
	if o.GetReceiveBufferSize() > share {
		o.SetReceiveBufferSize(share, false)
	}
}

// begin sizes the queues of a new connection.
func (g *governor) begin(r *relay) {
	g.mu.Lock()
	share := g.share
	g.mu.Unlock()
	clamp(r, share)
}

// shareOf is the largest power of two that n connections may each queue in each
// direction, in bytes.
func shareOf(limit int64, n int) int64 {
	share := int64(maxQueue)
	for share > minQueue && share*2*int64(n) > limit/5 {
		share /= 2
	}
	return share
}

// MemoryLimit is the memory limit of this process's cgroup, version 1 or 2, in
// bytes; false if there is none. In a pod the cgroup is mounted as the root; the
// paths of /proc/self/cgroup are tried before, for other places.
func MemoryLimit() (int64, bool) { return memoryLimitAt("/sys/fs/cgroup", "/proc/self/cgroup") }

func memoryLimitAt(mount, self string) (int64, bool) {
	limit := int64(math.MaxInt64)
	try := func(file string) {
		b, err := os.ReadFile(file)
		if err != nil {
			return
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
		// Version 1 says "none" with the largest multiple of a page.
		if err == nil && n > 0 && n < 1<<62 {
			limit = min(limit, n)
		}
	}
	b, _ := os.ReadFile(self)
	for line := range strings.Lines(string(b)) {
		// hierarchy:controllers:path, cgroups(7)
		field := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(field) != 3 {
			continue
		}
		dir, name := mount, "memory.max"
		if field[1] != "" {
			if !strings.Contains(","+field[1]+",", ",memory,") {
				continue
			}
			dir, name = path.Join(mount, "memory"), "memory.limit_in_bytes"
		}
		for p := path.Clean("/" + field[2]); p != "/"; p = path.Dir(p) {
			try(path.Join(dir, p, name))
		}
	}
	try(path.Join(mount, "memory.max"))
	try(path.Join(mount, "memory", "memory.limit_in_bytes"))
	return limit, limit != math.MaxInt64
}
