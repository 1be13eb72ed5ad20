package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/nearest"
)

// ServicePlan is a Service that was looked at and may be intercepted. Nothing was
// changed.
type ServicePlan struct {
	Namespace, Name string
	Headless        bool
	Ports           []PlanPort // all of the Service's
	Notes           []string   // for people: what will be different, or could not be seen
	// Record is of who holds the Service, nil for nobody; then Ports and the rest
	// are those of the Service without that intercept. One of PhaseRestored is over,
	// but for ownership: Restore ends it.
	Record *Record

	expose  []Expose
	force   bool
	service *corev1.Service // as it is
	below   *corev1.Service // as it is without an intercept
}

// Service is the Service as it was when it was looked at, or switched, last.
// Treat it as read-only.
func (p *ServicePlan) Service() *corev1.Service { return p.service }

// PlanExchange looks at what target names: NAME, svc/NAME, NAME.NAMESPACE, or a
// workload (deployment/NAME, statefulset/NAME, replicaset/NAME, pod/NAME), which stands for the
// Service that selects its pods. namespace is that of a target without one; empty
// is the context's. It refuses what cannot be intercepted, and without force what
// would not be the same for callers. It changes nothing; errors are *api.Error.
func (c *Cluster) PlanExchange(ctx context.Context, namespace, target string, expose []Expose, force bool) (*ServicePlan, error) {
	kind, name, ns, err := splitExchange(target)
	if err != nil {
		return nil, err
	}
	ns = firstOf(ns, namespace, c.namespace)
	var service *corev1.Service
	if kind == "service" {
		service, err = c.findService(ctx, ns, name)
	} else {
		service, err = c.servingService(ctx, kind, ns, name)
	}
	if err != nil {
		return nil, err
	}
	plan, err := c.plan(ctx, service, nil, expose, force)
	if err != nil {
		return nil, err
	}
	return plan, c.mayExchange(ctx, ns)
}

// Replan is plan for the Service as somebody else made it meanwhile: the same
// ports are exposed, and the Record has their newest selector and ports, so that
// undo restores those. When the ports are not found any more, it is the error of
// PlanExchange.
func (c *Cluster) Replan(ctx context.Context, plan *ServicePlan, service *corev1.Service) (*ServicePlan, error) {
	return c.plan(ctx, service, plan.Record, plan.expose, plan.force)
}

// plan checks the Service. held is its Record if the annotation is gone.
func (c *Cluster) plan(ctx context.Context, service *corev1.Service, held *Record, expose []Expose, force bool) (*ServicePlan, error) {
	r, err := RecordOf(service)
	if err != nil {
		return nil, err
	}
	if r == nil && held != nil {
		r = held
	}
	p := &ServicePlan{
		Namespace: service.Namespace, Name: service.Name, Headless: service.Spec.ClusterIP == corev1.ClusterIPNone,
		expose: expose, force: force, service: service, below: r.below(service),
	}
	if err := p.check(); err != nil {
		return nil, err
	}
	if p.Headless {
		if err := c.checkGoverned(ctx, p); err != nil {
			return nil, err
		}
	}
	for _, port := range p.below.Spec.Ports {
		p.Ports = append(p.Ports, PlanPort{
			Name: port.Name, Protocol: keyOf(port).Protocol, Port: port.Port, TargetPort: port.TargetPort, AppProtocol: port.AppProtocol,
		})
	}
	c.resolveTargets(ctx, p)
	if err := p.match(expose); err != nil {
		return nil, err
	}
	if p.Headless {
		if err := p.checkHeadlessPorts(); err != nil {
			return nil, err
		}
	}
	if r == nil {
		return p, nil
	}
	now := *r
	now.Selector, now.Ports = p.below.Spec.Selector, nil
	for _, port := range p.below.Spec.Ports {
		was, _ := r.port(keyOf(port))
		now.Ports = append(now.Ports, RecordedPort{Port: port.Port, Protocol: keyOf(port).Protocol, TargetPort: port.TargetPort, Gate: was.Gate})
	}
	p.Record = &now
	return p, nil
}

func (p *ServicePlan) String() string { return "Service " + p.Namespace + "/" + p.Name }

// refuse is the error for a Service that cannot be exchanged.
func (p *ServicePlan) refuse(hint, format string, args ...any) error {
	return &api.Error{Code: api.CodeUsage, Message: p.String() + " " + fmt.Sprintf(format, args...), Hint: hint}
}

const hintForce = "--force exchanges it all the same"

// unlessForced is the error for what would not be the same for callers, and a
// note with force: what is there stands in the way, and no input is bad.
func (p *ServicePlan) unlessForced(hint, why string) error {
	if p.force {
		p.note("forced: " + p.String() + " " + why)
		return nil
	}
	return &api.Error{Code: api.CodeConflict, Message: p.String() + " " + why, Hint: hint + hintForce}
}

