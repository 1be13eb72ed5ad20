package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

const (
	// linger is how long gates go on after the traffic was led away from them:
	// until every node knows.
	linger = 3 * time.Second
	// scaleBackTime is how long a workload's pods have to become ready again, before
	// those that stand in for them end.
	scaleBackTime = 2 * time.Minute
	// goneTime is how long a gate may take to end: its grace period, and some more.
	goneTime = (gateGrace + 15) * time.Second
	// drainPoll is how often gates are asked whether connections are left.
	drainPoll = 500 * time.Millisecond
)

// UndoSpec says what to undo and how.
type UndoSpec struct {
	Namespace string
	// Key is the intercept's in the gates' state: a Service's name, or scaleKey.
	Key string
	// Session, if set, is whose it has to be: another's is left alone, without an
	// error. Of a mesh it is one member, who leaves; the last one ends it.
	Session string
	// Dead: the session is known to be over; what is open to it is reset, since
	// nobody is at its other end.
	Dead    bool
	Drain   time.Duration     // for open connections; 0: only what is needed
	Reached func(step string) // told each step when it begins; may be nil
	Say     func(string)      // told what was done; may be nil
}

// Undo ends an intercept with nothing but what the cluster knows of it. First
// the traffic is led back, then everything is deleted, last the entry in the gates'
// state, which is the lock of the Service: until then nobody else can have it, and
// what bears the Service's name is this intercept's. When the traffic cannot be led
// back nothing is deleted. It is idempotent: each step finds what is there.
func (c *Cluster) Undo(ctx context.Context, u UndoSpec) error {
	if u.Reached == nil {
		u.Reached = func(string) {}
	}
	if u.Say == nil {
		u.Say = func(string) {}
	}
	c.keys.drop(u.Namespace, u.Key)
	// A state that cannot be read is no reason to leave the Service with the gates.
	state, stateErr := c.GateState(ctx, u.Namespace)
	var entry intercept.Entry
	known := false
	if stateErr == nil {
		entry, known = state.Entries[u.Key]
		if known && u.Session != "" && entry.Holder.Session != u.Session && entry.Kind != intercept.Mesh {
			return nil
		}
	}
	if known && entry.Kind == intercept.Mesh && u.Session != "" && u.Session != entry.Holder.Session {
		l, err := c.leaveMesh(ctx, u)
		if err != nil || l.others || l.mesh.Session == "" {
			return err
		}
		// The last one: what is shared goes with it.
		u.Session = l.mesh.Session
		if state, stateErr = c.GateState(ctx, u.Namespace); stateErr == nil {
			entry, known = state.Entries[u.Key]
		}
	}
	u.Reached(StepRestore)
	service := !strings.HasPrefix(u.Key, scalePrefix)
	if known && service {
		// Before the Service is led back: whoever watches over it sees that this is
		// no accident, and does not lead it to the gates again.
		if err := c.markDraining(ctx, u, entry.Holder.Session, true); err != nil {
			u.Say("telling the gates: " + err.Error())
		}
	}
	back, err := c.leadBack(ctx, u, entry)
	if err != nil {
		if known && service { // traffic still comes to the gates, and its holder may live
			undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
			defer cancel()
			err = errors.Join(err, c.markDraining(undo, u, entry.Holder.Session, false))
		}
		return err
	}
	if back.foreign || stateErr != nil {
		return stateErr
	}
	gate := firstOf(back.gate, entry.Gate, intercept.GateName)
	holder := firstOf(entry.Holder.Session, back.session, u.Session)
	if holder == "" {
		return nil // nothing says that anything is left
	}

	u.Reached(StepDrain)
	var trouble []error
	switch {
	case !service:
		// Those that stand in have no origin to lead to. They serve until nobody
		// finds them any more.
		gate = firstOf(back.gate, entry.Gate, OwnGate(u.Key))
		trouble = append(trouble, c.DeleteGates(ctx, u.Namespace, gate))
	case known:
		trouble = append(trouble, c.drain(ctx, u, gate, back.led, entry.Mode != "" && !u.Dead))
	}
	only := "" // with the entry, all that bears the Service's name
	if !known {
		only = holder
	}
	u.Reached(StepOriginDeleted)
	if service {
		trouble = append(trouble, c.DeleteOrigin(ctx, u.Namespace, u.Key, only), c.deleteMember(ctx, u.Namespace, u.Key, only))
	}
	u.Reached(StepPolicyDeleted)
	trouble = append(trouble, c.DeletePolicies(ctx, u.Namespace, u.Key, only))
	if service && known && gate != intercept.GateName {
		trouble = append(trouble, c.DeleteGates(ctx, u.Namespace, gate))
	}
	u.Reached(StepEntryRemoved)
	last, rest, err := c.RemoveGateEntry(ctx, u.Namespace, u.Key, holder)
	if err != nil {
		return errors.Join(append(trouble, err)...)
	}
	if known && gate == intercept.GateName {
		// Gates that know of nothing end at once when they are told to.
		push, cancel := context.WithTimeout(ctx, 5*time.Second)
		if err := c.Push(push, u.Namespace, gate, rest); err != nil && !last {
			trouble = append(trouble, err)
		}
		cancel()
	}
	u.Reached(StepGatesGone)
	if last {
		trouble = append(trouble, c.awaitGatesGone(ctx, u))
	}
	return errors.Join(trouble...)
}

