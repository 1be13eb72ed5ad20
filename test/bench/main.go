// Command bench prints culvert's figures on the test cluster beside those of
// raw kubectl port-forward, taken in the same run: medians of interleaved
// rounds, so that what lasts are the ratios. Run it with `make bench`, as root.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// path is a way from the laptop to the pods.
type path struct {
	name string
	addr func(port int) string
}

// cell is one measurement of testapp's.
type cell struct {
	name  string
	unit  string
	args  func(p path) []string
	field string
	bytes bool // its traffic counts for CPU per GB
}

func main() {
	rounds := flag.Int("rounds", 3, "interleaved rounds; medians are printed")
	seconds := flag.Int("seconds", 3, "length of one throughput measurement")
	keep := flag.Bool("keep", false, "leave the test cluster up")
	out := flag.String("json", "", "also write the figures to this file")
	way := flag.String("carrier", "auto", "the carrier that culvert uses: auto, port-forward or pods-proxy")
	flag.Parse()
	if err := run(*rounds, *seconds, *keep, *out, *way); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(rounds, seconds int, keep bool, out, way string) (err error) {
	m, err := netlab.New()
	if err != nil {
		return err
	}
	defer func() {
		m.Close() // the daemon first: it gives back the laptop's names
		if !keep {
			m.Cluster("down", "--all")
		}
	}()
	up := m.ClusterCommand("up")
	up.Stdout, up.Stderr = os.Stderr, os.Stderr
	if err := up.Run(); err != nil {
		return fmt.Errorf("testcluster up: %w", err)
	}
	image, err := m.LoadImage()
	if err != nil {
		return err
	}
	config, err := m.Kubeconfig("", "developer")
	if err != nil {
		return err
	}
	if err := m.StartDaemon(); err != nil {
		return err
	}
	connectTook, err := connect(m, config, image, way)
	if err != nil {
		return err
	}
	defer m.Culvert(netlab.Alice, "disconnect")

	r := m.Kubectl("", nil, "-n", "demo", "get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[0].metadata.name} {.items[0].status.podIP}")
	pod, ip, ok := strings.Cut(strings.TrimSpace(r.Stdout), " ")
	if !ok {
		return fmt.Errorf("finding an echo pod: %v", r)
	}
	paths := []path{{"culvert", func(port int) string { return fmt.Sprintf("%s:%d", ip, port) }}}
	for i, kind := range []struct{ name, websockets string }{{"port-forward WebSocket", "true"}, {"port-forward SPDY", "false"}} {
		base := 19000 + 1000*i
		// A reset from the pod's side makes the whole kubectl exit: keep it up.
		stop := forward(m, config, kind.websockets, pod, base)
		defer stop()
		paths = append(paths, path{kind.name, func(port int) string { return fmt.Sprintf("127.0.0.1:%d", base+port-9000) }})
	}
	time.Sleep(2 * time.Second)

	secs := fmt.Sprint(seconds)
	cells := []cell{
		{"up, 1 connection", "Mbit/s", func(p path) []string { return []string{"push", p.addr(9002), secs, "1"} }, "mbit_per_s", true},
		{"down, 1 connection", "Mbit/s", func(p path) []string { return []string{"pull", p.addr(9003), secs, "1"} }, "mbit_per_s", true},
		{"up, 8 connections", "Mbit/s", func(p path) []string { return []string{"push", p.addr(9002), secs, "8"} }, "mbit_per_s", true},
		{"down, 8 connections", "Mbit/s", func(p path) []string { return []string{"pull", p.addr(9003), secs, "8"} }, "mbit_per_s", true},
		{"round trip p50", "ms", func(p path) []string { return []string{"rtt", p.addr(9000), "2000"} }, "p50_ms", false},
		{"round trip p99", "ms", func(p path) []string { return []string{"rtt", p.addr(9000), "2000"} }, "p99_ms", false},
		{"new connections, 1 worker", "/s", func(p path) []string { return []string{"conns", p.addr(9000), secs, "1"} }, "per_s", false},
		{"new connections, 32 workers", "/s", func(p path) []string { return []string{"conns", p.addr(9000), secs, "32"} }, "per_s", false},
	}
	procs, err := processes(m)
	if err != nil {
		return err
	}
	idle := procs.resident()
	values := map[string]map[string][]float64{}
	cpu := map[string][]float64{} // process -> seconds per GB, of culvert's bulk cells
	for round := range rounds {
		for _, c := range cells {
			for _, p := range paths {
				before := procs.cpu()
				v, moved, err := measure(m, c, p)
				if err != nil {
					fmt.Fprintf(os.Stderr, "round %d, %s, %s: %v\n", round+1, c.name, p.name, err)
					continue
				}
				if values[c.name] == nil {
					values[c.name] = map[string][]float64{}
				}
				values[c.name][p.name] = append(values[c.name][p.name], v)
				if c.bytes && p.name == "culvert" && moved > 0 {
					for name, s := range procs.cpu() {
						cpu[name] = append(cpu[name], (s-before[name])/(moved/1e9))
					}
				}
			}
		}
		fmt.Fprintf(os.Stderr, "round %d of %d done\n", round+1, rounds)
	}
	report := report{Date: time.Now().UTC(), Rounds: rounds, Connect: connectTook.Seconds(), Idle: idle, Loaded: procs.resident(), CPU: map[string]float64{}}
	for name, vs := range cpu {
		report.CPU[name] = median(vs)
	}
	for _, c := range cells {
		row := row{Name: c.name, Unit: c.unit, Values: map[string]float64{}}
		for _, p := range paths {
			row.Values[p.name] = median(values[c.name][p.name])
		}
		report.Rows = append(report.Rows, row)
	}
	report.print(paths)
	if out != "" {
		b, err := json.MarshalIndent(report, "", "  ")
		if err != nil {
			return err
		}
		return os.WriteFile(out, append(b, '\n'), 0o644)
	}
	return nil
}

// connect times `culvert connect` until the first byte from a Service's name.
func connect(m *netlab.Machine, config, image, way string) (time.Duration, error) {
	begun := time.Now()
	r := m.Run(netlab.Alice, "/bin/sh", "-c", "culvert connect --kubeconfig "+config+" --image "+image+" --carrier "+way+" >/dev/null && curl -sS --max-time 10 -o /dev/null http://echo.demo/healthz")
	if r.Code != 0 {
		return 0, fmt.Errorf("connect: %v\ndaemon:\n%s", r, m.Tail(20))
	}
	return time.Since(begun), nil
}

// forward runs kubectl port-forward again and again until stopped.
func forward(m *netlab.Machine, config, websockets, pod string, base int) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			cmd := m.Command(ctx, netlab.Alice, m.Repo+"/test/cluster/bin/kubectl", "--kubeconfig", config, "-n", "demo", "port-forward", "pod/"+pod,
				fmt.Sprintf("%d:9000", base), fmt.Sprintf("%d:9002", base+2), fmt.Sprintf("%d:9003", base+3))
			cmd.Env = append(cmd.Env, "KUBECTL_PORT_FORWARD_WEBSOCKETS="+websockets)
			_ = cmd.Run()
		}
	}()
	return func() { cancel(); <-done }
}

