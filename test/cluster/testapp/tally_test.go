package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestTally(t *testing.T) {
	begun := time.UnixMilli(1_000_000)
	at := func(ms int) time.Time { return begun.Add(time.Duration(ms) * time.Millisecond) }
	ly := newTally(begun)
	for _, o := range []outcome{
		{begun: at(0), ended: at(10), server: "pod", tries: 1},
		{begun: at(90), ended: at(100), server: "pod", tries: 1},
		{begun: at(100), ended: at(700), server: "alice", tries: 2},
		{begun: at(95), ended: at(200), err: io.EOF, reused: true},
		{begun: at(650), ended: at(690), server: "pod", tries: 1}, // added late
	} {
		ly.add(o)
	}
	ly.finish(at(1000), at(1000), 7)
	if ly.Count != 4 || ly.Failed != 1 || ly.Retried != 1 || ly.Dialled != 7 || ly.PerS != 4 {
		t.Errorf("counts: %v", ly)
	}
	if ly.Gap != 590 || ly.GapUntil != 1_000_690 {
		t.Errorf("longest gap %v until %v", ly.Gap, ly.GapUntil)
	}
	if ly.P50 != 40 || ly.Max != 600 {
		t.Errorf("p50 %v, max %v", ly.P50, ly.Max)
	}
	if s := ly.Servers["pod"]; s.Count != 3 || s.First != 1_000_010 || s.Last != 1_000_690 || s.Gap != 590 {
		t.Errorf("the pod: %+v", *s)
	}
	if f := ly.Failures; len(f) != 1 || f[0].Kind != "closed" || !f[0].Reused || f[0].At != 1_000_095 || f[0].Took != 105 {
		t.Errorf("failures: %+v", f)
	}
	if got := fmt.Sprint(ly.Answers); got != "map[alice:[700] pod:[10 100 690]]" {
		t.Errorf("answers: %s", got)
	}
	b, err := json.Marshal(ly)
	if err != nil || !strings.Contains(string(b), `"p99_ms":600`) {
		t.Errorf("JSON: %s, %v", b, err)
	}
}

// TestTallyGaps: silence at the beginning and at the end counts, but not the wait
// for a last answer after the end.
func TestTallyGaps(t *testing.T) {
	begun := time.UnixMilli(0)
	for answer, want := range map[int64]float64{900: 900, 200: 800, 5000: 1000} {
		ly := newTally(begun)
		ly.add(outcome{begun: begun, ended: time.UnixMilli(answer), server: "pod"})
		ly.finish(time.UnixMilli(1000), time.UnixMilli(6000), 0)
		if ly.Gap != want {
			t.Errorf("an answer after %d of 1000 ms: gap %v, want %v", answer, ly.Gap, want)
		}
	}
}

func TestTallyKeepsFewFailures(t *testing.T) {
	ly := newTally(time.Now())
	for range 3 * mostFailures {
		ly.add(outcome{err: syscall.ECONNREFUSED})
	}
	if ly.Failed != 3*mostFailures || ly.Kinds["refused"] != 3*mostFailures || len(ly.Failures) != mostFailures {
		t.Errorf("%d failed, %d are kept", ly.Failed, len(ly.Failures))
	}
}

func TestKindOf(t *testing.T) {
	dial := func(err error) error {
		return &url.Error{Op: "Get", Err: &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", err)}}
	}
	for want, err := range map[string]error{
		"refused":     dial(syscall.ECONNREFUSED),
		"reset":       dial(syscall.ECONNRESET),
		"unreachable": dial(syscall.EHOSTUNREACH),
		"timeout":     &url.Error{Op: "Get", Err: context.DeadlineExceeded},
		"closed":      fmt.Errorf("the body: %w", io.ErrUnexpectedEOF),
		"status 503":  &statusError{503},
		"other":       errors.New("no such host"),
	} {
		if got := kindOf(err); got != want {
			t.Errorf("%v is %q, want %q", err, got, want)
		}
	}
}
