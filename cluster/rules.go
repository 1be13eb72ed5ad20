package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/culvert-dev/culvert/daemon/api"
)

// A rule leads the requests of one member of a mesh to a Service of his own: an entry
// in the list of routes of an Istio VirtualService or of a Gateway API HTTPRoute. Only
// entries that lead to Services of culvert's are ever added or taken away, in front of
// whatever else is there, and found again by where they lead: undo needs no memory,
// and whoever changed the rest meanwhile has it as he left it.

// router is what has rules: where Istio and Gateway API differ.
type router interface {
	// kind is that of the objects with rules.
	kind() custom
	// rules are where in an object they are.
	rules() []string
	// check refuses what cannot be expressed, before anything is changed.
	check(h *ruleHead) error
	// governs tells whether an object decides where requests to the Service go.
	governs(o *unstructured.Unstructured, service, namespace string) bool
	// made are objects of culvert's own, by name, for what nothing decides yet. They
	// lead everything where it went before.
	made(h *ruleHead, governing []*unstructured.Unstructured) map[string]map[string]any
	// insert are the rules of h for an object, others being all that govern the Service.
	// Empty: those of the object are others' ports.
	insert(h *ruleHead, o *unstructured.Unstructured, others []*unstructured.Unstructured) ([]any, error)
	// yields tells whether an object of culvert's own stands in the way of others.
	yields(o *unstructured.Unstructured, theirs []*unstructured.Unstructured, service string) bool
	// leadsTo tells whether a rule leads to a Service.
	leadsTo(rule map[string]any, service, namespace string) bool
	// beside makes what a rule needs beside it, owned by the Service of h.
	beside(ctx context.Context, h *ruleHead) error
	// accepted waits until somebody says that it took the rules up, where somebody does.
	accepted(ctx context.Context, h *ruleHead, o *unstructured.Unstructured) (note string, err error)
}

// routers are all that there are, by the name of their mode.
var routers = map[string]router{api.ModeIstio: istio{}, api.ModeGateway: gatewayAPI{}}

// AnnotationMeshed is on what culvert made for a mesh by rules, and names the Service.
const AnnotationMeshed = "culvert.dev/mesh"

// routerApp is the LabelName of objects that culvert made because there were none.
const routerApp = "culvert-mesh"

// routerName is the name of an object that culvert made to have rules in.
func routerName(service string) string { return hashed(service, "culvert") }

func isOurs(o metav1.Object) bool {
	return o.GetLabels()[LabelManagedBy] == "culvert" && o.GetLabels()[LabelName] == routerApp
}

// rulesOf are the rules of an object.
func rulesOf(r router, o *unstructured.Unstructured) []map[string]any {
	list, _, _ := unstructured.NestedSlice(o.Object, r.rules()...)
	var all []map[string]any
	for _, one := range list {
		rule, _ := one.(map[string]any)
		all = append(all, rule) // a nil one keeps the indexes
	}
	return all
}

// ofCulverts tells whether a rule leads to a Service that culvert made for a member.
func ofCulverts(r router, rule map[string]any, members []string, namespace string) bool {
	return slices.ContainsFunc(members, func(m string) bool { return r.leadsTo(rule, m, namespace) })
}

const (
	// ruleTime bounds how long a change is tried again that somebody else's came before:
	// dozens may come and go at one time.
	ruleTime = 30 * time.Second
	// ownTries bounds how often ownership is given back, which is no more than good manners.
	ownTries = 20
)

// addRules puts the rules of h in front of those that are there, or makes the object.
// It is idempotent.
func (c *Cluster) addRules(ctx context.Context, h *ruleHead) (notes []string, err error) {
	r, ns := h.router, h.plan.Namespace
	objects := c.client.customs(r.kind(), ns)
	doing := fmt.Sprintf("adding a rule to a %s of namespace %q", r.kind(), ns)
	why := doing + ": somebody else changes it all the time"
	for n, end := 0, time.Now().Add(ruleTime); n == 0 || time.Now().Before(end); n++ {
		pauseRules(ctx, n)
		governing, yielding, err := c.governing(ctx, objects, r, h.plan.Name)
		if err != nil {
			return nil, err
		}
		if made := r.made(h, governing); len(made) > 0 {
			for name, o := range made {
				o["metadata"] = map[string]any{"name": name, "namespace": ns,
					"labels":      map[string]any{LabelName: routerApp, LabelManagedBy: "culvert"},
					"annotations": map[string]any{AnnotationMeshed: h.plan.Name}}
				if _, err := objects.create(ctx, o); err != nil && !apierrors.IsAlreadyExists(err) {
					return nil, ruleError(r, ns, doing, err)
				}
			}
			why = fmt.Sprintf("a %s named %s is there already and leads no requests of %s", r.kind().kind, list(slices.Sorted(maps.Keys(made))), h.plan)
			if governing, yielding, err = c.governing(ctx, objects, r, h.plan.Name); err != nil {
				return nil, err
			}
			if len(r.made(h, governing)) > 0 { // or the last member of before has just deleted it
				continue
			}
		}
		again := false
		for _, o := range governing {
			note, err := c.addTo(ctx, objects, h, o, governing)
			if apierrors.IsConflict(err) || apierrors.IsNotFound(err) {
				again = true
				break
			}
			if err != nil {
				return nil, ruleError(r, ns, doing, err)
			}
			if note != "" {
				notes = append(notes, note)
			}
		}
		for _, o := range yielding {
			if err := c.removeFrom(ctx, objects, r, o, h.name); err != nil {
				again = true
			}
		}
		if !again {
			return notes, nil
		}
	}
	return nil, &api.Error{Code: api.CodeConflict, Message: why, Hint: "try again, or --mode router"}
}

