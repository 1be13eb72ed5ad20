package cluster

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"net"
	"strconv"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// InterceptSpec says which traffic shall come to a session's machine.
type InterceptSpec struct {
	Kind      string // intercept.Exchange, Mesh, Preview or Scale
	Namespace string // empty: the cluster's
	Target    string // as typed
	Expose    []Expose
	Force     bool
	Holder    intercept.Holder // Since is set by Start
	Agent     *Agent           // the session's
	Gates     AgentSpec        // image, pull secrets and so on are the gates' too
	OnRefused string           // intercept.RefusedToOrigin or RefusedToClient

	// Of a mesh: see intercept.Member. Mode is api.ModeRouter, ..., or api.ModeAuto,
	// which planning makes one of them.
	Mode         string
	Match        []intercept.Condition
	OnGone       string
	TagResponses bool
	// TLSSecret names the Secret with the Service's own key, for ports of TLS.
	TLSSecret string

	// Of a preview: how it is seen outside of the cluster.
	External     bool
	Host         string
	IngressClass string
}

// Intercept is one that was planned. Its methods are for one goroutine.
type Intercept struct {
	c    *Cluster
	spec InterceptSpec
	head head

	// ID and Token are what a connection of the gates shows (intercept.Header).
	ID, Token string
	Key       string // in the gates' state
	Gate      string // the Deployment that serves it
	Notes     []string

	tls      *intercept.TLSKey    // nil: TLS passes as it is
	mesh     intercept.Holder     // of a mesh: what it shares with others is the mesh's
	undone   bool                 // Start failed and left nothing
	backends map[PortKey][]string // pods that served when it started; nil: gates did, of a mesh

	mu sync.Mutex // held while its head, or what follows from that, changes
}

// head is what leads traffic to the gates: where the kinds of intercepts differ.
// Its methods are called in this order, each at most once in a Start.
type head interface {
	// service is its name for people and in the gates' state.
	service() string
	// ports are all that the gates serve, exposed or not, and mapping says where
	// each leads.
	ports() []PlanPort
	mapping() []string
	// gates changes the gates' Deployment to what this head needs.
	gates(*GateSpec)
	// origin makes what the gates lead to when the machine does not answer, and
	// returns its address for each port, or nil.
	origin(ctx context.Context, session string) (map[PortKey]string, error)
	// policies opens the way through NetworkPolicies and returns notes.
	policies(ctx context.Context, i *Intercept, routes []intercept.Route) ([]string, error)
	// lead leads the traffic to the gates. It is idempotent.
	lead(ctx context.Context, i *Intercept, routes []intercept.Route) error
	// led tells whether it still is.
	led(ctx context.Context, i *Intercept) (bool, error)
}

// The steps of Start and Undo, in order. Tests end a session at each of them.
// StepActive and StepLeaseDeleted are the session's own: the intercept is noted as one
// that goes on, and the session's last one in the namespace is over.
const (
	StepLease  = "lease"
	StepEntry  = "entry"
	StepOrigin = "origin"
	StepGates  = "gates"
	StepPolicy = "policy"
	StepPush   = "push"
	StepReach  = "reach"
	StepSwitch = "switch"
	StepActive = "active"

	StepRestore       = "restore"
	StepDrain         = "drain"
	StepOriginDeleted = "origin-deleted"
	StepPolicyDeleted = "policy-deleted"
	StepEntryRemoved  = "entry-removed"
	StepGatesGone     = "gates-gone"
	StepLeaseDeleted  = "lease-deleted"
)

// StartSteps and StopSteps are all of them.
var (
	StartSteps = []string{StepLease, StepEntry, StepOrigin, StepGates, StepPolicy, StepPush, StepReach, StepSwitch, StepActive}
	StopSteps  = []string{StepRestore, StepDrain, StepOriginDeleted, StepPolicyDeleted, StepEntryRemoved, StepGatesGone, StepLeaseDeleted}
)

