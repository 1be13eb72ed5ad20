package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// report is all that a run found, as it is kept in JSON.
type report struct {
	Date    time.Time `json:"date"`
	Commit  string    `json:"commit"`
	Machine machine   `json:"machine"`
	Rounds  int       `json:"rounds"`
	Seconds float64   `json:"seconds"` // of one throughput measurement
	Took    float64   `json:"tookSeconds"`
	Tables  []*Table  `json:"tables"`
	Goals   []goal    `json:"goals,omitempty"`
}

// machine is where a run happened.
type machine struct {
	CPU    string `json:"cpu"`
	Cores  int    `json:"cores"`
	Kernel string `json:"kernel"`
	Go     string `json:"go"`
}

func newReport(rounds int, seconds float64) *report {
	return &report{Date: time.Now().UTC(), Rounds: rounds, Seconds: seconds,
		Commit:  said("git", "describe", "--always", "--dirty", "--abbrev=12"),
		Machine: machine{cpuModel(), runtime.NumCPU(), said("uname", "-sr"), runtime.Version()}}
}

func said(name string, args ...string) string {
	b, err := exec.Command(name, args...).Output()
	if err != nil {
		return "unknown"
	}
	return strings.TrimSpace(string(b))
}

func cpuModel() string {
	f, err := os.Open("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, value, ok := strings.Cut(s.Text(), ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

// table is the table with this name, made if it is not there.
func (r *report) table(name string) *Table {
	t := r.find(name)
	if t == nil {
		t = &Table{Name: name}
		r.Tables = append(r.Tables, t)
	}
	return t
}

func (r *report) find(name string) *Table {
	for _, t := range r.Tables {
		if t.Name == name {
			return t
		}
	}
	return nil
}

// finish judges the goals.
func (r *report) finish() {
	r.Took = time.Since(r.Date).Seconds()
	r.Goals = judge(r)
}

func (r *report) print(out io.Writer) {
	for _, t := range r.Tables {
		t.print(out)
	}
	printGoals(out, r.Goals)
	fmt.Fprintf(out, "\n%s, commit %s: %s, %d cores, %s, %s; medians of %d interleaved rounds, %.0f s in all\n",
		r.Date.Format("2006-01-02 15:04 MST"), r.Commit, r.Machine.CPU, r.Machine.Cores, r.Machine.Kernel, r.Machine.Go, r.Rounds, r.Took)
}

// again judges and draws anew what an earlier run found.
func again(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	r := &report{}
	if err := json.Unmarshal(b, r); err != nil {
		return fmt.Errorf("reading %s: %w", file, err)
	}
	r.Goals = judge(r)
	r.print(os.Stdout)
	return r.saveAs(strings.TrimSuffix(file, ".json"))
}

// save writes DATE.json and DATE.png into a directory.
func (r *report) save(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return r.saveAs(filepath.Join(dir, r.Date.Format("2006-01-02")))
}

func (r *report) saveAs(base string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(base+".json", append(b, '\n'), 0o644); err != nil {
		return err
	}
	if err := r.plot(base + ".png"); err != nil {
		return fmt.Errorf("drawing the plot: %w", err)
	}
	fmt.Fprintf(os.Stderr, "kept: %s.json and .png\n", base)
	return nil
}