// measure runs testapp on the laptop; moved is bytes, for throughput.
func measure(m *netlab.Machine, c cell, p path) (value, moved float64, err error) {
	var r netlab.Result
	for range 3 { // a raw port-forward may just be starting again
		if r = m.Run(netlab.Alice, m.Testapp(), append([]string{"--json"}, c.args(p)...)...); r.Code == 0 {
			break
		}
		time.Sleep(2 * time.Second)
	}
	if r.Code != 0 {
		return 0, 0, fmt.Errorf("testapp: %v", r)
	}
	var got map[string]any
	if err := json.Unmarshal([]byte(r.Stdout), &got); err != nil {
		return 0, 0, err
	}
	value, ok := got[c.field].(float64)
	if !ok {
		return 0, 0, fmt.Errorf("no %s in %s", c.field, r.Stdout)
	}
	if s, ok := got["seconds"].(float64); ok {
		moved = value * 1e6 / 8 * s
	}
	return value, moved, nil
}

func median(v []float64) float64 {
	if len(v) == 0 {
		return 0
	}
	v = slices.Sorted(slices.Values(v))
	return v[len(v)/2]
}

type row struct {
	Name   string             `json:"name"`
	Unit   string             `json:"unit"`
	Values map[string]float64 `json:"values"`
}

type report struct {
	Date    time.Time          `json:"date"`
	Rounds  int                `json:"rounds"`
	Rows    []row              `json:"rows"`
	Connect float64            `json:"connectSeconds"` // until the first byte from a Service by name
	CPU     map[string]float64 `json:"cpuSecondsPerGB"`
	Idle    map[string]float64 `json:"idleMB"`
	Loaded  map[string]float64 `json:"loadedMB"`
}

func (r report) print(paths []path) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprint(w, "\t")
	for _, p := range paths {
		fmt.Fprintf(w, "%s\t", p.name)
	}
	fmt.Fprintf(w, "culvert / WebSocket\n")
	for _, row := range r.Rows {
		fmt.Fprintf(w, "%s, %s\t", row.Name, row.Unit)
		for _, p := range paths {
			fmt.Fprintf(w, "%.4g\t", row.Values[p.name])
		}
		if raw := row.Values[paths[1].name]; raw > 0 {
			fmt.Fprintf(w, "%.2f", row.Values[paths[0].name]/raw)
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "connect until the first byte, s\t%.2f\n", r.Connect)
	for _, name := range []string{"session", "agent", "daemon"} {
		fmt.Fprintf(w, "%s: memory idle / after load, MB\t%.0f / %.0f\n", name, r.Idle[name], r.Loaded[name])
	}
	for _, name := range []string{"session", "agent"} {
		fmt.Fprintf(w, "%s: CPU s per GB\t%.2f\n", name, r.CPU[name])
	}
	w.Flush()
	fmt.Printf("medians of %d interleaved rounds\n", r.Rounds)
}
