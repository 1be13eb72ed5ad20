package cluster

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
)

// PlanPort is a port of a Service without its intercept.
type PlanPort struct {
	Name       string
	Protocol   corev1.Protocol
	Port       int32
	TargetPort intstr.IntOrString
	// Number is that of TargetPort, of a name what the pods' containers make of it;
	// 0: not known.
	Number      int32
	Local       uint16 // of this machine; 0: not exposed
	AppProtocol *string
}

// Key is the port's in the Service.
func (p PlanPort) Key() PortKey { return PortKey{Port: p.Port, Protocol: p.Protocol} }

// String is the port for people: "80 (http, targetPort 8080)", "53/UDP (dns)".
func (p PlanPort) String() string { return p.text(true) }

func (p PlanPort) text(target bool) string {
	s := strconv.Itoa(int(p.Port))
	if p.Protocol != corev1.ProtocolTCP {
		s += "/" + string(p.Protocol)
	}
	var more []string
	if p.Name != "" {
		more = append(more, p.Name)
	}
	if target && p.TargetPort != intstr.FromInt32(p.Port) {
		more = append(more, "targetPort "+p.TargetPort.String())
	}
	if len(more) > 0 {
		s += " (" + strings.Join(more, ", ") + ")"
	}
	return s
}

// Mapping says for people, a line for each port, who will answer.
func (p *ServicePlan) Mapping() []string {
	var lines []string
	for _, port := range p.Ports {
		if port.Local != 0 {
			lines = append(lines, fmt.Sprintf("port %s -> localhost:%d", port, port.Local))
		} else {
			lines = append(lines, fmt.Sprintf("port %s: stays with the origin", port.text(false)))
		}
	}
	return lines
}

// meant says whether e may mean the port, and how well: 1 by the Service's own
// name, or as a number that the Service has written down, 2 by a targetPort's name,
// 3 by the number that such a name stands for in the pods, 0 not at all.
func (p PlanPort) meant(e Expose) int {
	switch {
	case e.Protocol != "" && e.Protocol != p.Protocol:
	case e.Remote == strconv.Itoa(int(p.Port)), e.Remote == p.Name,
		p.TargetPort.Type == intstr.Int && e.Remote == p.TargetPort.String():
		return 1
	case e.Remote == p.TargetPort.String():
		return 2
	case p.Number != 0 && e.Remote == strconv.Itoa(int(p.Number)):
		return 3
	}
	return 0
}

// matches are the ports that e means best. It is one, or TCP and UDP of the same
// number, unless e is ambiguous.
func (p *ServicePlan) matches(e Expose) (found []int, ambiguous bool) {
	best := 0
	for i, port := range p.Ports {
		how := port.meant(e)
		if how == 0 || best != 0 && how > best {
			continue
		}
		if how != best {
			best, found, ambiguous = how, nil, false
		}
		found = append(found, i)
		ambiguous = ambiguous || port.Port != p.Ports[found[0]].Port
	}
	return found, ambiguous
}

// match sets each exposed port's Local.
func (p *ServicePlan) match(expose []Expose) error {
	by := map[int]Expose{}
	for _, e := range expose {
		found, ambiguous := p.matches(e)
		switch {
		case len(found) == 0:
			return p.noMatch(e)
		case ambiguous:
			return p.ambiguous(e, found)
		}
		for _, i := range found {
			if other, ok := by[i]; ok {
				return &api.Error{
					Code:    api.CodeUsage,
					Message: fmt.Sprintf("--expose %s and --expose %s both mean port %s of %s", other, e, p.Ports[i], p),
					Hint:    "a port of the Service comes to one local port: leave one of them out",
				}
			}
			by[i] = e
			p.Ports[i].Local = e.Local
		}
	}
	return nil
}

