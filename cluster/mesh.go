package cluster

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// A mesh is one Entry for all developers of a Service. What they share in the
// cluster (the Service's Record, the origin, policies) bears the mesh's own id where
// an exchange has its session's, so that nothing of it is the first one's: whoever
// comes first makes it, and whoever leaves last undoes it. Each developer is a
// Member of the Entry, and the ConfigMap's optimistic concurrency keeps them from
// losing each other.

// meshPrefix begins the id of a mesh. Each first one in makes a new one, so that
// who is late in undoing an old mesh leaves the new one alone.
const meshPrefix = "mesh-"

func isMesh(session string) bool { return strings.HasPrefix(session, meshPrefix) }

// memberOf is the index of a session's Member, -1 for none.
func memberOf(e intercept.Entry, session string) int {
	return slices.IndexFunc(e.Members, func(m intercept.Member) bool { return m.Holder.Session == session })
}

// planMesh is an exchange's plan, of a Service that others may have meshed already.
func (c *Cluster) planMesh(ctx context.Context, i *Intercept) error {
	if len(i.spec.Match) == 0 {
		return &api.Error{Code: api.CodeUsage, Message: "nothing says which requests shall come here", Hint: "give --version-mark or --match"}
	}
	plan, err := c.PlanExchange(ctx, i.spec.Namespace, i.spec.Target, i.spec.Expose, i.spec.Force)
	if err != nil {
		return err
	}
	for _, p := range plan.Ports {
		if p.Local == 0 {
			continue
		}
		if p.Protocol != corev1.ProtocolTCP {
			return plan.refuse("exchange takes all of its traffic", "has port %s, which carries no HTTP requests that could be told apart", p)
		}
		if httpOf(p) == intercept.HTTPNever && !(overTLS(p) && i.spec.TLSSecret != "") {
			return plan.refuse("exchange takes all of its traffic; an appProtocol or a port name of http, http2 or grpc says that it is HTTP",
				"says of port %s that it is %s: the headers of its requests cannot be seen%s", p, protocolWord(p), map[bool]string{true: " without --tls-secret"}[overTLS(p)])
		}
	}
	if r := plan.Record; r != nil && r.Kind != intercept.Mesh {
		return heldBy(plan.Namespace, plan.Name, plan.Name, intercept.Holder{Session: r.Session, User: r.User, Origin: r.Origin, Since: r.Since})
	}
	state, err := c.GateState(ctx, plan.Namespace)
	if err != nil {
		return err
	}
	if plan.Record == nil && plan.below.Spec.Selector[LabelGate] != "" {
		// What serves it now are the gates: they would be their own origin.
		return &api.Error{Code: api.CodeConflict,
			Message: fmt.Sprintf("%s leads to gates, but its annotation %s, which says what served it before, is gone", plan, AnnotationIntercept),
			Hint:    "try again, a member of the mesh may be putting it back; `culvert recover " + plan.Name + "` makes it what it was"}
	}
	for _, e := range state.Entries {
		if e.Kind == intercept.Mesh && e.Service == plan.Name && memberOf(e, i.spec.Holder.Session) >= 0 {
			return &api.Error{Code: api.CodeExists, Message: "you mesh Service " + plan.Name + " already", Hint: "culvert leave " + plan.Name}
		}
	}
	i.spec.Namespace, i.mesh = plan.Namespace, intercept.Holder{}
	if err := c.chooseMode(ctx, i, plan); err != nil {
		return err
	}
	if name := i.spec.TLSSecret; name != "" {
		if i.spec.Mode != api.ModeRouter {
			return plan.refuse("--mode router", "is meshed by a rule of %s, which sees no headers in TLS: gates with a key change nothing about that", i.spec.Mode)
		}
		key, err := c.tlsKey(ctx, plan.Namespace, name)
		if err != nil {
			return err
		}
		i.tls = &key
	}
	if i.spec.Mode == api.ModeRouter {
		c.planRouter(i, plan)
	} else {
		err = c.planRule(ctx, i, plan, state)
	}
	i.Notes = plan.Notes
	if err != nil {
		return err
	}
	return i.checkTaken(state)
}

// planRouter has all traffic of the Service come to the gates, which tell requests apart.
func (c *Cluster) planRouter(i *Intercept, plan *ServicePlan) {
	i.Key = plan.Name
	if r := plan.Record; r != nil {
		i.mesh = intercept.Holder{Session: r.Session, Since: r.Since}
	}
	if plan.Headless {
		i.Gate = OwnGate(plan.Name)
	}
	i.head = &exchangeHead{c: c, plan: plan, again: plan.reapplied()}
}

