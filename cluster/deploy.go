package cluster

import (
	"context"
	"errors"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/culvert-dev/culvert/daemon/api"
)

// undoTimeout is for taking back a Deployment whose pod did not start, after
// the caller gave up.
const undoTimeout = 15 * time.Second

// EnsureAgent creates the agent's Deployment, or adopts the one that this
// session made before, and waits until its pod is ready. progress is told each
// step, from this goroutine; it may be nil. What stops the pod (image,
// scheduling, quota, PodSecurity, a crash) is an *api.Error with the cluster's
// own words, as soon as it is known; then, and when ctx ends, a Deployment that
// this call created is deleted again.
func (c *Cluster) EnsureAgent(ctx context.Context, spec AgentSpec, progress func(step string)) (*Agent, error) {
	d, err := spec.deployment(c.namespace)
	if err != nil {
		return nil, err
	}
	created, err := c.createOrAdopt(ctx, d)
	if err != nil {
		return nil, err
	}
	w := c.agentWait(d, progress)
	w.strict = true
	agent, err := w.agent(ctx)
	if err != nil && created {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		if undoErr := c.DeleteAgent(undo, d.Name); undoErr != nil {
			var e *api.Error
			if errors.As(err, &e) {
				return nil, &api.Error{Code: e.Code, Message: e.Message, Hint: fmt.Sprintf("%s\nits Deployment could not be deleted (%v): `kubectl -n %s delete deployment %s`", e.Hint, undoErr, c.namespace, d.Name)}
			}
		}
	}
	return agent, err
}

// createOrAdopt says whether it created the Deployment.
func (c *Cluster) createOrAdopt(ctx context.Context, d *appsv1.Deployment) (created bool, err error) {
	deployments := c.client.Deployments(c.namespace)
	what := fmt.Sprintf("creating Deployment %s in namespace %q", d.Name, c.namespace)
	for range 3 {
		_, err = deployments.Create(ctx, d, metav1.CreateOptions{})
		if !apierrors.IsAlreadyExists(err) {
			return err == nil, translate(what, err)
		}
		there, err := deployments.Get(ctx, d.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			continue
		case err != nil:
			return false, translate(what, err)
		case there.Labels[LabelSession] != d.Labels[LabelSession] || there.Labels[LabelManagedBy] != d.Labels[LabelManagedBy]:
			return false, &api.Error{
				Code:    api.CodeExists,
				Message: fmt.Sprintf("Deployment %s in namespace %q exists and is not this session's", d.Name, c.namespace),
				Hint:    fmt.Sprintf("`kubectl -n %s get deployment %s -o yaml` shows whose it is", c.namespace, d.Name),
			}
		case there.DeletionTimestamp == nil && there.Annotations[AnnotationSpec] == d.Annotations[AnnotationSpec]:
			return false, nil
		}
		// Other options or another version, or it is going: make it anew.
		if err := c.DeleteAgent(ctx, d.Name); err != nil {
			return false, err
		}
	}
	return false, &api.Error{Code: api.CodeAgent, Message: what + ": it appears and disappears: does another program manage it?"}
}

// WaitAgent waits for a ready pod of an agent's Deployment that exists, e.g.
// after its pod was deleted or its node drained. What stops the pod for now is
// told as progress; only when ctx ends it is the error. A Deployment that does
// not exist is an *api.Error with CodeNotFound: EnsureAgent makes it anew.
func (c *Cluster) WaitAgent(ctx context.Context, name string, progress func(step string)) (*Agent, error) {
	d, err := c.client.Deployments(c.namespace).Get(ctx, name, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, c.gone(name)
	}
	if err != nil {
		return nil, translate("looking for the agent's Deployment", err)
	}
	return c.agentWait(d, progress).agent(ctx)
}

func (c *Cluster) gone(name string) error { return deploymentGone("agent", c.namespace, name) }

func deploymentGone(role, namespace, name string) error {
	return &api.Error{
		Code:    api.CodeNotFound,
		Message: fmt.Sprintf("the %s's Deployment %s in namespace %q was deleted", role, name, namespace),
	}
}

// DeleteAgent deletes an agent's Deployment and returns when it, its ReplicaSet
// and its pods are gone. One that does not exist is no error.
func (c *Cluster) DeleteAgent(ctx context.Context, name string) error {
	return c.deleteDeployment(ctx, c.namespace, name)
}

func (c *Cluster) deleteDeployment(ctx context.Context, namespace, name string) error {
	// Foreground: the Deployment vanishes last.
	foreground := metav1.DeletePropagationForeground
	err := c.client.Deployments(namespace).Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &foreground})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return translate(fmt.Sprintf("deleting Deployment %s in namespace %q", name, namespace), err)
	}
	return c.awaitNoDeployment(ctx, namespace, name)
}

// awaitNoDeployment returns when a Deployment whose end was asked for is gone.
func (c *Cluster) awaitNoDeployment(ctx context.Context, namespace, name string) error {
	for {
		// The watch comes first, so that nothing happens between it and the look.
		// Without the right to watch there is a look every pollGone.
		events, stop := (<-chan watch.Event)(nil), func() {}
		if w, err := c.watch.Deployments(namespace).Watch(ctx, byName(name)); err == nil {
			events, stop = w.ResultChan(), w.Stop
		}
		_, err := c.client.Deployments(namespace).Get(ctx, name, metav1.GetOptions{})
		if !apierrors.IsNotFound(err) {
			awaitDeleted(ctx, events)
		}
		stop()
		if apierrors.IsNotFound(err) {
			return nil
		}
		if ctx.Err() != nil {
			return &api.Error{
				Code:    api.CodeTimeout,
				Message: fmt.Sprintf("deleting Deployment %s in namespace %q: it was asked for, but its pods are not gone yet", name, namespace),
				Hint:    fmt.Sprintf("`kubectl -n %s get deployment,pod -l %s=culvert` shows what is left", namespace, LabelManagedBy),
			}
		}
	}
}

const pollGone = 500 * time.Millisecond

// awaitDeleted returns when the watched object was deleted, the watch ended, or
// it is time to look.
func awaitDeleted(ctx context.Context, events <-chan watch.Event) {
	look := time.NewTimer(pollGone)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			return
		case event, ok := <-events:
			if !ok {
				<-look.C // a server that ends watches at once is not asked without pause
				return
			}
			if event.Type == watch.Deleted {
				return
			}
		}
	}
}

func byName(name string) metav1.ListOptions {
	return metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()}
}
