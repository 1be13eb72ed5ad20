package main

import (
	"fmt"
	"io"
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

var aims = []aim{
	{"CPU of the session on a plain carrier, the worse of up and down", "≤", 1.2, "s/GB",
		greatest(of(plainTable, "CPU of session: up, 1", "culvert"), of(plainTable, "CPU of session: down, 1", "culvert"))},
	{"CPU of the agent on a plain carrier, the worse of up and down", "≤", 1.5, "s/GB",
		greatest(of(plainTable, "CPU of agent: up, 1", "culvert"), of(plainTable, "CPU of agent: down, 1", "culvert"))},
	{"new connections, 32 workers, 8 targets, plain carrier", "≥", 5000, "/s", of(plainTable, "new connections, 32", "culvert")},
}

// judge measures the goals of the issue against a report.
func judge(r *report) []goal {
	var all []goal
	for _, a := range aims {
		g := goal{Figure: a.figure, Goal: fmt.Sprintf("%s %g %s", a.sign, a.bound, a.unit)}
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