// noMatch tells a wrong protocol from a wrong port.
func (p *ServicePlan) noMatch(e Expose) error {
	any := e
	any.Protocol = ""
	if found, _ := p.matches(any); len(found) > 0 {
		port := p.Ports[found[0]]
		return &api.Error{
			Code:    api.CodeUsage,
			Message: fmt.Sprintf("--expose %s: port %s of %s is %s, not %s", e, port, p, port.Protocol, e.Protocol),
			Hint:    fmt.Sprintf("try --expose %d:%s", e.Local, e.Remote),
		}
	}
	var ports []string
	for _, port := range p.Ports {
		ports = append(ports, port.String())
	}
	return &api.Error{
		Code:    api.CodeUsage,
		Message: fmt.Sprintf("--expose %s: %s has no port, port name or targetPort %s; its ports are %s", e, p, e.Remote, list(ports)),
		Hint:    fmt.Sprintf("give the Service's port behind the local one, e.g. --expose %d:%d", e.Local, p.Ports[0].Port),
	}
}

// ambiguous lists what e may mean, and what to type for each.
func (p *ServicePlan) ambiguous(e Expose, found []int) error {
	var means, types []string
	for _, i := range found {
		means = append(means, p.Ports[i].String())
		types = append(types, fmt.Sprintf("--expose %d:%s", e.Local, p.typed(i)))
	}
	return &api.Error{
		Code:    api.CodeUsage,
		Message: fmt.Sprintf("--expose %s: %s may mean more than one port of %s: %s", e, e.Remote, p, strings.Join(means, "; ")),
		Hint:    "type " + strings.Join(slices.Compact(types), " or "),
	}
}

// typed is the shortest REMOTE that means port i alone, or with the other
// protocol's port of that number.
func (p *ServicePlan) typed(i int) string {
	port := p.Ports[i]
	for _, remote := range []string{port.Name, strconv.Itoa(int(port.Port)), port.TargetPort.String()} {
		if _, ambiguous := p.matches(Expose{Remote: remote}); remote != "" && !ambiguous {
			return remote
		}
	}
	// Only the protocol is left to tell them apart.
	return fmt.Sprintf("%d/%s", port.Port, strings.ToLower(string(port.Protocol)))
}

// resolveTargets finds the number of each targetPort. Of a name each pod has a number
// of its own; the first pod's is taken. Who may not list pods goes without.
func (c *Cluster) resolveTargets(ctx context.Context, p *ServicePlan) {
	named := false
	for i := range p.Ports {
		port := &p.Ports[i]
		switch {
		case port.TargetPort.Type == intstr.String:
			named = true
		case port.TargetPort.IntVal == 0:
			port.Number = port.Port // as the server would fill it in
		default:
			port.Number = port.TargetPort.IntVal
		}
	}
	if !named {
		return
	}
	pods, err := c.client.Pods(p.Namespace).List(ctx, metav1.ListOptions{
		LabelSelector: labels.SelectorFromSet(p.below.Spec.Selector).String(),
		Limit:         pageSize,
	})
	if err != nil {
		return
	}
	for _, pod := range pods.Items {
		if pod.DeletionTimestamp != nil || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
			continue
		}
		for i := range p.Ports {
			if port := &p.Ports[i]; port.Number == 0 {
				port.Number = containerPort(&pod, port.TargetPort.StrVal, port.Protocol)
			}
		}
	}
}

// containerPort is the number that a pod gives a port's name, 0 for none.
func containerPort(pod *corev1.Pod, name string, protocol corev1.Protocol) int32 {
	containers := pod.Spec.Containers
	for _, c := range pod.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways { // a sidecar
			containers = append(slices.Clip(containers), c)
		}
	}
	for _, c := range containers {
		for _, port := range c.Ports {
			if port.Name == name && firstOf(string(port.Protocol), string(corev1.ProtocolTCP)) == string(protocol) {
				return port.ContainerPort
			}
		}
	}
	return 0
}

// checkHeadlessPorts: callers of a headless Service dial a pod's own port, so
// the gates have to listen at that very number, once.
func (p *ServicePlan) checkHeadlessPorts() error {
	seen := map[PortKey]PlanPort{}
	for _, port := range p.Ports {
		if port.Number == 0 {
			return p.refuse("start a pod of it first, or use --mode scale",
				"is headless, so the gates have to listen at its pods' port %q, and no pod says which number that is", port.TargetPort.String())
		}
		k := PortKey{Port: port.Number, Protocol: port.Protocol}
		if other, ok := seen[k]; ok && other.Local != port.Local {
			return p.refuse("expose both to the same local port", "is headless, and its ports %s and %s are the same port of its pods", other, port)
		}
		seen[k] = port
	}
	return nil
}
