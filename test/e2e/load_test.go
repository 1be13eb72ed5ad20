//go:build e2e

package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// loadClients is how many clients of a load there are: as many connections it has
// at most.
const loadClients = 20

// loaded is what testapp's load tells.
type loaded struct {
	Begun    int64 `json:"begun_unix_ms"`
	Count    int
	Failed   int
	Retried  int
	Dialled  int
	PerS     float64 `json:"per_s"`
	P50      float64 `json:"p50_ms"`
	P99      float64 `json:"p99_ms"`
	Max      float64 `json:"max_ms"`
	Gap      float64 `json:"gap_ms"`
	GapUntil int64   `json:"gap_until_unix_ms"`
	Kinds    map[string]int
	Failures []failedRequest
	Answers  map[string][]int64 // ms since Begun
}

type failedRequest struct {
	At     int64   `json:"at_unix_ms"` // when it began
	Took   float64 `json:"took_ms"`
	Kind   string
	Reused bool
	Error  string
}

// loading is a load that goes on.
type loading struct {
	name string
	end  io.Closer // the load's standard input, by which it ends earlier
	done chan netlab.Result
}

// startLoad has clients in a pod ask a URL 200 times a second, as issue 4 says,
// and returns when they do: so what happens next happens under load.
func startLoad(t *testing.T, client, url string, d time.Duration, flags ...string) *loading {
	t.Helper()
	in, end, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end.Close() })
	l := &loading{name: strings.Join(append([]string{"load"}, flags...), " "), end: end, done: make(chan netlab.Result, 1)}
	cmd, err := lab.KubectlCommand("", append([]string{"-n", "clients", "exec", "-i", client, "--", "/testapp", "--json", "load", url, "--until-eof", "--times",
		"--rate", "200", "--workers", fmt.Sprint(loadClients), "--seconds", fmt.Sprint(d.Seconds())}, flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	begins := &firstLine{came: make(chan struct{})}
	cmd.Stdin, cmd.Stderr = in, begins
	go func() {
		var stdout bytes.Buffer
		cmd.Stdout = &stdout
		begun := time.Now()
		err := cmd.Run()
		in.Close()
		r := netlab.Result{Stdout: stdout.String(), Stderr: begins.text.String(), Took: time.Since(begun)}
		if err != nil {
			r.Code = -1
			r.Stderr += err.Error()
		}
		l.done <- r
	}()
	select {
	case <-begins.came:
	case <-time.After(20 * time.Second):
		t.Fatalf("%s does not begin", l.name)
	}
	return l
}

// firstLine keeps what is written, and tells when its first line came.
type firstLine struct {
	text bytes.Buffer
	came chan struct{}
	once sync.Once
}

func (f *firstLine) Write(b []byte) (int, error) {
	f.text.Write(b)
	if bytes.IndexByte(f.text.Bytes(), '\n') >= 0 {
		f.once.Do(func() { close(f.came) })
	}
	return len(b), nil
}

// stop ends the load before its time and waits for its end: so it lasts as long as
// what it is about, whatever that takes on a slow machine.
func (l *loading) stop(t *testing.T) loaded {
	t.Helper()
	l.end.Close()
	return l.wait(t)
}

// wait waits for the end.
func (l *loading) wait(t *testing.T) loaded {
	t.Helper()
	r := <-l.done
	var got loaded
	if err := json.Unmarshal([]byte(r.Stdout), &got); err != nil || r.Code != 0 {
		t.Fatalf("%s: %v, %v", l.name, err, r)
	}
	by := map[string]int{}
	for server, times := range got.Answers {
		by[server] = len(times)
	}
	t.Logf("%s: %d answers %v, %d failed %v, %d retried, p50 %.1f ms, p99 %.1f ms, max %.0f ms, longest gap %.0f ms",
		l.name, got.Count, by, got.Failed, got.Kinds, got.Retried, got.P50, got.P99, got.Max, got.Gap)
	return got
}

// at is when a server, or a pod of a workload, answered first after a moment.
func (l loaded) at(name string, after time.Time) (time.Time, bool) {
	from := after.UnixMilli() - l.Begun
	first := int64(-1)
	for server, times := range l.Answers {
		if !serves(server, name) {
			continue
		}
		for _, ms := range times {
			if ms >= from && (first < 0 || ms < first) {
				first = ms
			}
		}
	}
	return time.UnixMilli(l.Begun + first), first >= 0
}

// pause is the longest time after a moment for which a server answered nothing.
func (l loaded) pause(name string, after time.Time) (longest time.Duration) {
	from := after.UnixMilli() - l.Begun
	for _, ms := range slices.Sorted(slices.Values(l.Answers[name])) {
		if ms > from {
			longest = max(longest, time.Duration(ms-from)*time.Millisecond)
			from = ms
		}
	}
	return longest
}

// last is when a server answered last.
func (l loaded) last(name string) (time.Time, bool) {
	times := l.Answers[name]
	if len(times) == 0 {
		return time.Time{}, false
	}
	return time.UnixMilli(l.Begun + slices.Max(times)), true
}

// taken is how long after a moment a server answered first. It is a failure when
// that is later than limit.
func (l loaded) taken(t *testing.T, what, name string, after time.Time, limit time.Duration) time.Duration {
	t.Helper()
	first, ok := l.at(name, after)
	if !ok {
		t.Errorf("%s: %s answered nothing afterwards", what, name)
		return 0
	}
	took := first.Sub(after)
	t.Logf("%s: %s answers after %v", what, name, took)
	if took > limit {
		t.Errorf("%s: %s answered only after %v", what, name, took)
	}
	return took
}

// none wants that no request failed.
func (l loaded) none(t *testing.T) {
	t.Helper()
	if l.Failed != 0 {
		t.Errorf("%d of %d requests failed: %v\n%s", l.Failed, l.Failed+l.Count, l.Kinds, l.firstFailures())
	}
}

// onlyOpen wants that only requests failed whose connection was open at a moment:
// those that were under way, and those on connections that were kept.
func (l loaded) onlyOpen(t *testing.T, at time.Time) {
	t.Helper()
	if l.Failed > loadClients {
		t.Errorf("%d requests failed, but only %d connections can have been open: %v\n%s", l.Failed, loadClients, l.Kinds, l.firstFailures())
	}
	for _, f := range l.Failures {
		if !f.Reused && f.At > at.UnixMilli() {
			t.Errorf("a request on a new connection failed, %d ms afterwards: %+v", f.At-at.UnixMilli(), f)
			return
		}
	}
}

func (l loaded) firstFailures() string {
	var b strings.Builder
	for i, f := range l.Failures {
		if i == 8 {
			break
		}
		fmt.Fprintf(&b, "%d ms after the begin, %.0f ms long, on a kept connection %v: %s\n", f.At-l.Begun, f.Took, f.Reused, f.Error)
	}
	return b.String()
}
