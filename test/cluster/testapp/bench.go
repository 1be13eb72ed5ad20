package main

import (
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

func push(args []string) error {
	return throughput("push", args, func(c net.Conn, b []byte) (int, error) { return c.Write(b) })
}

func pull(args []string) error {
	return throughput("pull", args, func(c net.Conn, b []byte) (int, error) { return c.Read(b) })
}

func throughput(name string, args []string, step func(net.Conn, []byte) (int, error)) error {
	addr, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	seconds, err := number(args, 1, 5)
	if err != nil {
		return err
	}
	count, err := number(args, 2, 1)
	if err != nil {
		return err
	}
	cs := make([]net.Conn, count)
	for i := range cs {
		if cs[i], err = net.DialTimeout("tcp", addr, 10*time.Second); err != nil {
			return err
		}
		defer cs[i].Close()
	}
	var total atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	end := start.Add(time.Duration(seconds) * time.Second)
	for _, c := range cs {
		c.SetDeadline(end)
		wg.Go(func() {
			b := make([]byte, 256<<10)
			for {
				n, err := step(c, b)
				total.Add(int64(n))
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	d := time.Since(start).Seconds()
	if d < 0.9*float64(seconds) {
		return fmt.Errorf("every connection broke after %.1f s", d)
	}
	rate := float64(total.Load()) * 8 / 1e6 / d
	return report(fmt.Sprintf("%s: %.1f Mbit/s, %d connection(s), %.1f s", name, rate, count, d),
		map[string]any{"test": name, "mbit_per_s": rate, "connections": count, "seconds": d})
}

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
	b := []byte{1}
	for range count {
		start := time.Now()
		c.SetDeadline(start.Add(30 * time.Second))
		if _, err := c.Write(b); err != nil {
			return err
		}
		if _, err := io.ReadFull(c, b); err != nil {
			return err
		}
		ds = append(ds, time.Since(start))
	}
	slices.Sort(ds)
	p50, p90, p99 := ds[count/2], ds[count*9/10], ds[count*99/100]
	return report(fmt.Sprintf("rtt: p50 %v p90 %v p99 %v max %v (%d)", p50, p90, p99, ds[count-1], count), map[string]any{
		"test": "rtt", "p50_ms": ms(p50), "p90_ms": ms(p90), "p99_ms": ms(p99), "max_ms": ms(ds[count-1]), "count": count})
}

func conns(args []string) error {
	addr, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	seconds, err := number(args, 1, 5)
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
	end := start.Add(time.Duration(seconds) * time.Second)
	for range workers {
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
