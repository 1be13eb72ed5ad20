package main

import (
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"time"
)

// rtt makes a number of round trips on one connection.
func rtt(args []string) error {
	addr, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	count, err := number(args, 1, 1000)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	ds := make([]time.Duration, 0, count)
	for range count {
		d, err := trip(c)
		if err != nil {
			return err
		}
		ds = append(ds, d)
	}
	return reportTrips("rtt", ds)
}

// ping makes round trips on several connections, one after the other on each, for
// a time; those that are under way then are waited for.
func ping(args []string) error {
	addr, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	seconds, err := decimal(args, 1, 5)
	if err != nil {
		return err
	}
	count, err := number(args, 2, 4)
	if err != nil {
		return err
	}
	cs, err := dialMany([]string{addr}, count)
	defer closeAll(cs)
	if err != nil {
		return err
	}
	ds, err := tripsUntil(cs, time.Now().Add(span(seconds)))
	if err != nil {
		return err
	}
	return reportTrips("ping", ds)
}

// tripsUntil makes round trips on every connection until the end.
func tripsUntil(cs []net.Conn, end time.Time) ([]time.Duration, error) {
	var mu sync.Mutex
	var all []time.Duration
	var broken error
	var wg sync.WaitGroup
	for _, c := range cs {
		wg.Go(func() {
			var own []time.Duration
			var err error
			for err == nil && time.Now().Before(end) {
				var d time.Duration
				if d, err = trip(c); err == nil {
					own = append(own, d)
				}
			}
			mu.Lock()
			defer mu.Unlock()
			all = append(all, own...)
			if err != nil {
				broken = err
			}
		})
	}
	wg.Wait()
	return all, broken
}

// trip sends a byte and waits for it to come back.
func trip(c net.Conn) (time.Duration, error) {
	b := [1]byte{1}
	start := time.Now()
	c.SetDeadline(start.Add(30 * time.Second))
	if _, err := c.Write(b[:]); err != nil {
		return 0, err
	}
	_, err := io.ReadFull(c, b[:])
	return time.Since(start), err
}

func reportTrips(name string, ds []time.Duration) error {
	if len(ds) == 0 {
		return fmt.Errorf("no round trip ended")
	}
	slices.Sort(ds)
	n := len(ds)
	p50, p90, p99, last := ds[n/2], ds[n*9/10], ds[n*99/100], ds[n-1]
	return report(fmt.Sprintf("%s: p50 %v p90 %v p99 %v max %v (%d)", name, p50, p90, p99, last, n), map[string]any{
		"test": name, "p50_ms": ms(p50), "p90_ms": ms(p90), "p99_ms": ms(p99), "max_ms": ms(last), "count": n})
}

// hold uses one connection at an interval and says when it was silent longest.
func hold(args []string) error {
	addr, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	seconds, err := decimal(args, 1, 10)
	if err != nil {
		return err
	}
	every, err := number(args, 2, 100)
	if err != nil {
		return err
	}
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	end := time.Now().Add(span(seconds))
	b := []byte{0}
	var n int
	var longest time.Duration
	var until time.Time
	for ; time.Now().Before(end); n++ {
		start := time.Now()
		c.SetDeadline(start.Add(time.Minute))
		b[0] = byte(n)
		if _, err := c.Write(b); err != nil {
			return fmt.Errorf("after %d round trips: %w", n, err)
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return fmt.Errorf("after %d round trips: %w", n, err)
		}
		if b[0] != byte(n) {
			return fmt.Errorf("byte %d came back as %d", byte(n), b[0])
		}
		if d := time.Since(start); d > longest {
			longest, until = d, time.Now()
		}
		time.Sleep(time.Duration(every) * time.Millisecond)
	}
	return report(fmt.Sprintf("%d round trips on one connection, longest %v", n, longest),
		map[string]any{"count": n, "longest_ms": ms(longest), "longest_until_unix_ms": until.UnixMilli()})
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// span is a number of seconds.
func span(seconds float64) time.Duration { return time.Duration(seconds * float64(time.Second)) }
