package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// ruleHead is a Service of a mesh's member alone, before the gates, and a rule that
// leads his requests there. The meshed Service stays as it is; it is the origin. The
// gates look at each request again, so that what the rule could not tell apart, and
// what his machine does not answer, goes there.
type ruleHead struct {
	c       *Cluster
	spec    *InterceptSpec
	plan    *ServicePlan // the meshed Service
	mode    string
	router  router // nil: the user makes the rule
	name    string // of the Service of its own
	list    []PlanPort
	members []string // Services like it, of others who mesh the same

	made types.UID // of the Service, once it is there
}

// ruleApp is the LabelName of such Services.
const ruleApp = "culvert-member"

func isRule(s *corev1.Service) bool {
	return s.Labels[LabelManagedBy] == "culvert" && s.Labels[LabelName] == ruleApp
}

// memberName is the name of a member's own Service.
func memberName(service, session string) string {
	const most = 63 // a DNS label (RFC 1035)
	tail := "-culvert-" + session
	return service[:min(len(service), most-len(tail))] + tail
}

// planRule makes a mesh by a rule of what planMesh found to be possible.
func (c *Cluster) planRule(ctx context.Context, i *Intercept, plan *ServicePlan, state *intercept.State) error {
	h := &ruleHead{c: c, spec: &i.spec, plan: plan, mode: i.spec.Mode, router: routers[i.spec.Mode], name: memberName(plan.Name, i.spec.Holder.Session)}
	if plan.Headless {
		return plan.refuse("--mode router", "is headless: gates would have no address to lead to while this machine is away")
	}
	for _, p := range plan.Ports {
		if p.Local != 0 {
			h.list = append(h.list, p)
		}
	}
	if h.router != nil {
		if err := h.router.check(h); err != nil {
			return err
		}
	}
	i.Key, i.head = h.name, h
	h.members = rulesFor(state, plan.Name)
	if h.router == nil {
		plan.note(fmt.Sprintf("no rule leads requests here yet: have one of your own lead those with the mark to Service %s.%s, which has the ports of %s", h.name, plan.Namespace, plan.Name))
		return nil
	}
	objects := c.client.customs(h.router.kind(), plan.Namespace)
	governing, _, err := c.governing(ctx, objects, h.router, plan.Name)
	if errors.Is(err, errNoKind) {
		return &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("--mode %s needs the kind %s, which this cluster does not have", h.mode, h.router.kind()), Hint: "--mode router needs neither Istio nor Gateway API"}
	}
	if err != nil {
		return err
	}
	for _, o := range governing { // what cannot be is found before anything is changed
		if _, err := h.router.insert(h, o, governing); err != nil {
			return err
		}
	}
	return c.ruleAccess(ctx, h.router, plan.Namespace)
}

func (h *ruleHead) service() string   { return h.plan.Name }
func (h *ruleHead) ports() []PlanPort { return h.list }
func (h *ruleHead) gates(*GateSpec)   {}

func (h *ruleHead) mapping() []string {
	var lines []string
	for _, p := range h.list {
		lines = append(lines, fmt.Sprintf("port %s -> localhost:%d", p, p.Local))
	}
	if h.router == nil {
		return append(lines, fmt.Sprintf("Service %s will lead here; no rule leads requests there before you make one", h.name))
	}
	return append(lines, fmt.Sprintf("a rule among those of %s objects will lead marked requests here, by Service %s", h.router.kind().kind, h.name))
}

// origin is the meshed Service, as it is.
func (h *ruleHead) origin(context.Context, string) (map[PortKey]string, error) {
	origins := map[PortKey]string{}
	for _, p := range h.list {
		origins[p.Key()] = hostPortOf(h.plan.below.Spec.ClusterIP, p.Port)
	}
	return origins, nil
}

func (h *ruleHead) policies(ctx context.Context, i *Intercept, routes []intercept.Route) ([]string, error) {
	return i.openOrigin(ctx, routes, h.plan)
}

