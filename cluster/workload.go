package cluster

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// Kinds of what a user names as KIND/NAME.
const (
	kindDeployment  = "Deployment"
	kindStatefulSet = "StatefulSet"
	kindDaemonSet   = "DaemonSet"
	kindReplicaSet  = "ReplicaSet"
	kindService     = "Service"
	kindPod         = "Pod"
)

// kindNames are how users write them, in lower case.
var kindNames = map[string]string{
	"deploy": kindDeployment, "deployment": kindDeployment, "deployments": kindDeployment,
	"sts": kindStatefulSet, "statefulset": kindStatefulSet, "statefulsets": kindStatefulSet,
	"ds": kindDaemonSet, "daemonset": kindDaemonSet, "daemonsets": kindDaemonSet,
	"rs": kindReplicaSet, "replicaset": kindReplicaSet, "replicasets": kindReplicaSet,
	"svc": kindService, "service": kindService, "services": kindService,
	"po": kindPod, "pod": kindPod, "pods": kindPod,
}

// workload is what makes pods, a Service that selects them, or a pod.
type workload struct {
	kind, namespace, name string
	uid                   types.UID
	meta                  *metav1.ObjectMeta
	replicas              int32                   // that are asked for; of kinds that have them
	template              *corev1.PodTemplateSpec // nil: a Service
	selector              labels.Selector         // nil: selects nothing, or a pod
	pod                   *corev1.Pod             // of a pod only
	service               *corev1.Service         // of a Service only
	gates                 bool                    // of a Service: culvert's gates count as its pods
	retention             *appsv1.StatefulSetPersistentVolumeClaimRetentionPolicy
	paused                bool
}

// String is for people.
func (w *workload) String() string { return w.kind + " " + w.namespace + "/" + w.name }

// findWorkload reads KIND/NAME, or a NAME, which is a Deployment's, StatefulSet's,
// DaemonSet's, Service's or pod's, in this order.
func (c *Cluster) findWorkload(ctx context.Context, namespace, target string) (*workload, error) {
	namespace = firstOf(namespace, c.namespace)
	kinds := []string{kindDeployment, kindStatefulSet, kindDaemonSet, kindService, kindPod}
	name := target
	if before, after, ok := strings.Cut(target, "/"); ok {
		short, _, _ := strings.Cut(strings.ToLower(before), ".") // deployment.apps/x, as kubectl prints it
		kind := kindNames[short]
		if kind == "" {
			return nil, noWorkload(target)
		}
		kinds, name = []string{kind}, after
	}
	if name == "" || strings.Contains(name, "/") {
		return nil, noWorkload(target)
	}
	var first error
	for _, kind := range kinds {
		w, err := c.getWorkload(ctx, kind, namespace, name)
		if err == nil {
			return w, nil
		}
		if len(kinds) == 1 && !apierrors.IsNotFound(err) || !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err) {
			return nil, translate(fmt.Sprintf("reading %s %s/%s", kind, namespace, name), err)
		}
		if first == nil && apierrors.IsForbidden(err) {
			first = translate(fmt.Sprintf("reading %s %s/%s", kind, namespace, name), err)
		}
	}
	if first != nil {
		return nil, first
	}
	return nil, c.missingWorkload(ctx, kinds, namespace, name)
}

func noWorkload(target string) error {
	return &api.Error{
		Code:    api.CodeUsage,
		Message: fmt.Sprintf("%q names no workload", target),
		Hint:    "give deployment/NAME, statefulset/NAME, daemonset/NAME, replicaset/NAME, pod/NAME or service/NAME",
	}
}

// missingWorkload suggests names that are near.
func (c *Cluster) missingWorkload(ctx context.Context, kinds []string, namespace, name string) error {
	var have []string
	for _, kind := range kinds {
		names, _ := c.workloadNames(ctx, kind, namespace)
		for _, n := range names {
			have = append(have, strings.ToLower(kind)+"/"+n)
		}
	}
	what := "workload, Service or pod"
	if len(kinds) == 1 {
		what = kinds[0]
	}
	e := &api.Error{
		Code:    api.CodeNotFound,
		Message: fmt.Sprintf("there is no %s %q in namespace %q", what, name, namespace),
		Hint:    fmt.Sprintf("`kubectl -n %s get deploy,sts,ds,svc,pod` shows what there is; --namespace names another one", namespace),
	}
	if near := closestNames(name, have); len(near) > 0 {
		e.Hint = "did you mean " + strings.Join(near, " or ") + "? " + e.Hint
	}
	return e
}