// PlanIntercept looks at everything that could be wrong and changes nothing.
// Errors are *api.Error; that of a Service which somebody else holds is a *Held.
func (c *Cluster) PlanIntercept(ctx context.Context, spec InterceptSpec) (*Intercept, error) {
	spec.Namespace = firstOf(spec.Namespace, c.namespace)
	if err := c.InterceptAccess(ctx, spec.Namespace, spec.Kind); err != nil {
		return nil, err
	}
	i := &Intercept{c: c, spec: spec, ID: randomHex(8), Token: randomHex(16), Gate: intercept.GateName}
	var err error
	switch spec.Kind {
	case intercept.Exchange:
		err = c.planExchangeHead(ctx, i)
	case intercept.Preview:
		err = c.planPreviewHead(ctx, i)
	case intercept.Scale:
		err = c.planScaleHead(ctx, i)
	case intercept.Mesh:
		err = c.planMesh(ctx, i)
	default:
		err = fmt.Errorf("%q is no kind of intercept", spec.Kind)
	}
	if err != nil {
		return nil, err
	}
	return i, nil
}

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails (crypto/rand, Go 1.24)
	return hex.EncodeToString(b)
}

// Namespace is where it is, and Service what it is called there.
func (i *Intercept) Namespace() string { return i.spec.Namespace }

// Mode is how a mesh tells requests apart: api.ModeRouter, ...; of others empty.
func (i *Intercept) Mode() string { return i.spec.Mode }

// Service is the Service's name, or KIND/NAME of a workload.
func (i *Intercept) Service() string { return i.head.service() }

// Exposed are the ports that come to the machine.
func (i *Intercept) Exposed() []PlanPort {
	var exposed []PlanPort
	for _, p := range i.head.ports() {
		if p.Local != 0 {
			exposed = append(exposed, p)
		}
	}
	return exposed
}

// Start leads the traffic to the machine, which must be ready for it. It tells
// each step when it begins. On an error everything is undone.
func (i *Intercept) Start(ctx context.Context, reached func(step string), progress func(string)) error {
	err := i.start(ctx, reached, progress)
	if err == nil {
		return nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if e := i.undo(undo); e != nil {
		return &api.Error{Code: asAPIError(err).Code,
			Message: fmt.Sprintf("%s\nand what had been begun could not be undone: %v", asAPIError(err).Message, e),
			Hint:    fmt.Sprintf("culvert recover %s -n %s", i.Service(), i.spec.Namespace)}
	}
	return err
}

// undo takes back what Start did.
func (i *Intercept) undo(ctx context.Context) error {
	err := i.c.Undo(ctx, UndoSpec{Namespace: i.spec.Namespace, Key: i.Key, Session: i.spec.Holder.Session})
	i.undone = err == nil
	return err
}

// Cancel takes back a Start that succeeded.
func (i *Intercept) Cancel() error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	return i.undo(ctx)
}

// Undone says that a Start which failed, or was cancelled, left nothing.
func (i *Intercept) Undone() bool { return i.undone }

// Since is when it started, by the API server's clock.
func (i *Intercept) Since() time.Time { return i.spec.Holder.Since }

// Mapping says for people where each port leads.
func (i *Intercept) Mapping() []string { return i.head.mapping() }