// chooseMode makes api.ModeAuto one that the Service is governed by, and refuses what
// mutual TLS would not let through.
func (c *Cluster) chooseMode(ctx context.Context, i *Intercept, plan *ServicePlan) (err error) {
	if i.spec.Mode == "" || i.spec.Mode == api.ModeAuto {
		if i.spec.Mode, err = c.governedBy(ctx, plan); err != nil {
			return err
		}
	}
	if i.spec.Mode == api.ModeRouter {
		return c.checkStrict(ctx, plan, true, "--mode istio --on-gone fail leads only your requests to gates, and nothing from them to its pods; ")
	}
	return c.checkStrict(ctx, plan, i.spec.OnGone != intercept.GoneFails, "--on-gone fail answers your requests with 503 while this machine is away, and needs no way to them; ")
}

// governedBy tells what decides where requests to a Service go: an object that names it,
// else a proxy beside its pods, else nothing but the cluster itself.
func (c *Cluster) governedBy(ctx context.Context, plan *ServicePlan) (mode string, err error) {
	for _, mode := range []string{api.ModeIstio, api.ModeGateway} {
		r := routers[mode]
		objects, err := c.client.customs(r.kind(), plan.Namespace).list(ctx)
		switch {
		case errors.Is(err, errNoKind):
			continue
		case apierrors.IsForbidden(err):
			plan.note(fmt.Sprintf("whether %s objects decide where requests to %s go is not known, since you may not list them (role %s)", r.kind().kind, plan, meshRole(mode)))
			continue
		case err != nil:
			return "", translate("listing "+r.kind().String(), err)
		}
		if slices.ContainsFunc(objects, func(o *unstructured.Unstructured) bool { return r.governs(o, plan.Name, plan.Namespace) }) {
			return mode, nil
		}
		if mode == api.ModeIstio && !plan.Headless {
			if pod, err := c.sidecar(ctx, plan); err != nil || pod != nil {
				return mode, err
			}
		}
	}
	return api.ModeRouter, nil
}

// checkTaken refuses conditions that another member has: whose a request is would
// depend on who came first.
func (i *Intercept) checkTaken(s *intercept.State) error {
	exposed := map[int32]bool{}
	for _, p := range i.Exposed() {
		exposed[p.Port] = true
	}
	for key, e := range s.Entries {
		if e.Kind != intercept.Mesh || e.Service != i.Service() {
			continue
		}
		for _, m := range e.Members {
			same := slices.ContainsFunc(m.Ports, func(p intercept.MemberPort) bool { return exposed[p.Port] })
			if m.Holder.Session == i.spec.Holder.Session || m.Draining || !same || !intercept.Same(m.Match, i.spec.Match) {
				continue
			}
			return &Held{Namespace: i.spec.Namespace, Key: key, Holder: m.Holder, Err: &api.Error{
				Code: api.CodeExists,
				Message: fmt.Sprintf("requests to %s in namespace %q with %s are %s's since %s", i.Service(), i.spec.Namespace, matchText(m.Match),
					firstOf(m.Holder.User, "session "+m.Holder.Session), m.Holder.Since.Local().Format(time.DateTime)),
				Hint: "take another --version-mark or --match; --wait waits for theirs to end",
			}}
		}
	}
	return nil
}

// matchText is a member's conditions for people.
func matchText(match []intercept.Condition) string {
	var texts []string
	for _, c := range match {
		texts = append(texts, c.String())
	}
	return strings.Join(texts, " and ")
}

// meshed is the error for a Service whose members stand in the way of an exchange.
func (c *Cluster) meshed(ctx context.Context, plan *ServicePlan) error {
	state, err := c.GateState(ctx, plan.Namespace)
	if err != nil {
		return err
	}
	return meshedBy(plan.Namespace, plan.Name, state.Entries[plan.Name])
}

func meshedBy(namespace, service string, e intercept.Entry) error {
	var who []string
	for _, m := range e.Members {
		who = append(who, firstOf(m.Holder.User, "session "+m.Holder.Session))
	}
	by := "nobody who is still there"
	if len(who) > 0 {
		by = list(who)
	}
	return &api.Error{Code: api.CodeExists,
		Message: fmt.Sprintf("Service %s in namespace %q is meshed, by %s", service, namespace, by),
		Hint:    fmt.Sprintf("`culvert mesh %s` beside them takes only your requests; `culvert recover %s` ends a mesh whose members are gone", service, service)}
}

// meshEnds: the mesh that is there has no members, and somebody is undoing it.
type meshEnds struct{ holder intercept.Holder }

