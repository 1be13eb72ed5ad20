package agent

import (
	"crypto/sha256"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// maxProven bounds what a proven remembers; a session has 32 intercepts, and two
// gates for each at most.
const maxProven = 512

// proven remembers for a while what the session vouched for.
type proven[K comparable] struct {
	keep time.Duration

	mu    sync.Mutex
	until map[K]time.Time
}

func newProven[K comparable](keep time.Duration) *proven[K] {
	return &proven[K]{keep: keep, until: map[K]time.Time{}}
}

func (p *proven[K]) has(k K) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.until[k])
}

// add remembers k from now on. Where there is no room another one gives way, and
// has to be proved again.
func (p *proven[K]) add(k K) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if _, ok := p.until[k]; !ok && len(p.until) >= maxProven {
		for other, until := range p.until {
			if !now.Before(until) {
				delete(p.until, other)
			}
		}
		for other := range p.until {
			if len(p.until) < maxProven {
				break
			}
			delete(p.until, other)
		}
	}
	p.until[k] = now.Add(p.keep)
}

func (p *proven[K]) drop(k K) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.until, k)
}

// proof is the ID and the token of a header, as a hash: looking it up tells
// nothing about those that are good.
type proof [sha256.Size]byte

func proofOf(h intercept.Header) proof { return sha256.Sum256([]byte(h.ID + "\x00" + h.Token)) }
