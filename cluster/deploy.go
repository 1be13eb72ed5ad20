package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
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
	w := &podWait{c: c, name: d.Name, selector: d.Spec.Selector.MatchLabels, progress: progress, strict: true}
	agent, err := w.run(ctx)
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
	w := &podWait{c: c, name: name, selector: d.Spec.Selector.MatchLabels, progress: progress}
	return w.run(ctx)
}

func (c *Cluster) gone(name string) error {
	return &api.Error{
		Code:    api.CodeNotFound,
		Message: fmt.Sprintf("the agent's Deployment %s in namespace %q was deleted", name, c.namespace),
	}
}

// DeleteAgent deletes an agent's Deployment and returns when it, its ReplicaSet
// and its pods are gone. One that does not exist is no error.
func (c *Cluster) DeleteAgent(ctx context.Context, name string) error {
	deployments := c.client.Deployments(c.namespace)
	what := fmt.Sprintf("deleting Deployment %s in namespace %q", name, c.namespace)
	// Foreground: the Deployment vanishes last.
	foreground := metav1.DeletePropagationForeground
	err := deployments.Delete(ctx, name, metav1.DeleteOptions{PropagationPolicy: &foreground})
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return translate(what, err)
	}
	for {
		// The watch comes first, so that nothing happens between it and the look.
		// Without the right to watch there is a look every pollGone.
		events, stop := (<-chan watch.Event)(nil), func() {}
		if w, err := c.watch.Deployments(c.namespace).Watch(ctx, byName(name)); err == nil {
			events, stop = w.ResultChan(), w.Stop
		}
		_, err = deployments.Get(ctx, name, metav1.GetOptions{})
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
				Message: what + ": it was asked for, but its pods are not gone yet",
				Hint:    fmt.Sprintf("`kubectl -n %s get deployment,pod -l %s=culvert` shows what is left", c.namespace, LabelManagedBy),
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

// podWait waits for one Deployment's pod to be ready.
type podWait struct {
	c        *Cluster
	name     string
	selector map[string]string
	progress func(string)
	strict   bool // the first trouble is the error

	step    string
	pods    map[string]*corev1.Pod // by uid
	trouble *api.Error             // what stops the pod now
	warning string                 // the last Warning event of the pod
	settled <-chan time.Time       // then an unschedulable pod is an error
}

// unschedulableGrace: the scheduler says so of a pod that it is about to place,
// too, when a node has just become ready or a pod has just gone.
const unschedulableGrace = 1500 * time.Millisecond

func (w *podWait) run(ctx context.Context) (*Agent, error) {
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	ns, selector := w.c.namespace, labels.SelectorFromSet(w.selector).String()
	// Room for what the API server sends at once; when it is full the watches
	// wait, they lose nothing.
	seen := make(chan watch.Event, 64)
	go observe(watching, seen, func(ctx context.Context) (watch.Interface, error) {
		return w.c.watch.Pods(ns).Watch(ctx, metav1.ListOptions{LabelSelector: selector})
	})
	go observe(watching, seen, func(ctx context.Context) (watch.Interface, error) {
		return w.c.watch.Deployments(ns).Watch(ctx, byName(w.name))
	})
	w.pods = map[string]*corev1.Pod{}
	w.say("waiting for the agent's pod")
	eventsOf := ""
	for {
		select {
		case <-ctx.Done():
			return nil, w.ended(ctx)
		case <-w.settled:
			return nil, w.trouble
		case event := <-seen:
			agent, err := w.handle(event)
			if agent != nil || err != nil {
				return agent, err
			}
		}
		if pod := w.current(); pod != nil && string(pod.UID) != eventsOf {
			eventsOf = string(pod.UID)
			go observe(watching, seen, func(ctx context.Context) (watch.Interface, error) {
				return w.c.watch.Events(ns).Watch(ctx, metav1.ListOptions{
					FieldSelector: fields.OneTermEqualSelector("involvedObject.uid", string(pod.UID)).String(),
				})
			})
		}
	}
}

// observe sends a watch's events, beginning with the objects that exist, until
// ctx is done. A watch that ends is begun again; one that is forbidden is given
// up.
func observe(ctx context.Context, out chan<- watch.Event, open func(context.Context) (watch.Interface, error)) {
	for ctx.Err() == nil {
		w, err := open(ctx)
		if apierrors.IsForbidden(err) {
			return
		}
		if err == nil {
			for event := range w.ResultChan() {
				select {
				case out <- event:
				case <-ctx.Done():
				}
			}
			w.Stop()
		}
		select {
		case <-ctx.Done():
		case <-time.After(retryFirst):
		}
	}
}

func (w *podWait) handle(event watch.Event) (*Agent, error) {
	switch o := event.Object.(type) {
	case *corev1.Pod:
		if event.Type == watch.Deleted {
			delete(w.pods, string(o.UID))
		} else {
			w.pods[string(o.UID)] = o
		}
		return w.look()
	case *appsv1.Deployment:
		if event.Type == watch.Deleted {
			return nil, w.c.gone(w.name)
		}
		for _, condition := range o.Status.Conditions {
			if condition.Type == appsv1.DeploymentReplicaFailure && condition.Status == corev1.ConditionTrue && w.current() == nil {
				return nil, w.troubled(refusedPod(condition.Message))
			}
		}
	case *corev1.Event:
		return nil, w.noteEvent(o)
	}
	return nil, nil
}

// look says what the current pod's status means.
func (w *podWait) look() (*Agent, error) {
	pod := w.current()
	if pod == nil {
		w.say("waiting for the agent's pod")
		return nil, nil
	}
	if ready(pod) {
		return agentOf(w.name, pod), nil
	}
	trouble, patient := diagnose(pod)
	if trouble == nil {
		w.trouble, w.settled = nil, nil
		w.say(stepOf(pod))
		return nil, nil
	}
	if patient && w.strict {
		w.trouble = trouble
		if w.settled == nil {
			w.settled = time.After(unschedulableGrace)
		}
		return nil, nil
	}
	return nil, w.troubled(trouble)
}

// troubled is the error when strict, else progress.
func (w *podWait) troubled(e *api.Error) error {
	if w.strict {
		return e
	}
	w.trouble = e
	w.say(e.Message)
	return nil
}

func (w *podWait) noteEvent(e *corev1.Event) error {
	pod := w.current()
	switch {
	case pod == nil:
	case e.Reason == "Unhealthy" && strings.Contains(e.Message, agentBinary) && strings.Contains(e.Message, "no such file"):
		return w.troubled(&api.Error{
			Code:    api.CodeImage,
			Message: fmt.Sprintf("%s is not an image of the agent: it has no %s", pod.Spec.Containers[0].Image, agentBinary),
			Hint:    "--image names another one",
		})
	case e.Type == corev1.EventTypeWarning:
		w.warning = e.Reason + ": " + e.Message
	case e.Reason == "Pulling":
		w.say("pulling image " + pod.Spec.Containers[0].Image)
	}
	return nil
}

// current is the newest pod that is not on its way out.
func (w *podWait) current() *corev1.Pod {
	var newest *corev1.Pod
	for _, pod := range w.pods {
		if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded {
			continue
		}
		if newest == nil || newest.CreationTimestamp.Before(&pod.CreationTimestamp) {
			newest = pod
		}
	}
	return newest
}

func (w *podWait) say(step string) {
	if step != w.step && w.progress != nil {
		w.progress(step)
	}
	w.step = step
}

// ended is the error when ctx is over before the pod was ready: the trouble, if
// there is one, says more than the time.
func (w *podWait) ended(ctx context.Context) error {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return &api.Error{Code: api.CodeCanceled, Message: "waiting for the agent's pod: canceled"}
	}
	if w.trouble != nil {
		return w.trouble
	}
	message := "the agent's pod is not ready in time (" + w.step + ")"
	if w.warning != "" {
		message += "; its last event: " + w.warning
	}
	return &api.Error{
		Code:    api.CodeAgent,
		Message: message,
		Hint:    "a longer --timeout may help, if the image is large or the node slow",
	}
}
