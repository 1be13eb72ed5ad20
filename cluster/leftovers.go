package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// Leftover is something of culvert's that no living session owns.
type Leftover struct {
	Kind      string    `json:"kind"` // "Service", "Deployment", ...; KindGateEntry
	Namespace string    `json:"namespace"`
	Name      string    `json:"name"` // of a KindGateEntry its key
	UID       types.UID `json:"uid,omitempty"`
	Session   string    `json:"session,omitempty"` // empty: of no one session
	User      string    `json:"user,omitempty"`
	LastSeen  time.Time `json:"lastSeen,omitzero"` // of the session, by the API server's clock; zero: it has no Lease
	Action    string    `json:"action"`            // LeftoverRestore, ...
}

// KindGateEntry is a Leftover inside the gates' ConfigMap.
const KindGateEntry = "entry of ConfigMap " + intercept.GateName

// What is to be done about a Leftover, in this order: what serves traffic is put
// back before anything that serves it goes.
const (
	LeftoverRestore = "restore"  // a Service with the annotation
	LeftoverRescale = "rescale"  // a workload with the annotation
	LeftoverTakeOut = "take out" // an entry: RemoveGateEntry with its name, which may be empty
	LeftoverDelete  = "delete"   // RemoveLeftover
	LeftoverUnknown = "unknown"  // an agent that nothing is known about: stays
)

// leftoverAge: what is younger and has no Lease is not judged. A Lease that
// somebody deleted is back within HeartbeatEvery.
const leftoverAge = time.Minute

// Leftovers finds what sessions left whose Lease was not renewed within olderThan
// by the API server's clock, or that have none. What may not be listed is in the
// notes. The order is that in which to undo them. Errors are *api.Error.
func (c *Cluster) Leftovers(ctx context.Context, namespaces []string, olderThan time.Duration) (left []Leftover, notes []string, err error) {
	for _, ns := range namespaces {
		s := &sweep{c: c, namespace: ns, olderThan: olderThan, seen: map[string]time.Time{}, users: map[string]string{}}
		some, err := s.run(ctx)
		if err != nil {
			return nil, nil, err
		}
		left, notes = append(left, some...), append(notes, s.notes...)
	}
	order := []string{LeftoverRestore, LeftoverRescale, LeftoverTakeOut, LeftoverDelete, LeftoverUnknown}
	slices.SortStableFunc(left, func(a, b Leftover) int { return slices.Index(order, a.Action) - slices.Index(order, b.Action) })
	return left, notes, nil
}

// sweep looks through one namespace.
type sweep struct {
	c         *Cluster
	namespace string
	olderThan time.Duration

	candidates []candidate
	state      *gateState
	seen       map[string]time.Time // by session: its Lease
	users      map[string]string    // by session
	now        time.Time
	notes      []string
}

// candidate is left over if its session is not alive.
type candidate struct {
	Leftover
	made time.Time
	// judge overrides that; nil: by the session.
	judge func() (left bool)
	// quiet: its session may be alive without a Lease.
	quiet bool
}

func (s *sweep) run(ctx context.Context) ([]Leftover, error) {
	// Leases last: a session has one before it makes anything else, so whatever
	// was listed before belongs to a Lease that is listed now.
	for _, look := range []func(context.Context) error{s.services, s.workloads, s.gateState, s.rest, s.leases} {
		if err := look(ctx); err != nil {
			return nil, err
		}
	}
	s.now = s.c.Now()
	var left []Leftover
	for _, one := range s.candidates {
		switch {
		case one.judge != nil && !one.judge(), one.judge == nil && s.alive(one.Session):
			continue
		case s.seen[one.Session].IsZero() && s.now.Sub(one.made) < leftoverAge:
			continue
		case one.quiet && s.seen[one.Session].IsZero():
			one.Action = LeftoverUnknown
		}
		one.LastSeen = s.seen[one.Session]
		one.User = firstOf(one.User, s.users[one.Session])
		left = append(left, one.Leftover)
	}
	return left, nil
}

func (s *sweep) alive(session string) bool {
	if isMesh(session) { // it lives as long as one of its members
		for _, e := range s.state.Entries {
			if e.Holder.Session == session && slices.ContainsFunc(e.Members, func(m intercept.Member) bool { return s.alive(m.Holder.Session) }) {
				return true
			}
		}
		return false
	}
	last, ok := s.seen[session]
	return ok && s.now.Sub(last) <= s.olderThan
}

// add notes an object of culvert's. One that an agent's Deployment owns goes with
// that.
func (s *sweep) add(kind string, o metav1.Object, action string) *candidate {
	s.candidates = append(s.candidates, candidate{
		Leftover: Leftover{
			Kind: kind, Namespace: s.namespace, Name: o.GetName(), UID: o.GetUID(),
			Session: o.GetLabels()[LabelSession], User: o.GetAnnotations()[AnnotationUser], Action: action,
		},
		made: o.GetCreationTimestamp().Time,
	})
	return &s.candidates[len(s.candidates)-1]
}

