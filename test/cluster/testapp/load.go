package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// servedBy is the header in which every answer names its server.
const servedBy = "X-Served-By"

// loader is a number of clients that ask for one URL. Each waits for its answer
// before it asks again, as real ones do: a server that is slow gets fewer requests.
type loader struct {
	url       string
	rate      float64 // requests per second of all together; 0: as many as they can
	workers   int
	timeout   time.Duration // of a request
	keepalive bool
	post      bool
	http2     bool // each client has one connection
	add       headers
	stop      <-chan struct{} // closed: ask no more; may be nil

	dialled atomic.Int64
}

// load keeps clients busy for a time and tells what became of every request.
func load(args []string) error {
	url, err := word(args, 0, "URL")
	if err != nil {
		return err
	}
	l := &loader{url: url}
	f := flag.NewFlagSet("load", flag.ContinueOnError)
	f.Float64Var(&l.rate, "rate", 200, "requests per second of all clients together; 0: as many as they can")
	seconds := f.Float64("seconds", 10, "how long requests begin")
	f.IntVar(&l.workers, "workers", 20, "clients")
	f.DurationVar(&l.timeout, "timeout", 10*time.Second, "time for one request")
	f.BoolVar(&l.keepalive, "keepalive", true, "keep connections")
	f.BoolVar(&l.post, "post", false, "POST, which nobody repeats, instead of GET")
	f.BoolVar(&l.http2, "http2", false, "HTTP/2, without asking for it")
	f.Var(&l.add, "header", "NAME:VALUE, several times")
	times := f.Bool("times", false, "tell when each server answered, in JSON")
	stdin := f.Bool("until-eof", false, "end earlier when standard input ends, and say on standard error that it begins")
	if err := f.Parse(args[1:]); err != nil {
		return err
	}
	if *stdin {
		stop := make(chan struct{})
		l.stop = stop
		go func() {
			defer close(stop)
			_, _ = io.Copy(io.Discard, os.Stdin) // an error is its end, too
		}()
	}
	if l.workers < 1 || *seconds <= 0 || l.rate < 0 {
		return errors.New("clients and seconds have to be more than none")
	}
	if *stdin {
		fmt.Fprintln(os.Stderr, "begins")
	}
	t := l.run(span(*seconds))
	if t.Count == 0 {
		return errors.New("no request ended")
	}
	if !*times {
		t.Answers = nil
	}
	return report(t.String(), t)
}

// run runs the clients; what they asked for last is waited for.
func (l *loader) run(d time.Duration) *tally {
	t := newTally(time.Now())
	end := t.begun.Add(d)
	stopped := make(chan time.Time, 1)
	over := make(chan struct{})
	go func() {
		select {
		case <-l.stop:
		case <-time.After(d):
		case <-over:
		}
		stopped <- time.Now()
	}()
	var clients sync.WaitGroup
	for i := range l.workers {
		clients.Go(func() {
			var every time.Duration
			if l.rate > 0 {
				every = time.Duration(float64(l.workers) / l.rate * float64(time.Second))
			}
			transport := newTransport(l.dial, l.http2)
			transport.DisableKeepAlives = !l.keepalive
			defer transport.CloseIdleConnections()
			client := &http.Client{Transport: transport, Timeout: l.timeout}
			// Spread over the interval, so that they do not ask all at once.
			next := t.begun.Add(every * time.Duration(i) / time.Duration(l.workers))
			for next.Before(end) {
				if !l.waitFor(next) {
					return
				}
				t.add(l.once(client))
				if next = next.Add(every); next.Before(time.Now()) {
					next = time.Now() // late: what is overdue is not made up for
				}
			}
		})
	}
	clients.Wait()
	close(over)
	t.finish(<-stopped, time.Now(), l.dialled.Load())
	return t
}

// waitFor waits until a moment, and says whether to go on. At full speed, when it is
// over already, it costs nothing.
func (l *loader) waitFor(t time.Time) bool {
	if d := time.Until(t); d > 0 {
		select {
		case <-l.stop:
			return false
		case <-time.After(d):
			return true
		}
	}
	select {
	case <-l.stop:
		return false
	default:
		return true
	}
}

func (l *loader) dial(ctx context.Context, network, addr string) (net.Conn, error) {
	l.dialled.Add(1)
	return (&net.Dialer{}).DialContext(ctx, network, addr)
}

// once makes one request.
func (l *loader) once(client *http.Client) outcome {
	o := outcome{begun: time.Now()}
	ctx := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{GotConn: func(i httptrace.GotConnInfo) {
		o.tries++
		o.reused = i.Reused
	}})
	o.server, o.err = l.ask(ctx, client)
	o.ended = time.Now()
	return o
}

func (l *loader) ask(ctx context.Context, client *http.Client) (server string, err error) {
	method, body := http.MethodGet, io.Reader(nil)
	if l.post {
		method, body = http.MethodPost, strings.NewReader(strings.Repeat("culvert ", 8))
	}
	req, err := http.NewRequestWithContext(ctx, method, l.url, body)
	if err != nil {
		return "", err
	}
	l.add.put(req)
	r, err := client.Do(req)
	if err != nil {
		return "", err
	}
	defer r.Body.Close()
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return "", fmt.Errorf("the body: %w", err)
	}
	if r.StatusCode >= 400 {
		return "", &statusError{r.StatusCode}
	}
	return r.Header.Get(servedBy), nil
}
