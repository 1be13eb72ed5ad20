// Package cores has a process use one core while that is enough. A packet passes
// through four goroutines in WireGuard and as many around it. With several cores
// Go wakes an idle one at each hand-over, which finds nothing left to do: that
// costs more than the packet does, and makes it late.
package cores

import (
	"context"
	"os"
	"runtime"
	"time"
)

const (
	// look is how often the CPU time is looked at: a transfer that one core cannot
	// keep up with has the others after one or two looks.
	look = 100 * time.Millisecond
	// many is how busy one core is when it is not enough. Half, because a process
	// that shares the machine with those it works for does not get more of it. A
	// ping-pong takes 0.4.
	many = 0.5
	// few is how busy several are together, in cores, when one may be enough; it
	// has to last for calm looks.
	few  = 0.5
	calm = 10
)

// Adapt sets GOMAXPROCS to one, and while one core is not enough to what it was,
// until ctx ends. It does nothing when the environment says GOMAXPROCS.
func Adapt(ctx context.Context) {
	if _, ok := spent(); ok && os.Getenv("GOMAXPROCS") == "" {
		adapt(ctx, func() time.Duration { d, _ := spent(); return d })
	}
}

// adapt is Adapt of a process whose CPU time spent tells.
func adapt(ctx context.Context, spent func() time.Duration) {
	g := gear{most: runtime.GOMAXPROCS(1), now: 1}
	defer runtime.GOMAXPROCS(g.most)
	before, at := spent(), time.Now()
	t := time.NewTicker(look)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		used, elapsed := spent(), time.Since(at)
		if n := g.next(float64(used-before) / float64(elapsed)); n != g.now {
			runtime.GOMAXPROCS(n)
			g.now = n
		}
		before, at = used, at.Add(elapsed)
	}
}

// gear decides how many cores to use.
type gear struct {
	most, now int
	quiet     int // looks in succession at which one core would have been enough
}

// next is the number of cores after a look that found busy of them busy.
func (g *gear) next(busy float64) int {
	if busy > few {
		g.quiet = 0
	} else {
		g.quiet++
	}
	switch {
	case g.now == 1 && busy > many:
		return g.most
	case g.quiet >= calm:
		return 1
	}
	return g.now
}
