package cluster

import (
	"maps"
	"reflect"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
)

var gates = map[string]string{LabelName: "culvert-gate"}

// switched is a Service that session s1 switched.
func switched(t *testing.T, c *Cluster) (*ServicePlan, *corev1.Service) {
	t.Helper()
	plan, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080"), false)
	if err != nil {
		t.Fatal(err)
	}
	live, err := c.Switch(t.Context(), plan, gates, gatePorts, Record{Session: "s1", User: "eve"})
	if err != nil {
		t.Fatal(err)
	}
	return plan, live
}

var gatePorts = map[PortKey]uint16{{80, corev1.ProtocolTCP}: 20000, {53, corev1.ProtocolUDP}: 20001, {90, corev1.ProtocolTCP}: 20002}

func webService() *corev1.Service {
	return testService("web", tcp("http", 80, "8080"), udp("dns", 53, "dns"))
}

func TestServiceSwitchAndRestore(t *testing.T) {
	c, s := newServiceServer(t, webService())
	before := s.services["web"].DeepCopy()
	plan, live := switched(t, c)
	if !maps.Equal(live.Spec.Selector, gates) || live.Spec.Ports[0].TargetPort.IntVal != 20000 || live.Spec.Ports[1].TargetPort.IntVal != 20001 {
		t.Errorf("%+v", live.Spec)
	}
	r, err := RecordOf(live)
	if err != nil || !reflect.DeepEqual(r, plan.Record) || r.Selector["app"] != "web" || r.Ports[1].TargetPort.StrVal != "dns" {
		t.Errorf("%+v, %v", r, err)
	}
	// Once more is no change, and who plans now sees who holds it.
	if again, err := c.Switch(t.Context(), plan, gates, gatePorts, Record{Session: "s1", User: "eve"}); err != nil || again.ResourceVersion != live.ResourceVersion {
		t.Errorf("%v, %v", again, err)
	}
	other, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080"), false)
	if err != nil || other.Record.Session != "s1" || !reflect.DeepEqual(other.Ports, plan.Ports) {
		t.Errorf("%+v, %v", other, err)
	}
	_, err = c.Switch(t.Context(), other, gates, gatePorts, Record{Session: "s2"})
	wantError(t, err, api.CodeExists, "eve", "s1", "--wait")

	if did, err := c.Restore(t.Context(), "demo", "web", "s2"); err != nil || did.Record != nil {
		t.Errorf("another's: %+v, %v", did, err)
	}
	did, err := c.Restore(t.Context(), "demo", "web", "")
	if err != nil || did.Record.Session != "s1" || len(did.Done) != 3 {
		t.Errorf("%+v, %v", did, err)
	}
	after := s.services["web"]
	before.ResourceVersion, before.Annotations, before.ManagedFields = after.ResourceVersion, after.Annotations, after.ManagedFields
	if !reflect.DeepEqual(before, after) || len(after.Annotations) > 0 {
		t.Errorf("before %+v\nafter %+v", before, after)
	}
	for _, name := range []string{"web", "gone"} {
		if did, err := c.Restore(t.Context(), "demo", name, ""); err != nil || did.Record != nil {
			t.Errorf("%s: %+v, %v", name, did, err)
		}
	}
}

