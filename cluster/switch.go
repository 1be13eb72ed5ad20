package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"

	"github.com/culvert-dev/culvert/daemon/api"
)

// conflictTries is how often a change is tried when others write the Service at
// the same time; a controller that writes without pause is not waited for.
const conflictTries = 8

// Switch has the Service select the gates: selector, targetPorts and Record in
// one request, which the server refuses if anybody wrote the Service meanwhile;
// then it is looked at again. Of r, what names the holder and the gates has to be
// set; the rest is filled in. gatePorts has a port for each of plan's. It is
// idempotent. plan then has the Service and the Record as they became.
//
// A Service that another session holds by now is an *api.Error with CodeExists,
// one that changed since it was planned has CodeConflict (plan anew).
func (c *Cluster) Switch(ctx context.Context, plan *ServicePlan, selector map[string]string, gatePorts map[PortKey]uint16, r Record) (*corev1.Service, error) {
	doing := fmt.Sprintf("leading Service %s/%s to the gates", plan.Namespace, plan.Name)
	live := plan.service
	for try := 1; ; try++ {
		held, err := plan.stillAs(live, r.Session)
		if err != nil {
			return nil, err
		}
		next, ops, err := held.switched(live, selector, gatePorts, r)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", doing, err)
		}
		made := live
		if len(ops) > 0 {
			made, err = c.patchService(ctx, live, ops)
		}
		if err == nil {
			plan.service, plan.Record = made, &next
			return made, nil
		}
		if !apierrors.IsConflict(err) || try == conflictTries {
			return nil, translateService(doing, err)
		}
		if live, err = c.client.Services(plan.Namespace).Get(ctx, plan.Name, metav1.GetOptions{}); err != nil {
			return nil, translateService(doing, err)
		}
	}
}

// stillAs finds that live is as planned, and returns the Record that it has from
// the same session before, nil for none.
func (p *ServicePlan) stillAs(live *corev1.Service, session string) (*Record, error) {
	held, err := RecordOf(live)
	if err != nil {
		return nil, err
	}
	if held == nil && p.Record != nil && p.Record.Session == session {
		held = p.Record // somebody removed the annotation only
	}
	if held != nil && held.Session != session {
		return nil, heldError(live, held)
	}
	// Below the intercept: when the answer to the switch was lost, live is
	// switched already.
	now, planned := held.below(live), p.below
	if now.UID != planned.UID || now.Spec.Type != planned.Spec.Type || now.DeletionTimestamp != nil ||
		!maps.Equal(now.Spec.Selector, planned.Spec.Selector) || !slices.EqualFunc(now.Spec.Ports, planned.Spec.Ports, samePort) {
		return nil, &api.Error{
			Code:    api.CodeConflict,
			Message: fmt.Sprintf("Service %s/%s changed while the exchange was prepared%s", live.Namespace, live.Name, by(changedBy(live, isSelectorOrPort))),
			Hint:    "try again",
		}
	}
	return held, nil
}

// samePort leaves out the node's port, which nobody here minds.
func samePort(a, b corev1.ServicePort) bool {
	a.NodePort, b.NodePort = 0, 0
	return reflect.DeepEqual(a, b)
}

func heldError(service *corev1.Service, held *Record) error {
	return &api.Error{
		Code:    api.CodeExists,
		Message: fmt.Sprintf("Service %s/%s is intercepted already, by %s", service.Namespace, service.Name, held.Holder()),
		Hint:    "use --wait to wait for its end; `culvert list` shows whether its holder is alive",
	}
}

func isSelectorOrPort(p fieldpath.Path) bool { return isSelector(p) || isPort(p) }

func by(manager string) string {
	if manager == "" {
		return ""
	}
	return " (by " + manager + ")"
}

