package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/test/bench/rig"
	"github.com/culvert-dev/culvert/test/netlab"
)

// The tables of this part, and the columns and rows that goals look at.
const (
	exchangeTable = "Exchange"
	lossTable     = "Failed requests at an exchange"

	toMachine = "exchanged" // served by the machine, through gate, agent and tunnel
	toPod     = "pod"       // the same program in a pod, by a Service of its own
	freshOnes = "new connections"
	keptOnes  = "kept connections"

	coldRow = "command to first request, no gates"
	warmRow = "command to first request, gates run"
	openRow = "memory at 1000 connections"
)

// interceptWorkload is three Services of the same pods: one to exchange, one to
// compare with, and one whose exchange keeps gates running. The client is a pod.
const interceptWorkload = `
apiVersion: v1
kind: Service
metadata: {name: bench-exchanged, namespace: demo}
spec:
  selector: {app: echo}
  ports: [{name: http, port: 80, targetPort: http}, {name: echo, port: 9000, targetPort: echo}]
---
apiVersion: v1
kind: Service
metadata: {name: bench-pod, namespace: demo}
spec:
  selector: {app: echo}
  ports: [{name: http, port: 80, targetPort: http}, {name: echo, port: 9000, targetPort: echo}]
---
apiVersion: v1
kind: Service
metadata: {name: bench-other, namespace: demo}
spec:
  selector: {app: echo}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Pod
metadata: {name: bench-client, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: testapp.local/testapp:1, args: [serve], imagePullPolicy: IfNotPresent}]
`

// machineName is what the program on the machine answers with.
const machineName = "machine"

// intercept measures traffic that comes from the cluster to the machine.
func (b *bench) intercept() error {
	l := b.lab
	if err := l.link("--reset"); err != nil { // no way to pods but the tunnel
		return err
	}
	defer l.link("--reset", "--pods", "on")
	l.disconnect()
	if r := l.Kubectl("", strings.NewReader(interceptWorkload), "apply", "-f", "-"); r.Code != 0 {
		return fmt.Errorf("making the Services: %v", r)
	}
	defer l.Kubectl("", strings.NewReader(interceptWorkload), "delete", "--ignore-not-found", "-f", "-")
	if r := l.Kubectl("", nil, "wait", "--for=condition=Ready", "pod/bench-client", "--timeout=60s"); r.Code != 0 {
		return fmt.Errorf("starting the client: %v", r)
	}
	var err error
	if l.admin, err = l.Kubeconfig("", "admin"); err != nil {
		return err
	}
	stop, err := l.serveLocally()
	if err != nil {
		return err
	}
	defer stop()
	if err := l.connect(best, "-n", "demo"); err != nil {
		return err
	}
	defer l.disconnect()
	for range b.rounds {
		if err := b.startOfExchange(); err != nil {
			return err
		}
	}
	if _, err := l.exchange("bench-exchanged"); err != nil {
		return err
	}
	defer l.leave()
	for range b.rounds {
		b.throughExchange()
	}
	b.crowdThroughGate()
	return b.failedRequests()
}