func (i *Intercept) start(ctx context.Context, reached func(step string), progress func(string)) error {
	c, ns := i.c, i.spec.Namespace
	reached(StepLease)
	if err := c.Heartbeat(ctx, ns, i.spec.Holder.Session, i.spec.Holder.User, i.spec.Holder.Origin, nil); err != nil {
		return err
	}
	i.spec.Holder.Since = c.Now().Truncate(time.Second).UTC()

	// The entry is the lock: of two who want the same Service at once, one finds
	// the other's.
	reached(StepEntry)
	if err := i.lock(ctx, progress); err != nil {
		return err
	}
	reached(StepOrigin)
	origins, err := i.head.origin(ctx, i.owner().Session)
	if err != nil {
		return err
	}
	if origins != nil {
		if i.backends, err = c.readyBackends(ctx, ns, i.head.service()); err != nil {
			return err
		}
	}
	reached(StepGates)
	gates := GateSpec{Agent: i.spec.Gates, Name: i.Gate}
	i.head.gates(&gates)
	if err := c.EnsureGates(ctx, ns, gates, progress); err != nil {
		return err
	}
	state, err := c.ChangeGateState(ctx, ns, func(s *intercept.State) error {
		if e, ok := s.Entries[i.Key]; !ok || e.Draining {
			return i.endedMeanwhile()
		}
		return i.fill(s, origins, i.standIns())
	})
	if err != nil {
		return err
	}
	routes := state.Entries[i.Key].Routes
	reached(StepPolicy)
	notes, err := i.head.policies(ctx, i, routes)
	if err != nil {
		return err
	}
	i.Notes = append(i.Notes, notes...)
	reached(StepPush)
	if err := c.Push(ctx, ns, i.Gate, state); err != nil {
		return err
	}
	reached(StepReach)
	if i.backends != nil || i.tls != nil { // else gates serve it already
		if err := i.reach(ctx); err != nil {
			return err
		}
	}
	if i.tls != nil {
		c.keys.set(ns, i.Key, *i.tls)
		if err := c.Push(ctx, ns, i.Gate, state); err != nil {
			return err
		}
	}
	reached(StepSwitch)
	if err := i.head.lead(ctx, i, routes); err != nil {
		return err
	}
	// Somebody who ended it meanwhile found nothing to lead back.
	if state, err = c.GateState(ctx, ns); err != nil {
		return err
	}
	if e, ok := state.Entries[i.Key]; !ok || e.Draining || !i.owns(e) {
		return i.endedMeanwhile()
	}
	return nil
}

// standIns are the pods that stand in for the origin's address until every node knows
// it: of a mesh by a rule it is none that is new.
func (i *Intercept) standIns() map[PortKey][]string {
	if _, ok := i.head.(*ruleHead); ok {
		return nil
	}
	return i.backends
}

// lock adds the entry.
func (i *Intercept) lock(ctx context.Context, progress func(string)) error {
	if i.spec.Kind == intercept.Mesh {
		return i.joinMesh(ctx, progress)
	}
	_, err := i.c.ChangeGateState(ctx, i.spec.Namespace, i.enter)
	return err
}

// owner is whose everything is that the intercept has in the cluster: the session's,
// or the mesh's that it shares.
func (i *Intercept) owner() intercept.Holder {
	if i.spec.Kind == intercept.Mesh {
		return i.mesh
	}
	return i.spec.Holder
}

// owns tells whether e is this intercept's entry.
func (i *Intercept) owns(e intercept.Entry) bool {
	if i.spec.Kind == intercept.Mesh {
		return e.Holder.Session == i.mesh.Session && memberOf(e, i.spec.Holder.Session) >= 0
	}
	return e.Holder.Session == i.spec.Holder.Session
}

func (i *Intercept) endedMeanwhile() error {
	return &api.Error{Code: api.CodeConflict, Message: fmt.Sprintf("somebody ended the intercept of %s while it was starting", i.Service()), Hint: "culvert list"}
}

