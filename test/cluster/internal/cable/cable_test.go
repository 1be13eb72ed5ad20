package cable

import (
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	for in, want := range map[string]float64{"100mbit": 1e8, "1gbit": 1e9, "500Kbit": 5e5, "0": 0, "2.5mbit": 2.5e6} {
		if got, err := ParseRate(in); err != nil || got != want {
			t.Errorf("rate %q: %v, %v", in, got, err)
		}
	}
	for in, want := range map[string]float64{"1%": 0.01, "0": 0, "100%": 1, "0.5": 0.005} {
		if got, err := ParseLoss(in); err != nil || got != want {
			t.Errorf("loss %q: %v, %v", in, got, err)
		}
	}
	for _, bad := range []string{"", "x", "-1", "101%"} {
		if _, err := ParseLoss(bad); err == nil {
			t.Errorf("loss %q was taken", bad)
		}
	}
	for _, bad := range []string{"", "-1mbit", "fast"} {
		if _, err := ParseRate(bad); err == nil {
			t.Errorf("rate %q was taken", bad)
		}
	}
	for in, want := range map[string]int{"256kb": 256 << 10, "1MB": 1 << 20, "1500": 1500, "0": 0} {
		if got, err := ParseQueue(in); err != nil || got != want {
			t.Errorf("queue %q: %v, %v", in, got, err)
		}
	}
	for _, bad := range []string{"", "x", "-1", "2048mb", "1.5kb"} {
		if _, err := ParseQueue(bad); err == nil {
			t.Errorf("queue %q was taken", bad)
		}
	}
	if d, err := ParseDelay("20ms"); err != nil || d != 20*time.Millisecond {
		t.Errorf("delay: %v, %v", d, err)
	}
	if _, err := ParseDelay("-1s"); err == nil {
		t.Error("a negative delay was taken")
	}
}

func TestString(t *testing.T) {
	for want, f := range map[string]Faults{
		"perfect": {}, "cut": {Cut: true, Loss: 0.5},
		"delay 20ms, loss 1%, rate 100 Mbit/s with a queue of 1221 KiB": {Delay: 20 * time.Millisecond, Loss: 0.01, Rate: 1e8},
	} {
		if f.String() != want {
			t.Errorf("got %q, want %q", f.String(), want)
		}
	}
}

func TestSchedule(t *testing.T) {
	now := time.Unix(1000, 0)
	var s shaper
	if at, ok := s.schedule(Faults{Delay: time.Second}, now, 1500, 0.5); !ok || at != now.Add(time.Second) {
		t.Errorf("delay: %v, %v", at, ok)
	}
	if _, ok := s.schedule(Faults{Loss: 0.1}, now, 1500, 0.05); ok {
		t.Error("a frame that was to be lost arrived")
	}
	if _, ok := s.schedule(Faults{Loss: 0.1}, now, 1500, 0.1); !ok {
		t.Error("a frame that was not to be lost did not arrive")
	}
	if _, ok := s.schedule(Faults{Cut: true}, now, 1500, 0.99); ok {
		t.Error("a frame passed a cut cable")
	}
}

func TestScheduleRate(t *testing.T) {
	now := time.Unix(1000, 0)
	var s shaper
	f := Faults{Rate: 8e6, Queue: 100_000} // a byte per microsecond
	passed := 0
	var last time.Time
	for range 1000 {
		if at, ok := s.schedule(f, now, 1000, 0.5); ok {
			passed++
			if !last.IsZero() && at.Sub(last) != time.Millisecond {
				t.Fatalf("frames are %v apart", at.Sub(last))
			}
			last = at
		}
	}
	if passed < 100 || passed > 102 { // the queue's
		t.Errorf("%d frames fit the queue", passed)
	}
	s = shaper{}
	f.Queue = 0
	passed = 0
	for range 2000 {
		if _, ok := s.schedule(f, now, 1000, 0.5); ok {
			passed++
		}
	}
	if passed < 100 || passed > 102 { // 100 ms at a byte per microsecond
		t.Errorf("%d frames fit a queue of no length", passed)
	}
	later := now.Add(time.Second)
	if at, ok := s.schedule(f, later, 1000, 0.5); !ok || at != later.Add(time.Millisecond) {
		t.Errorf("the cable did not get free: %v, %v", at, ok)
	}
}

func TestPerfect(t *testing.T) {
	if f := (Faults{Queue: 1000}); !f.Perfect() {
		t.Error("a queue alone is a fault")
	}
	if f := (Faults{Queue: 1000, Rate: 1e6}); f.Perfect() {
		t.Error("a limited rate is none")
	}
}

func TestOrders(t *testing.T) {
	dir := t.TempDir()
	want := order{3, Faults{Delay: time.Second, Loss: 0.25, Rate: 1e6}}
	if err := writeOrder(orderFile(dir), want); err != nil {
		t.Fatal(err)
	}
	if got, err := Current(dir); err != nil || got != want.Faults {
		t.Errorf("got %v, %v", got, err)
	}
	if got, err := Current(t.TempDir()); err != nil || !got.Perfect() {
		t.Errorf("a cable without an order: %v, %v", got, err)
	}
}