// ledBack is what leadBack found and did.
type ledBack struct {
	led     bool   // traffic had come to the gates
	foreign bool   // it is another session's than was asked for
	gate    string // that it came to, if the record says so
	session string // whose it was, if the record says so
}

// leadBack undoes the head.
func (c *Cluster) leadBack(ctx context.Context, u UndoSpec, entry intercept.Entry) (ledBack, error) {
	if strings.HasPrefix(u.Key, scalePrefix) {
		return c.scaleBack(ctx, u, entry)
	}
	service, err := c.client.Services(u.Namespace).Get(ctx, u.Key, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		if entry.Mode != "" { // somebody deleted it, and the rule leads to nothing
			return ledBack{}, c.removeRules(ctx, u.Namespace, u.Key, entry.Mode)
		}
		return ledBack{}, nil
	case err != nil:
		return ledBack{}, translate(fmt.Sprintf("looking at Service %s in namespace %q", u.Key, u.Namespace), err)
	}
	if isPreview(service) {
		if session := service.Labels[LabelSession]; u.Session != "" && session != u.Session {
			return ledBack{foreign: true}, nil
		}
		return ledBack{led: true, session: service.Labels[LabelSession]}, c.deletePreview(ctx, service)
	}
	if isRule(service) {
		if session := service.Labels[LabelSession]; u.Session != "" && session != u.Session {
			return ledBack{foreign: true}, nil
		}
		u.Say("taking the rule away")
		return ledBack{led: true, session: service.Labels[LabelSession]}, c.removeRules(ctx, u.Namespace, u.Key, entry.Mode)
	}
	record, err := RecordOf(service)
	switch {
	case err != nil:
		return ledBack{}, err
	case record == nil:
		led, err := c.restoreFromOrigin(ctx, service)
		return ledBack{led: led}, err
	case u.Session != "" && record.Session != u.Session:
		return ledBack{foreign: true}, nil
	}
	restored, err := c.Restore(ctx, u.Namespace, u.Key, u.Session)
	if err != nil {
		return ledBack{}, err
	}
	for _, done := range restored.Done {
		u.Say(done)
	}
	for _, theirs := range restored.Theirs {
		u.Say(theirs + " is somebody else's and stays")
	}
	return ledBack{led: true, gate: record.Gate, session: record.Session}, nil
}

// markDraining has the gates lead new connections to the origin, or takes that back,
// if the entry is still of the session.
func (c *Cluster) markDraining(ctx context.Context, u UndoSpec, session string, draining bool) error {
	_, err := c.ChangeGateState(ctx, u.Namespace, func(s *intercept.State) error {
		if e, ok := s.Entries[u.Key]; ok && e.Holder.Session == session {
			e.Draining, e.Over = draining, draining && u.Dead
			s.Entries[u.Key] = e
		}
		return nil
	})
	return err
}

