package main

import (
	"fmt"
	"io"
	"sync"
	"time"
)

// progress shows steps as they happen: on a terminal a spinner that becomes a
// tick with the time the step took, elsewhere a line per step. Its methods may
// be called by any goroutine; Close ends the spinner and may be called twice.
type progress struct {
	w        io.Writer
	terminal bool

	mu    sync.Mutex
	step  string
	since time.Time
	frame int

	closing sync.Once
	stop    chan struct{}
	done    chan struct{}
}

const spinnerInterval = 100 * time.Millisecond

var spinnerFrames = []rune("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏")

func newProgress(w io.Writer, terminal bool) *progress {
	p := &progress{w: w, terminal: terminal, stop: make(chan struct{}), done: make(chan struct{})}
	if terminal {
		go p.spin()
	} else {
		close(p.done)
	}
	return p
}

func (p *progress) spin() {
	defer close(p.done)
	tick := time.NewTicker(spinnerInterval)
	defer tick.Stop()
	for {
		select {
		case <-p.stop:
			return
		case <-tick.C:
			p.mu.Lock()
			p.frame++
			p.drawLocked()
			p.mu.Unlock()
		}
	}
}

// drawLocked draws the current step over whatever stands on the line.
func (p *progress) drawLocked() {
	if p.step != "" {
		fmt.Fprintf(p.w, "\r\x1b[K%c %s", spinnerFrames[p.frame%len(spinnerFrames)], p.step)
	}
}

// Step begins a step, which ends the one before it well. The same step again,
// or none, changes nothing.
func (p *progress) Step(step string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if step == "" || step == p.step {
		return
	}
	p.finishLocked('✓')
	p.step, p.since = step, time.Now()
	if p.terminal {
		p.drawLocked()
	} else {
		fmt.Fprintln(p.w, step)
	}
}

// Close ends the last step, well or not, and the spinner.
func (p *progress) Close(ok bool) {
	p.closing.Do(func() { close(p.stop) })
	<-p.done
	mark := '✗'
	if ok {
		mark = '✓'
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.finishLocked(mark)
}

func (p *progress) finishLocked(mark rune) {
	if p.step != "" && p.terminal {
		fmt.Fprintf(p.w, "\r\x1b[K%c %s (%s)\n", mark, p.step, took(time.Since(p.since)))
	}
	p.step = ""
}

// took is a duration as people read it.
func took(d time.Duration) string {
	switch {
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.1f ms", float64(d)/float64(time.Millisecond))
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	case d < time.Minute:
		return fmt.Sprintf("%.1f s", d.Seconds())
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	default:
		return fmt.Sprintf("%dd", int(d.Hours())/24)
	}
}
