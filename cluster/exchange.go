package cluster

import (
	"context"
	"net"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// exchangeHead is a Service whose selector leads to the gates.
type exchangeHead struct {
	c     *Cluster
	plan  *ServicePlan
	again reapplies // when somebody's change was overwritten
}

func (c *Cluster) planExchangeHead(ctx context.Context, i *Intercept) error {
	plan, err := c.PlanExchange(ctx, i.spec.Namespace, i.spec.Target, i.spec.Expose, i.spec.Force)
	if err != nil {
		return err
	}
	if r := plan.Record; r != nil {
		if r.Session == i.spec.Holder.Session {
			return &api.Error{Code: api.CodeExists, Message: "you intercept Service " + plan.Name + " already", Hint: "culvert leave " + plan.Name}
		}
		if r.Kind == intercept.Mesh {
			return c.meshed(ctx, plan)
		}
		return heldBy(plan.Namespace, plan.Name, plan.Name, intercept.Holder{Session: r.Session, User: r.User, Origin: r.Origin, Since: r.Since})
	}
	if err := c.checkStrict(ctx, plan, true, "--mode scale needs no way to them; "); err != nil {
		return err
	}
	i.spec.Namespace, i.Key, i.Notes = plan.Namespace, plan.Name, plan.Notes
	if plan.Headless {
		i.Gate = OwnGate(plan.Name)
	}
	i.head = &exchangeHead{c: c, plan: plan}
	return nil
}

func (h *exchangeHead) service() string   { return h.plan.Name }
func (h *exchangeHead) ports() []PlanPort { return h.plan.Ports }
func (h *exchangeHead) mapping() []string { return h.plan.Mapping() }

func (h *exchangeHead) gates(g *GateSpec) {
	if h.plan.Headless {
		g.Ports = containerPorts(h.plan.Ports)
	}
}

// containerPorts declares ports with their names: what selects pods may use those.
func containerPorts(ports []PlanPort) []corev1.ContainerPort {
	var all []corev1.ContainerPort
	for _, p := range ports {
		all = append(all, corev1.ContainerPort{ContainerPort: p.Number, Protocol: p.Protocol})
	}
	return all
}

func (h *exchangeHead) origin(ctx context.Context, session string) (map[PortKey]string, error) {
	s, err := h.c.EnsureOrigin(ctx, h.plan, session)
	if err != nil {
		return nil, err
	}
	origins := map[PortKey]string{}
	for _, p := range h.plan.Ports {
		origins[p.Key()] = net.JoinHostPort(s.Spec.ClusterIP, strconv.Itoa(int(p.Port)))
	}
	return origins, nil
}

func (h *exchangeHead) policies(ctx context.Context, i *Intercept, routes []intercept.Route) ([]string, error) {
	return i.openOrigin(ctx, routes, h.plan)
}

// openOrigin opens the way to a Service's pods, and to the gates for whom those let in.
func (i *Intercept) openOrigin(ctx context.Context, routes []intercept.Route, plan *ServicePlan) (notes []string, err error) {
	spec := i.policySpec(routes)
	spec.OriginSelector = plan.below.Spec.Selector
	for k, r := range routes {
		for _, p := range plan.Ports {
			if p.Key() == (PortKey{Port: r.Port, Protocol: protocolNamed(r.Protocol)}) {
				spec.Ports[k].Target = p.TargetPort
			}
		}
	}
	_, notes, err = i.c.EnsurePolicies(ctx, i.spec.Namespace, spec)
	return notes, err
}

func (h *exchangeHead) lead(ctx context.Context, i *Intercept, routes []intercept.Route) error {
	r := i.record()
	r.Reapplied = h.again
	ports := listenPorts(routes)
	if h.plan.Headless {
		for _, p := range h.plan.Ports {
			ports[p.Key()] = uint16(p.Number)
		}
	}
	_, err := h.c.Switch(ctx, h.plan, GateSelector(i.Gate), ports, r)
	return err
}

func (h *exchangeHead) led(ctx context.Context, i *Intercept) (bool, error) {
	service, err := h.c.client.Services(i.spec.Namespace).Get(ctx, i.Key, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, translate("looking at Service "+i.Key, err)
	}
	r, err := RecordOf(service)
	return r != nil && r.Session == i.owner().Session && r.Phase == PhaseActive, err
}

// policySpec is what all kinds have in common.
func (i *Intercept) policySpec(routes []intercept.Route) PolicySpec {
	spec := PolicySpec{Service: i.Key, Session: i.owner().Session, Gate: i.Gate, AgentNamespace: i.spec.Agent.Namespace,
		AgentLabels: map[string]string{LabelName: agentApp, LabelManagedBy: "culvert", LabelSession: i.spec.Holder.Session}}
	for _, r := range routes {
		spec.Ports = append(spec.Ports, PolicyPort{Protocol: protocolNamed(r.Protocol), Gate: r.Listen})
	}
	if i.spec.Kind == intercept.Mesh {
		spec.Member = i.spec.Holder.Session
	}
	return spec
}

// record is what undo will need; Switch adds what the Service is now.
func (i *Intercept) record() Record {
	h := i.owner()
	return Record{Session: h.Session, User: h.User, Origin: h.Origin, Since: h.Since, Kind: i.spec.Kind, Gate: i.Gate}
}

// listenPorts are the gates' ports by those of the Service.
func listenPorts(routes []intercept.Route) map[PortKey]uint16 {
	ports := map[PortKey]uint16{}
	for _, r := range routes {
		ports[PortKey{Port: r.Port, Protocol: protocolNamed(r.Protocol)}] = r.Listen
	}
	return ports
}

// reapplied is when changes of others were overwritten.
func (p *ServicePlan) reapplied() []time.Time {
	if p.Record == nil {
		return nil
	}
	return p.Record.Reapplied
}
