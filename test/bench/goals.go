package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// goal is a figure that has to reach something.
type goal struct {
	Figure   string   `json:"figure"`
	Goal     string   `json:"goal"`
	Measured *float64 `json:"measured"` // null: not measured in this run
	Holds    bool     `json:"holds"`
}

// aim is how a goal is judged.
type aim struct {
	figure string
	sign   string // ≥ or ≤
	bound  float64
	unit   string
	value  func(*report) (float64, bool)
}

// of is a cell of a table.
func of(table, row, column string) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) { return r.find(table).get(row, column) }
}

// ratio is one cell to another.
func ratio(a, b func(*report) (float64, bool)) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		x, ok1 := a(r)
		y, ok2 := b(r)
		if !ok1 || !ok2 || y == 0 {
			return 0, false
		}
		return x / y, true
	}
}

// greatest and least of several cells; all have to be there.
func greatest(all ...func(*report) (float64, bool)) func(*report) (float64, bool) {
	return pick(func(a, b float64) bool { return a > b }, all)
}

func least(all ...func(*report) (float64, bool)) func(*report) (float64, bool) {
	return pick(func(a, b float64) bool { return a < b }, all)
}

func pick(better func(a, b float64) bool, all []func(*report) (float64, bool)) func(*report) (float64, bool) {
	return func(r *report) (best float64, ok bool) {
		for i, f := range all {
			v, ok := f(r)
			if !ok {
				return 0, false
			}
			if i == 0 || better(v, best) {
				best = v
			}
		}
		return best, len(all) > 0
	}
}

// The rows that goals look at.
const (
	upRow, downRow = "up, 1", "down, 1"
	cutRow         = "after a cut of 5 s: link back until traffic"
	cpuOf          = "CPU of "
)

func onCluster(row, column string) func(*report) (float64, bool) {
	return of(carriersTable, row, column)
}

// underBulkRatio is the worse of both directions, to the idle median.
func underBulkRatio(congestion, loss, percentile string) func(*report) (float64, bool) {
	row := func(direction string) func(*report) (float64, bool) {
		return of(latencyTable(congestion), loss+" % loss, "+direction+": "+percentile+" to idle", best)
	}
	return greatest(row("up"), row("down"))
}

// toDirect is what bulk reaches of direct TCP on the same link.
func toDirect(direction string) func(*report) (float64, bool) {
	row := "0 % loss, " + direction + ": bulk"
	return ratio(of(latencyTable("cubic"), row, best), of(latencyTable("cubic"), row, direct))
}

