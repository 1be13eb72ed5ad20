package cluster

import (
	"context"
	"errors"
	"maps"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func TestServiceWatchJudge(t *testing.T) {
	c, _ := newServiceServer(t, webService())
	_, live := switched(t, c)
	held, err := RecordOf(live)
	if err != nil {
		t.Fatal(err)
	}
	record := func(s *corev1.Service, change func(*Record)) {
		r := *held
		change(&r)
		text, err := r.encode()
		if err != nil {
			t.Fatal(err)
		}
		s.Annotations = map[string]string{AnnotationIntercept: text}
	}
	theirs := map[string]string{"app": "web2"}
	for _, test := range []struct {
		name   string
		change func(s *corev1.Service)
		want   string
	}{
		{"nothing", func(s *corev1.Service) {}, ""},
		{"a label", func(s *corev1.Service) { s.Labels = theirs }, ""},
		{"switched again, with another port", func(s *corev1.Service) {
			s.Spec.Ports = append(s.Spec.Ports, tcp("new", 90, "20002"))
			record(s, func(r *Record) {
				r.Ports = append(r.Ports, RecordedPort{90, corev1.ProtocolTCP, intstr.FromInt32(9090), 20002})
			})
		}, ""},
		{"selector", func(s *corev1.Service) { s.Spec.Selector = theirs }, Overwritten},
		{"selector merged", func(s *corev1.Service) { s.Spec.Selector = merge(gates, theirs) }, Overwritten},
		{"targetPort", func(s *corev1.Service) { s.Spec.Ports[1].TargetPort = intstr.FromInt32(5) }, Overwritten},
		{"port added", func(s *corev1.Service) { s.Spec.Ports = append(s.Spec.Ports, tcp("new", 90, "9090")) }, Overwritten},
		{"port removed", func(s *corev1.Service) { s.Spec.Ports = s.Spec.Ports[:1] }, Overwritten},
		{"port renumbered", func(s *corev1.Service) { s.Spec.Ports[0].Port = 81 }, Overwritten},
		{"annotation removed", func(s *corev1.Service) { s.Annotations = nil }, Overwritten},
		{"annotation spoilt", func(s *corev1.Service) { s.Annotations[AnnotationIntercept] = "x" }, Overwritten},
		{"replaced", func(s *corev1.Service) { s.Annotations, s.Spec.Selector = nil, theirs }, Released},
		{"undone half-way", func(s *corev1.Service) {
			s.Spec.Selector = held.Selector
			record(s, func(r *Record) { r.Phase = PhaseRestored })
		}, Released},
		{"taken over", func(s *corev1.Service) { record(s, func(r *Record) { r.Session = "s2" }) }, Taken},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := live.DeepCopy()
			test.change(s)
			w := &serviceWatch{held: *held}
			change := w.judge(s)
			if change.Kind != test.want {
				t.Errorf("%q, want %q", change.Kind, test.want)
			}
			if (change.Record != nil) != (test.want == Taken) {
				t.Errorf("record %+v", change.Record)
			}
		})
	}
}

// The server ends each watch at once: changes are found all the same, each once.
func TestServiceWatchKept(t *testing.T) {
	c, s := newServiceServer(t, webService())
	c.watch = c.client
	plan, live := switched(t, c)
	held, err := RecordOf(live)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	changes, done := make(chan ServiceChange, 10), make(chan error, 1)
	go func() {
		done <- c.WatchService(ctx, "demo", "web", *held, func(change ServiceChange) {
			if change.Kind == Overwritten {
				next, err := c.Replan(ctx, plan, change.Service)
				if err == nil {
					_, err = c.Switch(ctx, next, gates, gatePorts, *held)
				}
				if err != nil {
					t.Error(err)
				}
			}
			changes <- change
		})
	}()
	s.mu.Lock()
	theirs := s.services["web"].DeepCopy()
	theirs.Spec.Selector = map[string]string{"app": "web2"}
	s.touch(theirs)
	s.services["web"] = theirs
	s.mu.Unlock()
	if change := <-changes; change.Kind != Overwritten {
		t.Errorf("%+v", change)
	}
	s.mu.Lock()
	if got := s.services["web"].Spec.Selector; !maps.Equal(got, gates) {
		t.Errorf("selector %v", got)
	}
	delete(s.services, "web")
	s.mu.Unlock()
	if change := <-changes; change.Kind != Deleted {
		t.Errorf("%+v", change)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	cancel()
	s.services["web"] = live
	if err := c.WatchService(ctx, "demo", "web", *held, nil); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestServiceReapplies(t *testing.T) {
	start := time.Unix(1700000000, 0)
	var r reapplies
	var ok bool
	for i, step := range []struct {
		after time.Duration
		want  bool
	}{{0, true}, {time.Minute, true}, {9 * time.Minute, true}, {10*time.Minute - time.Second, false}, {10 * time.Minute, true}, {10*time.Minute + time.Second, false}, {11 * time.Minute, true}, {time.Hour, true}} {
		if r, ok = r.add(start.Add(step.after)); ok != step.want {
			t.Errorf("%d, after %v: %v", i, step.after, ok)
		}
		if len(r) > maxReapplies {
			t.Errorf("%d are kept", len(r))
		}
	}
	if len(r) != 1 {
		t.Errorf("%d are kept after an hour", len(r))
	}
}