// Somebody writes the Service between the look at it and each of our requests:
// what does not matter is no trouble, what does is told, and nothing is lost.
func TestServiceSwitchConflicts(t *testing.T) {
	label := func(c *corev1.Service) { c.Labels = map[string]string{"note": "new"} }
	retarget := func(c *corev1.Service) { c.Spec.Ports[0].TargetPort = intstr.FromInt32(8081) }
	for _, test := range []struct {
		name   string
		change func(*corev1.Service)
		code   string
	}{
		{"a label", label, ""},
		{"a targetPort", retarget, api.CodeConflict},
		{"the selector", func(s *corev1.Service) { s.Spec.Selector = map[string]string{"app": "web2"} }, api.CodeConflict},
		{"a port", func(s *corev1.Service) { s.Spec.Ports = append(s.Spec.Ports, tcp("x", 90, "90")) }, api.CodeConflict},
		{"another of its name", func(s *corev1.Service) { s.UID = "uid-2" }, api.CodeConflict},
		{"another session", func(s *corev1.Service) {
			s.Annotations = map[string]string{AnnotationIntercept: `{"version":1,"session":"s2","user":"bob"}`}
		}, api.CodeExists},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, s := newServiceServer(t, webService())
			s.before = func(patch int, service *corev1.Service) {
				if patch == 0 {
					test.change(service)
					s.touch(service)
				}
			}
			plan, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080"), false)
			if err != nil {
				t.Fatal(err)
			}
			live, err := c.Switch(t.Context(), plan, gates, gatePorts, Record{Session: "s1"})
			if test.code != "" {
				wantError(t, err, test.code, "demo/web")
				if maps.Equal(s.services["web"].Spec.Selector, gates) {
					t.Error("it was switched")
				}
			} else if err != nil || live.Labels["note"] != "new" {
				t.Errorf("%v, %v", live, err)
			}
		})
	}
	t.Run("during undo", func(t *testing.T) {
		c, s := newServiceServer(t, webService())
		switched(t, c)
		s.before = func(patch int, service *corev1.Service) {
			switch patch {
			case 1: // ours is 0, undo's are from 1
				label(service)
			case 3:
				retarget(service)
			default:
				return
			}
			s.touch(service)
		}
		if _, err := c.Restore(t.Context(), "demo", "web", "s1"); err != nil {
			t.Fatal(err)
		}
		if got := s.services["web"]; got.Labels["note"] != "new" || got.Spec.Ports[0].TargetPort.IntVal != 8081 || got.Spec.Selector["app"] != "web" || len(got.Annotations) > 0 {
			t.Errorf("%+v", got)
		}
	})
	t.Run("without end", func(t *testing.T) {
		c, s := newServiceServer(t, webService())
		switched(t, c)
		s.before = func(_ int, service *corev1.Service) { s.touch(service) }
		if _, err := c.Restore(t.Context(), "demo", "web", "s1"); err == nil {
			t.Error("undo is done")
		}
	})
}

// A switch whose answer was lost is done once more.
func TestServiceSwitchAgain(t *testing.T) {
	c, _ := newServiceServer(t, webService())
	early, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080"), false)
	if err != nil {
		t.Fatal(err)
	}
	_, live := switched(t, c)
	again, err := c.Switch(t.Context(), early, gates, gatePorts, Record{Session: "s1", User: "eve"})
	if err != nil || again.ResourceVersion != live.ResourceVersion {
		t.Fatalf("%v, %v", again, err)
	}
	if r, err := RecordOf(again); err != nil || r.Selector["app"] != "web" || r.Ports[0].TargetPort.IntVal != 8080 {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestServiceReplan(t *testing.T) {
	c, s := newServiceServer(t, webService())
	plan, live := switched(t, c)
	theirs := live.DeepCopy()
	theirs.Spec.Selector = map[string]string{"app": "web2"}
	theirs.Spec.Ports = append(theirs.Spec.Ports, tcp("new", 90, "9090"))
	theirs.Annotations = nil
	s.services["web"] = theirs
	next, err := c.Replan(t.Context(), plan, theirs)
	if err != nil {
		t.Fatal(err)
	}
	if next.Ports[0].Local != 8080 || next.Ports[0].TargetPort.IntVal != 8080 || next.Ports[2].TargetPort.IntVal != 9090 || next.Record.Selector["app"] != "web2" || len(next.Record.Ports) != 3 {
		t.Errorf("%+v, %+v", next.Ports, next.Record)
	}
	if live, err = c.Switch(t.Context(), next, gates, gatePorts, Record{Session: "s1"}); err != nil || !maps.Equal(live.Spec.Selector, gates) || live.Spec.Ports[2].TargetPort.IntVal != 20002 {
		t.Fatalf("%+v, %v", live, err)
	}
	if _, err := c.Restore(t.Context(), "demo", "web", "s1"); err != nil {
		t.Fatal(err)
	}
	if got := s.services["web"].Spec; got.Selector["app"] != "web2" || got.Ports[0].TargetPort.IntVal != 8080 || got.Ports[1].TargetPort.StrVal != "dns" || got.Ports[2].TargetPort.IntVal != 9090 {
		t.Errorf("%+v", got)
	}
	// A port that is exposed and gone is an error.
	theirs = s.services["web"].DeepCopy()
	theirs.Spec.Ports = theirs.Spec.Ports[1:]
	_, err = c.Replan(t.Context(), plan, theirs)
	wantError(t, err, api.CodeUsage, "8080")
}