// switched is what live becomes: next is its Record, and ops change it; none if it
// is so already. r is what is kept of live before, if it was switched before.
func (r *Record) switched(live *corev1.Service, selector map[string]string, gatePorts map[PortKey]uint16, next Record) (Record, []patchOp, error) {
	below := r.below(live)
	next.Version, next.Phase = recordVersion, PhaseActive
	next.Selector, next.Gates, next.Ports = below.Spec.Selector, selector, nil
	var saved []metav1.ManagedFieldsEntry
	if r != nil {
		saved = r.Managed
	}
	var err error
	if next.Managed, err = owners(live.ManagedFields, saved, isTouched); err != nil {
		return next, nil, err
	}
	want := live.DeepCopy()
	want.Spec.Selector = selector
	for i := range want.Spec.Ports {
		k := keyOf(want.Spec.Ports[i])
		gate := gatePorts[k]
		if gate == 0 {
			return next, nil, fmt.Errorf("the gates have no port for %d/%s", k.Port, k.Protocol)
		}
		next.Ports = append(next.Ports, RecordedPort{Port: k.Port, Protocol: k.Protocol, TargetPort: below.Spec.Ports[i].TargetPort, Gate: gate})
		want.Spec.Ports[i].TargetPort = intstr.FromInt32(int32(gate))
	}
	text, err := next.encode()
	if err != nil {
		return next, nil, err
	}
	ops := specOps(live, want)
	if live.Annotations[AnnotationIntercept] != text {
		ops = append(ops, annotationOp(live, text))
	}
	return next, ops, nil
}

// patchOp is one operation of a JSON patch (RFC 6902). Services are patched and
// not replaced: a server newer than this program has fields that it would drop.
type patchOp struct {
	Op    string `json:"op"`
	Path  string `json:"path"`
	Value any    `json:"value,omitempty"`
}

// set adds a field or replaces it.
func set(path string, value any) patchOp { return patchOp{Op: "add", Path: path, Value: value} }

// specOps make live's selector and targetPorts those of want, which has the same
// ports.
func specOps(live, want *corev1.Service) (ops []patchOp) {
	switch {
	case maps.Equal(live.Spec.Selector, want.Spec.Selector):
	case len(want.Spec.Selector) == 0:
		ops = append(ops, patchOp{Op: "remove", Path: "/spec/selector"})
	default:
		ops = append(ops, set("/spec/selector", want.Spec.Selector))
	}
	for i, p := range want.Spec.Ports {
		if p.TargetPort != live.Spec.Ports[i].TargetPort {
			ops = append(ops, set(fmt.Sprintf("/spec/ports/%d/targetPort", i), p.TargetPort))
		}
	}
	return ops
}

// annotationPath has the annotation's slash as RFC 6901 wants it.
const annotationPath = "/metadata/annotations/culvert.dev~1intercept"

func annotationOp(live *corev1.Service, text string) patchOp {
	if live.Annotations == nil {
		return set("/metadata/annotations", map[string]string{AnnotationIntercept: text})
	}
	return set(annotationPath, text)
}

// patchService changes live, if it is still the newest; else the error is a
// conflict.
func (c *Cluster) patchService(ctx context.Context, live *corev1.Service, ops []patchOp) (*corev1.Service, error) {
	data, err := json.Marshal(append([]patchOp{set("/metadata/resourceVersion", live.ResourceVersion)}, ops...))
	if err != nil {
		return nil, fmt.Errorf("encoding a patch: %w", err)
	}
	return c.client.Services(live.Namespace).Patch(ctx, live.Name, types.JSONPatchType, data, metav1.PatchOptions{FieldManager: fieldManager})
}

// translateService is translate for a change to a Service: the hints about the
// agent's pod do not help there.
func translateService(doing string, err error) error {
	err = translate(doing, err)
	if e, ok := err.(*api.Error); ok && e.Code == api.CodeNamespace {
		e.Hint = "a quota or an admission policy of the namespace refuses the change of a Service: who runs the cluster can allow it"
	}
	return err
}
