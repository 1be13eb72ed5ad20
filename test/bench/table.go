package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
)

// Table is the figures of one topic: a row for each figure, a column for each way
// to the pods.
type Table struct {
	Name    string   `json:"name"`
	Notes   []string `json:"notes,omitempty"`
	Columns []string `json:"columns"`
	Rows    []*Row   `json:"rows"`
}

// Row is one figure.
type Row struct {
	Name  string           `json:"name"`
	Unit  string           `json:"unit"`
	Cells map[string]*Cell `json:"cells"` // by column
}

// Cell is one figure of one way: what each round brought, and the median.
type Cell struct {
	Median float64   `json:"median"`
	Rounds []float64 `json:"rounds,omitempty"`
	Error  string    `json:"error,omitempty"` // why there is no figure, or not of every round
}

func (t *Table) row(name, unit string) *Row {
	for _, r := range t.Rows {
		if r.Name == name {
			return r
		}
	}
	r := &Row{Name: name, Unit: unit, Cells: map[string]*Cell{}}
	t.Rows = append(t.Rows, r)
	return r
}

func (t *Table) cell(row, unit, column string) *Cell {
	if !slices.Contains(t.Columns, column) {
		t.Columns = append(t.Columns, column)
	}
	r := t.row(row, unit)
	if r.Cells[column] == nil {
		r.Cells[column] = &Cell{}
	}
	return r.Cells[column]
}

// add puts a round's figure into a cell.
func (t *Table) add(row, unit, column string, v float64) {
	c := t.cell(row, unit, column)
	c.Rounds = append(c.Rounds, v)
	c.Median = median(c.Rounds)
}

// fail says why there is no figure.
func (t *Table) fail(row, unit, column string, err error) {
	t.cell(row, unit, column).Error = err.Error()
}

// get is a cell's median, if there is one.
func (t *Table) get(row, column string) (float64, bool) {
	if t == nil {
		return 0, false
	}
	for _, r := range t.Rows {
		if c := r.Cells[column]; r.Name == row && c != nil && len(c.Rounds) > 0 {
			return c.Median, true
		}
	}
	return 0, false
}

// note adds a line below the table, unless it is there.
func (t *Table) note(format string, args ...any) {
	if n := fmt.Sprintf(format, args...); !slices.Contains(t.Notes, n) {
		t.Notes = append(t.Notes, n)
	}
}

func (t *Table) print(out io.Writer) {
	fmt.Fprintf(out, "\n%s\n", t.Name)
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	for _, c := range t.Columns {
		fmt.Fprintf(w, "\t%s", c)
	}
	fmt.Fprintln(w)
	var errors []string
	for _, r := range t.Rows {
		fmt.Fprintf(w, "%s, %s", r.Name, r.Unit)
		for _, name := range t.Columns {
			c := r.Cells[name]
			switch {
			case c == nil:
				fmt.Fprint(w, "\t")
			case len(c.Rounds) == 0:
				fmt.Fprint(w, "\t-")
			default:
				fmt.Fprintf(w, "\t%s", figure(c.Median))
			}
			if c != nil && c.Error != "" {
				if e := fmt.Sprintf("%s: %s", name, c.Error); !slices.Contains(errors, e) {
					errors = append(errors, e)
				}
			}
		}
		fmt.Fprintln(w)
	}
	w.Flush()
	for _, n := range slices.Concat(t.Notes, errors) {
		fmt.Fprintf(out, "  %s\n", n)
	}
}

// figure writes a number with three digits that mean something.
func figure(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3g", v)
}

func median[T cmp.Ordered](v []T) T {
	var zero T
	if len(v) == 0 {
		return zero
	}
	return slices.Sorted(slices.Values(v))[len(v)/2]
}