// getWorkload returns the API server's errors as they are.
func (c *Cluster) getWorkload(ctx context.Context, kind, namespace, name string) (*workload, error) {
	switch kind {
	case kindDeployment:
		d, err := c.client.Deployments(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return deploymentWorkload(d), nil
	case kindStatefulSet:
		s, err := c.client.StatefulSets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return statefulSetWorkload(s), nil
	case kindReplicaSet:
		r, err := c.client.ReplicaSets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return replicaSetWorkload(r), nil
	case kindDaemonSet:
		d, err := c.client.DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return &workload{kind: kind, namespace: namespace, name: name, uid: d.UID, meta: &d.ObjectMeta, template: &d.Spec.Template, selector: selectorOf(d.Spec.Selector)}, nil
	case kindService:
		s, err := c.client.Services(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return serviceWorkload(s), nil
	case kindPod:
		p, err := c.client.Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		return podWorkload(p), nil
	}
	return nil, fmt.Errorf("unknown kind %q", kind)
}

func deploymentWorkload(d *appsv1.Deployment) *workload {
	return &workload{kind: kindDeployment, namespace: d.Namespace, name: d.Name, uid: d.UID, meta: &d.ObjectMeta, paused: d.Spec.Paused,
		replicas: replicasOf(d.Spec.Replicas), template: &d.Spec.Template, selector: selectorOf(d.Spec.Selector)}
}

func statefulSetWorkload(s *appsv1.StatefulSet) *workload {
	return &workload{kind: kindStatefulSet, namespace: s.Namespace, name: s.Name, uid: s.UID, meta: &s.ObjectMeta,
		replicas: replicasOf(s.Spec.Replicas), template: &s.Spec.Template, selector: selectorOf(s.Spec.Selector),
		retention: s.Spec.PersistentVolumeClaimRetentionPolicy}
}

func replicaSetWorkload(r *appsv1.ReplicaSet) *workload {
	return &workload{kind: kindReplicaSet, namespace: r.Namespace, name: r.Name, uid: r.UID, meta: &r.ObjectMeta,
		replicas: replicasOf(r.Spec.Replicas), template: &r.Spec.Template, selector: selectorOf(r.Spec.Selector)}
}

func serviceWorkload(s *corev1.Service) *workload {
	w := &workload{kind: kindService, namespace: s.Namespace, name: s.Name, uid: s.UID, meta: &s.ObjectMeta, service: s}
	if len(s.Spec.Selector) > 0 {
		w.selector = labels.SelectorFromSet(s.Spec.Selector)
	}
	return w
}

func podWorkload(p *corev1.Pod) *workload {
	return &workload{kind: kindPod, namespace: p.Namespace, name: p.Name, uid: p.UID, meta: &p.ObjectMeta, pod: p,
		template: &corev1.PodTemplateSpec{ObjectMeta: p.ObjectMeta, Spec: p.Spec}}
}

// replicasOf is what an absent number means.
func replicasOf(n *int32) int32 {
	if n == nil {
		return 1
	}
	return *n
}

// selectorOf selects nothing for a selector that the server would not take.
func selectorOf(s *metav1.LabelSelector) labels.Selector {
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return labels.Nothing()
	}
	return selector
}

func (c *Cluster) workloadNames(ctx context.Context, kind, namespace string) (names []string, err error) {
	page := metav1.ListOptions{Limit: pageSize}
	switch kind {
	case kindDeployment:
		l, err := c.client.Deployments(namespace).List(ctx, page)
		if err != nil {
			return nil, err
		}
		for i := range l.Items {
			names = append(names, l.Items[i].Name)
		}
	case kindStatefulSet:
		l, err := c.client.StatefulSets(namespace).List(ctx, page)
		if err != nil {
			return nil, err
		}
		for i := range l.Items {
			names = append(names, l.Items[i].Name)
		}
	case kindService:
		l, err := c.client.Services(namespace).List(ctx, page)
		if err != nil {
			return nil, err
		}
		for i := range l.Items {
			names = append(names, l.Items[i].Name)
		}
	case kindPod:
		l, err := c.client.Pods(namespace).List(ctx, page)
		if err != nil {
			return nil, err
		}
		for i := range l.Items {
			names = append(names, l.Items[i].Name)
		}
	}
	return names, nil
}

// closestNames are at most three of the names that look like the wanted one: one
// contains the other, or few letters differ. Names may have a KIND/ before them.
func closestNames(want string, have []string) []string {
	type near struct {
		name     string
		distance int
	}
	var all []near
	for _, h := range have {
		bare := h[strings.LastIndexByte(h, '/')+1:]
		d := letters(want, bare)
		if len(want) > 2 && (strings.Contains(bare, want) || strings.Contains(want, bare)) {
			d = min(d, 2)
		}
		if d <= max(2, len(want)/3) {
			all = append(all, near{h, d})
		}
	}
	slices.SortStableFunc(all, func(a, b near) int { return cmp.Compare(a.distance, b.distance) })
	var names []string
	for _, n := range all[:min(3, len(all))] {
		names = append(names, n.name)
	}
	return names
}

// letters is the number of letters to insert, remove or replace to make b of a
// (Levenshtein).
func letters(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			above := row[j+1]
			replace := diagonal
			if a[i] != b[j] {
				replace++
			}
			row[j+1] = min(above+1, row[j]+1, replace)
			diagonal = above
		}
	}
	return row[len(b)]
}