// lead makes the Service, waits until gates serve it, and only then makes the rule.
func (h *ruleHead) lead(ctx context.Context, i *Intercept, routes []intercept.Route) error {
	r := i.record()
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encoding the record of a mesh: %w", err)
	}
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Name: h.name, Namespace: i.spec.Namespace,
			Labels:      map[string]string{LabelName: ruleApp, LabelManagedBy: "culvert", LabelSession: r.Session},
			Annotations: map[string]string{AnnotationPreview: string(text), AnnotationUser: i.spec.Holder.User, AnnotationMeshed: h.plan.Name},
		},
		Spec: corev1.ServiceSpec{Selector: GateSelector(i.Gate)},
	}
	listen := listenPorts(routes)
	for _, p := range h.list {
		// Name and appProtocol decide what the proxies take its traffic for.
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: p.Name, Protocol: p.Protocol, Port: p.Port, AppProtocol: p.AppProtocol, TargetPort: intstr.FromInt32(int32(listen[p.Key()]))})
	}
	doing := fmt.Sprintf("creating Service %s in namespace %q", s.Name, s.Namespace)
	made, err := h.c.client.Services(s.Namespace).Create(ctx, s, metav1.CreateOptions{FieldManager: fieldManager})
	if apierrors.IsAlreadyExists(err) {
		if made, err = h.c.again(ctx, s); err == nil && made == nil {
			return &api.Error{Code: api.CodeExists, Message: doing + ": there is one, of somebody else", Hint: "culvert recover " + h.plan.Name}
		}
	}
	if err != nil {
		return translate(doing, err)
	}
	h.made = made.UID
	if err := h.c.awaitServed(ctx, s.Namespace, s.Name); err != nil || h.router == nil {
		return err
	}
	if err := h.router.beside(ctx, h); err != nil {
		return err
	}
	notes, err := h.c.addRules(ctx, h)
	for _, n := range notes {
		if !slices.Contains(i.Notes, n) {
			i.Notes = append(i.Notes, n)
		}
	}
	return err
}

// servedTime is how long a new Service may take to have endpoints.
const servedTime = 10 * time.Second

// awaitServed waits until a Service has an endpoint that is ready.
func (c *Cluster) awaitServed(ctx context.Context, namespace, service string) error {
	for end := time.Now().Add(servedTime); ; {
		list, err := c.client.EndpointSlices(namespace).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + service})
		if err != nil {
			return translate("waiting for endpoints of Service "+service, err)
		}
		for _, s := range list.Items {
			if slices.ContainsFunc(s.Endpoints, func(e discoveryv1.Endpoint) bool { return e.Conditions.Ready == nil || *e.Conditions.Ready }) {
				return nil
			}
		}
		if time.Now().After(end) {
			return &api.Error{Code: api.CodeTimeout, Message: fmt.Sprintf("Service %s has no endpoints after %v: no request was led there", service, servedTime), Hint: "culvert doctor"}
		}
		select {
		case <-time.After(pollRules):
		case <-ctx.Done():
			return translate("waiting for endpoints of Service "+service, ctx.Err())
		}
	}
}

