package main

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/culvert-dev/culvert/test/bench/rig"
)

// culvertColumn is the data path under measurement.
const culvertColumn = "culvert"

const plainTable = "Without a cluster: one plain TCP stream between two namespaces, or one UDP path"

// plain measures the data path alone, beside stock wireguard-go.
func (b *bench) plain() error {
	t := b.report.table(plainTable)
	p, err := rig.NewPlain(rig.PlainConfig{Testapp: b.testapp(), Profiles: b.profiles})
	if err != nil {
		return err
	}
	defer p.Close()
	type target struct {
		name  string
		addrs []netip.Addr
	}
	ways := []target{{culvertColumn, p.Targets}, {direct, []netip.Addr{p.Direct}}}
	if b.profiles == "" { // who profiles wants nothing else on the machine
		for i, s := range []struct {
			name  string
			relay netip.Addr
		}{{stock, netip.Addr{}}, {stockNet, p.Direct}} {
			tunnel, err := rig.NewStock(rig.StockConfig{Near: p.Laptop, Far: p.Pod, FarAddr: p.Direct, Number: uint8(i), Relay: s.relay})
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			defer tunnel.Close()
			ways = append(ways, target{s.name, []netip.Addr{tunnel.Addr}})
		}
	}
	for range b.rounds {
		for _, w := range ways {
			one := func(port int) string { return netip.AddrPortFrom(w.addrs[0], uint16(port)).String() }
			all := func(port int) string {
				var list []string
				for _, a := range w.addrs {
					list = append(list, netip.AddrPortFrom(a, uint16(port)).String())
				}
				return strings.Join(list, ",")
			}
			cells := []cell{up(b, 1), down(b, 1)}
			if w.name == culvertColumn {
				cells = append(cells, up(b, 8), down(b, 8))
			}
			for _, c := range cells {
				session, agent := rig.CPU(p.Session.PID()), rig.CPU(p.Agent.PID())
				got, err := b.into(t, w.name, p.Command, c, one)
				// The seconds before testapp counts are in the CPU time, too.
				if gb := got["bytes"] / 1e9 * (b.seconds + warmUp) / b.seconds; err == nil && w.name == culvertColumn && gb > 0 {
					t.add(cpuOf+"session: "+c.figures[0].row, "s/GB", w.name, (rig.CPU(p.Session.PID())-session)/gb)
					t.add(cpuOf+"agent: "+c.figures[0].row, "s/GB", w.name, (rig.CPU(p.Agent.PID())-agent)/gb)
				}
			}
			_, _ = b.into(t, w.name, p.Command, roundTrip(), one)
			if w.name == culvertColumn || w.name == direct {
				_, _ = b.into(t, w.name, p.Command, connections(b, 1), one)
				_, _ = b.into(t, w.name, p.Command, connections(b, 32), all)
			}
		}
	}
	t.note("memory of session and agent afterwards: %.0f and %.0f MB", rig.Resident(p.Session.PID()), rig.Resident(p.Agent.PID()))
	t.note("new connections: culvert to %d targets, direct to one", len(p.Targets))
	return nil
}
