package main

import (
	"fmt"
	"time"

	"github.com/culvert-dev/culvert/test/bench/rig"
)

const memoryTable = "Memory and crowds of connections"

const idleRow = "10000 idle connections"

// The crowds.
const idleCrowd, busyCrowd = 10_000, 1_000

// memory measures what session and agent need, first with a few bulk flows, then
// with many connections.
func (b *bench) memory() error {
	l := b.lab
	t := b.report.table(memoryTable)
	l.disconnect() // both processes are fresh
	// The usual 256 MiB bound the agent to 5,600 connections.
	if err := l.connect(best, "--pod-quota", "2c,512m"); err != nil {
		return err
	}
	session, agent, err := l.processes()
	if err != nil {
		return err
	}
	add := func(row string, session, agent float64) {
		t.add(row, "MB", "session", session)
		t.add(row, "MB", "agent", agent)
	}
	add("connected, idle", rig.Resident(session), rig.Resident(agent))
	t.add("connected, idle", "MB", "daemon", rig.Resident(l.DaemonPID()))
	for _, c := range []struct {
		row  string
		args []string
	}{
		{"8 bulk flows up", []string{"push", l.inside.addr(9002), "3", "8"}},
		{"8 bulk flows down", []string{"pull", l.inside.addr(9003), "3", "8"}},
		{fmt.Sprintf("%d busy connections", busyCrowd), []string{"crowd", l.inside.addr(9000), fmt.Sprint(busyCrowd), "3", "busy"}},
		{idleRow, []string{"crowd", l.inside.addr(9000), fmt.Sprint(idleCrowd), "3"}},
	} {
		w := watch(session, agent)
		got, err := b.measure(l.command, c.args...)
		s, a := w.stop()
		if err != nil {
			t.fail(c.row, "MB", "session", err)
			t.fail(c.row, "MB", "agent", err)
			continue
		}
		add(c.row, s, a)
		if open, ok := got["open_s"]; ok {
			t.note("%s: opened in %.1f s, and all of them answered afterwards", c.row, open)
		}
		if p50, ok := got["p50_ms"]; ok {
			t.note("%s: %.0f round trips/s, p50 %.1f ms, p99 %.1f ms", c.row, got["count"]/3, p50, got["p99_ms"])
		}
	}
	t.note("the agent's pod has 512 MiB; the greatest VmRSS while it happens")
	return nil
}

// watcher notes the greatest memory of two processes.
type watcher struct {
	pids [2]int
	most [2]float64
	end  chan struct{}
	done chan struct{}
}

func watch(session, agent int) *watcher {
	w := &watcher{pids: [2]int{session, agent}, end: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(w.done)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			for i, pid := range w.pids {
				w.most[i] = max(w.most[i], rig.Resident(pid))
			}
			select {
			case <-tick.C:
			case <-w.end:
				return
			}
		}
	}()
	return w
}

func (w *watcher) stop() (session, agent float64) {
	close(w.end)
	<-w.done
	return w.most[0], w.most[1]
}
