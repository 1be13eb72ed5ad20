package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/daemon/api"
)

// AnnotationScaled is on a workload whose pods are replaced: a ScaleRecord, all
// that is needed to put them back.
const AnnotationScaled = "culvert.dev/scaled"

// scaleVersion is that of ScaleRecord.
const scaleVersion = 1

// Phases of a ScaleRecord.
const (
	ScalePhaseDown     = "down"     // 0 replicas
	ScalePhaseRestored = "restored" // the replicas are back, the rest of the undo is missing
)

// ScaleRecord is what a workload was before culvert scaled it down, and for whom
// it did.
type ScaleRecord struct {
	Version  int       `json:"version"`
	Session  string    `json:"session"`
	User     string    `json:"user,omitempty"`
	Origin   string    `json:"origin,omitempty"` // of the user's daemon
	Since    time.Time `json:"since"`            // by the API server's clock
	Gate     string    `json:"gate,omitempty"`   // Deployment of the pods that stand in
	Phase    string    `json:"phase"`
	Replicas int32     `json:"replicas"`
	Ready    int32     `json:"ready"` // pods that were ready
	// Managed is who owned spec.replicas.
	Managed []metav1.ManagedFieldsEntry `json:"managed,omitempty"`
}

// Scaled is a workload that has a ScaleRecord.
type Scaled struct {
	Namespace, Kind, Name string
	Record                ScaleRecord
	Replicas              int32 // now
}

// ScaledBack says what ScaleBack did.
type ScaledBack struct {
	// Record is the one that was undone; nil: there was none, or no workload.
	Record *ScaleRecord
	// Theirs: somebody else had set the replicas meanwhile, and they stay so.
	Theirs   bool
	Replicas int32 // after it
	Ready    int32 // pods, after it: fewer than were ready before if the time was too short
}

// scaleAttempts bounds how often a change is tried again because the object
// changed meanwhile. A rollout changes it a few times in a second.
const scaleAttempts = 20

// readScaleRecord is nil if there is none; one that cannot be read has no Version.
func readScaleRecord(meta *metav1.ObjectMeta) *ScaleRecord {
	text, ok := meta.Annotations[AnnotationScaled]
	if !ok {
		return nil
	}
	r := &ScaleRecord{}
	if json.Unmarshal([]byte(text), r) != nil {
		return &ScaleRecord{}
	}
	return r
}

// Scaled lists the workloads of a namespace whose pods are replaced.
func (c *Cluster) Scaled(ctx context.Context, namespace string) (scaled []Scaled, err error) {
	all, err := c.scalables(ctx, firstOf(namespace, c.namespace))
	if err != nil {
		return nil, err
	}
	live := map[types.UID]bool{} // Deployments, whose ReplicaSets have copies
	for _, w := range all {
		live[w.uid] = readScaleRecord(w.meta) != nil
	}
	for _, w := range all {
		owner := metav1.GetControllerOf(w.meta)
		if r := readScaleRecord(w.meta); r != nil && (owner == nil || !live[owner.UID]) {
			scaled = append(scaled, Scaled{w.namespace, w.kind, w.name, *r, w.replicas})
		}
	}
	return scaled, nil
}

// dropCopies removes the record from a Deployment's ReplicaSets: its controller
// copies all annotations there, never takes one away, and `kubectl rollout undo`
// would bring it back. The controller may just be at work with what the
// Deployment was a moment ago, hence the second look.
func (c *Cluster) dropCopies(ctx context.Context, w *workload) error {
	if w.kind != kindDeployment {
		return nil
	}
	what := "removing the annotation " + AnnotationScaled + " from the ReplicaSets of " + w.String()
	for look := range copyLooks {
		if look > 0 {
			select {
			case <-ctx.Done():
				return translate(what, ctx.Err())
			case <-time.After(copyPause):
			}
		}
		page, err := c.client.ReplicaSets(w.namespace).List(ctx, metav1.ListOptions{LabelSelector: w.selector.String(), Limit: pageSize})
		if err != nil {
			return translate(what, err)
		}
		found := false
		for i := range page.Items {
			r := &page.Items[i]
			owner := metav1.GetControllerOf(r)
			if _, has := r.Annotations[AnnotationScaled]; !has || owner == nil || owner.UID != w.uid {
				continue
			}
			found = true
			b := fmt.Appendf(nil, `{"metadata":{"annotations":{%q:null}}}`, AnnotationScaled)
			_, err := c.client.ReplicaSets(w.namespace).Patch(ctx, r.Name, types.MergePatchType, b, metav1.PatchOptions{FieldManager: fieldManager})
			if err != nil && !apierrors.IsNotFound(err) {
				return translate(what, err)
			}
		}
		if !found && look > 0 {
			break
		}
	}
	return nil
}

const (
	copyLooks = 4
	copyPause = 250 * time.Millisecond
)

