package cluster

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
)

// ScalePlan says how the pods of a workload are replaced. PlanScale makes it and
// changes nothing.
type ScalePlan struct {
	Namespace string
	Kind      string // Deployment, StatefulSet or ReplicaSet
	Name      string
	UID       types.UID
	Replicas  int32 // that the workload has now

	// PodLabels are those of the workload's pods, for the pods that stand in for
	// them: Services, NetworkPolicies and headless names then find those.
	//
	// The workload's controllers leave them alone, though the labels match their
	// selector: a ReplicaSet or StatefulSet adopts pods, and a Deployment adopts
	// ReplicaSets, only if they have no controller. The pods' controller is a
	// ReplicaSet, whose controller is the gates' Deployment; an owner that is
	// gone still counts as one until the garbage collector has taken what it
	// owned. Only `kubectl delete --cascade=orphan` takes the references away: so
	// gates have to be deleted in the background or the foreground. The gates'
	// own Deployment must select by labels that the workload's pods do not have,
	// for the same reason. Labels that controllers set for their own pods are not
	// among these.
	PodLabels map[string]string
	// Ports are what the workload's pods listen at: ports of its containers, and
	// target ports of Services that select them.
	Ports []ScalePort
	// Budgets are the PodDisruptionBudgets that select the pods, and so the
	// pods that stand in. The eviction API refuses pods that two of them select:
	// pods with these labels must have no other one while there is any.
	Budgets []string
	// Notes are for the user, to be printed before anything changes. The first
	// says that the mode cannot fail open.
	Notes []string
}

// ScalePort is one port of a workload's pods.
type ScalePort struct {
	Number   uint16
	Name     string // may be empty
	Protocol corev1.Protocol
	Local    uint16 // of this machine; 0: not exposed
}

func (p ScalePort) String() string {
	text := fmt.Sprintf("%d/%s", p.Number, p.Protocol)
	if p.Name != "" {
		text += " (" + p.Name + ")"
	}
	return text
}

// String is for people, and for Entry.Service without the namespace.
func (p *ScalePlan) String() string {
	return p.Kind + " " + p.Namespace + "/" + p.Name
}

// controllerLabels are set on pods by controllers, each pod's own.
var controllerLabels = []string{
	"pod-template-hash", "controller-revision-hash", "statefulset.kubernetes.io/pod-name", "apps.kubernetes.io/pod-index",
	"pod-template-generation",
}

// podLabelsOf are those of a workload's pods that controllers do not set.
func podLabelsOf(w *workload) map[string]string {
	all := maps.Clone(w.template.Labels)
	for _, l := range controllerLabels {
		delete(all, l)
	}
	return all
}

// PlanScale finds the workload that target means (deployment/x, statefulset/x,
// replicaset/x, or service/x and pod/x for the workload behind them; a bare name
// is looked for among all of them), matches expose with its ports, and lists what
// is to be known before its pods are replaced. force allows kube-system and the
// loss of a StatefulSet's volumes. Errors are *api.Error.
func (c *Cluster) PlanScale(ctx context.Context, namespace, target string, expose []Expose, force bool) (*ScalePlan, error) {
	w, err := c.findWorkload(ctx, namespace, target)
	if err != nil {
		return nil, err
	}
	if w, err = c.scalable(ctx, w); err != nil {
		return nil, err
	}
	if err := refuseScale(w, force); err != nil {
		return nil, err
	}
	p := &ScalePlan{Namespace: w.namespace, Kind: w.kind, Name: w.name, UID: w.uid, Replicas: w.replicas, PodLabels: podLabelsOf(w)}
	p.note("this mode replaces the pods of %s and cannot fail open: while your machine is away, nobody answers", p)
	services, err := c.servicesOf(ctx, w)
	if err != nil {
		return nil, err
	}
	p.Ports = portsOf(w, services)
	if err := p.expose(expose); err != nil {
		return nil, err
	}
	p.describe(w)
	if err := c.scalers(ctx, p); err != nil {
		return nil, err
	}
	return p, nil
}

func (p *ScalePlan) note(format string, args ...any) {
	p.Notes = append(p.Notes, fmt.Sprintf(format, args...))
}

