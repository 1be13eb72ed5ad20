package cluster

import (
	"context"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// EnsureGates creates the gates' Deployment and its PodDisruptionBudget below the
// namespace's ConfigMap, which ChangeGateState made before, or adopts those of
// another session, and waits until as many pods as wanted are ready and those of
// an older ConfigMap are gone. progress is told each step, from this goroutine;
// it may be nil. What stops a pod of a Deployment that this call created is an
// *api.Error as soon as it is known; of an adopted one when ctx ends. Nothing is
// taken back: that is the end of the last entry (RemoveGateEntry, DeleteGates).
func (c *Cluster) EnsureGates(ctx context.Context, namespace string, spec GateSpec, progress func(string)) error {
	state, err := c.readGateState(ctx, namespace)
	if err != nil {
		return err
	}
	if state.object == nil {
		return &api.Error{
			Code:    api.CodeNotFound,
			Message: fmt.Sprintf("ConfigMap %s in namespace %q was deleted while gates were made for it", intercept.GateName, namespace),
			Hint:    "try again",
		}
	}
	created, err := c.createOrAdoptGates(ctx, state.object, spec)
	if err != nil {
		return err
	}
	if err := c.ensureBudget(ctx, state.object, spec); err != nil {
		return err
	}
	w := &podWait{
		c: c, role: "gate", namespace: namespace, name: spec.Name, selector: spec.selector(state.object.UID).MatchLabels,
		want: int(spec.replicas()), progress: progress, strict: created,
	}
	if _, err := w.run(ctx); err != nil {
		return err
	}
	return c.awaitOldGates(ctx, spec.Name, state.object, w.say)
}

// awaitOldGates returns when all pods of gates belong to owner. Services select
// the others, too, as long as nobody ends them, and they know nothing new.
func (c *Cluster) awaitOldGates(ctx context.Context, gate string, owner *corev1.ConfigMap, say func(string)) error {
	for {
		pods, err := c.runningGates(ctx, owner.Namespace, gate)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(pods, func(pod *corev1.Pod) bool {
			return onItsWay(pod) && pod.Labels[LabelGateState] != string(owner.UID)
		}) {
			return nil
		}
		say("waiting until the gates of before end")
		select {
		case <-ctx.Done():
			return &api.Error{
				Code:    api.CodeTimeout,
				Message: fmt.Sprintf("gates of before are still there in namespace %q: does the cluster's garbage collector run?", owner.Namespace),
				Hint:    fmt.Sprintf("`kubectl -n %s get replicaset,pod -l %s=%s` shows them", owner.Namespace, LabelGate, gate),
			}
		case <-time.After(pollGone):
		}
	}
}

// createOrAdoptGates says whether it created the Deployment.
func (c *Cluster) createOrAdoptGates(ctx context.Context, owner *corev1.ConfigMap, spec GateSpec) (created bool, err error) {
	d, err := spec.deployment(owner)
	if err != nil {
		return false, err
	}
	ns := owner.Namespace
	deployments := c.client.Deployments(ns)
	what := fmt.Sprintf("creating Deployment %s in namespace %q", d.Name, ns)
	err = c.contend(ctx, what, func() error {
		_, err := deployments.Create(ctx, d, metav1.CreateOptions{FieldManager: fieldManager})
		if !apierrors.IsAlreadyExists(err) {
			created = err == nil
			return err
		}
		there, err := deployments.Get(ctx, d.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return errLostRace
		case err != nil:
			return err
		case there.Labels[LabelManagedBy] != "culvert" || there.Labels[LabelGate] != d.Name:
			return &api.Error{
				Code:    api.CodeExists,
				Message: fmt.Sprintf("Deployment %s in namespace %q exists and is not culvert's", d.Name, ns),
				Hint:    fmt.Sprintf("`kubectl -n %s get deployment %s -o yaml` shows whose it is", ns, d.Name),
			}
		case there.DeletionTimestamp != nil:
			if err := c.awaitNoDeployment(ctx, ns, d.Name); err != nil {
				return err
			}
			return errLostRace
		case there.Labels[LabelGateState] != string(owner.UID):
			// The garbage collector is about to take it; this is sooner.
			if err := c.deleteOldGates(ctx, there); err != nil {
				return err
			}
			return errLostRace
		}
		return c.adoptGates(ctx, there, d)
	})
	return created, err
}

// adoptGates takes gates that others use as they are, if they understand what
// this version says. Gates of an entry's own are its holder's: they are made anew
// if they were made otherwise.
func (c *Cluster) adoptGates(ctx context.Context, there, wanted *appsv1.Deployment) error {
	if there.Name != intercept.GateName {
		if there.Annotations[AnnotationSpec] == wanted.Annotations[AnnotationSpec] {
			return nil
		}
		if err := c.deleteDeployment(ctx, there.Namespace, there.Name); err != nil {
			return err
		}
		return errLostRace
	}
	if protocol := there.Annotations[AnnotationGateProtocol]; protocol != GateProtocol {
		return &api.Error{
			Code: api.CodeExists,
			Message: fmt.Sprintf("the gates in namespace %q (image %s) are of another version of culvert: protocol %q, where this one speaks %s",
				there.Namespace, there.Spec.Template.Spec.Containers[0].Image, protocol, GateProtocol),
			Hint: "use the version of those who intercept there, or wait until they left; `culvert list` shows who they are",
		}
	}
	return nil
}

// deleteOldGates lets the pods end on their own: they may drain for a while.
func (c *Cluster) deleteOldGates(ctx context.Context, d *appsv1.Deployment) error {
	background := metav1.DeletePropagationBackground
	err := c.client.Deployments(d.Namespace).Delete(ctx, d.Name, metav1.DeleteOptions{
		PropagationPolicy: &background,
		Preconditions:     &metav1.Preconditions{UID: &d.UID},
	})
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}

// ensureBudget makes the PodDisruptionBudget, unless the pods have one already:
// with two, a pod cannot be evicted at all.
func (c *Cluster) ensureBudget(ctx context.Context, owner *corev1.ConfigMap, spec GateSpec) error {
	pod := labels.Set(spec.templateLabels(owner.UID))
	budgets := c.client.PodDisruptionBudgets(owner.Namespace)
	what := fmt.Sprintf("creating PodDisruptionBudget %s in namespace %q", spec.Name, owner.Namespace)
	return c.contend(ctx, what, func() error {
		there, err := budgets.List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, b := range there.Items {
			if b.Name == spec.Name {
				if b.Labels[LabelManagedBy] == "culvert" && b.Labels[LabelGateState] != string(owner.UID) {
					if err := c.deleteBudget(ctx, owner.Namespace, b.Name, &metav1.Preconditions{UID: &b.UID}); err != nil {
						return err
					}
					continue
				}
				return nil
			}
			if selector, err := metav1.LabelSelectorAsSelector(b.Spec.Selector); err == nil && selector.Matches(pod) {
				return nil
			}
		}
		_, err = budgets.Create(ctx, spec.budget(owner), metav1.CreateOptions{FieldManager: fieldManager})
		if apierrors.IsAlreadyExists(err) {
			return errLostRace
		}
		return err
	})
}

func (c *Cluster) deleteBudget(ctx context.Context, namespace, name string, only *metav1.Preconditions) error {
	err := c.client.PodDisruptionBudgets(namespace).Delete(ctx, name, metav1.DeleteOptions{Preconditions: only})
	if apierrors.IsNotFound(err) || only != nil && apierrors.IsConflict(err) {
		return nil
	}
	return translate(fmt.Sprintf("deleting PodDisruptionBudget %s in namespace %q", name, namespace), err)
}

// DeleteGates deletes gates that serve one entry alone, and their budget, and
// returns when their pods are gone. What does not exist is no error. Those of a
// namespace end with their ConfigMap, see RemoveGateEntry. Errors are *api.Error.
func (c *Cluster) DeleteGates(ctx context.Context, namespace, name string) error {
	if err := c.deleteDeployment(ctx, namespace, name); err != nil {
		return err
	}
	return c.deleteBudget(ctx, namespace, name, nil)
}