// ScaleDown sets the replicas of the plan's workload to 0 and records in the same
// request what they were: either both happened or nothing. Session, User, Origin,
// Since and Gate of r are the caller's. It is done already if the record is there
// for the same session. The pods end after it returned. Errors are *api.Error.
func (c *Cluster) ScaleDown(ctx context.Context, p *ScalePlan, r ScaleRecord) error {
	what := "scaling " + p.String() + " down"
	r.Version, r.Phase = scaleVersion, ScalePhaseDown
	return translate(what, c.tryScale(ctx, what, func() error {
		o, err := c.scaledObject(ctx, p.Kind, p.Namespace, p.Name)
		if err != nil {
			return err
		}
		if o.uid != p.UID {
			return &api.Error{Code: api.CodeConflict, Message: what + ": it was deleted and made anew meanwhile", Hint: "try again"}
		}
		if there := readScaleRecord(o.meta); there != nil {
			if there.Session == r.Session && there.Phase == ScalePhaseDown && o.replicas == 0 {
				return nil
			}
			return &api.Error{
				Code:    api.CodeExists,
				Message: fmt.Sprintf("%s: its pods are replaced already, by %s", what, firstOf(there.User, "session "+there.Session)),
				Hint:    "`culvert recover` undoes one that nobody holds any more",
			}
		}
		r.Replicas, r.Ready = o.replicas, o.ready
		if r.Managed, err = owners(o.meta.ManagedFields, nil, isReplicas); err != nil {
			return err
		}
		return c.patchScale(ctx, o, map[string]any{"replicas": 0}, &r, nil)
	}))
}

// ScaleBack undoes ScaleDown: replicas first, then, when as many pods are ready as
// were before or ctx has reached its deadline, the record and the ownership of
// the field. What somebody else set meanwhile stays. It may be called by anybody,
// at any time and again: without a record, or without the workload, there is
// nothing to do. progress is told how the pods come; it may be nil. Errors are
// *api.Error; the record stays then.
func (c *Cluster) ScaleBack(ctx context.Context, namespace, kind, name string, progress func(step string)) (ScaledBack, error) {
	kind = firstOf(kindNames[strings.ToLower(kind)], kind)
	what := fmt.Sprintf("putting the replicas of %s %s/%s back", kind, namespace, name)
	var back ScaledBack
	var seen *workload
	err := c.tryScale(ctx, what, func() error {
		o, err := c.scaledObject(ctx, kind, namespace, name)
		if err != nil {
			return err
		}
		seen, back = o.workload, ScaledBack{Record: readScaleRecord(o.meta), Replicas: o.replicas, Ready: o.ready}
		r := back.Record
		if r == nil {
			return nil
		}
		if r.Version != scaleVersion {
			return &api.Error{
				Code:    api.CodeUnsupported,
				Message: fmt.Sprintf("%s: its annotation %s is of another version of culvert, or was changed: %q", what, AnnotationScaled, o.meta.Annotations[AnnotationScaled]),
				Hint:    "set the replicas by hand, then remove the annotation",
			}
		}
		back.Theirs = r.Phase == ScalePhaseDown && !scaledByCulvert(o)
		if r.Phase != ScalePhaseDown || back.Theirs {
			return nil
		}
		restored := *r
		restored.Phase = ScalePhaseRestored
		if err := c.patchScale(ctx, o, map[string]any{"replicas": r.Replicas}, &restored, nil); err != nil {
			return err
		}
		back.Replicas = r.Replicas
		return nil
	})
	if apierrors.IsNotFound(err) {
		return ScaledBack{}, nil
	}
	if err != nil {
		return back, translate(what, err)
	}
	if back.Record == nil {
		return back, c.dropCopies(ctx, seen) // who undid it may not have come so far
	}
	if !back.Theirs {
		if err := c.awaitScaled(ctx, kind, &back, namespace, name, progress); err != nil {
			return back, translate(what, err)
		}
	}
	// The time was for the pods; this is short.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	err = c.tryScale(ctx, what, func() error {
		o, err := c.scaledObject(ctx, kind, namespace, name)
		if err != nil {
			return err
		}
		if readScaleRecord(o.meta) == nil {
			return nil // another one undoes it too
		}
		fields, err := giveBack(o.meta.ManagedFields, back.Record.Managed)
		if err != nil {
			return err
		}
		back.Replicas, back.Ready = o.replicas, o.ready
		return c.patchScale(ctx, o, nil, nil, fields)
	})
	switch {
	case apierrors.IsNotFound(err):
		return back, nil
	case err != nil:
		return back, translate(what, err)
	}
	return back, c.dropCopies(ctx, seen)
}

// scaledByCulvert says whether the 0 replicas are those that ScaleDown set. A 0
// that only others own is theirs, and so is a Deployment's ReplicaSet, which has a
// copy of the record.
func scaledByCulvert(o *scaledObject) bool {
	if o.replicas != 0 || metav1.GetControllerOf(o.meta) != nil && o.kind == kindReplicaSet {
		return false
	}
	ours, theirs, err := splitOwners(o.meta.ManagedFields)
	if err != nil {
		return false
	}
	others, err := owners(theirs, nil, isReplicas)
	return err == nil && (!only(ours, isReplicas).Empty() || len(others) == 0)
}

