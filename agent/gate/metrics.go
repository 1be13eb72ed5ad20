package gate

import (
	"fmt"
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// metrics are read when they are asked for, from the counters of the routes.
type metrics struct {
	gate     *Gate
	registry *prometheus.Registry

	open, total, refused, bytes, machine *prometheus.Desc

	// Of meshes.
	requests, memberOpen, memberHere *prometheus.Desc
}

func newMetrics(g *Gate) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("culvert_gate_"+name, help, append([]string{"service", "port", "protocol"}, labels...), nil)
	}
	m := &metrics{
		gate:     g,
		registry: prometheus.NewRegistry(),
		open:     desc("connections", "Open TCP connections, or UDP flows.", "to"),
		total:    desc("connections_total", "TCP connections, or UDP flows.", "to"),
		refused:  desc("refused_total", "TCP connections, or datagrams, that nobody served."),
		bytes:    desc("bytes_total", "Bytes from clients (up) and to them (down).", "direction"),
		machine:  desc("machine_here", "1 while the machine serves the port, by its agent's word."),

		requests:   desc("requests_total", "Requests of a mesh: of the origin, of a member at his machine, at the origin for want of it (open), or failed.", "session", "to"),
		memberOpen: desc("member_requests", "A member's requests and upgraded connections that are under way.", "session"),
		memberHere: desc("member_machine_here", "1 while the member's machine serves the port, by its agent's word.", "session"),
	}
	gauge := func(name, help string, read func() float64) {
		m.registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "culvert_gate_" + name, Help: help}, read))
	}
	gauge("generation", "Generation of the state in force.", func() float64 { return float64(g.generation()) })
	gauge("draining_connections", "Open TCP connections that are asked to end.", func() float64 { return float64(g.drainingCount()) })
	gauge("udp_flows_evicted", "UDP flows ended early because there were too many.", func() float64 { return float64(g.flows.evicted.Load()) })
	m.registry.MustRegister(m, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{m.open, m.total, m.refused, m.bytes, m.machine, m.requests, m.memberOpen, m.memberHere} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	m.gate.mu.Lock()
	defer m.gate.mu.Unlock()
	for at, r := range m.gate.routes {
		sp := r.spec.Load()
		labels := []string{sp.key, strconv.Itoa(int(sp.Port)), at.protocol}
		put := func(d *prometheus.Desc, t prometheus.ValueType, v float64, more ...string) {
			ch <- prometheus.MustNewConstMetric(d, t, v, append(labels[:len(labels):len(labels)], more...)...)
		}
		put(m.open, prometheus.GaugeValue, float64(r.count.openMachine.Load()), "machine")
		put(m.open, prometheus.GaugeValue, float64(r.count.openOrigin.Load()), "origin")
		put(m.total, prometheus.CounterValue, float64(r.count.totalMachine.Load()), "machine")
		put(m.total, prometheus.CounterValue, float64(r.count.totalOrigin.Load()), "origin")
		put(m.refused, prometheus.CounterValue, float64(r.count.refused.Load()))
		put(m.bytes, prometheus.CounterValue, float64(r.count.up.Load()), "up")
		put(m.bytes, prometheus.CounterValue, float64(r.count.down.Load()), "down")
		if sp.table != nil {
			put(m.requests, prometheus.CounterValue, float64(r.count.requestsToOrigin.Load()), "", "origin")
			told := map[string]bool{} // a session has one set of counters
			for _, x := range sp.table.members {
				session := x.Holder.Session
				if told[session] {
					continue
				}
				told[session] = true
				put(m.requests, prometheus.CounterValue, float64(x.count.requests.Load()), session, "machine")
				put(m.requests, prometheus.CounterValue, float64(x.count.toOrigin.Load()), session, "open")
				put(m.requests, prometheus.CounterValue, float64(x.count.failed.Load()), session, "failed")
				put(m.memberOpen, prometheus.GaugeValue, float64(x.count.open.Load()), session)
				here := 0.0
				if x.watch.status() == intercept.Accepted {
					here = 1
				}
				put(m.memberHere, prometheus.GaugeValue, here, session)
			}
		}
		if sp.watch != nil {
			here := 0.0
			if sp.watch.status() == intercept.Accepted {
				here = 1
			}
			put(m.machine, prometheus.GaugeValue, here)
		}
	}
}

func (g *Gate) generation() int64 {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.state.Generation
}

func (g *Gate) drainingCount() (n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for c := range g.conns {
		if c.draining.Load() {
			n++
		}
	}
	return n
}

// handler serves metrics and health, as the agent does: `culvert-agent health`
// asks either.
func (m *metrics) handler(g *Gate) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	health := func(check func() error) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if err := check(); err != nil {
				w.WriteHeader(http.StatusServiceUnavailable)
				fmt.Fprintln(w, err)
				return
			}
			fmt.Fprintln(w, "ok")
		}
	}
	// Who answers has had the lock that every connection takes.
	mux.HandleFunc("GET /healthz", health(func() error { g.generation(); g.flows.count(); return nil }))
	mux.HandleFunc("GET /readyz", health(g.ready))
	return mux
}