func (*meshEnds) Error() string { return "the mesh of before is ending" }

const (
	// meshEndTime is how long whoever left last may take to undo a mesh, before
	// who comes next does it himself.
	meshEndTime = 15 * time.Second
	// meshEndPoll is the pause between two looks.
	meshEndPoll = 250 * time.Millisecond
)

// joinMesh makes the entry, or adds the member to it. It waits for a mesh that is
// about to end.
func (i *Intercept) joinMesh(ctx context.Context, progress func(string)) error {
	begun := time.Now()
	for {
		_, err := i.c.ChangeGateState(ctx, i.spec.Namespace, i.join)
		ends, ok := err.(*meshEnds)
		if !ok {
			return err
		}
		if progress != nil {
			progress("waiting for the mesh of before to end")
		}
		if time.Since(begun) > meshEndTime {
			undo := UndoSpec{Namespace: i.spec.Namespace, Key: i.Key, Session: ends.holder.Session}
			if err := i.c.Undo(ctx, undo); err != nil {
				return err
			}
		}
		select {
		case <-time.After(meshEndPoll):
		case <-ctx.Done():
			return translate("waiting for a mesh to end", ctx.Err())
		}
		// The Service is another one by then.
		if err := i.c.planMesh(ctx, i); err != nil {
			return err
		}
	}
}

// join is a change of the state.
func (i *Intercept) join(s *intercept.State) error {
	if err := i.checkTaken(s); err != nil {
		return err
	}
	e, ok := s.Entries[i.Key]
	switch {
	case ok && e.Kind != intercept.Mesh:
		return heldBy(i.spec.Namespace, i.Service(), i.Key, e.Holder)
	case ok && (e.Draining || len(e.Members) == 0):
		return &meshEnds{e.Holder}
	case ok:
		i.mesh = e.Holder
	case i.mesh.Session == "": // else somebody deleted the ConfigMap of a mesh that is there
		i.mesh = intercept.Holder{Session: meshPrefix + randomHex(6), Since: i.spec.Holder.Since}
	}
	return i.enter(s)
}

// member enters the intercept's own into e, which has the others of before, and
// returns it. Its ports are still to be filled in.
func (i *Intercept) member(e *intercept.Entry, before intercept.Entry) *intercept.Member {
	m := intercept.Member{Holder: i.spec.Holder, Match: i.spec.Match, OnGone: i.spec.OnGone, TagResponses: i.spec.TagResponses}
	e.Members = slices.Clone(before.Members)
	at := memberOf(before, i.spec.Holder.Session)
	if at < 0 {
		at = len(e.Members)
		e.Members = append(e.Members, m)
	}
	e.Members[at] = m
	return &e.Members[at]
}

// lostTo is why an entry that is not this intercept's is the end of it.
func (i *Intercept) lostTo(e intercept.Entry) error {
	if i.spec.Kind == intercept.Mesh && e.Holder.Session == i.mesh.Session {
		return &Lost{Why: "somebody took this machine out of the mesh (`culvert clean`)"}
	}
	return &Lost{Why: "another session has it now"}
}

// awaitAnother gives another member a moment to put the Service right that somebody
// changed: put tells that one did. The Service is returned as it is now.
func (h *exchangeHead) awaitAnother(ctx context.Context, i *Intercept) (service *corev1.Service, put bool, err error) {
	state, err := h.c.GateState(ctx, i.spec.Namespace)
	if err != nil {
		return nil, false, err
	}
	e := state.Entries[i.Key]
	if at := memberOf(e, i.spec.Holder.Session); at > 0 {
		select {
		case <-time.After(time.Second + rand.N(time.Duration(at)*time.Second)):
		case <-ctx.Done():
			return nil, false, ctx.Err()
		}
	}
	service, err = h.c.client.Services(i.spec.Namespace).Get(ctx, i.Key, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, false, &Lost{Why: "the Service was deleted"}
	}
	if err != nil {
		return nil, false, translate("looking at Service "+i.Key, err)
	}
	w := serviceWatch{held: Record{Session: i.mesh.Session, Gates: GateSelector(i.Gate)}}
	return service, w.judge(service).Kind == "", nil
}

// renew looks at what other members may have made of a mesh's Service since: they
// lead it to the gates again on top of others' changes.
func (i *Intercept) renew(ctx context.Context) error {
	h, ok := i.head.(*exchangeHead)
	if !ok || i.spec.Kind != intercept.Mesh {
		return nil
	}
	service, err := h.c.client.Services(i.spec.Namespace).Get(ctx, i.Key, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return &Lost{Why: "the Service was deleted"}
	}
	if err != nil {
		return translate("looking at Service "+i.Key, err)
	}
	return h.renew(ctx, service)
}