// awaitScaled waits for the pods until ctx is done: then the record stays, and what
// stands in for them, for another try.
func (c *Cluster) awaitScaled(ctx context.Context, kind string, back *ScaledBack, namespace, name string, progress func(string)) error {
	said := ""
	for {
		o, err := c.scaledObject(ctx, kind, namespace, name)
		switch {
		case apierrors.IsNotFound(err):
			return nil
		case err == nil:
			back.Replicas, back.Ready = o.replicas, o.ready
			// Who had no ready pod before is not waited for.
			wanted := min(back.Record.Ready, o.replicas)
			if o.observed >= o.meta.Generation && o.ready >= wanted {
				return nil
			}
			if step := fmt.Sprintf("%d of %d pods of %s are ready", o.ready, wanted, o); progress != nil && step != said {
				said = step
				progress(step)
			}
		case ctx.Err() == nil && !apierrors.IsServerTimeout(err) && !apierrors.IsTooManyRequests(err):
			return err
		}
		select {
		case <-ctx.Done():
			return &api.Error{
				Code: api.CodeTimeout,
				Message: fmt.Sprintf("%s %s/%s has its %d replicas back, but only %d of %d pods are ready; what stands in for them stays until they are",
					kind, namespace, name, back.Replicas, back.Ready, back.Record.Ready),
				Hint: fmt.Sprintf("`kubectl -n %s get pods` shows why; it goes on by itself, or with `culvert recover %s/%s`", namespace, strings.ToLower(kind), name),
			}
		case <-time.After(pollGone):
		}
	}
}

// tryScale repeats a look and a change until nobody else's change came between.
func (c *Cluster) tryScale(ctx context.Context, what string, try func() error) error {
	for attempt := 1; ; attempt++ {
		err := try()
		var known *api.Error
		switch {
		case err == nil || apierrors.IsNotFound(err) || errors.As(err, &known):
			return err
		case !apierrors.IsConflict(err) || attempt == scaleAttempts:
			return translate(what, err)
		}
		select {
		case <-ctx.Done():
			return translate(what, ctx.Err())
		case <-time.After(time.Duration(attempt) * 10 * time.Millisecond):
		}
	}
}

// scaledObject is a workload with what its controller says of it.
type scaledObject struct {
	*workload
	ready    int32
	observed int64
}

// scaledObject returns the API server's errors as they are.
func (c *Cluster) scaledObject(ctx context.Context, kind, namespace, name string) (*scaledObject, error) {
	switch kind {
	case kindDeployment:
		d, err := c.client.Deployments(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return &scaledObject{deploymentWorkload(d), d.Status.ReadyReplicas, d.Status.ObservedGeneration}, nil
	case kindStatefulSet:
		s, err := c.client.StatefulSets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return &scaledObject{statefulSetWorkload(s), s.Status.ReadyReplicas, s.Status.ObservedGeneration}, nil
	case kindReplicaSet:
		r, err := c.client.ReplicaSets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return &scaledObject{replicaSetWorkload(r), r.Status.ReadyReplicas, r.Status.ObservedGeneration}, nil
	}
	return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%q is no workload with replicas", kind), Hint: "Deployment, StatefulSet and ReplicaSet are"}
}

// patchScale changes the object as it was read, in one request: spec if there is
// one, the record (nil: it goes) and managedFields if there are any. A merge
// patch, unlike an Update, leaves alone what a newer API server has and this
// program does not know.
func (c *Cluster) patchScale(ctx context.Context, o *scaledObject, spec map[string]any, r *ScaleRecord, fields []metav1.ManagedFieldsEntry) error {
	var annotation any
	if r != nil {
		b, err := json.Marshal(r)
		if err != nil {
			return fmt.Errorf("encoding the record: %w", err)
		}
		annotation = string(b)
	}
	meta := map[string]any{"resourceVersion": o.meta.ResourceVersion, "annotations": map[string]any{AnnotationScaled: annotation}}
	if fields != nil {
		meta["managedFields"] = fields
	}
	patch := map[string]any{"metadata": meta}
	if spec != nil {
		patch["spec"] = spec
	}
	b, err := json.Marshal(patch)
	if err != nil {
		return fmt.Errorf("encoding the change: %w", err)
	}
	options := metav1.PatchOptions{FieldManager: fieldManager}
	switch o.kind {
	case kindDeployment:
		_, err = c.client.Deployments(o.namespace).Patch(ctx, o.name, types.MergePatchType, b, options)
	case kindStatefulSet:
		_, err = c.client.StatefulSets(o.namespace).Patch(ctx, o.name, types.MergePatchType, b, options)
	case kindReplicaSet:
		_, err = c.client.ReplicaSets(o.namespace).Patch(ctx, o.name, types.MergePatchType, b, options)
	}
	return err
}
