package main

import (
	"fmt"
	"time"
)

const matrixTable = "One connection by link, cubic"

// link is what a cell of the matrix has; delay is the round trip.
type link struct{ rate, delay, loss int } // Mbit/s (0: unlimited), ms, %

func (l link) String() string {
	rate := "unlimited"
	if l.rate > 0 {
		rate = fmt.Sprintf("%d Mbit/s", l.rate)
	}
	return fmt.Sprintf("%s, %d ms, %d %%", rate, l.delay, l.loss)
}

// chosenLinks are nine of the 27 in which every two values meet once; a whole
// matrix takes four minutes.
var chosenLinks = []link{
	{20, 0, 0}, {20, 20, 1}, {20, 80, 3},
	{100, 0, 1}, {100, 20, 3}, {100, 80, 0},
	{0, 0, 3}, {0, 20, 0}, {0, 80, 1},
}

func allLinks() []link {
	var all []link
	for _, rate := range []int{20, 100, 0} {
		for _, delay := range []int{0, 20, 80} {
			for _, loss := range []int{0, 1, 3} {
				all = append(all, link{rate, delay, loss})
			}
		}
	}
	return all
}

// What one transfer takes: slow start does not count.
const matrixSettle, matrixMeasure = "0.7", "1.3"

// matrix measures one connection each way on many links.
func (b *bench) matrix() error {
	l := b.lab
	t := b.report.table(matrixTable)
	links := chosenLinks
	if b.whole {
		links = allLinks()
	}
	defer l.link("--reset", "--pods", "on", "--congestion", "default")
	for _, k := range links {
		// A session of its own for each link: after a worse one the carrier's window
		// would stay small for longer than a measurement. It connects before anything
		// is lost, but by the link's delay: what knew a shorter one takes it for a queue.
		l.disconnect()
		delay := time.Duration(k.delay) * time.Millisecond / 2
		if err := l.link("--reset", "--pods", "on", "--congestion", "cubic", "--rate", fmt.Sprintf("%dmbit", k.rate), "--delay", delay.String()); err != nil {
			return err
		}
		if err := l.connect(best); err != nil {
			return err
		}
		if err := l.link("--loss", fmt.Sprintf("%d%%", k.loss)); err != nil {
			return err
		}
		for _, w := range []way{{name: best, addr: l.inside.addr}, {name: direct, addr: l.outside.addr}} {
			for _, c := range []struct {
				direction, test string
				port            int
			}{{"up", "push", 9002}, {"down", "pull", 9003}} {
				got, err := b.measure(l.command, c.test, w.addr(c.port), matrixMeasure, "1", matrixSettle)
				if err != nil {
					t.fail(k.String()+": "+c.direction, "Mbit/s", w.name, err)
					continue
				}
				t.add(k.String()+": "+c.direction, "Mbit/s", w.name, got["mbit_per_s"])
			}
		}
	}
	t.note("rate, round trip and loss of the link, loss both ways; one transfer of 2 s a cell")
	return nil
}
