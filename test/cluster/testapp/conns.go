package main

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// conns opens connections one after the other, with several workers.
func conns(args []string) error {
	list, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	addrs := strings.Split(list, ",")
	seconds, err := decimal(args, 1, 5)
	if err != nil {
		return err
	}
	workers, err := number(args, 2, 8)
	if err != nil {
		return err
	}
	var good, bad atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	end := start.Add(span(seconds))
	for i := range workers {
		addr := addrs[i%len(addrs)]
		wg.Go(func() {
			for time.Now().Before(end) {
				if err := once(addr); err != nil {
					bad.Add(1)
				} else {
					good.Add(1)
				}
			}
		})
	}
	wg.Wait()
	d := time.Since(start).Seconds()
	rate := float64(good.Load()) / d
	if good.Load() == 0 {
		return fmt.Errorf("none of %d connections worked", bad.Load())
	}
	return report(fmt.Sprintf("conns: %.1f connections/s, %d worker(s), %d failed", rate, workers, bad.Load()),
		map[string]any{"test": "conns", "per_s": rate, "workers": workers, "failed": bad.Load()})
}

// once connects, has one byte echoed and closes.
func once(addr string) error {
	c, err := net.DialTimeout("tcp", addr, 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	b := []byte{1}
	if _, err := c.Write(b); err != nil {
		return err
	}
	_, err = io.ReadFull(c, b)
	return err
}

// crowd keeps many connections open at once, idle or busy with round trips.
func crowd(args []string) error {
	list, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	count, err := number(args, 1, 1000)
	if err != nil {
		return err
	}
	seconds, err := decimal(args, 2, 5)
	if err != nil {
		return err
	}
	busy := len(args) > 3 && args[3] == "busy"
	start := time.Now()
	cs, err := dialMany(strings.Split(list, ","), count)
	defer closeAll(cs)
	if err != nil {
		return err
	}
	opened := time.Since(start)
	if !busy {
		time.Sleep(span(seconds))
		start = time.Now()
		// Each of them still lives.
		var wg sync.WaitGroup
		var broken atomic.Int64
		for w := range dialers {
			wg.Go(func() {
				for i := w; i < len(cs); i += dialers {
					if _, err := trip(cs[i]); err != nil {
						broken.Add(1)
					}
				}
			})
		}
		wg.Wait()
		if n := broken.Load(); n > 0 {
			return fmt.Errorf("%d of %d idle connections were broken", n, count)
		}
		return report(fmt.Sprintf("crowd: %d connections opened in %.1f s, idle %.1f s, then all answered", count, opened.Seconds(), seconds),
			map[string]any{"test": "crowd", "connections": count, "open_s": opened.Seconds()})
	}
	ds, err := tripsUntil(cs, time.Now().Add(span(seconds)))
	if err != nil {
		return err
	}
	return reportTrips("crowd", ds)
}

// dialers is how many connections are being opened at once.
const dialers = 64

// dialMany opens connections to the addresses in turn. It returns those that it
// opened also with an error.
func dialMany(addrs []string, count int) ([]net.Conn, error) {
	cs := make([]net.Conn, count)
	errs := make(chan error, dialers)
	var wg sync.WaitGroup
	for w := range min(dialers, count) {
		wg.Go(func() {
			for i := w; i < count; i += dialers {
				c, err := net.DialTimeout("tcp", addrs[i%len(addrs)], 10*time.Second)
				if err != nil {
					errs <- err
					return
				}
				cs[i] = c
			}
		})
	}
	wg.Wait()
	close(errs)
	return cs, <-errs
}

func closeAll(cs []net.Conn) {
	for _, c := range cs {
		if c != nil {
			c.Close()
		}
	}
}
