package cluster

import (
	"context"
	"fmt"
	"maps"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Restored is what Restore did.
type Restored struct {
	// Record is what undo went by; nil: the Service is gone, or not intercepted
	// (by that session), and nothing was done.
	Record *Record
	// Done and Theirs are for people: what is as before, and what somebody else
	// changed meanwhile and stays.
	Done, Theirs []string
}

// Restore undoes Switch: selector and targetPorts are again what they were, or
// what somebody else made of them meanwhile, and so are the owners of these
// fields; the annotation goes. It needs nothing but the annotation, is idempotent,
// and a Service that is gone is fine. With a session, an intercept of another one
// is left alone. Origin, gates and the rest are not touched: delete them afterwards.
//
// It takes two requests (see fieldManager). In between the Service works as
// before, and the annotation says what is left to do.
func (c *Cluster) Restore(ctx context.Context, namespace, name, session string) (did Restored, err error) {
	doing := fmt.Sprintf("restoring Service %s/%s", namespace, name)
	for try := 1; ; try++ {
		live, err := c.client.Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return did, nil
		}
		if err != nil {
			return did, translateService(doing, err)
		}
		r, err := RecordOf(live)
		if err != nil || r == nil || session != "" && r.Session != session {
			return did, err
		}
		if err = c.restore(ctx, live, r, &did); err == nil || apierrors.IsNotFound(err) {
			return did, nil
		}
		if !apierrors.IsConflict(err) || try == conflictTries {
			return did, translateService(doing, err)
		}
	}
}

// restore tries once, from the step that r's phase names.
func (c *Cluster) restore(ctx context.Context, live *corev1.Service, r *Record, did *Restored) error {
	if r.Phase != PhaseRestored {
		below := r.below(live)
		done, theirs := r.differences(live, below)
		ops := specOps(live, below)
		next := *r
		next.Phase = PhaseRestored
		// Ownership that cannot be read must not stop the rest.
		if managed, err := owners(live.ManagedFields, r.Managed, isTouched); err == nil {
			next.Managed = managed
		}
		text, err := next.encode()
		if err != nil {
			return err
		}
		if live, err = c.patchService(ctx, live, append(ops, annotationOp(live, text))); err != nil {
			return err
		}
		did.Done, did.Theirs = append(did.Done, done...), theirs
		did.Record, r = r, &next
	}
	if did.Record == nil {
		did.Record = r
	}
	ops := []patchOp{{Op: "remove", Path: annotationPath}}
	managed, unread := giveBack(live.ManagedFields, r.Managed)
	if unread == nil {
		ops = append(ops, set("/metadata/managedFields", managed))
	}
	if _, err := c.patchService(ctx, live, ops); err != nil {
		return err
	}
	if names := managerNames(r.Managed); names != "" && unread == nil {
		did.Done = append(did.Done, "fields belong to "+names+" again")
	}
	return nil
}

// differences says what undo changes, and what it leaves.
func (r *Record) differences(live, below *corev1.Service) (done, theirs []string) {
	if !maps.Equal(live.Spec.Selector, below.Spec.Selector) {
		done = append(done, "selector is "+labels.Set(below.Spec.Selector).String())
	}
	if !maps.Equal(below.Spec.Selector, r.Selector) {
		theirs = append(theirs, "selector "+labels.Set(below.Spec.Selector).String()+by(changedBy(live, isSelector)))
	}
	for i, p := range below.Spec.Ports {
		was, ok := r.port(keyOf(p))
		switch {
		case !ok:
			theirs = append(theirs, fmt.Sprintf("port %d", p.Port)+by(changedBy(live, isPort)))
		case p.TargetPort != was.TargetPort:
			theirs = append(theirs, fmt.Sprintf("targetPort %s of port %d", p.TargetPort.String(), p.Port)+by(changedBy(live, isPort)))
		case p.TargetPort != live.Spec.Ports[i].TargetPort:
			done = append(done, fmt.Sprintf("targetPort of port %d is %s", p.Port, p.TargetPort.String()))
		}
	}
	return done, theirs
}

// restoreFromOrigin is for a Service that leads to gates though its Record is gone:
// the origin has the selector and the targetPorts of before. led: it did lead there.
// Without origin it is an error, and what serves it now has to stay.
func (c *Cluster) restoreFromOrigin(ctx context.Context, live *corev1.Service) (led bool, err error) {
	if live.Spec.Selector[LabelGate] == "" {
		return false, nil
	}
	what := fmt.Sprintf("restoring Service %s/%s, whose annotation %s is gone", live.Namespace, live.Name, AnnotationIntercept)
	origin, err := c.client.Services(live.Namespace).Get(ctx, OriginName(live.Name), metav1.GetOptions{})
	if err != nil && !apierrors.IsNotFound(err) {
		return false, translateService(what, err)
	}
	if err != nil || !isOrigin(origin) {
		return false, &api.Error{Code: api.CodeConflict,
			Message: what + ": nothing tells what it selected before; the gates stay",
			Hint:    fmt.Sprintf("set its selector and targetPorts as its owner wants them (kubectl apply), then `culvert recover %s -n %s`", live.Name, live.Namespace)}
	}
	want := live.DeepCopy()
	want.Spec.Selector = origin.Spec.Selector
	for i := range want.Spec.Ports {
		for _, p := range origin.Spec.Ports {
			if keyOf(p) == keyOf(want.Spec.Ports[i]) {
				want.Spec.Ports[i].TargetPort = p.TargetPort
			}
		}
	}
	if _, err := c.patchService(ctx, live, specOps(live, want)); err != nil {
		return false, translateService(what, err)
	}
	return true, nil
}