// pauseRules lets others who change the same object go first: the longer, the more often
// (n) they did.
func pauseRules(ctx context.Context, n int) {
	if n == 0 {
		return
	}
	select {
	case <-time.After(rand.N(20 * time.Millisecond << min(n, 6))):
	case <-ctx.Done():
	}
}

// addTo adds to one object what is missing.
func (c *Cluster) addTo(ctx context.Context, objects *customs, h *ruleHead, o *unstructured.Unstructured, governing []*unstructured.Unstructured) (note string, err error) {
	r := h.router
	want, err := r.insert(h, o, governing)
	if err != nil || len(want) == 0 {
		return "", err
	}
	there := rulesOf(r, o)
	if !missing(r, there, want, h.name, h.plan.Namespace) {
		return r.accepted(ctx, h, o)
	}
	// One that is not as it should be (the Service has other ports by now) goes first.
	rules := slices.DeleteFunc(slices.Clone(there), func(rule map[string]any) bool { return r.leadsTo(rule, h.name, h.plan.Namespace) })
	at := 0
	for at < len(rules) && ofCulverts(r, rules[at], h.members, h.plan.Namespace) && conditionsIn(rules[at]) >= conditionsIn(want[0].(map[string]any)) {
		at++
	}
	next := make([]any, 0, len(rules)+len(want))
	for _, rule := range rules {
		next = append(next, rule)
	}
	next = slices.Insert(next, at, want...)
	changed, err := c.changeRules(ctx, objects, r, o, next)
	if err != nil {
		return "", err
	}
	return r.accepted(ctx, h, changed)
}

// missing tells whether what leads to the Service is something else than want.
func missing(r router, there []map[string]any, want []any, service, namespace string) bool {
	var have []any
	for _, rule := range there {
		if r.leadsTo(rule, service, namespace) {
			have = append(have, rule)
		}
	}
	return !covers(have, want)
}

// changeRules has an object lead by rules, and who owned its fields own them still:
// his next server-side apply has no conflict, and puts back what he wants.
func (c *Cluster) changeRules(ctx context.Context, objects *customs, r router, o *unstructured.Unstructured, rules []any) (*unstructured.Unstructured, error) {
	path := "/" + r.rules()[0] + "/" + r.rules()[1]
	op := set(path, rules)
	if len(rules) == 0 {
		op = patchOp{Op: "remove", Path: path}
	}
	if _, ok := o.Object[r.rules()[0]].(map[string]any); !ok {
		op = set("/"+r.rules()[0], map[string]any{r.rules()[1]: rules})
	}
	changed, err := objects.patch(ctx, o, op)
	if err != nil || isOurs(o) {
		return changed, err
	}
	return c.ownedAsBefore(ctx, objects, o, changed), nil
}

// ownedAsBefore gives the fields of changed, which culvert just made of before, to whom
// they belonged. That it was refused to the end is no error: the rules count, and an
// owner's apply says that culvert has them.
func (c *Cluster) ownedAsBefore(ctx context.Context, objects *customs, before, changed *unstructured.Unstructured) *unstructured.Unstructured {
	isOwn := func(e metav1.ManagedFieldsEntry) bool { return e.Manager == fieldManager && e.Subresource == "" }
	live := changed
	for range ownTries {
		entries := slices.DeleteFunc(slices.Clone(live.GetManagedFields()), isOwn)
		if live.GetGeneration() == changed.GetGeneration() { // else somebody else changed it meanwhile, and owns that
			entries = slices.DeleteFunc(entries, func(e metav1.ManagedFieldsEntry) bool { return e.Subresource == "" })
			for _, e := range before.GetManagedFields() {
				if e.Subresource == "" && !isOwn(e) {
					entries = append(entries, e)
				}
			}
		}
		if len(entries) == 0 {
			return live
		}
		owned, err := objects.patch(ctx, live, set("/metadata/managedFields", entries))
		if err == nil {
			return owned
		}
		if !apierrors.IsConflict(err) {
			return live
		}
		if live, err = objects.get(ctx, changed.GetName()); err != nil { // a controller wrote its status
			return changed
		}
	}
	return live
}

