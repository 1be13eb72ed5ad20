package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"
)

// sseResult is what came of a stream of server-sent events.
type sseResult struct {
	Test   string  `json:"test"`
	Server string  `json:"server"`
	Events int     `json:"events"`
	First  float64 `json:"first_ms"` // until the first
	Gap    float64 `json:"gap_ms"`   // the longest time between two
	Took   float64 `json:"took_ms"`
	Whole  bool    `json:"whole"` // the stream ended as it should
}

// sse reads events until their stream ends, and wants their numbers to be complete.
func sse(args []string) error {
	url, err := word(args, 0, "URL")
	if err != nil {
		return err
	}
	f := flag.NewFlagSet("sse", flag.ContinueOnError)
	var add headers
	f.Var(&add, "header", "NAME:VALUE, several times")
	http2 := f.Bool("http2", false, "HTTP/2, without asking for it")
	timeout := f.Duration("timeout", time.Minute, "for all of it")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	add.put(req)
	req.Header.Set("Accept", "text/event-stream")
	begun := time.Now()
	a, err := newTransport((&net.Dialer{}).DialContext, *http2).RoundTrip(req)
	if err != nil {
		return err
	}
	defer a.Body.Close()
	if a.StatusCode != http.StatusOK {
		return &statusError{a.StatusCode}
	}
	r := sseResult{Test: "sse", Server: a.Header.Get(servedBy)}
	last := begun
	lines := bufio.NewScanner(a.Body)
	for lines.Scan() {
		data, ok := strings.CutPrefix(lines.Text(), "data: ")
		if !ok {
			continue
		}
		if !strings.HasSuffix(data, fmt.Sprintf(" %d", r.Events)) {
			return fmt.Errorf("event %d is %q", r.Events, data)
		}
		now := time.Now()
		if r.Events == 0 {
			r.First = ms(now.Sub(begun))
		} else {
			r.Gap = max(r.Gap, ms(now.Sub(last)))
		}
		last = now
		r.Events++
	}
	r.Whole, r.Took = lines.Err() == nil, ms(time.Since(begun))
	err = report(fmt.Sprintf("sse: %d events from %s, first after %.1f ms, longest gap %.1f ms", r.Events, r.Server, r.First, r.Gap), r)
	if err == nil {
		err = lines.Err()
	}
	return err
}
