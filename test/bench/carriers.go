package main

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/culvert-dev/culvert/test/bench/rig"
)

const carriersTable = "On the cluster, unlimited link"

// The ways to a pod, as columns. Culvert's are named by --carrier's values.
const (
	best        = "pods-proxy" // of the stream carriers
	portForward = "port-forward"
	udpCarrier  = "udp"

	webSocket = "kubectl WebSocket"
	spdy      = "kubectl SPDY"
	rawProxy  = "raw pods/proxy"
	stock     = "stock wireguard-go"
	stockNet  = "stock with netstack"
	direct    = "direct"
)

// way is a way to a pod.
type way struct {
	name    string
	culvert bool // its name is that of a carrier
	addr    func(port int) string
	broken  error // why it cannot be used
}

// baselines starts the ways that are not culvert's.
func (l *lab) baselines() (ways []way, stop func(), err error) {
	var stops []func()
	stop = func() {
		for _, f := range stops {
			f()
		}
	}
	local := func(base int) func(int) string {
		return func(port int) string { return fmt.Sprintf("127.0.0.1:%d", base+port-9000) }
	}
	stops = append(stops, l.forward("true", l.inside, 19000), l.forward("false", l.inside, 20000))
	ways = []way{{name: webSocket, addr: local(19000)}, {name: spdy, addr: local(20000)}}

	proxy, err := l.laptop.StartPodProxy(l.config, "demo/"+l.inside.name, 21000)
	if err == nil {
		stops = append(stops, proxy.Close)
	}
	ways = append(ways, way{name: rawProxy, addr: local(21000), broken: err})

	far, err := namespaceOf(l.outside)
	if err != nil {
		stop()
		return nil, nil, err
	}
	stops = append(stops, func() { far.Close() })
	for i, s := range []struct {
		name  string
		relay string
	}{{stock, ""}, {stockNet, l.inside.ip}} {
		c := rig.StockConfig{Near: l.laptop, Far: far, FarAddr: netip.MustParseAddr(l.outside.ip), Number: uint8(i)}
		if s.relay != "" {
			c.Relay = netip.MustParseAddr(s.relay)
		}
		tunnel, err := rig.NewStock(c)
		if err == nil {
			stops = append(stops, tunnel.Close)
		}
		ways = append(ways, way{name: s.name, broken: err, addr: func(port int) string { return fmt.Sprintf("%s:%d", tunnel.Addr, port) }})
	}
	ways = append(ways, way{name: direct, addr: l.outside.addr})
	return ways, stop, nil
}

// carriers measures every carrier and what it is compared with.
func (b *bench) carriers() error {
	l := b.lab
	t := b.report.table(carriersTable)
	var ways []way
	for _, c := range []string{best, portForward, udpCarrier} {
		ways = append(ways, way{name: c, culvert: true, addr: l.inside.addr})
	}
	others, stop, err := l.baselines()
	if err != nil {
		return err
	}
	defer stop()
	time.Sleep(time.Second) // until kubectl listens
	ways = append(ways, others...)
	for round := range b.rounds {
		for i := range ways {
			w := &ways[i]
			if w.culvert && w.broken == nil {
				if w.broken = l.connect(w.name); w.broken == nil {
					t.add("connect until the first byte", "s", w.name, l.connectTook.Seconds())
				}
			}
			b.carrier(t, w, round)
		}
	}
	return nil
}

// carrier measures one way for a round.
func (b *bench) carrier(t *Table, w *way, round int) {
	cells := []cell{up(b, 1), down(b, 1), roundTrip()}
	if w.culvert || w.name == webSocket {
		cells = append(cells, up(b, 8), down(b, 8))
	}
	if w.name == best || w.name == webSocket {
		cells = append(cells, up(b, 64), down(b, 64), connections(b, 1), connections(b, 32))
	}
	if w.culvert && round == 0 {
		cells = append(cells, blast("up"), blast("down"))
	}
	var session, agent int
	if w.culvert && w.broken == nil {
		session, agent, w.broken = b.lab.processes()
	}
	for _, c := range cells {
		if w.broken != nil {
			for _, f := range c.figures {
				t.fail(f.row, f.unit, w.name, w.broken)
			}
			continue
		}
		s, a := rig.CPU(session), rig.CPU(agent)
		got, err := b.patiently(t, w, c)
		if gb := got["bytes"] / 1e9 * (b.seconds + warmUp) / b.seconds; err == nil && w.culvert && gb > 0 && len(c.figures) == 1 {
			t.add(cpuOf+"session: "+c.figures[0].row, "s/GB", w.name, (rig.CPU(session)-s)/gb)
			t.add(cpuOf+"agent: "+c.figures[0].row, "s/GB", w.name, (rig.CPU(agent)-a)/gb)
		}
	}
}

// patiently measures a cell, again if kubectl port-forward has just ended and is
// starting anew.
func (b *bench) patiently(t *Table, w *way, c cell) (answer, error) {
	args := c.args(w.addr)
	err := errors.New("never tried")
	for range 3 {
		if w.name == webSocket || w.name == spdy {
			time.Sleep(200 * time.Millisecond) // it ends a moment after what made it end
			_ = b.lab.laptop.Await(netip.MustParseAddrPort(w.addr(9000)))
		}
		var got answer
		if got, err = b.measure(b.lab.command, args...); err == nil {
			for _, f := range c.figures {
				t.add(f.row, f.unit, w.name, got[f.field]*f.times())
			}
			return got, nil
		}
		if w.name != webSocket && w.name != spdy {
			break
		}
	}
	for _, f := range c.figures {
		t.fail(f.row, f.unit, w.name, err)
	}
	return nil, err
}

// blast offers more than the carriers take.
func blast(direction string) cell {
	const size, offered, seconds = "1200", "300", "1"
	return cell{
		func(addr func(int) string) []string {
			return []string{"blast", addr(9004), direction, size, offered, seconds}
		},
		[]figureOf{
			{row: "UDP " + direction + ", " + offered + " offered", unit: "Mbit/s", field: "mbit_per_s"},
			{row: "UDP " + direction + ", lost", unit: "%", field: "loss", scale: 100},
		},
	}
}