// check finds what the Service itself says against an intercept.
func (p *ServicePlan) check() error {
	spec := &p.below.Spec
	switch {
	case p.Namespace == "default" && p.Name == "kubernetes":
		return p.refuse("", "is the way to the API server, for every pod and for culvert itself: it is never exchanged")
	case p.service.DeletionTimestamp != nil:
		return p.refuse("", "is being deleted")
	case isOrigin(p.service):
		return p.refuse("name the Service that it belongs to", "is culvert's own: the way to what served another Service before its exchange")
	case p.service.Labels[LabelManagedBy] == "culvert":
		return p.refuse("", "is culvert's own")
	case spec.Type == corev1.ServiceTypeExternalName:
		return p.refuse("exchange the Service behind it, if it is one of the cluster", "is an ExternalName, an alias of %s, and has no pods", spec.ExternalName)
	case len(spec.Selector) == 0:
		return p.refuse("", "has no selector: its endpoints are set by hand or by a controller, which would go on doing so")
	case len(spec.Ports) == 0:
		return p.refuse("--mode scale replaces the pods of a workload instead", "has no ports")
	}
	for _, port := range spec.Ports {
		if port.Protocol == corev1.ProtocolSCTP {
			return p.refuse("", "has port %d/SCTP, which the gates could not lead to its pods", port.Port)
		}
	}
	if spec.SessionAffinity == corev1.ServiceAffinityClientIP {
		p.note("sessionAffinity ClientIP: a caller stays with one gate, and its pods see the gates as their callers")
	}
	// What follows is refused without force.
	var why string
	switch {
	case p.Namespace == "kube-system":
		why = "is the cluster's own: in kube-system a mistake stops more than your program"
	case spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal:
		why = "has externalTrafficPolicy Local: nodes without a pod of it get no traffic from outside, and the gates run on other nodes; its pods would see the gates' addresses instead of the callers'"
	case spec.InternalTrafficPolicy != nil && *spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal:
		why = "has internalTrafficPolicy Local: a caller is served on its own node only, and the gates do not run on every node where its pods do"
	default:
		return nil
	}
	return p.unlessForced("", why)
}

func (p *ServicePlan) note(text string) { p.Notes = append(p.Notes, text) }

// checkGoverned finds the StatefulSet whose pods' names are a headless Service's.
func (c *Cluster) checkGoverned(ctx context.Context, p *ServicePlan) error {
	governed := ""
	err := eachOf(ctx, c.client.StatefulSets(p.Namespace), func(s *appsv1.StatefulSet) {
		if s.Spec.ServiceName == p.Name {
			governed = s.Name
		}
	})
	switch {
	case apierrors.IsForbidden(err):
		p.note("it is not known whether a StatefulSet's pods have their names by " + p.String() + ": you may not list statefulsets.apps; if so, these names stop resolving")
		return nil
	case err != nil:
		return translate("listing the StatefulSets of namespace "+p.Namespace, err)
	case governed == "":
		return nil
	}
	why := fmt.Sprintf("gives the pods of StatefulSet %s their names: %s-0.%s and the others would stop resolving", governed, governed, p.Name)
	return p.unlessForced("use --mode scale, which keeps the names; ", why)
}

// exchangeKinds are the words for what a target may be.
var exchangeKinds = map[string]string{
	"svc": "service", "service": "service", "services": "service",
	"deploy": "deployment", "deployment": "deployment", "deployments": "deployment",
	"sts": "statefulset", "statefulset": "statefulset", "statefulsets": "statefulset",
	"rs": "replicaset", "replicaset": "replicaset", "replicasets": "replicaset",
	"po": "pod", "pod": "pod", "pods": "pod",
}

// splitExchange reads [KIND/]NAME[.NAMESPACE]; further labels (.svc.cluster.local)
// are the full name's.
func splitExchange(target string) (kind, name, ns string, err error) {
	kind, name = "service", target
	before, after, hasKind := strings.Cut(target, "/")
	if hasKind {
		kind, name = exchangeKinds[strings.ToLower(before)], after
	}
	name, ns, _ = strings.Cut(name, ".")
	ns, _, _ = strings.Cut(ns, ".")
	if kind == "" || name == "" || strings.ContainsAny(name, "/: ") {
		return "", "", "", &api.Error{
			Code:    api.CodeUsage,
			Message: fmt.Sprintf("%q names no Service", target),
			Hint:    "give NAME, svc/NAME, deployment/NAME, statefulset/NAME, replicaset/NAME, pod/NAME or NAME.NAMESPACE",
		}
	}
	return kind, name, ns, nil
}

