package main

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// A datagram of a blast begins with 8 bytes that name the run and 8 bytes of a
// sequence number. The highest two are questions to the server.
const (
	blastHeader = 16
	blastCount  = ^uint64(0)     // how many of the run arrived? Answered by the same with 8 bytes of count
	blastSend   = ^uint64(0) - 1 // send a run to me: then 8 bytes each of size, bits per second, nanoseconds
)

// blast sends numbered datagrams at a rate, or has them sent, and says how many
// arrived.
func blast(args []string) error {
	addr, err := word(args, 0, "address")
	if err != nil {
		return err
	}
	way, err := word(args, 1, "direction, up or down,")
	if err != nil {
		return err
	}
	size, err := number(args, 2, 1200)
	if err != nil {
		return err
	}
	mbit, err := decimal(args, 3, 100)
	if err != nil {
		return err
	}
	seconds, err := decimal(args, 4, 3)
	if err != nil {
		return err
	}
	if size < blastHeader+24 || size > 65000 {
		return fmt.Errorf("%d is not a size between %d and 65000", size, blastHeader+24)
	}
	c, err := net.Dial("udp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.(*net.UDPConn).SetReadBuffer(4 << 20)
	run := rand.Uint64()
	var sent, arrived uint64
	switch way {
	case "up":
		sent = sendRun(func(b []byte) { _, _ = c.Write(b) }, run, size, mbit*1e6, span(seconds))
		arrived, err = askCount(c, run)
	case "down":
		sent, arrived, err = receiveRun(c, run, size, mbit*1e6, span(seconds))
	default:
		err = fmt.Errorf("%q is neither up nor down", way)
	}
	if err != nil {
		return err
	}
	rate := float64(arrived) * float64(size) * 8 / 1e6 / seconds
	loss := 1 - float64(arrived)/float64(max(sent, 1))
	return report(fmt.Sprintf("blast %s: %d of %d datagrams of %d bytes arrived, %.1f Mbit/s, %.2f %% lost", way, arrived, sent, size, rate, 100*loss),
		map[string]any{"test": "blast", "sent": sent, "received": arrived, "mbit_per_s": rate, "loss": loss, "size": size})
}

// sendRun sends datagrams evenly, as far as sleeping allows: what is due each
// half millisecond goes at once.
func sendRun(write func([]byte), run uint64, size int, bits float64, d time.Duration) (sent uint64) {
	b := make([]byte, size)
	binary.BigEndian.PutUint64(b, run)
	start := time.Now()
	for {
		past := time.Since(start)
		if past >= d {
			return sent
		}
		for due := uint64(past.Seconds() * bits / 8 / float64(size)); sent < due && time.Since(start) < d; sent++ {
			binary.BigEndian.PutUint64(b[8:], sent)
			write(b)
		}
		time.Sleep(500 * time.Microsecond)
	}
}

// askCount asks the server how much arrived, until the number stands still.
func askCount(c net.Conn, run uint64) (uint64, error) {
	q, b := make([]byte, blastHeader), make([]byte, 64<<10)
	binary.BigEndian.PutUint64(q, run)
	binary.BigEndian.PutUint64(q[8:], blastCount)
	last, same := uint64(0), 0
	for range 50 {
		time.Sleep(100 * time.Millisecond)
		if _, err := c.Write(q); err != nil {
			return 0, err
		}
		c.SetReadDeadline(time.Now().Add(time.Second))
		n, err := c.Read(b)
		if err != nil || n < blastHeader+8 || binary.BigEndian.Uint64(b) != run {
			continue
		}
		count := binary.BigEndian.Uint64(b[blastHeader:])
		if same++; count != last {
			last, same = count, 0
		}
		if same == 2 {
			return count, nil
		}
	}
	return 0, fmt.Errorf("the server does not say what arrived")
}

// receiveRun has the server send; the highest number tells how much that was,
// but for what was lost at the very end.
func receiveRun(c net.Conn, run uint64, size int, bits float64, d time.Duration) (sent, arrived uint64, err error) {
	q := make([]byte, blastHeader+24)
	binary.BigEndian.PutUint64(q, run)
	binary.BigEndian.PutUint64(q[8:], blastSend)
	binary.BigEndian.PutUint64(q[16:], uint64(size))
	binary.BigEndian.PutUint64(q[24:], uint64(bits))
	binary.BigEndian.PutUint64(q[32:], uint64(d))
	if _, err := c.Write(q); err != nil {
		return 0, 0, err
	}
	b := make([]byte, 64<<10)
	end := time.Now().Add(d + 10*time.Second)
	for {
		quiet := time.Now().Add(time.Second)
		if arrived == 0 || end.Before(quiet) {
			quiet = end
		}
		c.SetReadDeadline(quiet)
		n, err := c.Read(b)
		if err != nil {
			break
		}
		if n == size && binary.BigEndian.Uint64(b) == run {
			arrived++
			sent = max(sent, binary.BigEndian.Uint64(b[8:])+1)
		}
	}
	if arrived == 0 {
		return 0, 0, fmt.Errorf("nothing arrived")
	}
	return sent, arrived, nil
}

// serveBlast is the server of blasts. It counts the runs of the last minute; 64
// of them at most, so that nobody fills its memory.
func serveBlast(addr string) error {
	ua, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return err
	}
	pc, err := net.ListenUDP("udp", ua)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	_ = pc.SetReadBuffer(4 << 20)
	type tally struct {
		count uint64
		begun time.Time
	}
	runs := map[uint64]*tally{}
	var sending sync.Map // run -> nothing: a question that came twice is one
	b := make([]byte, 64<<10)
	for {
		n, from, err := pc.ReadFromUDPAddrPort(b)
		if err != nil || n < blastHeader {
			continue
		}
		run, number := binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])
		switch {
		case number == blastCount:
			t := runs[run]
			if t == nil {
				t = &tally{}
			}
			_, _ = pc.WriteToUDPAddrPort(binary.BigEndian.AppendUint64(b[:blastHeader:blastHeader], t.count), from)
		case number == blastSend && n >= blastHeader+24:
			if _, again := sending.LoadOrStore(run, nil); again {
				continue
			}
			size := int(min(65000, max(blastHeader, binary.BigEndian.Uint64(b[16:]))))
			bits := float64(binary.BigEndian.Uint64(b[24:]))
			d := time.Duration(min(uint64(time.Minute), binary.BigEndian.Uint64(b[32:])))
			go func() {
				defer sending.Delete(run)
				sendRun(func(b []byte) { _, _ = pc.WriteToUDPAddrPort(b, from) }, run, size, bits, d)
			}()
		default:
			t := runs[run]
			if t == nil {
				for id, old := range runs {
					if time.Since(old.begun) > time.Minute || len(runs) >= 64 {
						delete(runs, id)
					}
				}
				t = &tally{begun: time.Now()}
				runs[run] = t
			}
			t.count++
		}
	}
}
