// Command bench prints culvert's figures beside those of other ways to a pod,
// taken in the same run: raw kubectl port-forward, a raw stream through
// pods/proxy, stock wireguard-go, and the direct way. Medians of interleaved
// rounds, so that what lasts are the ratios. It leaves JSON and a plot in
// docs/bench, where README.md says what the rows mean. Run it with `make bench`,
// as root; a part of it with `go run ./test/bench -only plain`.
package main

import (
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/test/bench/rig"
	"github.com/culvert-dev/culvert/test/netlab"
)

// options are the flags.
type options struct {
	only     []string
	rounds   int
	seconds  float64
	keep     bool
	out      string
	whole    bool
	profiles string
}

// A part measures one topic and puts its tables into the report.
type part struct {
	name    string
	cluster bool // it needs the test cluster
	run     func(*bench) error
}

// parts in their order: a session that has carried 10,000 connections is not
// asked afterwards how little memory it needs.
var parts = []part{
	{"plain", false, (*bench).plain},
	{"carriers", true, (*bench).carriers},
	{"latency", true, (*bench).latency},
	{"matrix", true, (*bench).matrix},
	{"reconnect", true, (*bench).reconnect},
	{"memory", true, (*bench).memory},
}

// bench is one run.
type bench struct {
	options
	repo   string
	report *report
	lab    *lab // nil without a cluster
}

func main() {
	rig.Main()
	var o options
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	only := flag.String("only", "", "parts to measure, comma-separated: "+strings.Join(names, ", ")+" (default: all, and the result is kept)")
	flag.IntVar(&o.rounds, "rounds", 3, "interleaved rounds; medians are printed")
	flag.Float64Var(&o.seconds, "seconds", 1.2, "length of one throughput measurement")
	flag.BoolVar(&o.keep, "keep", false, "leave the test cluster up")
	flag.StringVar(&o.out, "out", "", "directory for the JSON and the plot (default: docs/bench for a whole run, none for a part)")
	flag.BoolVar(&o.whole, "whole-matrix", false, "measure all 27 links, not only the chosen ones")
	flag.StringVar(&o.profiles, "profiles", "", "directory for CPU profiles of the part plain")
	redraw := flag.String("redraw", "", "only judge and draw again what a JSON file says")
	flag.Parse()
	if *redraw != "" {
		if err := again(*redraw); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	if *only != "" {
		o.only = strings.Split(*only, ",")
	}
	for _, name := range o.only {
		if !slices.Contains(names, name) {
			fmt.Fprintf(os.Stderr, "bench: there is no part %q; there are %s\n", name, strings.Join(names, ", "))
			os.Exit(2)
		}
	}
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(o options) (err error) {
	repo, err := netlab.Repo()
	if err != nil {
		return err
	}
	b := &bench{options: o, repo: repo, report: newReport(o.rounds, o.seconds)}
	defer func() { b.lab.close(o.keep) }()
	for _, p := range parts {
		if len(o.only) > 0 && !slices.Contains(o.only, p.name) {
			continue
		}
		if p.cluster && b.lab == nil {
			if b.lab, err = newLab(); err != nil {
				return err
			}
		}
		begun := time.Now()
		if err := p.run(b); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		fmt.Fprintf(os.Stderr, "%s: %.0f s\n", p.name, time.Since(begun).Seconds())
	}
	b.report.finish()
	b.report.print(os.Stdout)
	dir := o.out
	if dir == "" && len(o.only) == 0 {
		dir = b.repo + "/docs/bench"
	}
	if dir == "" {
		return nil
	}
	return b.report.save(dir)
}