// governing are the objects that decide where requests to a Service go, oldest first:
// where only one counts it is that. Culvert's own yield to others that came later, or
// they would stand in their way.
func (c *Cluster) governing(ctx context.Context, objects *customs, r router, service string) (governing, yielding []*unstructured.Unstructured, err error) {
	all, err := objects.list(ctx)
	if err != nil {
		return nil, nil, ruleError(r, objects.namespace, fmt.Sprintf("listing %s in namespace %q", r.kind(), objects.namespace), err)
	}
	all = slices.DeleteFunc(all, func(o *unstructured.Unstructured) bool {
		return o.GetDeletionTimestamp() != nil || !r.governs(o, service, objects.namespace)
	})
	slices.SortStableFunc(all, func(a, b *unstructured.Unstructured) int {
		return a.GetCreationTimestamp().Compare(b.GetCreationTimestamp().Time)
	})
	theirs := slices.DeleteFunc(slices.Clone(all), func(o *unstructured.Unstructured) bool { return isOurs(o) })
	for _, o := range all {
		if isOurs(o) && r.yields(o, theirs, service) {
			yielding = append(yielding, o)
		} else {
			governing = append(governing, o)
		}
	}
	return governing, yielding, nil
}

// removeRules takes away the rules of a mode that lead to a Service (of all modes, where
// it is not known), and objects of culvert's own that have no other. It is idempotent.
// Who may not see them gets an error: what they lead to has to stay.
func (c *Cluster) removeRules(ctx context.Context, namespace, service, mode string) error {
	for _, one := range slices.Sorted(maps.Keys(routers)) {
		if mode != "" && mode != one {
			continue
		}
		if err := c.removeRulesOf(ctx, routers[one], namespace, service); err != nil && !errors.Is(err, errNoKind) {
			return err
		}
	}
	return nil
}

func (c *Cluster) removeRulesOf(ctx context.Context, r router, namespace, service string) error {
	objects := c.client.customs(r.kind(), namespace)
	doing := fmt.Sprintf("taking the rule to %s out of %s", service, r.kind())
	for n, end := 0, time.Now().Add(ruleTime); n == 0 || time.Now().Before(end); n++ {
		pauseRules(ctx, n)
		all, err := objects.list(ctx)
		if err != nil {
			return ruleError(r, namespace, doing, err)
		}
		again := false
		for _, o := range all {
			err := c.removeFrom(ctx, objects, r, o, service)
			if apierrors.IsConflict(err) {
				again = true
			} else if err != nil {
				return ruleError(r, namespace, doing, err)
			}
		}
		if !again {
			return nil
		}
	}
	return &api.Error{Code: api.CodeConflict, Message: doing + ": somebody else changes it all the time", Hint: "culvert recover"}
}

// removeFrom takes the rules that lead to a Service out of one object, and deletes one
// of culvert's own that leads to no member any more.
func (c *Cluster) removeFrom(ctx context.Context, objects *customs, r router, o *unstructured.Unstructured, service string) (err error) {
	there := rulesOf(r, o)
	var rest []any
	others := false // rules of other members, or of somebody who made it his
	for _, rule := range there {
		if !r.leadsTo(rule, service, objects.namespace) {
			rest = append(rest, rule)
			others = others || !r.leadsTo(rule, o.GetAnnotations()[AnnotationMeshed], objects.namespace)
		}
	}
	switch {
	case isOurs(o) && !others: // also one that was made, and no rule came into it
		err = objects.remove(ctx, o)
	case len(rest) < len(there):
		_, err = c.changeRules(ctx, objects, r, o, rest)
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// ruleError is an error of the API about rules, for people.
func ruleError(r router, namespace, doing string, err error) error {
	var known *api.Error
	switch {
	case errors.Is(err, errNoKind):
		return err
	case errors.As(err, &known):
		return err
	case apierrors.IsForbidden(err):
		return &api.Error{Code: api.CodeForbidden, Message: fmt.Sprintf("%s: %v", doing, err),
			Hint: grantHint(Check{group: r.kind().group, Namespace: namespace}) + "; --mode router needs no such right"}
	case apierrors.IsInvalid(err):
		return &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("%s: the API server refuses it: %v", doing, err), Hint: "other conditions, or --mode router"}
	}
	return translate(doing, err)
}

// pollRules is the pause between two looks at what somebody says of a rule.
const pollRules = 100 * time.Millisecond

// covers tells whether have says all that want does: the API server fills in what was
// left out.
func covers(have, want any) bool {
	switch w := want.(type) {
	case map[string]any:
		h, ok := have.(map[string]any)
		for k, v := range w {
			ok = ok && covers(h[k], v)
		}
		return ok
	case []any:
		h, ok := have.([]any)
		ok = ok && len(h) == len(w)
		for k := range w {
			ok = ok && covers(h[k], w[k])
		}
		return ok
	}
	if a, ok := number(have); ok {
		b, ok := number(want)
		return ok && a == b
	}
	return have == want
}

// conditionsIn is how many conditions a rule of a VirtualService has: the first one that
// matches counts there, and those of more conditions come first.
func conditionsIn(rule map[string]any) int {
	blocks, _ := rule["match"].([]any)
	if len(blocks) == 0 {
		return 0
	}
	block, _ := blocks[0].(map[string]any)
	headers, _ := block["headers"].(map[string]any)
	n := len(headers)
	for _, key := range []string{"uri", "method"} {
		if block[key] != nil {
			n++
		}
	}
	return n
}