// renew plans for the Service as it is. Where it has no Record, the last one that was
// seen holds.
func (h *exchangeHead) renew(ctx context.Context, service *corev1.Service) error {
	plan, err := h.c.Replan(ctx, h.plan, service)
	if err != nil {
		return lostIfRefused("the Service is not as it was", err)
	}
	h.plan, h.again = plan, plan.reapplied()
	return nil
}

// left is what leaveMesh found.
type left struct {
	others bool             // the mesh goes on without the session
	mesh   intercept.Holder // that it was in; without Session it was in none
}

// leaveMesh takes a session out of a mesh. Requests that are under way to its machine
// may end first. When it was the last one the mesh is about to end, and the caller
// undoes it.
func (c *Cluster) leaveMesh(ctx context.Context, u UndoSpec) (l left, err error) {
	change := func(leave func(*intercept.Entry, int)) (*intercept.State, error) {
		return c.ChangeGateState(ctx, u.Namespace, func(s *intercept.State) error {
			l = left{}
			e, ok := s.Entries[u.Key]
			if !ok || e.Kind != intercept.Mesh {
				return nil
			}
			l.mesh = e.Holder
			if at := memberOf(e, u.Session); at >= 0 {
				leave(&e, at)
			} else if len(e.Members) > 0 {
				l.mesh = intercept.Holder{} // not its own
			}
			if len(e.Members) == 0 {
				e.Draining, e.Over = true, e.Over || u.Dead
			}
			s.Entries[u.Key] = e
			return nil
		})
	}
	if !u.Dead {
		state, err := change(func(e *intercept.Entry, at int) { e.Members[at].Draining = true })
		if err != nil {
			return l, err
		}
		if l.mesh.Session != "" && len(state.Entries[u.Key].Members) > 1 {
			c.drainMember(ctx, u, state)
		}
	}
	state, err := change(func(e *intercept.Entry, at int) { e.Members = slices.Delete(e.Members, at, at+1) })
	if err != nil {
		return l, err
	}
	e := state.Entries[u.Key]
	if l.others = len(e.Members) > 0; !l.others {
		return l, nil
	}
	if l.mesh.Session == "" { // it left before, and may not have come to the rest
		return l, c.DeletePolicies(ctx, u.Namespace, u.Key, u.Session)
	}
	u.Reached(StepEntryRemoved)
	push, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.Push(push, u.Namespace, firstOf(e.Gate, intercept.GateName), state); err != nil {
		return l, err
	}
	u.Reached(StepPolicyDeleted)
	return l, c.DeletePolicies(ctx, u.Namespace, u.Key, u.Session)
}

// drainMember has the gates lead nothing new to a member, and waits for what is under
// way, UndoSpec.Drain at most. Gates that do not answer do not hold him: nothing of
// others depends on him.
func (c *Cluster) drainMember(ctx context.Context, u UndoSpec, state *intercept.State) {
	u.Reached(StepDrain)
	gate := firstOf(state.Entries[u.Key].Gate, intercept.GateName)
	push, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.Push(push, u.Namespace, gate, state); err != nil {
		u.Say("telling the gates: " + err.Error())
		return
	}
	for begun := time.Now(); ; {
		open := 0
		statuses, err := c.GateStatuses(ctx, u.Namespace, gate)
		if err != nil {
			return
		}
		for _, s := range statuses {
			for _, r := range s.Routes {
				for _, m := range r.Members {
					if r.Key == u.Key && m.Session == u.Session {
						open += m.Open
					}
				}
			}
		}
		if open == 0 || time.Since(begun) >= u.Drain {
			return
		}
		select {
		case <-time.After(drainPoll):
		case <-ctx.Done():
			return
		}
	}
}

// maxMatch bounds the conditions of one member.
const maxMatch = 16

// ParseMatch reads conditions as typed. Errors are *api.Error with CodeUsage.
func ParseMatch(texts []string) (match []intercept.Condition, err error) {
	if len(texts) > maxMatch {
		return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%d conditions, where %d are possible", len(texts), maxMatch)}
	}
	for _, text := range texts {
		c, err := intercept.ParseCondition(text)
		if err != nil {
			return nil, &api.Error{Code: api.CodeUsage, Message: err.Error(), Hint: "culvert mesh --help shows what a condition looks like"}
		}
		match = append(match, c)
	}
	return match, nil
}