// held is add for an object of somebody else's with an annotation of culvert's.
func (s *sweep) held(kind string, o metav1.Object, annotation, action string) {
	text, ok := o.GetAnnotations()[annotation]
	if !ok {
		return
	}
	var record intercept.Holder
	// A text that cannot be read names no session, and so none that lives: undo
	// says what is wrong with it.
	_ = json.Unmarshal([]byte(text), &record)
	one := s.add(kind, o, action)
	one.Session, one.User, one.made = record.Session, record.User, record.Since
}

// each lists what selector finds of one kind, or notes that it may not.
func each[T, L runtime.Object](ctx context.Context, s *sweep, kind string, objects Objects[T, L], selector string, items func(L) []T, do func(T)) error {
	options := metav1.ListOptions{LabelSelector: selector, Limit: leftoverPage}
	for {
		page, err := objects.List(ctx, options)
		if apierrors.IsForbidden(err) {
			s.notes = append(s.notes, fmt.Sprintf("%s objects in namespace %q may not be listed: what is left of them is not known", kind, s.namespace))
			return nil
		}
		if err != nil {
			return translate(fmt.Sprintf("listing %s objects in namespace %q", kind, s.namespace), err)
		}
		for _, o := range items(page) {
			do(o)
		}
		more, ok := any(page).(metav1.ListInterface)
		if !ok || more.GetContinue() == "" {
			return nil
		}
		options.Continue = more.GetContinue()
	}
}

// leftoverPage is how many objects one answer holds.
const leftoverPage = 500

const ofCulvert = LabelManagedBy + "=culvert"

func pointers[T any](items []T) []*T {
	all := make([]*T, len(items))
	for i := range items {
		all[i] = &items[i]
	}
	return all
}

func (s *sweep) services(ctx context.Context) error {
	return each(ctx, s, "Service", s.c.client.Services(s.namespace), "",
		func(l *corev1.ServiceList) []*corev1.Service { return pointers(l.Items) },
		func(o *corev1.Service) {
			if o.Labels[LabelManagedBy] != "culvert" {
				s.held("Service", o, AnnotationIntercept, LeftoverRestore)
				return
			}
			switch {
			case isRule(o): // first the rule that leads there
				s.add("Service", o, LeftoverRestore)
			case !ownedByA("Deployment", o): // not the way of UDP to an agent
				s.add("Service", o, LeftoverDelete)
			}
		})
}

func ownedByA(kind string, o metav1.Object) bool {
	return slices.ContainsFunc(o.GetOwnerReferences(), func(r metav1.OwnerReference) bool { return r.Kind == kind })
}

func (s *sweep) workloads(ctx context.Context) error {
	err := each(ctx, s, "Deployment", s.c.client.Deployments(s.namespace), "",
		func(l *appsv1.DeploymentList) []*appsv1.Deployment { return pointers(l.Items) },
		func(o *appsv1.Deployment) {
			switch {
			case o.Labels[LabelManagedBy] == "culvert" && o.Labels[LabelName] == agentApp:
				one := s.add("Deployment", o, LeftoverDelete)
				one.quiet = o.Annotations[AnnotationHeartbeat] != HeartbeatLease
			case o.Labels[LabelGate] != "":
				s.gate("Deployment", o)
			default:
				s.held("Deployment", o, AnnotationScaled, LeftoverRescale)
			}
		})
	if err != nil {
		return err
	}
	err = each(ctx, s, "StatefulSet", s.c.client.StatefulSets(s.namespace), "",
		func(l *appsv1.StatefulSetList) []*appsv1.StatefulSet { return pointers(l.Items) },
		func(o *appsv1.StatefulSet) { s.held("StatefulSet", o, AnnotationScaled, LeftoverRescale) })
	if err != nil {
		return err
	}
	return each(ctx, s, "ReplicaSet", s.c.client.ReplicaSets(s.namespace), "",
		func(l *appsv1.ReplicaSetList) []*appsv1.ReplicaSet { return pointers(l.Items) },
		func(o *appsv1.ReplicaSet) {
			// A Deployment copies its annotations to its ReplicaSets.
			if !ownedByA("Deployment", o) {
				s.held("ReplicaSet", o, AnnotationScaled, LeftoverRescale)
			}
		})
}

