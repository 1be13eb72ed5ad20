package agent

import (
	"math"
	"os"
	"path"
	"runtime"
	runtimemetrics "runtime/metrics"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
)

// governor keeps the queues of all TCP connections together within the memory
// limit. One connection may queue 4 MiB each way, which is what a fast one on a
// long path needs; a thousand that stand still may not. Above 60 % of the limit
// every connection's queues are taken down to 32 KiB (what is in them drains or
// stays), below 40 % they grow again.
type governor struct {
	node  *node
	tight atomic.Bool
	heap  []runtimemetrics.Sample
	limit int64
}

const (
	tightQueue = 32 << 10
	looseQueue = 1 << 20
	// collectEvery bounds how often the governor collects garbage to see what is
	// really in use.
	collectEvery = 5 * time.Second
)

func newGovernor(n *node) *governor {
	return &governor{
		node:  n,
		heap:  []runtimemetrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}},
		limit: n.agent.cfg.MemoryLimit,
	}
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
		switch used := g.used(); {
		case !g.tight.Load() && used > g.limit*6/10:
			if time.Since(collected) > collectEvery {
				collected = time.Now()
				runtime.GC()
				continue // and look again: most of it may have been garbage
			}
			g.set(true)
		case g.tight.Load() && used < g.limit*4/10:
			g.set(false)
		}
	}
}

func (g *governor) used() int64 {
	runtimemetrics.Read(g.heap)
	return int64(g.heap[0].Value.Uint64())
}

func (g *governor) set(tight bool) {
	g.tight.Store(tight)
	g.node.tcp.each(func(r *relay) { resize(r, tight) })
	g.node.agent.log.Warn("memory pressure", "tight", tight, "limit", g.limit)
}

// fit sizes the queues of a new connection.
func (g *governor) fit(r *relay) {
	if g.tight.Load() {
		resize(r, true)
	}
}

func resize(r *relay, tight bool) {
	size := int64(looseQueue)
	if tight {
		size = tightQueue
	}
	r.ep.SocketOptions().SetSendBufferSize(size, true)
	r.ep.SocketOptions().SetReceiveBufferSize(size, true)
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
