package cluster

import (
	"context"
	"fmt"
	"maps"
	"slices"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// LabelService is on what culvert makes for one Service: its key, see
// intercept.Key, shortened where a label's value may not be so long.
// LabelServiceNamespace is on what it makes for it in another namespace, too.
const (
	LabelService          = "culvert.dev/service"
	LabelServiceNamespace = "culvert.dev/service-namespace"
)

// PolicySpec says who has to reach whom for one intercept.
type PolicySpec struct {
	Service string // its key, see intercept.Key
	Session string
	// Member is the session of a mesh's member: the way to the agent is its own.
	Member string
	Gate   string // the name of the gates' Deployment
	// OriginSelector are the labels of the pods that served it; empty: nobody did.
	OriginSelector map[string]string
	Ports          []PolicyPort
	// AgentNamespace is where the agent runs; empty: with the gates.
	AgentNamespace string
	AgentLabels    map[string]string
	// StandIn: the gates have the labels of the pods that they replace, and so
	// their policies.
	StandIn bool
}

// PolicyPort is one port of the Service.
type PolicyPort struct {
	Protocol corev1.Protocol    // empty: TCP
	Target   intstr.IntOrString // of the origin's pods, as the Service had it
	Gate     uint16             // of the gates
}

// EnsurePolicies reads the NetworkPolicies that select the origin's pods, the
// gates or the agent, and makes own ones beside them, so that the intercept works
// and opens nothing that was closed: policies are additive, and whom the origin's
// let in, to a port, the gates let in to theirs. Without policies nothing is made.
// It returns the names of its own, as namespace/name, and what could not be
// looked at. It is idempotent. Errors are *api.Error: CodeForbidden if a policy is
// needed and may not be made.
//
// Gates serve many Services, and who selects a pod with a policy closes all its
// ports but those that are named. So whoever does it first makes policies for the
// others that are there (and those look themselves when they come; entries are
// written before policies are read, so one of two sees the other).
func (c *Cluster) EnsurePolicies(ctx context.Context, namespace string, spec PolicySpec) (made, notes []string, err error) {
	v, notes, err := c.viewPolicies(ctx, namespace, spec)
	if err != nil || v == nil {
		return nil, notes, err
	}
	wanted := v.wanted()
	if v.closesGates(wanted) {
		// Before, so that nobody is closed even for a moment; and after, for who
		// came in meanwhile.
		others, err := c.openOthers(ctx, v)
		if err != nil {
			return made, notes, err
		}
		made = append(made, others...)
	}
	for _, p := range wanted {
		if err := c.writePolicy(ctx, p); err != nil {
			return made, notes, err
		}
		made = append(made, p.Namespace+"/"+p.Name)
	}
	if v.closesGates(wanted) {
		others, err := c.openOthers(ctx, v)
		if err != nil {
			return made, notes, err
		}
		made = append(made, others...)
	}
	slices.Sort(made)
	return slices.Compact(made), notes, nil
}

// viewPolicies is nil if policies may not be listed at all.
func (c *Cluster) viewPolicies(ctx context.Context, namespace string, spec PolicySpec) (v *policyView, notes []string, err error) {
	v = &policyView{namespace: namespace, spec: spec, agentNamespace: firstOf(spec.AgentNamespace, namespace)}
	what := fmt.Sprintf("listing NetworkPolicies in namespace %q", namespace)
	policies, err := c.client.NetworkPolicies(namespace).List(ctx, metav1.ListOptions{})
	if apierrors.IsForbidden(err) {
		return nil, []string{fmt.Sprintf("NetworkPolicies in namespace %q may not be listed: if one keeps the gates from the origin, the agent or their clients, traffic does not come through", namespace)}, nil
	}
	if err != nil {
		return nil, nil, translate(what, err)
	}
	v.policies = policies.Items
	v.atAgent = policies.Items
	if v.agentNamespace != namespace {
		there, err := c.client.NetworkPolicies(v.agentNamespace).List(ctx, metav1.ListOptions{})
		if err != nil && !apierrors.IsForbidden(err) {
			return nil, nil, translate(fmt.Sprintf("listing NetworkPolicies in namespace %q", v.agentNamespace), err)
		}
		if err != nil {
			notes = append(notes, fmt.Sprintf("NetworkPolicies in namespace %q may not be listed: one may keep the gates from the agent", v.agentNamespace))
			there = &networkingv1.NetworkPolicyList{}
		}
		v.atAgent = there.Items
	}
	if len(v.policies) == 0 && len(v.atAgent) == 0 {
		return v, notes, nil
	}
	pods := func(namespace string, selector map[string]string) ([]corev1.Pod, error) {
		if len(selector) == 0 {
			return nil, nil
		}
		list, err := c.client.Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(selector).String()})
		if err != nil {
			return nil, translate(fmt.Sprintf("listing pods in namespace %q", namespace), err)
		}
		return list.Items, nil
	}
	if v.origin, err = pods(namespace, spec.OriginSelector); err != nil {
		return nil, notes, err
	}
	gates, err := pods(namespace, GateSelector(spec.Gate))
	if err != nil {
		return nil, notes, err
	}
	agents, err := pods(v.agentNamespace, spec.AgentLabels)
	if err != nil {
		return nil, notes, err
	}
	v.gates = labelsOf(gates, merge(GateSelector(spec.Gate), map[string]string{LabelName: gateApp, LabelManagedBy: "culvert"}))
	v.agents = labelsOf(agents, spec.AgentLabels)
	return v, notes, nil
}

