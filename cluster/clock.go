package cluster

import (
	"net/http"
	"sync"
	"time"

	"k8s.io/client-go/rest"
)

// clock is the API server's clock, as the Date header of its answers tells it
// (RFC 9110, 6.6.1: whole seconds). The machines of several developers do not
// agree about the time, and what one writes another judges.
type clock struct {
	mu   sync.Mutex
	date time.Time // the newest answer's; zero: none yet
	seen time.Time // when that answer came, with the local monotonic time
}

// wrap makes requests by the returned copy of config tell the time.
func (k *clock) wrap(config *rest.Config) *rest.Config {
	config = rest.CopyConfig(config)
	config.Wrap(func(next http.RoundTripper) http.RoundTripper {
		return roundTripper(func(req *http.Request) (*http.Response, error) {
			resp, err := next.RoundTrip(req)
			if err == nil {
				k.note(resp.Header.Get("Date"))
			}
			return resp, err
		})
	})
	return config
}

func (k *clock) note(header string) {
	date, err := http.ParseTime(header)
	if err != nil {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.date, k.seen = date, time.Now()
}

func (k *clock) now() time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.date.IsZero() {
		return time.Now().UTC()
	}
	return k.date.Add(time.Since(k.seen)).UTC()
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(req *http.Request) (*http.Response, error) { return f(req) }

// Now is the time by the API server's clock, about a second exact. Before its
// first answer it is this machine's. The monotonic clock stands while a machine
// sleeps, so what must be right after a sleep asks the server something first.
func (c *Cluster) Now() time.Time { return c.clock.now() }
