package cluster

import (
	"encoding/json"
	"fmt"
	"maps"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
)

// AnnotationIntercept is on an intercepted Service and holds a Record as JSON.
const AnnotationIntercept = "culvert.dev/intercept"

// recordVersion is that of Record's form. A Record with a larger one was made by
// a newer culvert and is left alone.
const recordVersion = 1

// Phases of a Record.
const (
	PhaseActive   = "active"
	PhaseRestored = "restored" // selector and targetPorts are back, ownership is not yet
)

// Record is all that undo needs. Whoever may change the Service can undo an
// intercept with it (Restore), without a session or its memory.
type Record struct {
	Version int       `json:"version"`
	Phase   string    `json:"phase"`
	Session string    `json:"session"` // its id
	User    string    `json:"user,omitempty"`
	Origin  string    `json:"origin,omitempty"` // of the user's daemon, see AnnotationOrigin
	Since   time.Time `json:"since"`            // by the API server's clock
	Kind    string    `json:"kind,omitempty"`   // of package intercept

	Selector map[string]string `json:"selector"` // what was there before
	Gates    map[string]string `json:"gates"`    // what is there instead
	Ports    []RecordedPort    `json:"ports"`
	// Managed is who owned the fields that the intercept changes, and nothing of
	// what else they own.
	Managed []metav1.ManagedFieldsEntry `json:"managed,omitempty"`

	OriginService string `json:"originService,omitempty"`
	Gate          string `json:"gate,omitempty"` // the gates' Deployment
	// Reapplied is when somebody else's change was overwritten, the last few times.
	Reapplied []time.Time `json:"reapplied,omitempty"`
}

// RecordedPort is one port of an intercepted Service.
type RecordedPort struct {
	Port       int32              `json:"port"`
	Protocol   corev1.Protocol    `json:"protocol"`
	TargetPort intstr.IntOrString `json:"targetPort"` // what was there before
	Gate       uint16             `json:"gate"`       // what is there instead
}

// PortKey tells the ports of a Service apart.
type PortKey struct {
	Port     int32
	Protocol corev1.Protocol
}

func keyOf(p corev1.ServicePort) PortKey {
	return PortKey{Port: p.Port, Protocol: corev1.Protocol(firstOf(string(p.Protocol), string(corev1.ProtocolTCP)))}
}

// RecordOf reads a Service's Record, nil for none. One that cannot be read is an
// *api.Error.
func RecordOf(service *corev1.Service) (*Record, error) {
	text, ok := service.Annotations[AnnotationIntercept]
	if !ok {
		return nil, nil
	}
	bad := func(why string, hint string) (*Record, error) {
		return nil, &api.Error{
			Code:    api.CodeInternal,
			Message: fmt.Sprintf("annotation %s of Service %s/%s %s", AnnotationIntercept, service.Namespace, service.Name, why),
			Hint:    hint,
		}
	}
	r := &Record{}
	if err := json.Unmarshal([]byte(text), r); err != nil {
		return bad(fmt.Sprintf("cannot be read: %v", err), "somebody changed it: put the Service's selector and targetPorts back by hand and remove the annotation")
	}
	if r.Version != recordVersion {
		return bad(fmt.Sprintf("has version %d, and this culvert knows version %d", r.Version, recordVersion), "use the culvert that made it, or a newer one")
	}
	return r, nil
}

// encode is the annotation's text.
func (r Record) encode() (string, error) {
	b, err := json.Marshal(r)
	if err != nil {
		return "", fmt.Errorf("encoding annotation %s: %w", AnnotationIntercept, err)
	}
	return string(b), nil
}

// Holder says for people whose the intercept is.
func (r Record) Holder() string {
	return fmt.Sprintf("%s (session %s, since %s)", firstOf(r.User, "somebody"), r.Session, r.Since.Local().Format(time.DateTime))
}

// port is what is kept of the Service's port k, false for nothing.
func (r *Record) port(k PortKey) (RecordedPort, bool) {
	for _, p := range r.Ports {
		if p.Port == k.Port && p.Protocol == k.Protocol {
			return p, true
		}
	}
	return RecordedPort{}, false
}

// below is the Service as it is without the intercept: where the intercept's own
// values stand, what was there before; where somebody else changed a value
// meanwhile, his. A nil Record and one that is restored leave it as it is.
func (r *Record) below(live *corev1.Service) *corev1.Service {
	s := live.DeepCopy()
	if r == nil || r.Phase == PhaseRestored {
		return s
	}
	s.Spec.Selector = r.selectorBelow(live)
	for i := range s.Spec.Ports {
		p := &s.Spec.Ports[i]
		if was, ok := r.port(keyOf(*p)); ok && p.TargetPort == intstr.FromInt32(int32(was.Gate)) {
			p.TargetPort = was.TargetPort
		}
	}
	return s
}

// selectorBelow is below's selector. A merge patch (kubectl apply, Helm, an
// operator) merges a selector key by key: the gates' keys stay beside the new
// ones, and the Service selects nothing at all. So what is not the gates' is
// theirs: all of it if it came from a manifest, else a change to what was there.
func (r *Record) selectorBelow(live *corev1.Service) map[string]string {
	present := live.Spec.Selector
	if maps.Equal(present, r.Gates) {
		return maps.Clone(r.Selector)
	}
	rest := maps.Clone(present)
	maps.DeleteFunc(rest, func(k, v string) bool {
		was, had := r.Selector[k]
		return r.Gates[k] == v && !(had && was == v)
	})
	switch {
	case len(rest) == len(present):
		return rest // nothing of ours is in it
	case len(rest) > 0 && (maps.Equal(rest, lastApplied(live)) || strings.HasPrefix(changedBy(live, isSelector), "helm")):
		return rest
	}
	return merge(r.Selector, rest)
}

// lastApplied is the selector of the manifest that `kubectl apply` keeps in an
// annotation.
func lastApplied(service *corev1.Service) map[string]string {
	var manifest struct {
		Spec struct {
			Selector map[string]string `json:"selector"`
		} `json:"spec"`
	}
	_ = json.Unmarshal([]byte(service.Annotations[corev1.LastAppliedConfigAnnotation]), &manifest) // none is as good as an empty one
	return manifest.Spec.Selector
}
