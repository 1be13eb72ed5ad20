package router

import "time"

// bucket is a token bucket for one goroutine.
type bucket struct {
	size   int
	every  time.Duration // one token
	tokens float64
	last   time.Time
}

func newBucket(size int, every time.Duration) *bucket {
	return &bucket{size: size, every: every, tokens: float64(size)}
}

// take takes a token, borrowing if there is none, and returns how long to wait for it.
func (b *bucket) take(now time.Time) time.Duration {
	if !b.last.IsZero() {
		b.tokens = min(float64(b.size), b.tokens+float64(now.Sub(b.last))/float64(b.every))
	}
	b.last = now
	b.tokens--
	if b.tokens >= 0 {
		return 0
	}
	return time.Duration(-b.tokens * float64(b.every))
}
