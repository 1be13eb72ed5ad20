package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"time"
)

// asked is all that a client sees of one request's answer. Times are milliseconds
// since the request began.
type asked struct {
	Test     string      `json:"test"`
	Server   string      `json:"server"`
	Status   int         `json:"status"`
	Protocol string      `json:"protocol"`
	Headers  http.Header `json:"headers"`
	Trailers http.Header `json:"trailers,omitempty"`
	Interim  []int       `json:"interim,omitempty"` // statuses before the last
	Sent     int64       `json:"sent"`              // bytes of the request's body
	Sum      string      `json:"sent_sha256"`
	Length   int64       `json:"length"` // of the answer's body
	SHA256   string      `json:"sha256"`
	Body     string      `json:"body,omitempty"` // its first 16 KiB
	Head     float64     `json:"head_ms"`        // until the answer's head
	Took     float64     `json:"took_ms"`        // until its end
	// SentAt is when all of the body had been taken, 0: never; while the answer comes
	// at the same time that is after Head.
	SentAt float64 `json:"sent_ms"`
	Error  string  `json:"error,omitempty"` // what went wrong after the head
}

// mostBody is how much of an answer's body is kept.
const mostBody = 16 << 10

// ask makes one request with all that it may have and tells what came back.
func ask(args []string) error {
	url, err := word(args, 0, "URL")
	if err != nil {
		return err
	}
	f := flag.NewFlagSet("ask", flag.ContinueOnError)
	var add headers
	f.Var(&add, "header", "NAME:VALUE, several times")
	method := f.String("method", http.MethodGet, "method")
	size := f.Int64("body", 0, "bytes of a body to send")
	chunked := f.Bool("chunked", false, "do not say before how long the body is, and send its checksum in a trailer")
	http2 := f.Bool("http2", false, "HTTP/2, without asking for it")
	expect := f.Bool("expect", false, "wait for a 100 before the body is sent")
	rate := f.Int64("rate", 0, "bytes per second of the body; 0: as fast as it goes")
	timeout := f.Duration("timeout", time.Minute, "time for all of it")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	got := asked{Test: "ask"}
	begun := time.Now()
	since := func() float64 { return ms(time.Since(begun)) }
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		Got1xxResponse: func(code int, _ textproto.MIMEHeader) error {
			got.Interim = append(got.Interim, code)
			return nil
		},
		Got100Continue: func() { got.Interim = append(got.Interim, 100) },
	})
	req, err := http.NewRequestWithContext(ctx, *method, url, nil)
	if err != nil {
		return err
	}
	body := &source{left: *size, rate: *rate, begun: begun, sum: sha256.New(), over: make(chan struct{})}
	if *size > 0 {
		req.Body, req.ContentLength = body, *size
		if *chunked {
			req.ContentLength = -1
			req.Trailer = http.Header{"X-Sha256": nil}
			body.end = func(sum string) { req.Trailer.Set("X-Sha256", sum) }
		}
	}
	add.put(req)
	transport := newTransport((&net.Dialer{Timeout: 10 * time.Second}).DialContext, *http2)
	if *expect {
		req.Header.Set("Expect", "100-continue")
		transport.ExpectContinueTimeout = *timeout
	}
	r, err := transport.RoundTrip(req) // no redirects
	if err != nil {
		return err
	}
	defer r.Body.Close()
	got.Head = since()
	got.Server, got.Status, got.Protocol, got.Headers = r.Header.Get(servedBy), r.StatusCode, r.Proto, r.Header
	h, start := sha256.New(), &prefix{}
	got.Length, err = io.Copy(io.MultiWriter(h, start), r.Body)
	if err != nil {
		got.Error = err.Error()
	}
	got.Took, got.Trailers = since(), r.Trailer
	got.SHA256, got.Body = hex.EncodeToString(h.Sum(nil)), string(start.b)
	if *size > 0 && got.Error == "" && got.Status < 400 {
		select { // an answer may end before the body does
		case <-body.over:
		case <-time.After(time.Second):
		}
	}
	var last time.Time
	got.Sent, got.Sum, last = body.state()
	if !last.IsZero() {
		got.SentAt = ms(last.Sub(begun))
	}
	text, err := json.MarshalIndent(got, "", "  ")
	if err != nil {
		return err
	}
	if err := report(string(text), got); err != nil {
		return err
	}
	if got.Error != "" {
		return errors.New(got.Error)
	}
	return nil
}

// prefix keeps the first bytes that are written to it.
type prefix struct{ b []byte }

func (p *prefix) Write(b []byte) (int, error) {
	p.b = append(p.b, b[:min(len(b), mostBody-len(p.b))]...)
	return len(b), nil
}
