package main

import (
	"fmt"
	"net"
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

// throughput runs step on each of some connections until the time is over; what
// moves in the time before, for slow start, does not count.
func throughput(name string, args []string, step func(net.Conn, []byte) (int, error)) error {
	addr, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	seconds, err := decimal(args, 1, 5)
	if err != nil {
		return err
	}
	count, err := number(args, 2, 1)
	if err != nil {
		return err
	}
	warm, err := decimal(args, 3, 0)
	if err != nil {
		return err
	}
	cs, err := dialMany([]string{addr}, count)
	defer closeAll(cs)
	if err != nil {
		return err
	}
	var total atomic.Int64
	var wg sync.WaitGroup
	start := time.Now().Add(span(warm))
	end := start.Add(span(seconds))
	for _, c := range cs {
		c.SetDeadline(end)
		wg.Go(func() {
			b := make([]byte, 256<<10)
			for {
				n, err := step(c, b)
				if warm == 0 || time.Now().After(start) {
					total.Add(int64(n))
				}
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	d := time.Since(start).Seconds()
	if d < 0.9*seconds {
		return fmt.Errorf("every connection broke after %.1f s", d+warm)
	}
	rate := float64(total.Load()) * 8 / 1e6 / d
	return report(fmt.Sprintf("%s: %.1f Mbit/s, %d connection(s), %.1f s", name, rate, count, d),
		map[string]any{"test": name, "mbit_per_s": rate, "connections": count, "seconds": d, "bytes": total.Load()})
}
