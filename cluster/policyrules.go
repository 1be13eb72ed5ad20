package cluster

import (
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// policyView is what has to be known to decide which policies an intercept needs.
// Its methods ask nobody.
type policyView struct {
	spec           PolicySpec
	namespace      string // of Service, origin and gates
	agentNamespace string

	policies []networkingv1.NetworkPolicy // of namespace
	atAgent  []networkingv1.NetworkPolicy // of agentNamespace
	origin   []corev1.Pod                 // that serve it now
	gates    []labels.Set                 // of their pods
	agents   []labels.Set
}

// wanted are the policies that have to be made.
func (v *policyView) wanted() (all []*networkingv1.NetworkPolicy) {
	origin := v.originPolicies()
	for _, theirs := range origin {
		if p := v.intoOrigin(theirs); !hasName(all, p.Name) {
			all = append(all, p)
		}
	}
	switch {
	case v.spec.StandIn:
		// What selects the gates selected those whose labels they have.
	case len(origin) > 0:
		all = append(all, v.intoGates(v.allowedBy(origin)))
	case v.isolated(v.policies, v.gates, networkingv1.PolicyTypeIngress):
		all = append(all, v.intoGates([]networkingv1.NetworkPolicyIngressRule{{Ports: v.gatePorts(func(PolicyPort) bool { return true })}}))
	}
	all = append(all, v.fromClients()...)
	if v.isolated(v.policies, v.gates, networkingv1.PolicyTypeEgress) {
		all = append(all, v.outOfGates())
	}
	if v.isolated(v.atAgent, v.agents, networkingv1.PolicyTypeIngress) {
		all = append(all, v.intoAgent())
	}
	return all
}

func hasName(all []*networkingv1.NetworkPolicy, name string) bool {
	return slices.ContainsFunc(all, func(p *networkingv1.NetworkPolicy) bool { return p.Name == name })
}

// closesGates: one of the policies is the first to select the gates.
func (v *policyView) closesGates(wanted []*networkingv1.NetworkPolicy) bool {
	return hasName(wanted, v.name("gates")) && !v.isolated(v.policies, v.gates, networkingv1.PolicyTypeIngress)
}

func applies(p *networkingv1.NetworkPolicy, direction networkingv1.PolicyType) bool {
	if len(p.Spec.PolicyTypes) > 0 {
		return slices.Contains(p.Spec.PolicyTypes, direction)
	}
	return direction == networkingv1.PolicyTypeIngress || len(p.Spec.Egress) > 0
}

// selects says whether a policy selects one of the pods. A selector that cannot be
// read selects nothing: the server accepts none.
func selects(s *metav1.LabelSelector, pods []labels.Set) bool {
	selector, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && slices.ContainsFunc(pods, func(set labels.Set) bool { return selector.Matches(set) })
}

// isolated: a policy other than this intercept's own selects one of the pods in
// that direction, so that it takes, or sends, only what policies name.
func (v *policyView) isolated(policies []networkingv1.NetworkPolicy, pods []labels.Set, direction networkingv1.PolicyType) bool {
	return slices.ContainsFunc(policies, func(p networkingv1.NetworkPolicy) bool {
		return !v.own(&p) && applies(&p, direction) && selects(&p.Spec.PodSelector, pods)
	})
}

// own are those of this intercept.
func (v *policyView) own(p *networkingv1.NetworkPolicy) bool {
	own := v.spec.ownLabels(v.namespace)
	return labels.SelectorFromSet(own).Matches(labels.Set(p.Labels))
}

func (v *policyView) originLabels() []labels.Set { return labelsOf(v.origin, v.spec.OriginSelector) }

// originPolicies are other people's that say who may connect to the origin's pods.
// Culvert's, also those of other Services, only add gates to what these select.
func (v *policyView) originPolicies() (all []networkingv1.NetworkPolicy) {
	for _, p := range v.policies {
		if p.Labels[LabelManagedBy] != "culvert" && applies(&p, networkingv1.PolicyTypeIngress) && selects(&p.Spec.PodSelector, v.originLabels()) {
			all = append(all, p)
		}
	}
	return all
}

// intoOrigin lets the gates in to those of the origin's pods that theirs selects,
// and to no others: a pod that nobody selected is open, and shall stay it.
func (v *policyView) intoOrigin(theirs networkingv1.NetworkPolicy) *networkingv1.NetworkPolicy {
	both := *theirs.Spec.PodSelector.DeepCopy()
	for _, key := range slices.Sorted(maps.Keys(v.spec.OriginSelector)) {
		both.MatchExpressions = append(both.MatchExpressions, metav1.LabelSelectorRequirement{
			Key: key, Operator: metav1.LabelSelectorOpIn, Values: []string{v.spec.OriginSelector[key]},
		})
	}
	var ports []networkingv1.NetworkPolicyPort
	for _, p := range v.spec.Ports {
		ports = append(ports, policyPort(p.Protocol, p.Target))
	}
	return v.policy(v.namespace, "origin-"+digest(theirs.Name), both, networkingv1.NetworkPolicySpec{
		Ingress: []networkingv1.NetworkPolicyIngressRule{{From: v.gatePeers(v.namespace), Ports: ports}},
	})
}

// intoGates lets in to the gates what rules say.
func (v *policyView) intoGates(rules []networkingv1.NetworkPolicyIngressRule) *networkingv1.NetworkPolicy {
	return v.policy(v.namespace, "gates", metav1.LabelSelector{MatchLabels: GateSelector(v.spec.Gate)}, networkingv1.NetworkPolicySpec{Ingress: rules})
}

// allowedBy says of the gates' ports what policies say of the origin's.
func (v *policyView) allowedBy(policies []networkingv1.NetworkPolicy) (rules []networkingv1.NetworkPolicyIngressRule) {
	for _, p := range policies {
		for _, rule := range p.Spec.Ingress {
			ports := v.gatePorts(func(port PolicyPort) bool { return v.covers(rule.Ports, port) })
			if len(ports) > 0 {
				rules = append(rules, networkingv1.NetworkPolicyIngressRule{From: rule.From, Ports: ports})
			}
		}
	}
	return rules
}

// fromClients are for pods that may connect to nobody but, among others, the
// origin's pods: the Service leads them to gates now. Those of other namespaces
// cannot be seen.
func (v *policyView) fromClients() (all []*networkingv1.NetworkPolicy) {
	if len(v.spec.OriginSelector) == 0 || v.spec.StandIn {
		return nil
	}
	for _, theirs := range v.policies {
		if theirs.Labels[LabelManagedBy] == "culvert" || !applies(&theirs, networkingv1.PolicyTypeEgress) {
			continue
		}
		var ports []networkingv1.NetworkPolicyPort
		for _, port := range v.spec.Ports {
			reaches := func(pods []labels.Set, port PolicyPort, covers func([]networkingv1.NetworkPolicyPort, PolicyPort) bool) bool {
				return slices.ContainsFunc(theirs.Spec.Egress, func(rule networkingv1.NetworkPolicyEgressRule) bool {
					return covers(rule.Ports, port) && v.peersHold(rule.To, pods)
				})
			}
			if reaches(v.originLabels(), port, v.covers) && !reaches(v.gates, port, coversGate) {
				ports = append(ports, policyPort(port.Protocol, intstr.FromInt32(int32(port.Gate))))
			}
		}
		if len(ports) > 0 {
			all = append(all, v.policy(v.namespace, "clients-"+digest(theirs.Name), theirs.Spec.PodSelector, networkingv1.NetworkPolicySpec{
				Egress: []networkingv1.NetworkPolicyEgressRule{{To: v.gatePeers(v.namespace), Ports: ports}},
			}))
		}
	}
	return all
}

// peersHold says whether one of the pods, of this namespace, is among the peers;
// no peers at all are everybody.
func (v *policyView) peersHold(peers []networkingv1.NetworkPolicyPeer, pods []labels.Set) bool {
	here := []labels.Set{{corev1.LabelMetadataName: v.namespace}}
	return len(peers) == 0 || slices.ContainsFunc(peers, func(peer networkingv1.NetworkPolicyPeer) bool {
		if peer.IPBlock != nil || peer.NamespaceSelector != nil && !selects(peer.NamespaceSelector, here) {
			return false
		}
		return peer.PodSelector == nil || selects(peer.PodSelector, pods)
	})
}

// outOfGates lets the gates connect to the origin's pods, the agent and name
// servers.
func (v *policyView) outOfGates() *networkingv1.NetworkPolicy {
	dns := intstr.FromInt32(53)
	rules := []networkingv1.NetworkPolicyEgressRule{
		{Ports: []networkingv1.NetworkPolicyPort{policyPort(corev1.ProtocolUDP, dns), policyPort(corev1.ProtocolTCP, dns)}},
	}
	if len(v.spec.OriginSelector) > 0 {
		var ports []networkingv1.NetworkPolicyPort
		for _, p := range v.spec.Ports {
			ports = append(ports, policyPort(p.Protocol, p.Target))
		}
		rules = append(rules, networkingv1.NetworkPolicyEgressRule{
			To:    []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: v.spec.OriginSelector}}},
			Ports: ports,
		})
	}
	if len(v.spec.AgentLabels) > 0 {
		rules = append(rules, networkingv1.NetworkPolicyEgressRule{
			To:    []networkingv1.NetworkPolicyPeer{v.peer(v.agentNamespace, v.namespace, v.spec.AgentLabels)},
			Ports: []networkingv1.NetworkPolicyPort{policyPort(corev1.ProtocolTCP, intstr.FromInt32(intercept.Port))},
		})
	}
	return v.policy(v.namespace, v.membered("out"), metav1.LabelSelector{MatchLabels: GateSelector(v.spec.Gate)}, networkingv1.NetworkPolicySpec{Egress: rules})
}