// scalable finds the workload behind a Service or a pod, and refuses one that a
// Deployment manages.
func (c *Cluster) scalable(ctx context.Context, w *workload) (*workload, error) {
	from := w
	switch w.kind {
	case kindService:
		var err error
		if w, err = c.behindService(ctx, w); err != nil {
			return nil, err
		}
	case kindPod:
		owner := metav1.GetControllerOf(w.pod)
		if owner == nil {
			return nil, &api.Error{Code: api.CodeUnsupported, Message: from.String() + " belongs to no workload that could be scaled", Hint: "without --mode scale only its Service is changed"}
		}
		var err error
		if w, err = c.scaledBy(ctx, from, owner); err != nil {
			return nil, err
		}
		if owner = metav1.GetControllerOf(w.meta); w.kind == kindReplicaSet && owner != nil {
			return c.scaledBy(ctx, from, owner)
		}
		return w, nil
	case kindDaemonSet:
		return nil, &api.Error{Code: api.CodeUnsupported, Message: w.String() + " has no replicas that could be scaled", Hint: "without --mode scale only its Service is changed"}
	}
	if owner := metav1.GetControllerOf(w.meta); w.kind == kindReplicaSet && owner != nil {
		return nil, &api.Error{
			Code:    api.CodeUsage,
			Message: fmt.Sprintf("%s belongs to %s %s, which would put its replicas back at once", w, owner.Kind, owner.Name),
			Hint:    fmt.Sprintf("use %s/%s", strings.ToLower(owner.Kind), owner.Name),
		}
	}
	return w, nil
}

// scaledBy reads an owner.
func (c *Cluster) scaledBy(ctx context.Context, of *workload, owner *metav1.OwnerReference) (*workload, error) {
	switch owner.Kind {
	case kindDeployment, kindStatefulSet, kindReplicaSet:
		w, err := c.getWorkload(ctx, owner.Kind, of.namespace, owner.Name)
		return w, translate(fmt.Sprintf("reading %s %s/%s", owner.Kind, of.namespace, owner.Name), err)
	}
	return nil, &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("%s belongs to %s %s, which cannot be scaled", of, owner.Kind, owner.Name), Hint: "without --mode scale only its Service is changed"}
}

// behindService is the one workload whose pods the Service selects.
func (c *Cluster) behindService(ctx context.Context, service *workload) (*workload, error) {
	if service.selector == nil {
		return nil, &api.Error{Code: api.CodeUnsupported, Message: service.String() + " has no selector: no workload stands behind it"}
	}
	all, err := c.scalables(ctx, service.namespace)
	if err != nil {
		return nil, err
	}
	var found []*workload
	var names []string
	for _, w := range all {
		managed := w.kind == kindReplicaSet && metav1.GetControllerOf(w.meta) != nil
		if service.selector.Matches(labels.Set(w.template.Labels)) && !managed {
			found = append(found, w)
			names = append(names, strings.ToLower(w.kind)+"/"+w.name)
		}
	}
	switch len(found) {
	case 0:
		return nil, &api.Error{Code: api.CodeNotFound, Message: service.String() + " selects the pods of no Deployment, StatefulSet or ReplicaSet"}
	case 1:
		return found[0], nil
	}
	return nil, &api.Error{Code: api.CodeUsage, Message: service.String() + " selects the pods of several workloads", Hint: "name one of them: " + list(names)}
}

// scalables are all workloads of a namespace that have replicas, without
// culvert's own.
func (c *Cluster) scalables(ctx context.Context, namespace string) (all []*workload, err error) {
	page := metav1.ListOptions{Limit: pageSize, LabelSelector: LabelManagedBy + "!=culvert"}
	deployments, err := c.client.Deployments(namespace).List(ctx, page)
	if err != nil {
		return nil, translate("listing the Deployments of namespace "+namespace, err)
	}
	for i := range deployments.Items {
		all = append(all, deploymentWorkload(&deployments.Items[i]))
	}
	sets, err := c.client.StatefulSets(namespace).List(ctx, page)
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, translate("listing the StatefulSets of namespace "+namespace, err)
	}
	if err == nil {
		for i := range sets.Items {
			all = append(all, statefulSetWorkload(&sets.Items[i]))
		}
	}
	replicas, err := c.client.ReplicaSets(namespace).List(ctx, page)
	if err != nil && !apierrors.IsForbidden(err) {
		return nil, translate("listing the ReplicaSets of namespace "+namespace, err)
	}
	if err == nil {
		for i := range replicas.Items {
			all = append(all, replicaSetWorkload(&replicas.Items[i]))
		}
	}
	return all, nil
}

