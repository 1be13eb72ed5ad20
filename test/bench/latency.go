package main

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/test/bench/rig"
	"github.com/culvert-dev/culvert/test/netlab"
)

// latencyTable is the round trip while one connection carries as much as it can.
func latencyTable(congestion string) string {
	return "Ping under bulk, 100 Mbit/s, 25 ms each way, " + congestion
}

// The link of the latency part, and how long one bulk transfer runs before and
// while the round trip is measured.
const (
	latencyRate, latencyDelay = "100mbit", "25ms"
	latencyQueue              = "640kb" // what is under way on this link: direct TCP has 95 Mbit/s with it, 80 with 256 KiB
	latencySettle             = 2.5     // a download through the API server fills the link after that, one of direct TCP after 1 s
	latencyMeasure            = 3.0
	pings                     = 4 // connections; a round trip of 50 ms makes 80 samples a second
)

var congestions = []string{"cubic", "bbr"}

// latency measures culvert beside the direct way with each congestion control,
// without loss and with 1 %.
func (b *bench) latency() error {
	defer b.lab.link("--reset", "--pods", "on", "--congestion", "default")
	for range max(1, b.rounds-2) { // a round takes 90 s
		for _, congestion := range congestions {
			if err := b.latencyWith(congestion); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *bench) latencyWith(congestion string) error {
	l := b.lab
	t := b.report.table(latencyTable(congestion))
	// First the link, then the session: one that knew a better link would take
	// this one's delay for a queue, and so would BBR.
	l.disconnect()
	if err := l.link("--reset", "--pods", "on", "--congestion", congestion, "--rate", latencyRate, "--delay", latencyDelay, "--queue", latencyQueue); err != nil {
		return err
	}
	if err := l.connect(best); err != nil {
		return err
	}
	note, err := l.congestionInForce()
	if err != nil {
		return err
	}
	t.note("congestion control in force: %s", note)
	for _, loss := range []string{"0", "1"} {
		if err := l.link("--loss", loss+"%"); err != nil {
			return err
		}
		for _, w := range []way{{name: best, addr: l.inside.addr}, {name: direct, addr: l.outside.addr}} {
			if loss == "0" {
				idle, err := b.measure(l.command, "ping", w.addr(9000), "1", fmt.Sprint(pings))
				if err != nil {
					return fmt.Errorf("idle round trip, %s: %w", w.name, err)
				}
				t.add("idle p50", "ms", w.name, idle["p50_ms"])
			}
			b.underBulk(t, w, loss, "up", "push", 9002)
			b.underBulk(t, w, loss, "down", "pull", 9003)
		}
	}
	return nil
}

// underBulk measures the round trip while a transfer runs, and the transfer.
func (b *bench) underBulk(t *Table, w way, loss, direction, test string, port int) {
	prefix := fmt.Sprintf("%s %% loss, %s: ", loss, direction)
	type result struct {
		answer
		err error
	}
	bulk := make(chan result, 1)
	go func() {
		got, err := b.measure(b.lab.command, test, w.addr(port), fmt.Sprint(latencyMeasure), "1", fmt.Sprint(latencySettle))
		bulk <- result{got, err}
	}()
	time.Sleep(time.Duration(latencySettle * float64(time.Second)))
	busy, err := b.measure(b.lab.command, "ping", w.addr(9000), fmt.Sprint(latencyMeasure-0.2), fmt.Sprint(pings))
	moved := <-bulk
	if err = errors.Join(err, moved.err); err != nil {
		t.fail(prefix+"p50", "ms", w.name, err)
		return
	}
	t.add(prefix+"p50", "ms", w.name, busy["p50_ms"])
	t.add(prefix+"p99", "ms", w.name, busy["p99_ms"])
	if idle, ok := t.get("idle p50", w.name); ok {
		t.add(prefix+"p50 to idle", "×", w.name, busy["p50_ms"]/idle)
		t.add(prefix+"p99 to idle", "×", w.name, busy["p99_ms"]/idle)
	}
	t.add(prefix+"bulk", "Mbit/s", w.name, moved.answer["mbit_per_s"])
}

var congestionName = regexp.MustCompile(`\b(cubic|bbr|reno|dctcp|vegas)\b`)

// congestionInForce tells which congestion control the open TCP connections have:
// of the session to the API server, both ends of it, and of a new connection
// through the tunnel and past it.
func (l *lab) congestionInForce() (string, error) {
	server, err := rig.OpenNamespace("/run/netns/" + netlab.Lab() + "-cp")
	if err != nil {
		return "", err
	}
	defer server.Close()
	pod, err := namespaceOf(l.outside)
	if err != nil {
		return "", err
	}
	defer pod.Close()
	hold := l.command(l.Repo+"/test/cluster/bin/testapp", "hold", l.inside.addr(9000), "1.5")
	straight := l.command(l.Repo+"/test/cluster/bin/testapp", "hold", l.outside.addr(9000), "1.5")
	if err := errors.Join(hold.Start(), straight.Start()); err != nil {
		return "", err
	}
	defer func() { _, _ = hold.Wait(), straight.Wait() }()
	time.Sleep(700 * time.Millisecond)
	var all []string
	for _, q := range []struct {
		what   string
		in     *rig.Namespace
		filter []string
	}{
		{"carrier at the laptop", l.laptop, []string{"dport", "=", ":6443"}},
		{"carrier at the API server", server, []string{"sport", "=", ":6443", "and", "dst", laptopAddr}},
		{"inside the tunnel", l.laptop, []string{"dst", l.inside.ip}},
		{"direct at the laptop", l.laptop, []string{"dst", l.outside.ip}},
		{"direct at the pod", pod, []string{"sport", "=", ":9000", "and", "dst", laptopAddr}},
	} {
		out, err := q.in.Command("ss", append([]string{"-tinH", "state", "established"}, q.filter...)...).Output()
		if err != nil {
			return "", fmt.Errorf("ss: %w", err)
		}
		names := congestionName.FindAllString(string(out), -1)
		slices.Sort(names)
		names = slices.Compact(names)
		if len(names) == 0 {
			names = []string{"no connection"}
		}
		all = append(all, q.what+" "+strings.Join(names, " and "))
	}
	return strings.Join(all, ", "), nil
}

// laptopAddr is the laptop's address in its home network.
const laptopAddr = "192.168.50.2"
