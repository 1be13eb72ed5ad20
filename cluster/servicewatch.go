package cluster

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/watch"
)

// What a ServiceChange may be.
const (
	// Overwritten: selector or a targetPort is not the gates' any more, or there
	// are other ports, or the Record is gone. Replan and Switch put it right.
	Overwritten = "overwritten"
	Released    = "released" // somebody undid the intercept, or replaced the whole Service
	Taken       = "taken"    // another session's Record is on it
	Deleted     = "deleted"
)

// ServiceChange is what became of a Service that was switched.
type ServiceChange struct {
	Kind    string
	Service *corev1.Service // as it is; of Deleted nil
	Manager string          // who did it, as far as the object tells
	Record  *Record         // of Taken: of who holds it
}

// WatchService follows a Service that was switched with the Record held, and
// tells on of each change that is not the intercept's own. on is called from
// here, and what it does itself (Replan, Switch) is no change. It returns nil when
// the intercept is lost, by any change but Overwritten, ctx's error when ctx ends,
// and an *api.Error when the Service may not be read. An API server that is away
// is waited for.
func (c *Cluster) WatchService(ctx context.Context, namespace, name string, held Record, on func(ServiceChange)) error {
	w := &serviceWatch{c: c, namespace: namespace, name: name, held: held, on: on}
	wait := retryFirst
	for {
		lost, err := w.look(ctx)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case lost:
			return nil
		case apierrors.IsForbidden(err):
			return translate(fmt.Sprintf("watching Service %s/%s", namespace, name), err)
		case err == nil:
			begun := time.Now()
			lost, err = w.follow(ctx)
			switch {
			case lost:
				return nil
			case apierrors.IsForbidden(err), apierrors.IsMethodNotSupported(err):
				wait = pollUnseen // may read but not watch
			case time.Since(begun) > retryMost:
				wait = retryFirst
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(wait):
		}
		wait = min(2*wait, retryMost)
	}
}

// serviceWatch is one WatchService.
type serviceWatch struct {
	c               *Cluster
	namespace, name string
	held            Record
	on              func(ServiceChange)
	version         string // of the Service when it was looked at last
}

// look reads the Service and tells of what is wrong with it. An event may be old:
// only what is so now counts, or a change would be told again that on has put
// right meanwhile.
func (w *serviceWatch) look(ctx context.Context) (lost bool, err error) {
	live, err := w.c.client.Services(w.namespace).Get(ctx, w.name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		w.on(ServiceChange{Kind: Deleted})
		return true, nil
	}
	if err != nil {
		return false, err
	}
	w.version = live.ResourceVersion
	change := w.judge(live)
	if change.Kind == "" {
		return false, nil
	}
	w.on(change)
	return change.Kind != Overwritten, nil
}

// judge finds what is not as the Record of this session has it, which is on the
// Service itself: it changes with each Switch.
func (w *serviceWatch) judge(live *corev1.Service) ServiceChange {
	change := ServiceChange{Service: live, Manager: changedBy(live, isSelector)}
	r, err := RecordOf(live)
	switch {
	case err == nil && r != nil && r.Session != w.held.Session:
		change.Kind, change.Record, change.Manager = Taken, r, r.User
	case err == nil && r != nil && r.Phase == PhaseRestored:
		change.Kind = Released
	case r != nil:
		w.held = *r
		switch {
		case !maps.Equal(live.Spec.Selector, r.Gates):
			change.Kind = Overwritten
		case !w.held.hasPorts(live.Spec.Ports):
			change.Kind, change.Manager = Overwritten, changedBy(live, isPort)
		}
	case maps.Equal(live.Spec.Selector, w.held.Gates):
		// The annotation is gone, or not readable, and traffic comes still.
		change.Kind, change.Manager = Overwritten, ""
	default:
		change.Kind = Released
	}
	return change
}

// hasPorts says whether the ports are those of the intercept, with the gates'
// targetPorts.
func (r *Record) hasPorts(ports []corev1.ServicePort) bool {
	return len(ports) == len(r.Ports) && !slices.ContainsFunc(ports, func(p corev1.ServicePort) bool {
		was, ok := r.port(keyOf(p))
		return !ok || p.TargetPort != intstr.FromInt32(int32(was.Gate))
	})
}

// follow looks again whenever the Service changes, until the server ends the
// watch, which it does every few minutes.
func (w *serviceWatch) follow(ctx context.Context) (lost bool, err error) {
	events, err := w.c.watch.Services(w.namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector: "metadata.name=" + w.name, ResourceVersion: w.version,
	})
	if err != nil {
		return false, err
	}
	defer events.Stop()
	for event := range events.ResultChan() {
		if event.Type == watch.Error {
			return false, apierrors.FromObject(event.Object)
		}
		if s, ok := event.Object.(*corev1.Service); ok && event.Type != watch.Deleted && w.judge(s).Kind == "" {
			continue
		}
		if lost, err = w.look(ctx); lost || err != nil {
			return lost, err
		}
	}
	return false, ctx.Err()
}