// serveLocally runs testapp on the machine.
func (l *lab) serveLocally() (stop func(), err error) {
	cmd := l.Command(context.Background(), netlab.Alice, l.Testapp(), "serve", "--name", machineName, "--on", "127.0.0.1")
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	for range 100 {
		err = l.Inside(func() error {
			c, err := net.DialTimeout("tcp", "127.0.0.1:8080", time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	return func() {
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()
	}, err
}

// exchange exchanges a Service and returns when the command began.
func (l *lab) exchange(service string) (begun time.Time, err error) {
	begun = time.Now()
	expose := "8080:80"
	if service != "bench-other" {
		expose += ",9000:9000"
	}
	r := l.Culvert(netlab.Alice, "exchange", service, "-n", "demo", "--kubeconfig", l.config, "--expose", expose)
	if r.Code != 0 {
		return begun, fmt.Errorf("culvert exchange %s: %v", service, r)
	}
	return begun, nil
}

// leave ends exchanges: those of these Services, or all.
func (l *lab) leave(services ...string) {
	if len(services) == 0 {
		l.Culvert(netlab.Alice, "leave", "--all")
	}
	for _, s := range services {
		l.Culvert(netlab.Alice, "leave", s, "-n", "demo")
	}
}

// inClient runs testapp in the client's pod.
func (l *lab) inClient(_ string, args ...string) *exec.Cmd {
	return l.ClusterCommand(append([]string{"exec", "cp", "--", "kubectl", "--kubeconfig", l.admin,
		"-n", "default", "exec", "bench-client", "--", "/testapp"}, args...)...)
}

// requests is what testapp's load tells beyond plain figures.
type requests struct {
	Failed  int
	Count   int
	Gap     float64 `json:"gap_ms"`
	Begun   int64   `json:"begun_unix_ms"`
	Answers map[string][]int64
}

// load asks a Service 200 times a second, in the background.
func (l *lab) load(service string, d time.Duration, flags ...string) func() (requests, error) {
	done := make(chan netlab.Result, 1)
	args := append([]string{"--json", "load", "http://" + service + ".demo/who", "--times", "--seconds", fmt.Sprint(d.Seconds())}, flags...)
	go func() { done <- netlab.Run(l.inClient("", args...)) }()
	return func() (r requests, err error) {
		got := <-done
		if err := json.Unmarshal([]byte(got.Stdout), &r); err != nil || got.Code != 0 {
			return r, fmt.Errorf("load of %s: %v", service, got)
		}
		return r, nil
	}
}

// first is when a server answered first after a moment.
func (r requests) first(after time.Time, is func(server string) bool) (time.Time, error) {
	best := int64(-1)
	for server, times := range r.Answers {
		for _, ms := range times {
			if is(server) && ms >= after.UnixMilli()-r.Begun && (best < 0 || ms < best) {
				best = ms
			}
		}
	}
	if best < 0 {
		return time.Time{}, errors.New("it never answered")
	}
	return time.UnixMilli(r.Begun + best), nil
}

func isMachine(server string) bool { return server == machineName }
func isPod(server string) bool     { return server != machineName }

// startOfExchange measures the time from the command to the first request at the
// machine, without gates in the namespace and with.
func (b *bench) startOfExchange() error {
	l := b.lab
	t := b.report.table(exchangeTable)
	for _, row := range []string{coldRow, warmRow} {
		if row == warmRow {
			if _, err := l.exchange("bench-other"); err != nil {
				return err
			}
		}
		wait := l.load("bench-exchanged", 6*time.Second, "--keepalive=false")
		time.Sleep(time.Second) // kubectl's start
		begun, err := l.exchange("bench-exchanged")
		got, loadErr := wait()
		var first time.Time
		if err = errors.Join(err, loadErr); err == nil {
			first, err = got.first(begun, isMachine)
		}
		if err != nil {
			t.fail(row, "s", toMachine, err)
		} else {
			t.add(row, "s", toMachine, first.Sub(begun).Seconds())
		}
		l.leave()
	}
	return nil
}

// throughExchange measures requests through an exchange, and to a pod.
func (b *bench) throughExchange() {
	t := b.report.table(exchangeTable)
	for _, w := range []struct{ column, service string }{{toMachine, "bench-exchanged"}, {toPod, "bench-pod"}} {
		for _, c := range []struct {
			row   string
			flags []string
			rate  bool
		}{
			{"200 requests/s, kept connections", []string{"--rate", "200"}, false},
			{"200 requests/s, new connections", []string{"--rate", "200", "--keepalive=false"}, false},
			{"requests, 8 clients, kept connections", []string{"--rate", "0", "--workers", "8"}, true},
			{"requests, 8 clients, new connections", []string{"--rate", "0", "--workers", "8", "--keepalive=false"}, true},
		} {
			args := append([]string{"load", "http://" + w.service + ".demo/who", "--seconds", "2"}, c.flags...)
			got, err := b.measure(b.lab.inClient, args...)
			if err == nil && got["failed"] > 0 {
				err = fmt.Errorf("%s: %.0f failed", c.row, got["failed"])
			}
			for _, f := range []figureOf{
				{row: c.row, unit: "/s", field: "per_s"}, {row: c.row + ": p50", unit: "ms", field: "p50_ms"}, {row: c.row + ": p99", unit: "ms", field: "p99_ms"},
			} {
				if f.field == "per_s" && !c.rate {
					continue // it is the rate that was asked for
				}
				if err != nil {
					t.fail(f.row, f.unit, w.column, err)
				} else {
					t.add(f.row, f.unit, w.column, got[f.field])
				}
			}
		}
	}
	t.note("a client in a pod; both Services lead to it by kube-proxy, and names by the cluster's DNS")
}

// crowdThroughGate notes what 1,000 connections need at once.
func (b *bench) crowdThroughGate() {
	l := b.lab
	t := b.report.table(exchangeTable)
	role := func(gate bool) int {
		return processOf("culvert-agent", func(pid int) bool {
			line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
			return strings.Contains(string(line), "\x00gate\x00") == gate
		})
	}
	session, err := l.sessionPID()
	agent, gate := role(false), role(true)
	if err == nil && (agent == 0 || gate == 0) {
		err = errors.New("no agent or no gate on this machine")
	}
	if err == nil {
		t.add("memory before", "MB", "agent", rig.Resident(agent))
		t.add("memory before", "MB", "gate", rig.Resident(gate))
		t.add("memory before", "MB", "session", rig.Resident(session))
		agentAndGate, sessionToo := watch(agent, gate), watch(session, session)
		_, err = b.measure(l.inClient, "crowd", "bench-exchanged.demo:9000", "1000", "3")
		a, g := agentAndGate.stop()
		s, _ := sessionToo.stop()
		if err == nil {
			t.add(openRow, "MB", "agent", a)
			t.add(openRow, "MB", "gate", g)
			t.add(openRow, "MB", "session", s)
		}
	}
	if err != nil {
		t.fail(openRow, "MB", "agent", err)
	}
	t.note("1000 idle connections through both gates; the figure of one of them, each the greatest VmRSS")
}

// failedRequests runs the load of 200 requests a second through what happens to
// an exchange, once.
func (b *bench) failedRequests() error {
	l := b.lab
	t := b.report.table(lossTable)
	pods := func(label string) []string {
		r := l.Kubectl("", nil, "-n", "demo", "get", "pods", "-l", "app.kubernetes.io/name="+label, "-o", "jsonpath={.items[*].metadata.name}")
		return strings.Fields(r.Stdout)
	}
	remove := func(label string) error {
		all := pods(label)
		if len(all) == 0 {
			return fmt.Errorf("there is no %s", label)
		}
		if r := l.Kubectl("", nil, "-n", "demo", "delete", "pod", all[0], "--wait=false"); r.Code != 0 {
			return fmt.Errorf("deleting %s: %v", all[0], r)
		}
		return nil
	}
	for _, c := range []struct {
		name string
		do   func() error
		back func() error // nil: it comes back by itself
		gap  bool         // how long until the origin serves, and then the machine
	}{
		{name: "leave, and exchange again", do: func() error {
			l.leave("bench-exchanged")
			_, err := l.exchange("bench-exchanged")
			return err
		}},
		{name: "cable cut", gap: true, do: func() error { return l.link("--cut", "on") }, back: func() error { return l.link("--cut", "off") }},
		{name: "session killed", do: func() error {
			pid, err := l.sessionPID()
			if err != nil {
				return err
			}
			return syscall.Kill(pid, syscall.SIGKILL)
		}},
		{name: "gate deleted", do: func() error { return remove("culvert-gate") }},
		{name: "agent deleted", do: func() error { return remove("culvert-agent") }},
	} {
		fresh := l.load("bench-exchanged", 12*time.Second, "--keepalive=false")
		kept := l.load("bench-exchanged", 12*time.Second)
		time.Sleep(2 * time.Second)
		begun := time.Now()
		err := c.do()
		var back time.Time
		if c.back != nil {
			time.Sleep(4 * time.Second)
			back = time.Now()
			err = errors.Join(err, c.back())
		}
		for column, wait := range map[string]func() (requests, error){freshOnes: fresh, keptOnes: kept} {
			got, e := wait()
			if err = errors.Join(err, e); err != nil {
				t.fail(c.name+": failed", "requests", column, err)
				continue
			}
			t.add(c.name+": failed", "requests", column, float64(got.Failed))
			t.add(c.name+": longest without an answer", "s", column, got.Gap/1000)
			if c.gap && column == freshOnes {
				b.failOver(t, c.name, got, begun, back)
			}
		}
		time.Sleep(2 * time.Second)
	}
	t.note("200 requests/s of 20 closed-loop clients with a time-out of 10 s for 12 s, with new connections and with kept ones at once")
	return nil
}

// failOver notes when origin and machine answered.
func (b *bench) failOver(t *Table, name string, got requests, begun, back time.Time) {
	origin, err := got.first(begun, isPod)
	if err != nil {
		t.fail(name+": until the origin serves", "s", freshOnes, err)
	} else {
		t.add(name+": until the origin serves", "s", freshOnes, origin.Sub(begun).Seconds())
	}
	machine, err := got.first(back, isMachine)
	if err != nil {
		t.fail(name+": back until the machine serves", "s", freshOnes, err)
	} else {
		t.add(name+": back until the machine serves", "s", freshOnes, machine.Sub(back).Seconds())
	}
}
