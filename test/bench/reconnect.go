package main

import (
	"fmt"
	"syscall"
	"time"
)

const reconnectTable = "Traffic flows again"

// cutFor is how long the link is cut.
const cutFor = 5 * time.Second

// reconnect measures how long a connection is silent that outlives a cut link,
// and a session process that was killed.
func (b *bench) reconnect() error {
	l := b.lab
	t := b.report.table(reconnectTable)
	for range max(1, b.rounds-1) {
		for _, carrier := range []string{best, portForward, udpCarrier} {
			if err := l.connect(carrier); err != nil {
				t.fail(cutRow, "s", carrier, err)
				continue
			}
			b.interrupted(t, carrier, cutRow, cutFor+5*time.Second, func() (time.Time, error) {
				if err := l.link("--cut", "on"); err != nil {
					return time.Time{}, err
				}
				time.Sleep(cutFor)
				back := time.Now() // a little early: the command below takes a moment
				return back, l.link("--cut", "off")
			})
			if carrier != best {
				continue
			}
			b.interrupted(t, carrier, "after kill -9 of the session until traffic", 6*time.Second, func() (time.Time, error) {
				pid, err := l.sessionPID()
				if err != nil {
					return time.Time{}, err
				}
				return time.Now(), syscall.Kill(pid, syscall.SIGKILL)
			})
		}
	}
	t.note("one TCP connection with a byte every 5 ms lives through it")
	return nil
}

// interrupted keeps a connection busy while something happens that silences it,
// and notes the time from the moment that happen returns until it answers.
func (b *bench) interrupted(t *Table, carrier, row string, total time.Duration, happen func() (time.Time, error)) {
	type result struct {
		answer
		err error
	}
	held := make(chan result, 1)
	go func() {
		got, err := b.measure(b.lab.command, "hold", b.lab.inside.addr(9000), fmt.Sprint(total.Seconds()), "5")
		held <- result{got, err}
	}()
	time.Sleep(time.Second)
	from, err := happen()
	got := <-held
	if err == nil {
		err = got.err
	}
	until := time.UnixMilli(int64(got.answer["longest_until_unix_ms"]))
	if err == nil && until.Before(from) {
		err = fmt.Errorf("the connection was not silent: %v ms at most", got.answer["longest_ms"])
	}
	if err != nil {
		t.fail(row, "s", carrier, err)
		b.lab.disconnect() // whatever state it is in, the next one begins anew
		return
	}
	t.add(row, "s", carrier, until.Sub(from).Seconds())
}
