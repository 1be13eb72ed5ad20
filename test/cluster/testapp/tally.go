package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// outcome is what became of one request.
type outcome struct {
	begun, ended time.Time
	server       string // who answered
	tries        int    // connections that it was sent on
	reused       bool   // the last of them had served another request before
	err          error
}

// tally counts outcomes. Its exported fields are its JSON, complete after finish.
// Times are milliseconds, moments those since 1970.
type tally struct {
	Test    string  `json:"test"`
	Begun   int64   `json:"begun_unix_ms"`
	Seconds float64 `json:"seconds"`
	Count   int     `json:"count"` // answered
	PerS    float64 `json:"per_s"`
	Failed  int     `json:"failed"`
	Retried int     `json:"retried"` // answered after Go's client had sent it again by itself
	Dialled int64   `json:"dialled"`

	P50 float64 `json:"p50_ms"`
	P99 float64 `json:"p99_ms"`
	Max float64 `json:"max_ms"`

	// Gap is the longest time in which nobody answered, and until when that was.
	Gap      float64 `json:"gap_ms"`
	GapUntil int64   `json:"gap_until_unix_ms"`

	Kinds    map[string]int     `json:"kinds,omitempty"` // of failures
	Failures []failure          `json:"failures,omitempty"`
	Servers  map[string]*server `json:"servers"`
	// Answers is when each server answered, in milliseconds since Begun.
	Answers map[string][]int64 `json:"answers,omitempty"`

	mu    sync.Mutex // while clients add
	begun time.Time
	took  []time.Duration
	ends  []time.Time
}

// failure is a request without an answer.
type failure struct {
	At     int64   `json:"at_unix_ms"` // when it began
	Took   float64 `json:"took_ms"`
	Kind   string  `json:"kind"`
	Reused bool    `json:"reused"` // on a connection that had served before
	Error  string  `json:"error"`
}

// server is what one server answered.
type server struct {
	Count int   `json:"count"`
	First int64 `json:"first_unix_ms"`
	Last  int64 `json:"last_unix_ms"`
	// Gap is the longest time between two of its answers.
	Gap float64 `json:"gap_ms"`
	P50 float64 `json:"p50_ms"`
	P99 float64 `json:"p99_ms"`

	last time.Time
	took []time.Duration
}

// mostFailures are kept in full; the others are counted.
const mostFailures = 200

func newTally(begun time.Time) *tally {
	return &tally{Test: "load", Begun: begun.UnixMilli(), begun: begun,
		Kinds: map[string]int{}, Servers: map[string]*server{}, Answers: map[string][]int64{}}
}

func (t *tally) add(o outcome) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if o.err != nil {
		kind := kindOf(o.err)
		t.Failed++
		t.Kinds[kind]++
		if len(t.Failures) < mostFailures {
			t.Failures = append(t.Failures, failure{o.begun.UnixMilli(), ms(o.ended.Sub(o.begun)), kind, o.reused, o.err.Error()})
		}
		return
	}
	t.Count++
	if o.tries > 1 {
		t.Retried++
	}
	t.took = append(t.took, o.ended.Sub(o.begun))
	t.ends = append(t.ends, o.ended)
	t.Answers[o.server] = append(t.Answers[o.server], o.ended.Sub(t.begun).Milliseconds())
	s := t.Servers[o.server]
	if s == nil {
		s = &server{First: o.ended.UnixMilli(), last: o.ended}
		t.Servers[o.server] = s
	}
	s.Count++
	s.took = append(s.took, o.ended.Sub(o.begun))
	s.Last = o.ended.UnixMilli()
	s.Gap = max(s.Gap, ms(o.ended.Sub(s.last)))
	s.last = o.ended
}

// finish computes what needs all outcomes. The time before the first answer and
// the one after the last are gaps, too, but not what it takes after asked, when no
// request began any more, until the last is answered.
func (t *tally) finish(asked, end time.Time, dialled int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.Dialled = dialled
	t.Seconds = end.Sub(t.begun).Seconds()
	t.PerS = float64(t.Count) / max(t.Seconds, 1e-3)
	// They were added in nearly this order, but by several clients.
	slices.SortFunc(t.ends, time.Time.Compare)
	last := t.begun
	for _, at := range append(t.ends, asked) {
		if at.After(asked) {
			at = asked
		}
		if gap := ms(at.Sub(last)); gap > t.Gap {
			t.Gap, t.GapUntil = gap, at.UnixMilli()
		}
		last = at
	}
	for _, all := range t.Answers {
		slices.Sort(all)
	}
	for _, s := range t.Servers {
		slices.Sort(s.took)
		s.P50, s.P99 = ms(s.took[len(s.took)/2]), ms(s.took[len(s.took)*99/100])
	}
	if n := len(t.took); n > 0 {
		slices.Sort(t.took)
		t.P50, t.P99, t.Max = ms(t.took[n/2]), ms(t.took[n*99/100]), ms(t.took[n-1])
	}
}

func (t *tally) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "load: %d answers, %.1f/s, %d failed, p50 %.1f ms p99 %.1f ms max %.1f ms, longest gap %.0f ms",
		t.Count, t.PerS, t.Failed, t.P50, t.P99, t.Max, t.Gap)
	for name, s := range t.Servers {
		fmt.Fprintf(&b, "\n  %s: %d, p50 %.1f ms p99 %.1f ms", name, s.Count, s.P50, s.P99)
	}
	for kind, n := range t.Kinds {
		fmt.Fprintf(&b, "\n  failed, %s: %d", kind, n)
	}
	return b.String()
}

// statusError is an answer that says that something went wrong.
type statusError struct{ code int }

func (e *statusError) Error() string { return fmt.Sprintf("status %d", e.code) }

// kindOf puts an error into one of a few words.
func kindOf(err error) string {
	var timeout net.Error
	var status *statusError
	switch {
	case errors.As(err, &status):
		return status.Error()
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &timeout) && timeout.Timeout():
		return "timeout"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return "reset"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return "unreachable"
	case strings.Contains(err.Error(), "GOAWAY"):
		return "goaway"
	case strings.Contains(err.Error(), "stream error"), strings.Contains(err.Error(), "stream ID"):
		return "stream reset"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), strings.Contains(err.Error(), "server closed"):
		return "closed"
	}
	return "other"
}