// gate notes what belongs to gates. Those of a namespace go with their ConfigMap,
// which nobody but the last one out deletes; those of one entry alone, and any of
// a ConfigMap that is not there any more, when no living session has an entry.
func (s *sweep) gate(kind string, o metav1.Object) {
	name, owner := o.GetLabels()[LabelGate], o.GetLabels()[LabelGateState]
	s.add(kind, o, LeftoverDelete).judge = func() bool {
		if s.state.object == nil || string(s.state.object.UID) != owner {
			return true
		}
		if name == intercept.GateName {
			return false
		}
		for _, e := range s.state.Entries {
			if e.Gate == name && s.alive(e.Holder.Session) {
				return false
			}
		}
		return true
	}
}

func (s *sweep) gateState(ctx context.Context) (err error) {
	if s.state, err = s.c.readGateState(ctx, s.namespace); err != nil || s.state.object == nil {
		return err
	}
	entry := func(key string, h intercept.Holder) {
		one := s.add(KindGateEntry, s.state.object, LeftoverTakeOut)
		one.Name, one.UID, one.Session, one.User, one.made = key, "", h.Session, h.User, h.Since
	}
	for _, key := range slices.Sorted(maps.Keys(s.state.Entries)) {
		e := s.state.Entries[key]
		for _, m := range e.Members {
			entry(key, m.Holder)
		}
		if len(e.Members) == 0 {
			entry(key, e.Holder)
		}
	}
	if len(s.state.Entries) == 0 {
		entry("", intercept.Holder{}) // nothing to take out but the ConfigMap itself
	}
	return nil
}

func (s *sweep) rest(ctx context.Context) error {
	err := each(ctx, s, "PodDisruptionBudget", s.c.client.PodDisruptionBudgets(s.namespace), ofCulvert,
		func(l *policyv1.PodDisruptionBudgetList) []*policyv1.PodDisruptionBudget { return pointers(l.Items) },
		func(o *policyv1.PodDisruptionBudget) { s.gate("PodDisruptionBudget", o) })
	if err != nil {
		return err
	}
	err = each(ctx, s, "NetworkPolicy", s.c.client.NetworkPolicies(s.namespace), ofCulvert,
		func(l *networkingv1.NetworkPolicyList) []*networkingv1.NetworkPolicy { return pointers(l.Items) },
		func(o *networkingv1.NetworkPolicy) { s.add("NetworkPolicy", o, LeftoverDelete) })
	if err != nil {
		return err
	}
	return each(ctx, s, "Ingress", s.c.client.Ingresses(s.namespace), ofCulvert,
		func(l *networkingv1.IngressList) []*networkingv1.Ingress { return pointers(l.Items) },
		func(o *networkingv1.Ingress) { s.add("Ingress", o, LeftoverDelete) })
}

// leases cannot be left out: without them everything would look left over.
func (s *sweep) leases(ctx context.Context) error {
	list, err := s.c.client.Leases(s.namespace).List(ctx, metav1.ListOptions{LabelSelector: ofCulvert})
	if err != nil {
		return translate(fmt.Sprintf("listing the sessions' Leases in namespace %q", s.namespace), err)
	}
	for i := range list.Items {
		l := &list.Items[i]
		session := l.Labels[LabelSession]
		s.seen[session], s.users[session] = renewed(l), l.Annotations[AnnotationUser]
		s.add("Lease", l, LeftoverDelete)
	}
	return nil
}

// RemoveLeftover deletes one whose Action is LeftoverDelete, if it is still the
// same object and its session did not come back meanwhile. One that is gone is no
// error. Errors are *api.Error.
func (c *Cluster) RemoveLeftover(ctx context.Context, l Leftover) error {
	what := fmt.Sprintf("deleting %s %s in namespace %q", l.Kind, l.Name, l.Namespace)
	remove, ok := c.removers(l.Namespace)[l.Kind]
	if !ok || l.Action != LeftoverDelete {
		return &api.Error{Code: api.CodeInternal, Message: what + ": that is not how it is undone"}
	}
	if l.Session != "" {
		last, ok, err := c.SeenSession(ctx, l.Namespace, l.Session)
		if err != nil {
			return err
		}
		if ok && last.After(l.LastSeen) {
			return &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("%s: its session %s is back", what, l.Session)}
		}
	}
	background := metav1.DeletePropagationBackground
	err := remove(ctx, l.Name, metav1.DeleteOptions{PropagationPolicy: &background, Preconditions: &metav1.Preconditions{UID: &l.UID}})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return translate(what, err)
}

func (c *Cluster) removers(namespace string) map[string]func(context.Context, string, metav1.DeleteOptions) error {
	return map[string]func(context.Context, string, metav1.DeleteOptions) error{
		"Deployment":          c.client.Deployments(namespace).Delete,
		"Ingress":             c.client.Ingresses(namespace).Delete,
		"Lease":               c.client.Leases(namespace).Delete,
		"NetworkPolicy":       c.client.NetworkPolicies(namespace).Delete,
		"PodDisruptionBudget": c.client.PodDisruptionBudgets(namespace).Delete,
		"Service":             c.client.Services(namespace).Delete,
	}
}