// enter adds the entry, unless somebody else's is there. Ports that it had before
// keep theirs at the gates: connections may be open there.
func (i *Intercept) enter(s *intercept.State) error {
	before, ok := s.Entries[i.Key]
	if ok && before.Holder.Session != i.owner().Session {
		if before.Kind == intercept.Mesh {
			return meshedBy(i.spec.Namespace, i.Service(), before)
		}
		return heldBy(i.spec.Namespace, i.Service(), i.Key, before.Holder)
	}
	if before.Draining {
		return &Lost{Why: "somebody ended it (`culvert recover` or `clean`)"}
	}
	had := map[PortKey]intercept.Route{}
	for _, r := range before.Routes {
		had[PortKey{Port: r.Port, Protocol: protocolNamed(r.Protocol)}] = r
	}
	ports := i.head.ports()
	own := i.Gate != intercept.GateName // then it listens at the very ports
	var free []uint16
	if !own {
		if free = AllocatePorts(s, i.Gate, len(ports)); len(free) < len(ports) {
			return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("the gates of namespace %q have no free ports left", i.spec.Namespace), Hint: "culvert list shows who has them"}
		}
	}
	serves := map[PortKey]bool{} // at gates of its own two ports of a Service may be one
	e := intercept.Entry{Kind: i.spec.Kind, Service: i.head.service(), Gate: i.Gate, Holder: i.owner(), Replicas: before.Replicas}
	var member *intercept.Member
	if i.spec.Kind == intercept.Mesh {
		member = i.member(&e, before)
	}
	if _, ok := i.head.(*ruleHead); ok {
		e.Mode = i.spec.Mode
	}
	if h, ok := i.head.(*scaleHead); ok && h.plan.UID != "" {
		e.Replicas = h.plan.Replicas
	}
	for k, p := range ports {
		r := intercept.Route{Protocol: string(p.Protocol), Port: p.Port, Name: p.Name, Listen: uint16(p.Number), Backends: had[p.Key()].Backends}
		if member != nil { // others' requests are served meanwhile
			r.Origin, r.HTTP = had[p.Key()].Origin, httpOf(p)
			if had[p.Key()].HTTP == intercept.HTTPTLS || i.tls != nil && p.Local != 0 && r.HTTP != intercept.HTTPKnown {
				r.HTTP = intercept.HTTPTLS // and stays it for other members who have no key
			}
		}
		switch {
		case own:
		case had[p.Key()].Listen != 0:
			r.Listen = had[p.Key()].Listen
		default:
			r.Listen = free[k]
		}
		if p.Local != 0 {
			m := intercept.Machine{Agents: agentAddrs(i.spec.Agent), ID: PortID(i.ID, int(p.Port), string(p.Protocol)), Token: i.Token, OnRefused: i.spec.OnRefused, Local: p.Local}
			if member != nil {
				member.Ports = append(member.Ports, intercept.MemberPort{Port: p.Port, Machine: m})
			} else {
				r.Machine = &m
			}
		}
		if at := (PortKey{Port: int32(r.Listen), Protocol: p.Protocol}); !serves[at] {
			serves[at] = true
			e.Routes = append(e.Routes, r)
		}
	}
	s.Entries[i.Key] = e
	return nil
}

// PortID is the ID of one port of an intercept in intercept.Header: each is a
// target of its own at the session.
func PortID(id string, port int, protocol string) string {
	return fmt.Sprintf("%s-%d-%s", id, port, protocol)
}

// agentAddrs are where gates dial an agent.
func agentAddrs(a *Agent) []string {
	var addrs []string
	for _, ip := range a.IPs {
		addrs = append(addrs, net.JoinHostPort(ip.String(), strconv.Itoa(intercept.Port)))
	}
	return addrs
}

// SetAgent tells the gates of another pod of the session's agent.
func (i *Intercept) SetAgent(ctx context.Context, agent *Agent) error {
	i.spec.Agent = agent
	want := agentAddrs(agent)
	state, err := i.c.ChangeGateState(ctx, i.spec.Namespace, func(s *intercept.State) error {
		e, ok := s.Entries[i.Key]
		if !ok || !i.owns(e) {
			return &Lost{Why: "somebody ended it (`culvert recover` or `clean`)"}
		}
		for k := range e.Routes {
			if e.Routes[k].Machine != nil {
				e.Routes[k].Machine.Agents = want
			}
		}
		if i.spec.Kind == intercept.Mesh {
			m := &e.Members[memberOf(e, i.spec.Holder.Session)]
			for k := range m.Ports {
				m.Ports[k].Machine.Agents = want
			}
		}
		s.Entries[i.Key] = e
		return nil
	})
	if err != nil {
		return err
	}
	return i.c.Push(ctx, i.spec.Namespace, i.Gate, state)
}

const (
	// reachTime is how long gates try an origin that has ready endpoints: its
	// address is new, and nodes have to learn it.
	reachTime = 5 * time.Second
	// reachEvery is the pause between two tries.
	reachEvery = 100 * time.Millisecond
)

