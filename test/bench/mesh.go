package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/test/bench/rig"
	"github.com/culvert-dev/culvert/test/netlab"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// The table of this part, and the columns and rows that goals look at.
const (
	meshTable = "Mesh"

	meshDirect  = "direct"  // the Service of the same pods
	meshRouter  = "router"  // the meshed one, without the mark
	meshNginx   = "nginx"   // Debian's, that looks at the same header
	meshMachine = "machine" // the meshed one, with the mark

	meshRateRow   = "requests, 8 clients"
	meshOneRow    = "1 client"
	socketsRow    = "memory at 1000 WebSockets"
	crowdedRow    = "requests, 8 clients, 250 developers"
	crowdedBefore = "requests, 8 clients, 1 developer"
)

// meshWorkload is two Services of the same pods, one to mesh.
const meshWorkload = `
apiVersion: v1
kind: Service
metadata: {name: bench-meshed, namespace: demo}
spec:
  selector: {app: echo}
  ports: [{name: http, port: 80, targetPort: http}]
---
apiVersion: v1
kind: Service
metadata: {name: bench-direct, namespace: demo}
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

// mesh measures requests that gates look at.
func (b *bench) mesh() error {
	l := b.lab
	if err := l.link("--reset"); err != nil {
		return err
	}
	defer l.link("--reset", "--pods", "on")
	l.disconnect()
	if err := l.loadNginx(); err != nil {
		return err
	}
	if r := l.Kubectl("", strings.NewReader(meshWorkload), "apply", "-f", "-"); r.Code != 0 {
		return fmt.Errorf("making the Services: %v", r)
	}
	defer l.Kubectl("", strings.NewReader(meshWorkload), "delete", "--ignore-not-found", "-f", "-")
	ip := strings.TrimSpace(l.Kubectl("", nil, "-n", "demo", "get", "service", "bench-direct", "-o", "jsonpath={.spec.clusterIP}").Stdout)
	nginx := nginxWorkload(ip + ":80")
	if r := l.Kubectl("", strings.NewReader(nginx), "apply", "-f", "-"); r.Code != 0 {
		return fmt.Errorf("making nginx: %v", r)
	}
	defer l.Kubectl("", strings.NewReader(nginx), "delete", "--ignore-not-found", "-f", "-")
	for _, wait := range [][]string{{"wait", "--for=condition=Ready", "pod/bench-client", "--timeout=60s"}, {"-n", "demo", "rollout", "status", "deployment/bench-nginx", "--timeout=60s"}} {
		if r := l.Kubectl("", nil, wait...); r.Code != 0 {
			return fmt.Errorf("kubectl %v: %v", wait, r)
		}
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
	r := l.Culvert(netlab.Alice, "mesh", "bench-meshed", "-n", "demo", "--kubeconfig", l.config, "--expose", "8080:80", "--version-mark", "bench")
	if r.Code != 0 {
		return fmt.Errorf("culvert mesh: %v", r)
	}
	defer l.leave()
	time.Sleep(3 * time.Second) // until gates go by the origin's address
	t := b.report.table(meshTable)
	for range b.rounds {
		b.throughRouter(t)
	}
	b.socketsThroughGate(t)
	for range b.rounds {
		for _, c := range []struct {
			row  string
			many int
		}{{crowdedBefore, 1}, {crowdedRow, crowdOfMesh}} {
			if err := l.crowdMesh("bench-meshed", c.many); err != nil {
				return err
			}
			// A value that is nobody's: it is looked up among all.
			b.meshLoad(t, c.row, meshRouter, "bench-meshed", "--workers", "8", "--header", "VERSION:nobody")
		}
	}
	t.note("a client in a pod, kept connections, as fast as answers come; gates and nginx are two pods each, one on each node, before the same pods, and nginx has %d workers", runtime.NumCPU())
	return l.crowdMesh("bench-meshed", 1)
}

// throughRouter measures each way once.
func (b *bench) throughRouter(t *Table) {
	for _, w := range []struct {
		column, service string
		flags           []string
	}{
		{meshDirect, "bench-direct", nil}, {meshRouter, "bench-meshed", nil}, {meshNginx, "bench-nginx", nil},
		{meshMachine, "bench-meshed", []string{"--header", "VERSION:bench"}},
	} {
		b.meshLoad(t, meshRateRow, w.column, w.service, append([]string{"--workers", "8"}, w.flags...)...)
		b.meshLoad(t, meshOneRow, w.column, w.service, append([]string{"--workers", "1"}, w.flags...)...)
	}
}

// meshLoad is a closed loop of requests.
func (b *bench) meshLoad(t *Table, row, column, service string, flags ...string) {
	args := append([]string{"load", "http://" + service + ".demo/who", "--seconds", "3", "--rate", "0"}, flags...)
	got, err := b.measure(b.lab.inClient, args...)
	if err == nil && got["failed"] > 0 {
		err = fmt.Errorf("%s: %.0f failed", row, got["failed"])
	}
	for _, f := range []figureOf{{row: row, unit: "/s", field: "per_s"}, {row: row + ": p50", unit: "ms", field: "p50_ms"}, {row: row + ": p99", unit: "ms", field: "p99_ms"}} {
		if err != nil {
			t.fail(f.row, f.unit, column, err)
		} else {
			t.add(f.row, f.unit, column, got[f.field])
		}
	}
}

// socketsThroughGate notes what a gate needs for 1,000 WebSockets to the origin.
func (b *bench) socketsThroughGate(t *Table) {
	gate := processOf("culvert-agent", func(pid int) bool {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		return strings.Contains(string(line), "\x00gate\x00")
	})
	if gate == 0 {
		t.fail(socketsRow, "MB", meshRouter, errors.New("no gate on this machine"))
		return
	}
	t.add("memory before", "MB", meshRouter, rig.Resident(gate))
	memory := watch(gate, gate)
	_, err := b.measure(b.lab.inClient, "ws", "ws://bench-meshed.demo/ws", "--conns", "1000", "--count", "3", "--hold", "3s")
	most, _ := memory.stop()
	if err != nil {
		t.fail(socketsRow, "MB", meshRouter, err)
		return
	}
	t.add(socketsRow, "MB", meshRouter, most)
}

// crowdOfMesh is how many developers one Service has at most in the bench.
const crowdOfMesh = 250

// crowdMesh has a mesh be one of n developers, who are all the one that is there, with
// other marks.
func (l *lab) crowdMesh(service string, n int) error {
	r := l.Kubectl("", nil, "-n", "demo", "get", "configmap", intercept.GateName, "-o", "json")
	var object map[string]any
	if err := json.Unmarshal([]byte(r.Stdout), &object); err != nil {
		return fmt.Errorf("reading the gates' state: %w, %v", err, r)
	}
	data, _ := object["data"].(map[string]any)
	text, _ := data[service+".json"].(string)
	var e intercept.Entry
	if err := json.Unmarshal([]byte(text), &e); err != nil || len(e.Members) == 0 {
		return fmt.Errorf("reading the entry of %s: %v, %q", service, err, text)
	}
	e.Members = e.Members[:1]
	for i := 1; i < n; i++ {
		m := e.Members[0]
		m.Holder.Session = fmt.Sprint("bench", i)
		m.Match = []intercept.Condition{{On: intercept.OnHeader, Key: "VERSION", How: intercept.Exact, Value: fmt.Sprint("value", i)}}
		e.Members = append(e.Members, m)
	}
	changed, err := json.Marshal(e)
	if err != nil {
		return err
	}
	generation, _ := data["generation"].(string)
	number, err := strconv.ParseInt(generation, 10, 64)
	if err != nil {
		return fmt.Errorf("the state's generation: %w", err)
	}
	data[service+".json"], data["generation"] = string(changed), strconv.FormatInt(number+1, 10)
	whole, err := json.Marshal(object)
	if err != nil {
		return err
	}
	if r := l.Kubectl("", strings.NewReader(string(whole)), "replace", "-f", "-"); r.Code != 0 {
		return fmt.Errorf("changing the gates' state: %v", r)
	}
	// The session tells the gates within 3 s or so. Both have to know the last developer,
	// or to have forgotten him.
	value, right := fmt.Sprint("value", crowdOfMesh-1), 0
	for end := time.Now().Add(20 * time.Second); right < 10; {
		var got struct{ Server string }
		r := netlab.Run(l.inClient("", "--json", "ask", "http://"+service+".demo/who", "--header", "VERSION:"+value))
		if err := json.Unmarshal([]byte(r.Stdout), &got); err == nil && (got.Server == machineName) == (n == crowdOfMesh) {
			right++
			continue
		}
		if right = 0; time.Now().After(end) {
			return fmt.Errorf("with %d developers a request with VERSION:%s is answered by %v", n, value, r)
		}
		time.Sleep(200 * time.Millisecond)
	}
	return nil
}