// owns says whether the pod is of the workload. Labels alone do not tell: gates
// of culvert stand in with the labels of the workload that they replace.
func (w *workload) owns(pod *corev1.Pod) bool {
	owner := metav1.GetControllerOf(pod)
	switch w.kind {
	case kindDeployment:
		// The name of a ReplicaSet is its Deployment's with the hash. To read it
		// from there takes no right to list ReplicaSets.
		return owner != nil && owner.Kind == kindReplicaSet && owner.Name == w.name+"-"+pod.Labels[appsv1.DefaultDeploymentUniqueLabelKey]
	case kindService:
		return w.gates || owner == nil || !strings.HasPrefix(owner.Name, intercept.GateName)
	case kindPod:
		return pod.UID == w.uid
	}
	return owner != nil && owner.UID == w.uid
}

// bestPod is the workload's pod that says most of how it runs now: ready before
// not ready, then the newest. It is nil where none runs.
func (c *Cluster) bestPod(ctx context.Context, w *workload) (*corev1.Pod, error) {
	if w.pod != nil {
		return w.pod, nil
	}
	selector := w.selector
	if selector == nil || selector.Empty() {
		return nil, nil
	}
	pods, err := c.podsOf(ctx, w, selector)
	if err != nil || len(pods) > 0 || w.kind != kindService {
		return first(pods), err
	}
	// A Service whose pods are all gates is intercepted: what it had selected
	// before is in the selector of a Service that it owns.
	services, err := c.client.Services(w.namespace).List(ctx, metav1.ListOptions{Limit: pageSize})
	if err != nil {
		return nil, translate("listing the Services of namespace "+w.namespace, err)
	}
	for i := range services.Items {
		s := &services.Items[i]
		owned := slices.ContainsFunc(s.OwnerReferences, func(r metav1.OwnerReference) bool { return r.UID == w.uid })
		if owned && len(s.Spec.Selector) > 0 {
			pods, err := c.podsOf(ctx, w, labels.SelectorFromSet(s.Spec.Selector))
			return first(pods), err
		}
	}
	return nil, nil
}

func first(pods []*corev1.Pod) *corev1.Pod {
	if len(pods) == 0 {
		return nil
	}
	return pods[0]
}

// podsOf are the workload's pods that have not ended, best first.
func (c *Cluster) podsOf(ctx context.Context, w *workload, selector labels.Selector) ([]*corev1.Pod, error) {
	var pods []*corev1.Pod
	options := metav1.ListOptions{LabelSelector: selector.String(), Limit: pageSize}
	for {
		page, err := c.client.Pods(w.namespace).List(ctx, options)
		if err != nil {
			return nil, translate("listing the pods of "+w.String(), err)
		}
		for i := range page.Items {
			p := &page.Items[i]
			if over := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed; !over && w.owns(p) {
				pods = append(pods, p)
			}
		}
		if options.Continue = page.Continue; options.Continue == "" {
			break
		}
	}
	rank := func(p *corev1.Pod) int {
		switch {
		case p.DeletionTimestamp != nil:
			return 2
		case !ready(p):
			return 1
		}
		return 0
	}
	slices.SortStableFunc(pods, func(a, b *corev1.Pod) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), b.CreationTimestamp.Compare(a.CreationTimestamp.Time))
	})
	return pods, nil
}
