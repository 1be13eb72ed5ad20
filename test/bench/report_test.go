package main

import (
	"bytes"
	"errors"
	"image/png"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTable(t *testing.T) {
	table := &Table{Name: "T"}
	for _, v := range []float64{3, 1, 2} {
		table.add("up, 1", "Mbit/s", "a", v)
	}
	table.fail("up, 1", "Mbit/s", "b", errors.New("no such carrier"))
	if v, ok := table.get("up, 1", "a"); !ok || v != 2 {
		t.Errorf("median %v, %v", v, ok)
	}
	if _, ok := table.get("up, 1", "b"); ok {
		t.Error("a failure has a figure")
	}
	var out bytes.Buffer
	table.print(&out)
	if !strings.Contains(out.String(), "b: no such carrier") {
		t.Errorf("the reason is missing:\n%s", out.String())
	}
}

// The goals have to find their figures by the names that the parts give them.
func TestJudge(t *testing.T) {
	r := newReport(1, 1)
	c := r.table(carriersTable)
	c.add(upRow, "Mbit/s", best, 1300)
	c.add(upRow, "Mbit/s", webSocket, 1000)
	c.add(downRow, "Mbit/s", best, 800)
	c.add(downRow, "Mbit/s", webSocket, 1000)
	b := &bench{report: r}
	if up(b, 1).figures[0].row != upRow || down(b, 1).figures[0].row != downRow {
		t.Error("throughput is not where the goals look")
	}
	goals := judge(r)
	if g := goals[0]; g.Measured == nil || *g.Measured != 1.3 || !g.Holds {
		t.Errorf("%+v", g)
	}
	if g := goals[1]; g.Measured == nil || g.Holds {
		t.Errorf("%+v", g)
	}
	if g := goals[2]; g.Measured != nil || g.Holds {
		t.Errorf("%+v", g)
	}
}

func TestChosenLinks(t *testing.T) {
	pairs := map[string]int{}
	for _, k := range chosenLinks {
		for _, name := range []string{
			link{k.rate, k.delay, -1}.String(), link{k.rate, -1, k.loss}.String(), link{-1, k.delay, k.loss}.String(),
		} {
			pairs[name]++
		}
	}
	if len(pairs) != 27 {
		t.Errorf("%d of 27 pairs meet", len(pairs))
	}
	if len(allLinks()) != 27 {
		t.Errorf("%d links", len(allLinks()))
	}
}

func TestPlot(t *testing.T) {
	r := newReport(1, 1)
	r.table(carriersTable).add(upRow, "Mbit/s", best, 1300)
	for _, direction := range []string{"up", "down"} {
		r.table(matrixTable).add(chosenLinks[0].String()+": "+direction, "Mbit/s", direct, 20)
	}
	r.table(latencyTable("cubic")).add("0 % loss, up: p50 to idle", "×", best, 1.5)
	base := filepath.Join(t.TempDir(), "x")
	if err := r.saveAs(base); err != nil {
		t.Fatal(err)
	}
	if err := again(base + ".json"); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(base + ".png")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := png.Decode(f); err != nil {
		t.Error(err)
	}
}
