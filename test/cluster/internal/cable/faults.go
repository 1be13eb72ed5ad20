// Package cable is the laptop's cable: plain, or with the faults of a real
// one, for kernels without netem. In the router wan the cable's far end is a
// port of the bridge "home". For faults the port leaves the bridge, a TAP
// device takes its place, and a process copies frames between the two: late,
// lossy, slowly or not at all. The laptop's own device stays, and so do its
// connections.
package cable

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// Faults is what is wrong with the cable. The zero value is a perfect one.
type Faults struct {
	Delay time.Duration `json:"delay"` // one way
	Loss  float64       `json:"loss"`  // of the frames, 0 to 1
	Rate  float64       `json:"rate"`  // bits per second each way, 0: no limit
	Queue int           `json:"queue"` // bytes that may wait for a limited rate each way, 0: 100 ms of it
	Cut   bool          `json:"cut"`   // nothing passes
}

// Perfect says whether the cable has no fault.
func (f Faults) Perfect() bool {
	f.Queue = 0 // of a rate without limit it says nothing
	return f == Faults{}
}

// queueTime is what a queue holds unless it has a length: a router's buffer.
const queueTime = 100 * time.Millisecond

// queue is how many bytes may wait.
func (f Faults) queue() float64 {
	if f.Queue == 0 {
		return f.Rate / 8 * queueTime.Seconds()
	}
	return float64(f.Queue)
}

// String describes the cable.
func (f Faults) String() string {
	if f.Cut {
		return "cut"
	}
	if f.Perfect() {
		return "perfect"
	}
	var w []string
	if f.Delay > 0 {
		w = append(w, "delay "+f.Delay.String())
	}
	if f.Loss > 0 {
		w = append(w, fmt.Sprintf("loss %g%%", f.Loss*100))
	}
	if f.Rate > 0 {
		w = append(w, fmt.Sprintf("rate %g Mbit/s with a queue of %.0f KiB", f.Rate/1e6, f.queue()/1024))
	}
	return strings.Join(w, ", ")
}

// ParseLoss reads a share like "1%" or "0.5%"; a bare number means percent, too.
func ParseLoss(s string) (float64, error) {
	v, err := strconv.ParseFloat(strings.TrimSuffix(s, "%"), 64)
	if err != nil || v < 0 || v > 100 {
		return 0, fmt.Errorf("%q is not a loss like 1%%", s)
	}
	return v / 100, nil
}

// ParseDelay reads a duration like "20ms".
func ParseDelay(s string) (time.Duration, error) {
	if s == "0" {
		return 0, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a delay like 20ms", s)
	}
	return d, nil
}

// ParseRate reads bits per second like "100mbit", "1gbit", "500kbit"; 0 lifts the limit.
func ParseRate(s string) (float64, error) {
	number, unit := s, 1.0
	for suffix, u := range map[string]float64{"kbit": 1e3, "mbit": 1e6, "gbit": 1e9} {
		if n, ok := strings.CutSuffix(strings.ToLower(s), suffix); ok {
			number, unit = n, u
		}
	}
	v, err := strconv.ParseFloat(number, 64)
	if err != nil || v < 0 {
		return 0, fmt.Errorf("%q is not a rate like 100mbit", s)
	}
	return v * unit, nil
}

// ParseQueue reads a number of bytes like "256kb" or "1mb" (of 1024); 0 is the default.
func ParseQueue(s string) (int, error) {
	number, unit := strings.ToLower(s), 1
	for suffix, u := range map[string]int{"kb": 1 << 10, "mb": 1 << 20} {
		if n, ok := strings.CutSuffix(number, suffix); ok {
			number, unit = n, u
			break
		}
	}
	v, err := strconv.Atoi(number)
	if err != nil || v < 0 || v > 1<<30/unit {
		return 0, fmt.Errorf("%q is not a queue like 256kb", s)
	}
	return v * unit, nil
}

// order is the file through which the cable's process is told its faults, and
// through which it answers.
type order struct {
	Number int    `json:"number"`
	Faults Faults `json:"faults"`
}

func orderFile(dir string) string  { return filepath.Join(dir, "cable.order") }
func answerFile(dir string) string { return filepath.Join(dir, "cable.answer") }

func readOrder(file string) (order, error) {
	var o order
	b, err := os.ReadFile(file)
	if os.IsNotExist(err) {
		return o, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &o)
	}
	if err != nil {
		return o, fmt.Errorf("read the cable's setting: %w", err)
	}
	return o, nil
}

func writeOrder(file string, o order) error {
	b, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("encode the cable's setting: %w", err)
	}
	if err := os.WriteFile(file+".new", b, 0o644); err != nil {
		return fmt.Errorf("write the cable's setting: %w", err)
	}
	return os.Rename(file+".new", file)
}

// Current returns the faults that the cable in wan's state directory dir has.
func Current(dir string) (Faults, error) {
	o, err := readOrder(orderFile(dir))
	return o.Faults, err
}

// Set gives the cable other faults and waits until it has them.
func Set(dir string, f Faults) error {
	last, err := readOrder(orderFile(dir))
	if err != nil {
		return err
	}
	o := order{last.Number + 1, f}
	if err := writeOrder(orderFile(dir), o); err != nil {
		return err
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if a, err := readOrder(answerFile(dir)); err == nil && a.Number == o.Number {
			return nil
		}
	}
	return fmt.Errorf("the cable's process did not take its setting (see %s)", filepath.Join(dir, "log", "cable.log"))
}