// labelsOf are the label sets of pods, or those that are known without one.
func labelsOf(pods []corev1.Pod, known map[string]string) []labels.Set {
	if len(pods) == 0 && len(known) > 0 {
		return []labels.Set{known}
	}
	var all []labels.Set
	for _, pod := range pods {
		all = append(all, pod.Labels)
	}
	return all
}

// openOthers lets everybody in to the ports of other intercepts at the same gates
// that have no own policy.
func (c *Cluster) openOthers(ctx context.Context, v *policyView) (made []string, err error) {
	state, err := c.GateState(ctx, v.namespace)
	if err != nil {
		return nil, err
	}
	for _, key := range slices.Sorted(maps.Keys(state.Entries)) {
		e := state.Entries[key]
		if e.Gate != v.spec.Gate || key == v.spec.Service {
			continue
		}
		p := v.open(key, e)
		_, err := c.client.NetworkPolicies(p.Namespace).Create(ctx, p, metav1.CreateOptions{FieldManager: fieldManager})
		if apierrors.IsAlreadyExists(err) {
			continue
		}
		if err != nil {
			return made, policyError(p, err)
		}
		made = append(made, p.Namespace+"/"+p.Name)
	}
	return made, nil
}

// open is what another intercept makes for itself when nothing selects its
// origin.
func (v *policyView) open(key string, e intercept.Entry) *networkingv1.NetworkPolicy {
	spec := PolicySpec{Service: key, Session: e.Holder.Session, Gate: e.Gate}
	var ports []networkingv1.NetworkPolicyPort
	for _, r := range e.Routes {
		ports = append(ports, policyPort(corev1.Protocol(r.Protocol), intstr.FromInt32(int32(r.Listen))))
	}
	other := &policyView{namespace: v.namespace, spec: spec}
	return other.intoGates([]networkingv1.NetworkPolicyIngressRule{{Ports: ports}})
}

func (c *Cluster) writePolicy(ctx context.Context, p *networkingv1.NetworkPolicy) error {
	policies := c.client.NetworkPolicies(p.Namespace)
	err := c.contend(ctx, fmt.Sprintf("creating NetworkPolicy %s in namespace %q", p.Name, p.Namespace), func() error {
		_, err := policies.Create(ctx, p, metav1.CreateOptions{FieldManager: fieldManager})
		if !apierrors.IsAlreadyExists(err) {
			return policyError(p, err)
		}
		there, err := policies.Get(ctx, p.Name, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return errLostRace
		case err != nil:
			return err
		case there.Labels[LabelManagedBy] != "culvert":
			return &api.Error{
				Code:    api.CodeExists,
				Message: fmt.Sprintf("NetworkPolicy %s in namespace %q exists and is not culvert's", p.Name, p.Namespace),
				Hint:    fmt.Sprintf("`kubectl -n %s get networkpolicy %s -o yaml` shows whose it is", p.Namespace, p.Name),
			}
		case equality.Semantic.DeepEqual(there.Spec, p.Spec) && there.Labels[LabelSession] == p.Labels[LabelSession]:
			return nil
		}
		next := there.DeepCopy()
		next.Spec, next.Labels = p.Spec, p.Labels
		_, err = policies.Update(ctx, p.Name, next, metav1.UpdateOptions{FieldManager: fieldManager})
		if lostRace(err) {
			return errLostRace
		}
		return policyError(p, err)
	})
	return err
}

// policyError says why a policy is needed to whoever may not make one.
func policyError(p *networkingv1.NetworkPolicy, err error) error {
	if !isMissingRight(err) {
		return err
	}
	return &api.Error{
		Code: api.CodeForbidden,
		Message: fmt.Sprintf("NetworkPolicies in namespace %q would keep traffic from the gates, the agent or the origin, and you may not create one beside them: %s",
			p.Namespace, trim(err)),
		Hint: grantHint(Check{Namespace: p.Namespace}),
	}
}

// DeletePolicies deletes what EnsurePolicies made for a Service, by its key (with a
// session only its own), also
// in the session's own namespace. Errors are *api.Error.
func (c *Cluster) DeletePolicies(ctx context.Context, namespace, service, session string) error {
	spec := PolicySpec{Service: service}
	for _, ns := range slices.Compact([]string{namespace, c.namespace}) {
		what := fmt.Sprintf("deleting NetworkPolicies of %s in namespace %q", service, ns)
		policies := c.client.NetworkPolicies(ns)
		list, err := policies.List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(spec.ownLabels(namespace)).String()})
		if apierrors.IsForbidden(err) {
			continue // whoever may not list them made none
		}
		if err != nil {
			return translate(what, err)
		}
		for _, p := range list.Items {
			if session != "" && p.Labels[LabelSession] != session {
				continue
			}
			err := policies.Delete(ctx, p.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &p.UID}})
			if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) {
				return translate(what, err)
			}
		}
	}
	return nil
}

// ownLabels are those of all policies of a Service.
func (s PolicySpec) ownLabels(namespace string) map[string]string {
	return map[string]string{
		LabelManagedBy:        "culvert",
		LabelService:          hashed(s.Service),
		LabelServiceNamespace: namespace,
	}
}
