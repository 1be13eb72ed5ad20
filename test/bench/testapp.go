package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// answer is what testapp measured, by the names of its JSON.
type answer map[string]float64

// place prepares a program somewhere: on the cluster's laptop or on a rig's.
type place func(name string, args ...string) *exec.Cmd

// testapp is the test program's file.
func (b *bench) testapp() string { return filepath.Join(b.repo, "test", "cluster", "bin", "testapp") }

// measure runs a test of testapp's at a place.
func (b *bench) measure(at place, args ...string) (answer, error) {
	cmd := at(b.testapp(), append([]string{"--json"}, args...)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	// Nothing that is asked of it takes so long.
	timer := time.AfterFunc(90*time.Second, func() { _ = cmd.Process.Signal(syscall.SIGKILL) })
	defer timer.Stop()
	if err := cmd.Wait(); err != nil {
		lines := strings.Split(strings.TrimSpace(stderr.String()), "\n")
		return nil, errors.New(lines[len(lines)-1])
	}
	var got map[string]any
	if err := json.Unmarshal(stdout.Bytes(), &got); err != nil {
		return nil, fmt.Errorf("testapp %v said %q: %w", args, stdout.String(), err)
	}
	out := answer{}
	for k, v := range got {
		if f, ok := v.(float64); ok {
			out[k] = f
		}
	}
	return out, nil
}

// warmUp is how many seconds of a transfer do not count.
const warmUp = 0.3

// figureOf is a row of a table and the field of an answer that it shows.
type figureOf struct {
	row, unit, field string
	scale            float64 // 0: as it is
}

func (f figureOf) times() float64 {
	if f.scale == 0 {
		return 1
	}
	return f.scale
}

// cell is a test of testapp's and the figures that are taken from it.
type cell struct {
	args    func(addr func(port int) string) []string
	figures []figureOf
}

func (b *bench) throughput(row, test string, port, flows int) cell {
	return cell{
		func(addr func(int) string) []string {
			return []string{test, addr(port), fmt.Sprint(b.seconds), fmt.Sprint(flows), fmt.Sprint(warmUp)}
		},
		[]figureOf{{row: row, unit: "Mbit/s", field: "mbit_per_s"}},
	}
}

func up(b *bench, flows int) cell {
	return b.throughput(fmt.Sprintf("up, %d", flows), "push", 9002, flows)
}
func down(b *bench, flows int) cell {
	return b.throughput(fmt.Sprintf("down, %d", flows), "pull", 9003, flows)
}

func roundTrip() cell {
	return cell{
		func(addr func(int) string) []string { return []string{"rtt", addr(9000), "2000"} },
		[]figureOf{{row: "round trip p50", unit: "ms", field: "p50_ms"}, {row: "round trip p99", unit: "ms", field: "p99_ms"}},
	}
}

func connections(b *bench, workers int) cell {
	return cell{
		func(addr func(int) string) []string {
			return []string{"conns", addr(9000), fmt.Sprint(b.seconds), fmt.Sprint(workers)}
		},
		[]figureOf{{row: fmt.Sprintf("new connections, %d", workers), unit: "/s", field: "per_s"}},
	}
}

// into measures a cell for a column of a table.
func (b *bench) into(t *Table, column string, at place, c cell, addr func(int) string) (answer, error) {
	got, err := b.measure(at, c.args(addr)...)
	for _, f := range c.figures {
		if err != nil {
			t.fail(f.row, f.unit, column, err)
		} else {
			t.add(f.row, f.unit, column, got[f.field]*f.times())
		}
	}
	return got, err
}