var aims = []aim{
	{"one connection up, pods/proxy, to raw kubectl port-forward (WebSocket)", "≥", 1.3, "", ratio(onCluster(upRow, best), onCluster(upRow, webSocket))},
	{"one connection down, pods/proxy, to raw kubectl port-forward (WebSocket)", "≥", 0.85, "", ratio(onCluster(downRow, best), onCluster(downRow, webSocket))},
	{"one connection up, port-forward, to raw SPDY", "≥", 0.5, "", ratio(onCluster(upRow, portForward), onCluster(upRow, spdy))},
	{"one connection down, port-forward, to raw SPDY", "≥", 0.4, "", ratio(onCluster(downRow, portForward), onCluster(downRow, spdy))},
	{"network-bound (100 Mbit/s, 50 ms), to direct TCP, the worse of up and down", "≥", 0.95, "", least(toDirect("up"), toDirect("down"))},
	{"round trip p50, pods/proxy, to raw kubectl port-forward (WebSocket)", "≤", 0.7, "", ratio(onCluster("round trip p50", best), onCluster("round trip p50", webSocket))},
	{"ping p50 under bulk, no loss, cubic, to idle, the worse of up and down", "≤", 1.6, "", underBulkRatio("cubic", "0", "p50")},
	{"ping p99 under bulk, no loss, cubic, to idle p50", "≤", 2, "", underBulkRatio("cubic", "0", "p99")},
	{"ping p50 under bulk, 1 % loss, cubic, to idle", "≤", 1.1, "", underBulkRatio("cubic", "1", "p50")},
	{"ping p99 under bulk, 1 % loss, cubic, to idle p50", "≤", 3, "", underBulkRatio("cubic", "1", "p99")},
	{"beside: ping p50 under bulk, no loss, bbr", "≤", 1.6, "", underBulkRatio("bbr", "0", "p50")},
	{"beside: ping p99 under bulk, no loss, bbr", "≤", 2, "", underBulkRatio("bbr", "0", "p99")},
	{"one connection up, UDP, to stock wireguard-go with stock netstack", "≥", 1, "", ratio(onCluster(upRow, udpCarrier), onCluster(upRow, stockNet))},
	{"one connection down, UDP, to stock wireguard-go with stock netstack", "≥", 1, "", ratio(onCluster(downRow, udpCarrier), onCluster(downRow, stockNet))},
	{"CPU of the session, plain carrier, one connection, the worse of up and down", "≤", 1.2, "s/GB",
		greatest(of(plainTable, cpuOf+"session: "+upRow, culvertColumn), of(plainTable, cpuOf+"session: "+downRow, culvertColumn))},
	{"CPU of the agent, plain carrier, one connection, the worse of up and down", "≤", 1.5, "s/GB",
		greatest(of(plainTable, cpuOf+"agent: "+upRow, culvertColumn), of(plainTable, cpuOf+"agent: "+downRow, culvertColumn))},
	{"new connections, 32 workers, 8 targets, plain carrier", "≥", 5000, "/s", of(plainTable, "new connections, 32", culvertColumn)},
	{"memory of the session, 8 bulk flows", "≤", 60, "MB", greatest(of(memoryTable, "8 bulk flows up", "session"), of(memoryTable, "8 bulk flows down", "session"))},
	{"memory of the agent, 8 bulk flows", "≤", 100, "MB", greatest(of(memoryTable, "8 bulk flows up", "agent"), of(memoryTable, "8 bulk flows down", "agent"))},
	{"memory of the agent, 10,000 idle connections", "≤", 250, "MB", of(memoryTable, idleRow, "agent")},
	{"carrier cut for 5 s, network back: traffic flows after", "≤", 1, "s", of(reconnectTable, cutRow, best)},
	{"the same over port-forward", "≤", 1, "s", of(reconnectTable, cutRow, portForward)},
	{"the same over UDP", "≤", 1, "s", of(reconnectTable, cutRow, udpCarrier)},
	{"exchange, from the command to the first request at the machine, gates run", "≤", 1, "s", of(exchangeTable, warmRow, toMachine)},
	{"the same, the first in a namespace", "≤", 5, "s", of(exchangeTable, coldRow, toMachine)},
	{"cable cut: until the origin serves new connections", "≤", 3, "s", of(lossTable, "cable cut: until the origin serves", freshOnes)},
	{"cable back: until the machine serves", "≤", 3, "s", of(lossTable, "cable cut: back until the machine serves", freshOnes)},
	{"requests that fail when an exchange ends and starts", "≤", 0, "", greatest(of(lossTable, "leave, and exchange again: failed", freshOnes), of(lossTable, "leave, and exchange again: failed", keptOnes))},
	{"requests that fail when a gate or the agent is deleted", "≤", 0, "",
		greatest(of(lossTable, "gate deleted: failed", freshOnes), of(lossTable, "gate deleted: failed", keptOnes), of(lossTable, "agent deleted: failed", freshOnes), of(lossTable, "agent deleted: failed", keptOnes))},
	{"mesh: requests/s through the router, to nginx with the same rule", "≥", 0.8, "", ratio(of(meshTable, meshRateRow, meshRouter), of(meshTable, meshRateRow, meshNginx))},
	{"mesh: p99 through the router, to nginx", "≤", 1, "", ratio(of(meshTable, meshRateRow+": p99", meshRouter), of(meshTable, meshRateRow+": p99", meshNginx))},
	{"mesh: p50 that the router adds to one client's request", "≤", 0.3, "ms", func(r *report) (float64, bool) {
		with, ok1 := of(meshTable, meshOneRow+": p50", meshRouter)(r)
		without, ok2 := of(meshTable, meshOneRow+": p50", meshDirect)(r)
		return with - without, ok1 && ok2
	}},
	{"mesh: requests/s of 250 developers' router, to one's", "≥", 0.9, "", ratio(of(meshTable, crowdedRow, meshRouter), of(meshTable, crowdedBefore, meshRouter))},
	{"mesh: memory of a gate at 1,000 WebSockets", "≤", 60, "MB", of(meshTable, socketsRow, meshRouter)},
}

// judge measures the goals of the issue against a report.
func judge(r *report) []goal {
	var all []goal
	for _, a := range aims {
		g := goal{Figure: a.figure, Goal: strings.TrimSpace(fmt.Sprintf("%s %g %s", a.sign, a.bound, a.unit))}
		if v, ok := a.value(r); ok {
			g.Measured = &v
			g.Holds = a.sign == "≥" && v >= a.bound || a.sign == "≤" && v <= a.bound
		}
		all = append(all, g)
	}
	return all
}

func printGoals(out io.Writer, goals []goal) {
	fmt.Fprintln(out, "\nGoals")
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, g := range goals {
		switch {
		case g.Measured == nil:
			fmt.Fprintf(w, "%s\t%s\t-\tnot measured\n", g.Figure, g.Goal)
		case g.Holds:
			fmt.Fprintf(w, "%s\t%s\t%s\tholds\n", g.Figure, g.Goal, figure(*g.Measured))
		default:
			fmt.Fprintf(w, "%s\t%s\t%s\tdoes not hold\n", g.Figure, g.Goal, figure(*g.Measured))
		}
	}
	w.Flush()
}
