package cluster

import (
	"context"
	"net"
	"strconv"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// exchangeHead is a Service whose selector leads to the gates.
type exchangeHead struct {
	c    *Cluster
	plan *ServicePlan
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
		return heldBy(plan.Namespace, plan.Name, intercept.Holder{Session: r.Session, User: r.User, Origin: r.Origin, Since: r.Since})
	}
	i.spec.Namespace, i.Key, i.Notes = plan.Namespace, plan.Name, plan.Notes
	if plan.Headless {
		i.Gate = ownGateName(plan.Name)
		for _, p := range plan.Ports {
			if p.Number == 0 {
				return &api.Error{Code: api.CodeUsage, Message: "Service " + plan.Name + " is headless and none of its pods tells the number of target port " + p.TargetPort.String(), Hint: "--mode scale"}
			}
		}
	}
	i.head = &exchangeHead{c: c, plan: plan}
	return nil
}

func (h *exchangeHead) service() string   { return h.plan.Name }
func (h *exchangeHead) ports() []PlanPort { return h.plan.Ports }
func (h *exchangeHead) gates(*GateSpec)   {}

func (h *exchangeHead) origin(ctx context.Context, session string) ([]string, error) {
	s, err := h.c.EnsureOrigin(ctx, h.plan, session)
	if err != nil {
		return nil, err
	}
	origins := make([]string, len(h.plan.Ports))
	for k, p := range h.plan.Ports {
		origins[k] = net.JoinHostPort(s.Spec.ClusterIP, strconv.Itoa(int(p.Port)))
	}
	return origins, nil
}

func (h *exchangeHead) policies(ctx context.Context, i *Intercept, routes []intercept.Route) ([]string, error) {
	_, notes, err := h.c.EnsurePolicies(ctx, policySpec(h.plan, i, routes))
	return notes, err
}

func (h *exchangeHead) lead(ctx context.Context, i *Intercept, routes []intercept.Route) error {
	_, err := h.c.Switch(ctx, h.plan, GateSelector(i.Gate), gatePorts(routes), i.record())
	return err
}

// record is what undo will need; Switch adds what the Service is now.
func (i *Intercept) record() Record {
	h := i.spec.Holder
	return Record{Session: h.Session, User: h.User, Origin: h.Origin, Since: h.Since, Kind: i.spec.Kind, Gate: i.Gate}
}

// gatePorts are the gates' ports by those of the Service.
func gatePorts(routes []intercept.Route) map[PortKey]uint16 {
	ports := map[PortKey]uint16{}
	for _, r := range routes {
		ports[PortKey{Port: r.Port, Protocol: protocolNamed(r.Protocol)}] = r.Listen
	}
	return ports
}