// intoAgent lets the gates in to the agent, for gates' connections only.
func (v *policyView) intoAgent() *networkingv1.NetworkPolicy {
	return v.policy(v.agentNamespace, v.membered("agent"), metav1.LabelSelector{MatchLabels: v.spec.AgentLabels}, networkingv1.NetworkPolicySpec{
		Ingress: []networkingv1.NetworkPolicyIngressRule{{
			From:  v.gatePeers(v.agentNamespace),
			Ports: []networkingv1.NetworkPolicyPort{policyPort(corev1.ProtocolTCP, intstr.FromInt32(intercept.Port))},
		}},
	})
}

// gatePeers are the gates, as a policy in namespace names them.
func (v *policyView) gatePeers(namespace string) []networkingv1.NetworkPolicyPeer {
	return []networkingv1.NetworkPolicyPeer{v.peer(v.namespace, namespace, GateSelector(v.spec.Gate))}
}

// peer are the pods of namespace with labels, for a policy in the namespace from.
func (v *policyView) peer(namespace, from string, with map[string]string) networkingv1.NetworkPolicyPeer {
	p := networkingv1.NetworkPolicyPeer{PodSelector: &metav1.LabelSelector{MatchLabels: with}}
	if namespace != from {
		p.NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{corev1.LabelMetadataName: namespace}}
	}
	return p
}

