package cluster

import (
	"context"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// scaleHead is a workload whose pods are replaced by gates with their labels. It
// has no origin.
type scaleHead struct {
	c    *Cluster
	plan *ScalePlan // of one that is resumed kind, name and labels only
	list []PlanPort
}

// scalePrefix begins the keys of replaced workloads, see intercept.Key.
const scalePrefix = "scale."

// scaleKeyOf is the key of KIND/NAME as a person types it; empty for what is no
// workload with replicas.
func scaleKeyOf(target string) string {
	kind, name, ok := strings.Cut(target, "/")
	if kind = kindNames[strings.ToLower(kind)]; !ok || name == "" {
		return ""
	}
	switch kind {
	case kindDeployment, kindStatefulSet, kindReplicaSet:
		return intercept.Key(intercept.Scale, strings.ToLower(kind)+"/"+name)
	}
	return ""
}

func (c *Cluster) planScaleHead(ctx context.Context, i *Intercept) error {
	plan, err := c.PlanScale(ctx, i.spec.Namespace, i.spec.Target, i.spec.Expose, i.spec.Force)
	if err != nil {
		return err
	}
	h := &scaleHead{c: c, plan: plan}
	for _, p := range plan.Ports {
		if p.Local != 0 { // who dials another one is refused by the pod itself
			h.list = append(h.list, PlanPort{Name: p.Name, Protocol: p.Protocol, Port: int32(p.Number), TargetPort: intstr.FromInt32(int32(p.Number)), Number: int32(p.Number), Local: p.Local})
		}
	}
	i.spec.Namespace, i.Key, i.Notes, i.head = plan.Namespace, intercept.Key(intercept.Scale, h.service()), plan.Notes, h
	i.Gate = OwnGate(i.Key)
	return nil
}

func (h *scaleHead) service() string   { return strings.ToLower(h.plan.Kind) + "/" + h.plan.Name }
func (h *scaleHead) ports() []PlanPort { return h.list }

func (h *scaleHead) mapping() []string {
	lines := append([]string(nil), h.plan.Notes...)
	for _, p := range h.list {
		lines = append(lines, fmt.Sprintf("port %s of the pods of %s -> localhost:%d", p, h.plan, p.Local))
	}
	return lines
}

func (h *scaleHead) gates(g *GateSpec) {
	g.PodLabels = h.plan.PodLabels
	for _, p := range h.list {
		g.Ports = append(g.Ports, corev1.ContainerPort{Name: p.Name, ContainerPort: p.Number, Protocol: p.Protocol})
	}
}

// origin: its pods are gone.
func (h *scaleHead) origin(context.Context, string) (map[PortKey]string, error) { return nil, nil }

func (h *scaleHead) policies(ctx context.Context, i *Intercept, routes []intercept.Route) ([]string, error) {
	spec := i.policySpec(routes)
	spec.StandIn = true
	_, notes, err := h.c.EnsurePolicies(ctx, i.spec.Namespace, spec)
	return notes, err
}

func (h *scaleHead) lead(ctx context.Context, i *Intercept, _ []intercept.Route) error {
	if h.plan.UID == "" {
		return nil // resumed: it was scaled down then
	}
	held := i.spec.Holder
	if err := h.c.ScaleDown(ctx, h.plan, ScaleRecord{Session: held.Session, User: held.User, Origin: held.Origin, Since: held.Since, Gate: i.Gate}); err != nil {
		return err
	}
	// Traffic comes here alone when the old pods are out of it, which is not waited
	// for much longer than it usually takes.
	for end := time.Now().Add(endedTime); time.Now().Before(end); {
		o, err := h.c.scaledObject(ctx, h.plan.Kind, h.plan.Namespace, h.plan.Name)
		if err != nil || o.ready == 0 && o.observed >= o.meta.Generation {
			return translate("looking at "+h.service(), err)
		}
		select {
		case <-time.After(pollGone / 2):
		case <-ctx.Done():
			return translate("waiting for the pods of "+h.service()+" to end", ctx.Err())
		}
	}
	return nil
}

// endedTime is how long replaced pods may take to be out of the traffic.
const endedTime = 5 * time.Second

func (h *scaleHead) led(ctx context.Context, i *Intercept) (bool, error) {
	o, err := h.c.scaledObject(ctx, h.plan.Kind, i.spec.Namespace, h.plan.Name)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, translate("looking at "+h.service(), err)
	}
	r := readScaleRecord(o.meta)
	return r != nil && r.Session == i.spec.Holder.Session && r.Phase == ScalePhaseDown, nil
}

// resumeScaleHead finds the workload of an entry again.
func (c *Cluster) resumeScaleHead(ctx context.Context, namespace string, e intercept.Entry) (*scaleHead, error) {
	kind, name, _ := strings.Cut(e.Service, "/")
	kind = firstOf(kindNames[kind], kind)
	o, err := c.scaledObject(ctx, kind, namespace, name)
	if apierrors.IsNotFound(err) {
		return nil, &Lost{Why: e.Service + " was deleted"}
	}
	if err != nil {
		return nil, translate("looking at "+e.Service, err)
	}
	plan := &ScalePlan{Namespace: namespace, Kind: kind, Name: name, PodLabels: podLabelsOf(o.workload)}
	return &scaleHead{c: c, plan: plan, list: portsOfEntry(e)}, nil
}

// scaleBack puts a workload's replicas back.
func (c *Cluster) scaleBack(ctx context.Context, u UndoSpec, entry intercept.Entry) (ledBack, error) {
	rest := strings.TrimPrefix(u.Key, scalePrefix)
	kind, name, _ := strings.Cut(rest, ".")
	kind = firstOf(kindNames[kind], kind)
	o, err := c.scaledObject(ctx, kind, u.Namespace, name)
	if apierrors.IsNotFound(err) {
		return ledBack{}, nil
	}
	if err != nil {
		return ledBack{}, translate("looking at "+kind+" "+name, err)
	}
	r := readScaleRecord(o.meta)
	if r != nil && u.Session != "" && r.Session != u.Session {
		return ledBack{foreign: true}, nil
	}
	if r == nil && o.replicas == 0 && entry.Replicas > 0 {
		return ledBack{}, &api.Error{Code: api.CodeConflict,
			Message: fmt.Sprintf("%s %s/%s has 0 replicas, and somebody removed the annotation %s: what stands in for its pods stays", kind, u.Namespace, name, AnnotationScaled),
			Hint:    fmt.Sprintf("kubectl -n %s scale %s/%s --replicas=%d, then culvert recover %[2]s/%[3]s", u.Namespace, strings.ToLower(kind), name, entry.Replicas)}
	}
	waiting, cancel := context.WithTimeout(ctx, scaleBackTime)
	defer cancel()
	back, err := c.ScaleBack(waiting, u.Namespace, kind, name, u.Say)
	if err != nil || back.Record == nil {
		return ledBack{}, err
	}
	if back.Theirs {
		u.Say(fmt.Sprintf("the %d replicas of %s are somebody else's and stay", back.Replicas, name))
	}
	return ledBack{led: true, gate: back.Record.Gate, session: back.Record.Session}, nil
}
