package cluster

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// Every session of a namespace keeps its gates. Whoever changes the state pushes
// it himself, so the others look a little later, and not all at once.
const (
	keepSoon  = 200 * time.Millisecond // a gate became ready: nobody else may know
	keepLater = 2 * time.Second        // the state changed
	keepAgain = 10 * time.Second       // a gate did not take it
)

// KeepGates watches the gates of one Deployment until ctx ends, which is its
// error, and sees to it that each ready one knows the present state: what the
// kubelet mounted may be a minute old. gone is called, from this goroutine, when
// the Deployment or its ConfigMap does not exist any more, once for each time; it
// must not wait. Whoever stops using the gates ends ctx first.
func (c *Cluster) KeepGates(ctx context.Context, namespace, gate string, gone func(what string)) error {
	k := &keeper{c: c, namespace: namespace, gate: gate, gone: gone, ready: map[types.UID]bool{}, missing: map[string]bool{}}
	return k.run(ctx)
}

type keeper struct {
	c               *Cluster
	namespace, gate string
	gone            func(string)

	ready   map[types.UID]bool
	missing map[string]bool // kinds of which gone was told
	version string          // resourceVersion of the ConfigMap
	look    time.Time       // when to; zero: not
}

func (k *keeper) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	seen := make(chan watch.Event, 64)
	absent := make(chan string, 2)
	watches := k.c.watch
	go observe(ctx, seen, func(ctx context.Context) (watch.Interface, error) {
		return watches.Pods(k.namespace).Watch(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(GateSelector(k.gate)).String()})
	})
	// A watch does not tell of what went while it was not open: after it is, there
	// is a look.
	go observe(ctx, seen, func(ctx context.Context) (watch.Interface, error) {
		w, err := watches.Deployments(k.namespace).Watch(ctx, byName(k.gate))
		if err == nil {
			_, missing := k.c.client.Deployments(k.namespace).Get(ctx, k.gate, metav1.GetOptions{})
			note(ctx, absent, missing, goneDeployment)
		}
		return w, err
	})
	go observe(ctx, seen, func(ctx context.Context) (watch.Interface, error) {
		w, err := watches.ConfigMaps(k.namespace).Watch(ctx, byName(intercept.GateName))
		if err == nil {
			_, missing := k.c.client.ConfigMaps(k.namespace).Get(ctx, intercept.GateName, metav1.GetOptions{})
			note(ctx, absent, missing, goneConfigMap)
		}
		return w, err
	})
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for {
		if !k.look.IsZero() {
			timer.Reset(time.Until(k.look))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case kind := <-absent:
			k.lost(kind)
		case event := <-seen:
			k.handle(event)
		case <-timer.C:
			k.look = time.Time{}
			if err := k.c.catchUp(ctx, k.namespace, k.gate); err != nil {
				k.lookIn(keepAgain)
			}
		}
	}
}

const (
	goneDeployment = "Deployment"
	goneConfigMap  = "ConfigMap"
)

func note(ctx context.Context, absent chan<- string, err error, kind string) {
	if !apierrors.IsNotFound(err) {
		return
	}
	select {
	case absent <- kind:
	case <-ctx.Done():
	}
}

func (k *keeper) handle(event watch.Event) {
	deleted := event.Type == watch.Deleted
	switch o := event.Object.(type) {
	case *corev1.Pod:
		was := k.ready[o.UID]
		if now := !deleted && ready(o); !now {
			delete(k.ready, o.UID)
		} else if !was {
			k.ready[o.UID] = true
			k.lookIn(keepSoon)
		}
	case *appsv1.Deployment:
		k.present(goneDeployment, deleted)
	case *corev1.ConfigMap:
		k.present(goneConfigMap, deleted)
		if !deleted && o.ResourceVersion != k.version {
			k.version = o.ResourceVersion
			k.lookIn(keepLater)
		}
	}
}

func (k *keeper) present(kind string, deleted bool) {
	if deleted {
		k.lost(kind)
		return
	}
	delete(k.missing, kind)
}

func (k *keeper) lost(kind string) {
	if k.missing[kind] {
		return
	}
	k.missing[kind] = true
	name := k.gate
	if kind == goneConfigMap {
		name = intercept.GateName
	}
	if k.gone != nil {
		k.gone(fmt.Sprintf("%s %s in namespace %q does not exist any more", kind, name, k.namespace))
	}
}

// lookIn has catchUp called after d and up to half of it more, or sooner if that
// was to be anyway.
func (k *keeper) lookIn(d time.Duration) {
	at := time.Now().Add(d + rand.N(d/2))
	if k.look.IsZero() || at.Before(k.look) {
		k.look = at
	}
}

// catchUp tells the present state to those ready gates that know an older one.
func (c *Cluster) catchUp(ctx context.Context, namespace, gate string) error {
	s, err := c.GateState(ctx, namespace)
	if err != nil || s.Generation == 0 {
		return err
	}
	statuses, err := c.GateStatuses(ctx, namespace, gate)
	if err != nil {
		return err
	}
	pods, err := c.runningGates(ctx, namespace, gate)
	if err != nil {
		return err
	}
	told := map[string]bool{}
	s = c.keys.with(s, namespace, gate)
	for _, pod := range pods {
		status, ok := statuses[pod.Name]
		told[pod.Name] = !ready(pod) || ok && obeys(pod.Name, status, s) == nil
	}
	return c.pushOnce(ctx, pods, s, told)
}