// reach has the gates dial the origin before traffic depends on them.
func (i *Intercept) reach(ctx context.Context) error {
	if len(i.backends) == 0 && i.tls == nil {
		i.Notes = append(i.Notes, fmt.Sprintf("no pod serves %s at the moment: without this machine its clients get nothing, as before", i.Service()))
		return nil
	}
	for end := time.Now().Add(reachTime); ; {
		results, err := i.c.Reach(ctx, i.spec.Namespace, i.Gate, intercept.ReachRequest{Key: i.Key, TLS: i.tls})
		if err != nil {
			return err
		}
		var bad, refused []intercept.Reached
		for _, r := range results {
			switch r.Error {
			case "":
			case "refused":
				refused = append(refused, r)
			default:
				bad = append(bad, r)
			}
		}
		switch {
		case len(bad)+len(refused) == 0:
			return nil
		case time.Now().Before(end):
			select {
			case <-time.After(reachEvery):
			case <-ctx.Done():
				return translate("waiting for the gates to reach the origin", ctx.Err())
			}
			continue
		case len(bad) > 0 && (!i.spec.Force || i.tls != nil):
			return &api.Error{Code: api.CodeUnreachable,
				Message: fmt.Sprintf("the gates do not reach port %d of %s where it is served now (%s): %s; nothing was changed", bad[0].Port, i.Service(), bad[0].Origin, bad[0].Error),
				Hint:    "a NetworkPolicy or firewall may keep pods of namespace " + strconv.Quote(i.spec.Namespace) + " from it; --force goes on, and then nothing serves while this machine is away"}
		}
		for _, r := range append(bad, refused...) {
			i.Notes = append(i.Notes, fmt.Sprintf("port %d of %s does not answer where it is served now (%s): without this machine its clients get nothing", r.Port, i.Service(), r.Error))
		}
		return nil
	}
}

// maxBackends is how many pods stand in for a new Service's address until every
// node knows it.
const maxBackends = 8

// readyBackends are addresses of the pods that serve a Service, by its ports; nil if it
// is led to gates.
func (c *Cluster) readyBackends(ctx context.Context, namespace, service string) (map[PortKey][]string, error) {
	what := fmt.Sprintf("looking for the pods of Service %s/%s", namespace, service)
	live, err := c.client.Services(namespace).Get(ctx, service, metav1.GetOptions{})
	if err != nil {
		return nil, translate(what, err)
	}
	named := map[string]PortKey{}
	for _, p := range live.Spec.Ports {
		named[string(protocol(p.Protocol))+p.Name] = keyOf(p)
	}
	slices, err := c.client.EndpointSlices(namespace).List(ctx, metav1.ListOptions{LabelSelector: discoveryv1.LabelServiceName + "=" + service})
	if err != nil {
		return nil, translate(what, err)
	}
	// Of two who mesh it at once one may have led it to the gates meanwhile: their pods
	// are not the origin's.
	if live, err = c.client.Services(namespace).Get(ctx, service, metav1.GetOptions{}); err != nil {
		return nil, translate(what, err)
	}
	if live.Spec.Selector[LabelGate] != "" {
		return nil, nil
	}
	found := map[PortKey][]string{}
	for _, s := range slices.Items {
		for _, p := range s.Ports {
			if p.Port == nil || p.Protocol == nil || p.Name == nil {
				continue
			}
			key, ok := named[string(*p.Protocol)+*p.Name]
			for _, e := range s.Endpoints {
				if ready := e.Conditions.Ready == nil || *e.Conditions.Ready; ok && ready && len(e.Addresses) > 0 && len(found[key]) < maxBackends {
					found[key] = append(found[key], hostPortOf(e.Addresses[0], *p.Port))
				}
			}
		}
	}
	return found, nil
}

// heldBy is the error for an intercept of somebody else.
func heldBy(namespace, service, key string, h intercept.Holder) error {
	who := firstOf(h.User, "session "+h.Session)
	return &Held{Namespace: namespace, Key: key, Holder: h, Err: &api.Error{
		Code:    api.CodeExists,
		Message: fmt.Sprintf("%s in namespace %q is intercepted by %s since %s", service, namespace, who, h.Since.Local().Format("2006-01-02 15:04:05")),
		Hint:    "--wait waits for its end; `culvert recover " + service + "` ends it when its owner cannot",
	}}
}

// Held is the error for what somebody else intercepts.
type Held struct {
	Namespace, Key string
	Holder         intercept.Holder
	Err            *api.Error
}

func (h *Held) Error() string { return h.Err.Error() }
func (h *Held) Unwrap() error { return h.Err }

// protocol is TCP where a Service leaves it out.
func protocol(p corev1.Protocol) corev1.Protocol {
	if p == "" {
		return corev1.ProtocolTCP
	}
	return p
}
