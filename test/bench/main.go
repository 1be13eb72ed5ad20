// Command bench prints culvert's figures beside those of other ways to a pod,
// taken in the same run: raw kubectl port-forward, a raw stream through
// pods/proxy, stock wireguard-go, and the direct way. Medians of interleaved
// rounds, so that what lasts are the ratios. It leaves JSON and a plot in
// docs/bench, where README.md says what the rows mean. Run it with `make bench`,
// as root; a part of it with `go run ./test/bench -only plain`.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
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
	{"intercept", true, (*bench).intercept},
	{"mesh", true, (*bench).mesh},
	{"memory", true, (*bench).memory},
}

// bench is one run.
type bench struct {
	options
	repo   string
	report *report
	lab    *lab // nil without a cluster

	mu     sync.Mutex // while lab comes and goes
	closed bool
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
	flag.Float64Var(&o.seconds, "seconds", 1, "length of one throughput measurement")
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

func run(o options) error {
	repo, err := netlab.Repo()
	if err != nil {
		return err
	}
	b := &bench{options: o, repo: repo, report: newReport(o.rounds, o.seconds)}
	// Whoever interrupts it wants no cluster left behind.
	interrupt := make(chan os.Signal, 1)
	signal.Notify(interrupt, os.Interrupt, syscall.SIGTERM)
	measured := make(chan error, 1)
	go func() { measured <- b.measureParts() }()
	select {
	case err = <-measured:
	case <-interrupt:
		b.closeLab()
		return errors.New("interrupted")
	}
	b.closeLab()
	b.report.finish()
	b.report.print(os.Stdout)
	dir := o.out
	if dir == "" && len(o.only) == 0 && err == nil {
		dir = filepath.Join(b.repo, "docs", "bench")
	}
	if dir != "" {
		err = errors.Join(err, b.report.save(dir))
	}
	return err
}

// measureParts measures what was asked for. A part that goes wrong does not keep
// the others from being measured.
func (b *bench) measureParts() (err error) {
	for _, p := range parts {
		if len(b.only) > 0 && !slices.Contains(b.only, p.name) {
			continue
		}
		if p.cluster && b.lab == nil {
			if e := b.openLab(); e != nil {
				return errors.Join(err, e) // nothing that follows does without it
			}
		}
		begun := time.Now()
		if e := p.run(b); e != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", p.name, e))
		}
		fmt.Fprintf(os.Stderr, "%s: %.0f s\n", p.name, time.Since(begun).Seconds())
	}
	return err
}

func (b *bench) openLab() error {
	l, err := newLab()
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed && l != nil {
		l.close(b.keep)
	}
	b.lab = l
	return err
}

func (b *bench) closeLab() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.lab.close(b.keep)
}