// refuseScale is for what would do harm.
func refuseScale(w *workload, force bool) error {
	if r := readScaleRecord(w.meta); r != nil {
		return &api.Error{
			Code:    api.CodeExists,
			Message: fmt.Sprintf("the pods of %s are replaced already: by %s, since %s", w, firstOf(r.User, "session "+r.Session), r.Since.Format("2006-01-02 15:04:05 MST")),
			Hint:    "`culvert leave` ends one's own, `culvert recover` one that nobody holds any more",
		}
	}
	if w.namespace == metav1.NamespaceSystem && !force {
		return &api.Error{Code: api.CodeDenied, Message: fmt.Sprintf("%s belongs to the cluster itself", w), Hint: "--force does it nevertheless"}
	}
	if w.meta.Labels[LabelManagedBy] == "culvert" {
		return &api.Error{Code: api.CodeDenied, Message: fmt.Sprintf("%s is culvert's own", w)}
	}
	if losesVolumes(w) && !force {
		return &api.Error{
			Code:    api.CodeDenied,
			Message: fmt.Sprintf("%s deletes the volumes of its pods when it is scaled down (persistentVolumeClaimRetentionPolicy.whenScaled: Delete)", w),
			Hint:    "set whenScaled: Retain first; --force does it nevertheless, and the data is lost",
		}
	}
	return nil
}

func losesVolumes(w *workload) bool {
	return w.retention != nil && w.retention.WhenScaled == "Delete"
}

// servicesOf are those that select the workload's pods.
func (c *Cluster) servicesOf(ctx context.Context, w *workload) (all []corev1.Service, err error) {
	page, err := c.client.Services(w.namespace).List(ctx, metav1.ListOptions{Limit: pageSize})
	if err != nil {
		return nil, translate("listing the Services of namespace "+w.namespace, err)
	}
	for _, s := range page.Items {
		if len(s.Spec.Selector) > 0 && labels.SelectorFromSet(s.Spec.Selector).Matches(labels.Set(w.template.Labels)) {
			all = append(all, s)
		}
	}
	return all, nil
}

// portsOf are the containers' declared ports, then what Services add to them.
func portsOf(w *workload, services []corev1.Service) (ports []ScalePort) {
	add := func(p ScalePort) {
		if p.Protocol == "" {
			p.Protocol = corev1.ProtocolTCP
		}
		same := func(o ScalePort) bool { return o.Number == p.Number && o.Protocol == p.Protocol }
		if p.Protocol != corev1.ProtocolSCTP && !slices.ContainsFunc(ports, same) {
			ports = append(ports, p)
		}
	}
	for _, c := range w.template.Spec.Containers {
		for _, p := range c.Ports {
			add(ScalePort{Number: uint16(p.ContainerPort), Name: p.Name, Protocol: p.Protocol})
		}
	}
	for _, s := range services {
		for _, p := range s.Spec.Ports {
			if p.TargetPort.Type == intstr.Int { // a name is one of the containers'
				number := p.TargetPort.IntVal
				if number == 0 {
					number = p.Port
				}
				add(ScalePort{Number: uint16(number), Protocol: p.Protocol})
			}
		}
	}
	return ports
}

// expose sets Local of the ports that are exposed.
func (p *ScalePlan) expose(expose []Expose) error {
	if len(expose) == 0 {
		return usageScale("--expose LOCAL:REMOTE says which", "no port of this machine is exposed")
	}
	for _, e := range expose {
		i, err := p.match(e)
		if err != nil {
			return err
		}
		if at := p.Ports[i].Local; at != 0 {
			return usageScale("", "port %s of %s is exposed twice, by local ports %d and %d", p.Ports[i], p, at, e.Local)
		}
		p.Ports[i].Local = e.Local
	}
	return nil
}

