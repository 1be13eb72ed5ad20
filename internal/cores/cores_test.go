package cores

import (
	"context"
	"runtime"
	"sync/atomic"
	"testing"
	"time"
)

func TestGear(t *testing.T) {
	g := gear{most: 8, now: 1}
	step := func(busy float64, looks, want int) {
		t.Helper()
		for range looks {
			g.now = g.next(busy)
		}
		if g.now != want {
			t.Fatalf("%d cores after %d looks at %.1f, want %d", g.now, looks, busy, want)
		}
	}
	step(0.4, 100, 1) // not enough to want more
	step(0.9, 1, 8)
	step(0.4, calm-1, 8)
	step(3, 1, 8) // begins anew
	step(0.4, calm-1, 8)
	step(0.4, 1, 1)
	step(0.1, 100, 1)
	step(1, 1, 8) // at once
}

// TestAdapt: an idle process has one core, a busy one has all, and so has
// whoever ends it.
func TestAdapt(t *testing.T) {
	const most = 3
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(most))
	ctx, cancel := context.WithCancel(context.Background())
	var busy atomic.Bool
	begun := time.Now()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		adapt(ctx, func() time.Duration {
			if busy.Load() {
				return time.Since(begun)
			}
			return 0
		})
	}()
	await := func(want int) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); runtime.GOMAXPROCS(0) != want; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d cores, want %d", runtime.GOMAXPROCS(0), want)
			}
		}
	}
	await(1)
	busy.Store(true)
	await(most)
	busy.Store(false)
	await(1)
	cancel()
	<-ended
	await(most)
}

// TestSpent: the CPU time grows while one works.
func TestSpent(t *testing.T) {
	before, ok := spent()
	if !ok {
		t.Skip("this system does not tell")
	}
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); {
		if now, _ := spent(); now-before > 20*time.Millisecond {
			return
		}
	}
	t.Error("no CPU time was spent in 5 s of work")
}