// findService says which Service may be meant if there is none of the name.
func (c *Cluster) findService(ctx context.Context, ns, name string) (*corev1.Service, error) {
	service, err := c.client.Services(ns).Get(ctx, name, metav1.GetOptions{})
	if !apierrors.IsNotFound(err) {
		return service, translate(fmt.Sprintf("looking for Service %s/%s", ns, name), err)
	}
	e := &api.Error{
		Code:    api.CodeNotFound,
		Message: fmt.Sprintf("no Service %q in namespace %q", name, ns),
		Hint:    fmt.Sprintf("`kubectl get services -n %s` shows what there is; --namespace names another namespace", ns),
	}
	var known []string
	if eachOf(ctx, c.client.Services(ns), func(s *corev1.Service) {
		if s.Labels[LabelManagedBy] != "culvert" {
			known = append(known, s.Name)
		}
	}) != nil {
		return nil, e // who may not list them gets the name only
	}
	const few = 10
	switch near := nearest.Of(name, known); {
	case near != "":
		e.Message += fmt.Sprintf("; did you mean %q?", near)
	case len(known) == 0:
		e.Message += ", nor any other"
	case len(known) <= few:
		e.Message += "; it has " + list(known)
	}
	return nil, e
}

// servingService is the one Service that selects a workload's pods.
func (c *Cluster) servingService(ctx context.Context, kind, ns, name string) (*corev1.Service, error) {
	what := kind + "/" + name
	pod, err := c.podLabels(ctx, kind, ns, name)
	if apierrors.IsNotFound(err) {
		return nil, c.missingWorkload(ctx, []string{kindNames[kind]}, ns, name)
	}
	if err != nil {
		return nil, translate(fmt.Sprintf("looking for %s in namespace %q", what, ns), err)
	}
	var found []*corev1.Service
	err = eachOf(ctx, c.client.Services(ns), func(s *corev1.Service) {
		r, _ := RecordOf(s) // one that is not readable is reported when it is chosen
		selector := r.below(s).Spec.Selector
		if len(selector) > 0 && s.Labels[LabelManagedBy] != "culvert" && labels.SelectorFromSet(selector).Matches(labels.Set(pod)) {
			found = append(found, s)
		}
	})
	if err != nil {
		return nil, translate(fmt.Sprintf("listing the Services of namespace %q", ns), err)
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return nil, &api.Error{
			Code:    api.CodeNotFound,
			Message: fmt.Sprintf("no Service of namespace %q selects the pods of %s", ns, what),
			Hint:    "use --mode scale, which replaces the pods",
		}
	}
	var names []string
	for _, s := range found {
		names = append(names, s.Name)
	}
	slices.Sort(names)
	return nil, &api.Error{
		Code:    api.CodeUsage,
		Message: fmt.Sprintf("%d Services of namespace %q select the pods of %s: %s", len(names), ns, what, list(names)),
		Hint:    "name the one, e.g. svc/" + names[0],
	}
}

// podLabels are those of a workload's pods.
func (c *Cluster) podLabels(ctx context.Context, kind, ns, name string) (map[string]string, error) {
	switch kind {
	case "deployment":
		o, err := c.client.Deployments(ns).Get(ctx, name, metav1.GetOptions{})
		return o.Spec.Template.Labels, err
	case "statefulset":
		o, err := c.client.StatefulSets(ns).Get(ctx, name, metav1.GetOptions{})
		return o.Spec.Template.Labels, err
	case "replicaset":
		o, err := c.client.ReplicaSets(ns).Get(ctx, name, metav1.GetOptions{})
		return o.Spec.Template.Labels, err
	}
	o, err := c.client.Pods(ns).Get(ctx, name, metav1.GetOptions{})
	return o.Labels, err
}

// eachOf calls f for every object of a resource, page by page.
func eachOf[T, L runtime.Object](ctx context.Context, o Objects[T, L], f func(T)) error {
	options := metav1.ListOptions{Limit: pageSize}
	for {
		page, err := o.List(ctx, options)
		if err != nil {
			return err
		}
		err = meta.EachListItem(page, func(item runtime.Object) error {
			f(item.(T))
			return nil
		})
		if err != nil {
			return fmt.Errorf("reading a list: %w", err)
		}
		m, err := meta.ListAccessor(page)
		if err != nil {
			return fmt.Errorf("reading a list: %w", err)
		}
		if options.Continue = m.GetContinue(); options.Continue == "" {
			return nil
		}
	}
}

// mayExchange finds the verb on Services that is missing.
func (c *Cluster) mayExchange(ctx context.Context, ns string) error {
	var checks []Check
	for _, verb := range []string{"get", "patch", "create", "delete"} {
		checks = append(checks, newCheck(verb, "", "services", "", ns, true, "the intercepted Service, and the one that leads to its origin"))
	}
	checks, err := c.review(ctx, checks)
	if err != nil {
		return err
	}
	for _, check := range checks {
		if !check.Allowed {
			return c.refused(ctx, check)
		}
	}
	return nil
}