// drain has the gates lead new connections to the origin, and waits for the open
// ones: at least until every node knows that the gates are out of it. byRule: clients
// themselves chose to come, and do so until they know; only then are connections asked
// to end, since a client whose every connection ends as it begins fails.
func (c *Cluster) drain(ctx context.Context, u UndoSpec, gate string, led, byRule bool) error {
	if !led {
		return nil // no connection ever came
	}
	begun := time.Now()
	if byRule {
		select {
		case <-time.After(linger):
		case <-ctx.Done():
			return translate("waiting for clients to go by the rules that are left", ctx.Err())
		}
	}
	state, err := c.GateState(ctx, u.Namespace)
	if err != nil {
		return err
	}
	push, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	// A gate that cannot be told or asked is no reason to take the origin away from
	// under connections that nodes still send to the gates.
	unheard := c.Push(push, u.Namespace, gate, state)
	if unheard == nil {
		u.Say("open connections are asked to end")
	}
	for {
		open := 0
		statuses, err := c.GateStatuses(ctx, u.Namespace, gate)
		if err != nil && ctx.Err() == nil {
			unheard = err
		}
		for _, s := range statuses {
			for _, r := range s.Routes {
				if r.Key == u.Key && r.Protocol != string(corev1.ProtocolUDP) { // datagrams change sides without a loss
					open += r.OpenToMachine + r.OpenToOrigin
				}
			}
		}
		passed := time.Since(begun)
		if passed >= linger && (open == 0 || passed >= u.Drain) {
			return unheard
		}
		select {
		case <-time.After(min(drainPoll, max(linger-passed, 50*time.Millisecond))):
		case <-ctx.Done():
			return translate("waiting for open connections", ctx.Err())
		}
	}
}

// awaitGatesGone waits until the garbage collector took the gates of a ConfigMap
// that is gone; somebody who came in meanwhile has new ones, which stay. Pods whose
// node is away end when it is back, or is given up by the cluster: nobody waits for
// that.
func (c *Cluster) awaitGatesGone(ctx context.Context, u UndoSpec) error {
	waiting, cancel := context.WithTimeout(ctx, goneTime)
	defer cancel()
	for {
		left, err := c.oldGates(waiting, u.Namespace)
		if err == nil && left == 0 {
			return nil
		}
		if err != nil && waiting.Err() == nil {
			return translate("waiting for the gates to end", err)
		}
		select {
		case <-time.After(pollGone / 2):
			continue
		case <-waiting.Done():
		}
		if ctx.Err() == nil {
			u.Say(fmt.Sprintf("%d pods of the gates are still ending: their node may be away", left))
			return nil
		}
		return &api.Error{Code: api.CodeTimeout, Message: "the gates' end was asked for, but their pods are not gone yet",
			Hint: fmt.Sprintf("`kubectl -n %s get deployment,pod -l %s=culvert` shows what is left", u.Namespace, LabelManagedBy)}
	}
}

// oldGates counts what belongs to no ConfigMap that is there: Deployment and pods.
func (c *Cluster) oldGates(ctx context.Context, namespace string) (left int, err error) {
	owner := ""
	m, err := c.client.ConfigMaps(namespace).Get(ctx, intercept.GateName, metav1.GetOptions{})
	switch {
	case err == nil:
		owner = string(m.UID)
	case !apierrors.IsNotFound(err):
		return 0, err
	}
	d, err := c.client.Deployments(namespace).Get(ctx, intercept.GateName, metav1.GetOptions{})
	switch {
	case err == nil && d.Labels[LabelGateState] != owner:
		left++
	case err != nil && !apierrors.IsNotFound(err):
		return 0, err
	}
	pods, err := c.client.Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(GateSelector(intercept.GateName)).String()})
	if err != nil {
		return 0, err
	}
	for i := range pods.Items {
		if pods.Items[i].Labels[LabelGateState] != owner {
			left++
		}
	}
	return left, nil
}

// asAPIError gives any error the form that users see.
func asAPIError(err error) *api.Error {
	var e *api.Error
	if errors.As(err, &e) {
		return e
	}
	return &api.Error{Code: api.CodeInternal, Message: err.Error()}
}
