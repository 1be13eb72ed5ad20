package cluster

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/culvert-dev/culvert/daemon/api"
)

// podWait waits for the pods of one Deployment to be ready.
type podWait struct {
	c         *Cluster
	role      string // "agent" or "gate", for people
	namespace string
	name      string
	selector  map[string]string
	want      int // that many pods, the newest
	progress  func(string)
	strict    bool // the first trouble is the error

	step    string
	pods    map[string]*corev1.Pod // by uid
	trouble *api.Error             // what stops the pod now
	warning string                 // the last Warning event of the pod
	settled <-chan time.Time       // then an unschedulable pod is an error
}

func (c *Cluster) agentWait(d *appsv1.Deployment, progress func(string)) *podWait {
	return &podWait{c: c, role: "agent", namespace: c.namespace, name: d.Name, selector: d.Spec.Selector.MatchLabels, want: 1, progress: progress}
}

func (w *podWait) agent(ctx context.Context) (*Agent, error) {
	pods, err := w.run(ctx)
	if err != nil {
		return nil, err
	}
	return agentOf(w.name, pods[0]), nil
}

// unschedulableGrace: the scheduler says so of a pod that it is about to place,
// too, when a node has just become ready or a pod has just gone.
const unschedulableGrace = 1500 * time.Millisecond

// run returns the pods that were wanted, the newest first.
func (w *podWait) run(ctx context.Context) ([]*corev1.Pod, error) {
	watching, cancel := context.WithCancel(ctx)
	defer cancel()
	ns, selector := w.namespace, labels.SelectorFromSet(w.selector).String()
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
	w.say("waiting for the " + w.role + "'s pod")
	eventsOf := map[types.UID]bool{}
	for {
		select {
		case <-ctx.Done():
			return nil, w.ended(ctx)
		case <-w.settled:
			return nil, w.trouble
		case event := <-seen:
			pods, err := w.handle(event)
			if pods != nil || err != nil {
				return pods, err
			}
		}
		for _, pod := range w.current() {
			if eventsOf[pod.UID] {
				continue
			}
			eventsOf[pod.UID] = true
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

func (w *podWait) handle(event watch.Event) ([]*corev1.Pod, error) {
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
			return nil, deploymentGone(w.role, w.namespace, w.name)
		}
		for _, condition := range o.Status.Conditions {
			if condition.Type == appsv1.DeploymentReplicaFailure && condition.Status == corev1.ConditionTrue && len(w.current()) < w.want {
				return nil, w.troubled(refusedPod(w.role, w.namespace, condition.Message))
			}
		}
	case *corev1.Event:
		return nil, w.noteEvent(o)
	}
	return nil, nil
}

// look says what the current pods' status means.
func (w *podWait) look() ([]*corev1.Pod, error) {
	pods := w.current()
	var waiting *corev1.Pod // the first that is not ready
	for _, pod := range slices.Backward(pods) {
		if ready(pod) {
			continue
		}
		if waiting == nil {
			waiting = pod
		}
		trouble, patient := diagnose(pod)
		if trouble == nil {
			continue
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
	w.trouble, w.settled = nil, nil
	switch {
	case waiting != nil:
		w.say(stepOf(waiting))
	case len(pods) < w.want:
		w.say("waiting for the " + w.role + "'s pod")
	default:
		return pods, nil
	}
	return nil, nil
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
	pod := w.pods[string(e.InvolvedObject.UID)]
	switch {
	case pod == nil || !slices.Contains(w.current(), pod):
	case e.Reason == "Unhealthy" && strings.Contains(e.Message, agentBinary) && strings.Contains(e.Message, "no such file"):
		return w.troubled(&api.Error{
			Code:    api.CodeImage,
			Message: fmt.Sprintf("%s is not an image of the agent: it has no %s", imageOf(pod), agentBinary),
			Hint:    "--image names another one",
		})
	case e.Type == corev1.EventTypeWarning:
		w.warning = e.Reason + ": " + e.Message
	case e.Reason == "Pulling":
		w.say("pulling image " + imageOf(pod))
	}
	return nil
}

// current are the newest pods that are not on their way out, as many as are
// wanted.
func (w *podWait) current() []*corev1.Pod {
	var pods []*corev1.Pod
	for _, pod := range w.pods {
		if onItsWay(pod) {
			pods = append(pods, pod)
		}
	}
	slices.SortFunc(pods, func(a, b *corev1.Pod) int {
		return cmp.Or(b.CreationTimestamp.Compare(a.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
	})
	return pods[:min(len(pods), w.want)]
}

// onItsWay: the pod is ready or may become it.
func onItsWay(pod *corev1.Pod) bool {
	return pod.DeletionTimestamp == nil && pod.Status.Phase != corev1.PodSucceeded
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
		return &api.Error{Code: api.CodeCanceled, Message: "waiting for the " + w.role + "'s pod: canceled"}
	}
	if w.trouble != nil {
		return w.trouble
	}
	message := "the " + w.role + "'s pod is not ready in time (" + w.step + ")"
	if w.warning != "" {
		message += "; its last event: " + w.warning
	}
	return &api.Error{
		Code:    api.CodeAgent,
		Message: message,
		Hint:    "a longer --timeout may help, if the image is large or the node slow",
	}
}