func (v *policyView) gatePorts(which func(PolicyPort) bool) (ports []networkingv1.NetworkPolicyPort) {
	for _, p := range v.spec.Ports {
		if which(p) {
			ports = append(ports, policyPort(p.Protocol, intstr.FromInt32(int32(p.Gate))))
		}
	}
	return ports
}

// covers says whether a rule about ports, which are all ports if there are none,
// holds for the origin's port. Either may be a number or the name that a pod's
// container gives it.
func (v *policyView) covers(ports []networkingv1.NetworkPolicyPort, port PolicyPort) bool {
	numbers, names := v.resolve(port)
	return coversPort(ports, port.Protocol, numbers, names)
}

func coversGate(ports []networkingv1.NetworkPolicyPort, port PolicyPort) bool {
	return coversPort(ports, port.Protocol, []int32{int32(port.Gate)}, nil)
}

func coversPort(ports []networkingv1.NetworkPolicyPort, protocol corev1.Protocol, numbers []int32, names []string) bool {
	return len(ports) == 0 || slices.ContainsFunc(ports, func(p networkingv1.NetworkPolicyPort) bool {
		switch {
		case protocolOf(p.Protocol) != protocolOf(&protocol):
			return false
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.String:
			return slices.Contains(names, p.Port.StrVal)
		}
		last := p.Port.IntVal
		if p.EndPort != nil {
			last = *p.EndPort
		}
		return slices.ContainsFunc(numbers, func(n int32) bool { return n >= p.Port.IntVal && n <= last })
	})
}

// resolve finds the numbers and names of a target port in the origin's pods.
func (v *policyView) resolve(port PolicyPort) (numbers []int32, names []string) {
	if port.Target.Type == intstr.String {
		names = append(names, port.Target.StrVal)
	} else {
		numbers = append(numbers, port.Target.IntVal)
	}
	for _, pod := range v.origin {
		for _, container := range pod.Spec.Containers {
			for _, p := range container.Ports {
				if protocolOf(&p.Protocol) != protocolOf(&port.Protocol) {
					continue
				}
				switch {
				case port.Target.Type == intstr.String && p.Name == port.Target.StrVal:
					numbers = append(numbers, p.ContainerPort)
				case port.Target.Type == intstr.Int && p.ContainerPort == port.Target.IntVal && p.Name != "":
					names = append(names, p.Name)
				}
			}
		}
	}
	return numbers, names
}

func protocolOf(p *corev1.Protocol) corev1.Protocol {
	if p == nil || *p == "" {
		return corev1.ProtocolTCP
	}
	return *p
}

func policyPort(protocol corev1.Protocol, port intstr.IntOrString) networkingv1.NetworkPolicyPort {
	protocol = protocolOf(&protocol)
	return networkingv1.NetworkPolicyPort{Protocol: &protocol, Port: &port}
}

// policy is an own one; its types are the directions that it has rules for.
func (v *policyView) policy(namespace, purpose string, selector metav1.LabelSelector, spec networkingv1.NetworkPolicySpec) *networkingv1.NetworkPolicy {
	spec.PodSelector = selector
	spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	if len(spec.Egress) > 0 {
		spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	}
	session := v.spec.Session
	if v.spec.Member != "" && strings.HasSuffix(purpose, digest(v.spec.Member)) {
		session = v.spec.Member
	}
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{
			Name:      v.name(purpose),
			Namespace: namespace,
			Labels:    merge(v.spec.ownLabels(v.namespace), map[string]string{LabelName: gateApp, LabelSession: session}),
		},
		Spec: spec,
	}
}

// membered is the purpose of a policy of which each member of a mesh has one.
func (v *policyView) membered(purpose string) string {
	if v.spec.Member == "" {
		return purpose
	}
	return purpose + "-" + digest(v.spec.Member)
}

// name tells apart the Services of several namespaces, whose agent is in one.
func (v *policyView) name(purpose string) string {
	if v.agentNamespace != v.namespace && strings.HasPrefix(purpose, "agent") {
		purpose += "-" + digest(v.namespace)
	}
	return hashed("culvert", v.spec.Service, purpose)
}