// led: the Service is the intercept's. Whether the rule is there keepRule looks.
func (h *ruleHead) led(ctx context.Context, i *Intercept) (bool, error) {
	s, err := h.c.client.Services(i.spec.Namespace).Get(ctx, i.Key, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil && isRule(s) && s.Labels[LabelSession] == i.owner().Session, translate("looking at Service "+i.Key, err)
}

const (
	// ruleSoon is how long after a change of something with rules it is looked whether
	// the rule still stands: one change is often several.
	ruleSoon = 300 * time.Millisecond
	// ruleEvery is how often it is looked where nothing tells of changes, and how long
	// a watch that ended is not begun again.
	ruleEvery = 15 * time.Second
	ruleAgain = 2 * time.Second
)

// watchRules tells of changes of whatever has rules. Who may not watch is told now and then.
func (h *ruleHead) watchRules(ctx context.Context, tell func()) {
	for ctx.Err() == nil {
		objects, pause := h.c.watch.customs(h.router.kind(), h.plan.Namespace), ruleAgain
		_, err := objects.list(ctx) // which version there is
		if err == nil {
			tell()
			err = objects.watch(ctx, tell)
		}
		if apierrors.IsForbidden(err) {
			pause = ruleEvery
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// keepRule puts the rule back when somebody changed what it is in.
func (h *ruleHead) keepRule(ctx context.Context, i *Intercept, onConflict string, note func(string)) error {
	changed := make(chan struct{}, 1)
	tell := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	watched := make(chan struct{})
	go func() { defer close(watched); h.watchRules(ctx, tell) }()
	defer func() { cancel(); <-watched }()
	var again reapplies
	for {
		pause := ruleSoon
		select {
		case <-changed:
		case <-ctx.Done():
			return nil
		}
		for pause > 0 {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return nil
			}
			var lost *Lost
			switch err := h.putBack(ctx, i, onConflict, &again, note); {
			case err == nil:
				pause = 0
			case errors.As(err, &lost):
				return err
			default: // the API server is away, or others change it at the same time
				pause = ruleAgain
			}
		}
	}
}

// putBack puts the rule back where it does not stand. The error is a *Lost when it is
// not to be.
func (h *ruleHead) putBack(ctx context.Context, i *Intercept, onConflict string, again *reapplies, note func(string)) error {
	if ok, err := h.c.ruleStands(ctx, h); err != nil || ok {
		return err
	}
	led, err := h.led(ctx, i)
	if err != nil {
		return err
	}
	state, err := h.c.GateState(ctx, i.spec.Namespace)
	if err != nil {
		return err
	}
	if e, ok := state.Entries[i.Key]; !led || !ok || e.Draining || !i.owns(e) {
		return &Lost{Why: "somebody ended it (`culvert recover` or `clean`)"}
	}
	if onConflict == api.OnConflictLeave {
		return &Lost{Why: "somebody took the rule away, and theirs stays (--on-conflict leave)"}
	}
	next, more := again.add(h.c.Now())
	if !more {
		return &Lost{Why: fmt.Sprintf("somebody took the rule away again, after %d times within %v, and theirs stays", maxReapplies, reapplyWindow)}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	if _, err = h.c.addRules(ctx, h); err == nil {
		*again = next
		note("somebody took the rule out of the " + h.router.kind().kind + ": it is put in front again")
	}
	return lostIfRefused("the rule cannot be put back", err)
}

// ruleStands tells whether all that insert wants is there.
func (c *Cluster) ruleStands(ctx context.Context, h *ruleHead) (bool, error) {
	governing, yielding, err := c.governing(ctx, c.client.customs(h.router.kind(), h.plan.Namespace), h.router, h.plan.Name)
	if err != nil {
		return false, err
	}
	for _, o := range yielding {
		if missing(h.router, rulesOf(h.router, o), []any{}, h.name, h.plan.Namespace) {
			return false, nil // the rule is to move
		}
	}
	if len(h.router.made(h, governing)) > 0 {
		return false, nil
	}
	for _, o := range governing {
		want, err := h.router.insert(h, o, governing)
		if err != nil || missing(h.router, rulesOf(h.router, o), want, h.name, h.plan.Namespace) {
			return false, nil // addRules says what is wrong
		}
	}
	return true, nil
}

// resumeRuleHead finds one again that another process of the session began.
func (c *Cluster) resumeRuleHead(ctx context.Context, i *Intercept, e intercept.Entry, r ResumeSpec) error {
	service, err := c.client.Services(r.Namespace).Get(ctx, e.Service, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return &Lost{Why: "the Service was deleted"}
	}
	if err != nil {
		return translate("looking at Service "+e.Service, err)
	}
	plan, err := c.plan(ctx, service, nil, r.Expose, r.Force)
	if err != nil {
		return lostIfRefused("the Service is not as it was", err)
	}
	h := &ruleHead{c: c, spec: &i.spec, plan: plan, mode: e.Mode, router: routers[e.Mode], name: r.Key}
	for _, p := range plan.Ports {
		if p.Local != 0 {
			h.list = append(h.list, p)
		}
	}
	if own, err := c.client.Services(r.Namespace).Get(ctx, r.Key, metav1.GetOptions{}); err == nil {
		h.made = own.UID
	}
	i.spec.Mode, i.head = e.Mode, h
	return nil
}

// deleteMember deletes a member's own Service, after nothing leads there any more.
func (c *Cluster) deleteMember(ctx context.Context, namespace, name, session string) error {
	s, err := c.client.Services(namespace).Get(ctx, name, metav1.GetOptions{})
	if err == nil && isRule(s) && (session == "" || s.Labels[LabelSession] == session) {
		err = c.client.Services(namespace).Delete(ctx, name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &s.UID}})
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return translateService("deleting Service "+name, err)
	}
	return nil
}
