package agent

import (
	"context"
	"errors"
	"net"
	"syscall"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// metrics are the agent's counters. Its gauges are read when they are asked for.
type metrics struct {
	registry       *prometheus.Registry
	streams        prometheus.Counter
	refusedStreams prometheus.Counter
	tcpTotal       prometheus.Counter
	tcpUp, tcpDown prometheus.Counter
	udpTotal       prometheus.Counter
	udpEvicted     prometheus.Counter
	udpUp, udpDown prometheus.Counter
	echoes         prometheus.Counter
	queries        *prometheus.CounterVec
	failedQueries  prometheus.Counter
	refusals       *prometheus.CounterVec
	dialErrors     *prometheus.CounterVec
	inboundTotal   prometheus.Counter
	inboundAway    prometheus.Counter
	inboundRefused prometheus.Counter
}

func newMetrics(a *Agent) *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	add := func(c prometheus.Collector) { m.registry.MustRegister(c) }
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "culvert_agent_" + name, Help: help})
		add(c)
		return c
	}
	vector := func(name, help, label string) *prometheus.CounterVec {
		c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: "culvert_agent_" + name, Help: help}, []string{label})
		add(c)
		return c
	}
	gauge := func(name, help string, read func(*node) float64) {
		add(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "culvert_agent_" + name, Help: help}, func() float64 {
			if n := a.node(); n != nil {
				return read(n)
			}
			return 0
		}))
	}
	m.streams = counter("streams_total", "Carrier streams attached.")
	m.refusedStreams = counter("streams_refused_total", "Carrier streams refused or never introduced.")
	m.tcpTotal = counter("tcp_connections_total", "TCP connections forwarded.")
	m.tcpUp = counter("tcp_up_bytes_total", "Bytes from the session to TCP targets.")
	m.tcpDown = counter("tcp_down_bytes_total", "Bytes from TCP targets to the session.")
	m.udpTotal = counter("udp_flows_total", "UDP flows forwarded.")
	m.udpEvicted = counter("udp_flows_evicted_total", "UDP flows ended early because there were too many.")
	m.udpUp = counter("udp_up_bytes_total", "Bytes from the session to UDP targets.")
	m.udpDown = counter("udp_down_bytes_total", "Bytes from UDP targets to the session.")
	m.echoes = counter("echo_requests_total", "ICMP echo requests forwarded.")
	m.queries = vector("dns_queries_total", "DNS queries relayed.", "network")
	m.failedQueries = counter("dns_queries_failed_total", "DNS queries that no nameserver answered.")
	m.refusals = vector("refused_total", "Flows to destinations that are not allowed, or above the bound.", "protocol")
	m.dialErrors = vector("tcp_dial_errors_total", "TCP targets that could not be reached.", "reason")
	m.inboundTotal = counter("inbound_connections_total", "Connections and UDP flows from the cluster for the session.")
	m.inboundAway = counter("inbound_away_total", "Those that were not served because the session did not answer, or there was no room.")
	m.inboundRefused = counter("inbound_refused_total", "Those that the session refused.")
	gauge("inbound_connections", "Open connections and UDP flows from the cluster.", func(n *node) float64 { return float64(n.door.count()) })
	gauge("tcp_connections", "Open TCP connections.", func(n *node) float64 { open, _ := n.tcp.counts(); return float64(open) })
	gauge("tcp_dialing", "TCP connections whose target has not answered.", func(n *node) float64 { _, d := n.tcp.counts(); return float64(d) })
	gauge("udp_flows", "UDP flows.", func(n *node) float64 { return float64(n.udp.count()) })
	gauge("peers", "Standard WireGuard peers.", func(n *node) float64 { return float64(n.peers.count()) })
	gauge("queue_bytes", "Packets that wait for WireGuard, in bytes.", func(n *node) float64 { return float64(n.endpoint.Queued()) })
	gauge("queue_dropped", "Packets that found the queue to WireGuard full.", func(n *node) float64 { return float64(n.endpoint.Dropped()) })
	gauge("carrier_udp_sent_bytes", "WireGuard messages sent by UDP, in bytes.", func(n *node) float64 { return float64(n.bind.Stats().Datagrams.Sent) })
	gauge("carrier_udp_received_bytes", "WireGuard messages received by UDP, in bytes.", func(n *node) float64 { return float64(n.bind.Stats().Datagrams.Received) })
	gauge("last_handshake_seconds", "Unix time of the last WireGuard handshake, 0 if none.", func(n *node) float64 {
		if t := n.tunnel.LastHandshake(); !t.IsZero() {
			return float64(t.UnixNano()) / 1e9
		}
		return 0
	})
	add(collectors.NewGoCollector())
	add(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) refused(protocol string) { m.refusals.WithLabelValues(protocol).Inc() }

func (m *metrics) dialFailed(err error) {
	reason := "other"
	var ne net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return
	case refusedByTarget(err):
		reason = "refused"
	case errors.As(err, &ne) && ne.Timeout():
		reason = "timeout"
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		reason = "unreachable"
	}
	m.dialErrors.WithLabelValues(reason).Inc()
}

// node is that of the session, nil before it came.
func (a *Agent) node() *node {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.owner == nil {
		return nil
	}
	return a.owner.node
}