// match finds the port that e means, or adds one that is not declared: pods may
// listen at others.
func (p *ScalePlan) match(e Expose) (int, error) {
	protocol := e.Protocol
	if protocol == "" {
		protocol = corev1.ProtocolTCP
	}
	of := func(is func(ScalePort) bool) int {
		return slices.IndexFunc(p.Ports, func(o ScalePort) bool { return o.Protocol == protocol && is(o) })
	}
	remote := e.Remote
	if remote == "" {
		remote = strconv.Itoa(int(e.Local))
		only := slices.IndexFunc(p.Ports, func(o ScalePort) bool { return o.Protocol == protocol })
		several := only >= 0 && slices.ContainsFunc(p.Ports[only+1:], func(o ScalePort) bool { return o.Protocol == protocol })
		if i := of(func(o ScalePort) bool { return o.Number == e.Local }); i < 0 && only >= 0 {
			if several {
				return 0, usageScale("name it: --expose "+remote+":REMOTE, one of "+p.portList(), "which port of %s is local port %d for?", p, e.Local)
			}
			return only, nil
		}
	}
	if i := of(func(o ScalePort) bool { return o.Name == remote || strconv.Itoa(int(o.Number)) == remote }); i >= 0 {
		return i, nil
	}
	if i := slices.IndexFunc(p.Ports, func(o ScalePort) bool { return o.Name == remote || strconv.Itoa(int(o.Number)) == remote }); i >= 0 {
		return 0, usageScale(fmt.Sprintf("--expose %d:%s/%s", e.Local, remote, strings.ToLower(string(p.Ports[i].Protocol))), "port %s of %s is %s, not %s", remote, p, p.Ports[i].Protocol, protocol)
	}
	number, err := strconv.ParseUint(remote, 10, 16)
	if err != nil || number == 0 {
		return 0, usageScale("it has "+p.portList(), "%s has no port %q", p, remote)
	}
	p.note("port %d is declared neither by the containers of %s nor by a Service", number, p)
	p.Ports = append(p.Ports, ScalePort{Number: uint16(number), Protocol: protocol})
	return len(p.Ports) - 1, nil
}

func (p *ScalePlan) portList() string {
	var ports []string
	for _, o := range p.Ports {
		ports = append(ports, o.String())
	}
	return list(ports)
}

func usageScale(hint, format string, args ...any) error {
	return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf(format, args...), Hint: hint}
}

// describe notes what the user might not expect of this workload.
func (p *ScalePlan) describe(w *workload) {
	var unserved []string
	for _, o := range p.Ports {
		if o.Local == 0 {
			unserved = append(unserved, o.String())
		}
	}
	if len(unserved) > 0 {
		p.note("ports that are not exposed are not served meanwhile: %s", list(unserved))
	}
	if w.replicas == 0 {
		p.note("%s has 0 replicas now, and will have 0 again afterwards", p)
	}
	if w.paused {
		p.note("%s is paused: its replicas are changed nevertheless, as `kubectl scale` does", p)
	}
	if w.kind == kindStatefulSet {
		p.note("the names of its pods (%s-0 and so on) do not resolve meanwhile", w.name)
	}
	if losesVolumes(w) {
		p.note("the volumes of its pods are deleted (persistentVolumeClaimRetentionPolicy.whenScaled: Delete)")
	}
	if w.template.Spec.HostNetwork {
		p.note("its pods use the addresses of their nodes; the pods that stand in do not")
	}
	if owner := metav1.GetControllerOf(w.meta); owner != nil {
		p.note("it belongs to %s %s, whose controller may put the replicas back: theirs stays then", owner.Kind, owner.Name)
	}
}

// scalers notes what else has to do with the workload's replicas. Who may not
// see it is told so.
func (c *Cluster) scalers(ctx context.Context, p *ScalePlan) error {
	page := metav1.ListOptions{Limit: pageSize}
	hpas, err := c.client.HorizontalPodAutoscalers(p.Namespace).List(ctx, page)
	switch {
	case apierrors.IsForbidden(err):
		p.note("you may not list horizontalpodautoscalers: one that scales %s is inactive while it has 0 replicas", p)
	case err != nil:
		return translate("listing the HorizontalPodAutoscalers of namespace "+p.Namespace, err)
	default:
		for _, h := range hpas.Items {
			if t := h.Spec.ScaleTargetRef; t.Kind == p.Kind && t.Name == p.Name {
				p.note("HorizontalPodAutoscaler %s is inactive while %s has 0 replicas, and goes on when they are back", h.Name, p)
			}
		}
	}
	budgets, err := c.client.PodDisruptionBudgets(p.Namespace).List(ctx, page)
	switch {
	case apierrors.IsForbidden(err):
		p.note("you may not list poddisruptionbudgets: one that selects these pods does not keep them from being scaled down")
	case err != nil:
		return translate("listing the PodDisruptionBudgets of namespace "+p.Namespace, err)
	default:
		for _, b := range budgets.Items {
			if selectorOf(b.Spec.Selector).Matches(labels.Set(p.PodLabels)) && b.Labels[LabelManagedBy] != "culvert" {
				p.Budgets = append(p.Budgets, b.Name)
				p.note("PodDisruptionBudget %s does not keep the pods from being scaled down: it is about evictions only", b.Name)
			}
		}
	}
	return nil
}
