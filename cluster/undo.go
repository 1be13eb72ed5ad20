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
	// error.
	Session string
	// Dead: the session is known to be over; what is open to it is reset, since
	// nobody is at its other end.
	Dead    bool
	Drain   time.Duration     // for open connections; 0: only what is needed
	Reached func(step string) // told each step when it begins; may be nil
	Say     func(string)      // told what was done; may be nil
}

// Undo ends an intercept with nothing but what the cluster knows of it. First
// the traffic is led back, then everything is deleted; a failure of the former
// leaves the latter alone. It is idempotent: each step finds what is there.
func (c *Cluster) Undo(ctx context.Context, u UndoSpec) error {
	if u.Reached == nil {
		u.Reached = func(string) {}
	}
	if u.Say == nil {
		u.Say = func(string) {}
	}
	state, err := c.GateState(ctx, u.Namespace)
	if err != nil {
		return err
	}
	entry, known := state.Entries[u.Key]
	if known && u.Session != "" && entry.Holder.Session != u.Session {
		return nil
	}
	gate := firstOf(entry.Gate, intercept.GateName)

	u.Reached(StepRestore)
	var trouble []error
	service := !strings.HasPrefix(u.Key, scalePrefix)
	if known && service {
		// Before the Service is led back: whoever watches over it sees that this is
		// no accident, and does not lead it to the gates again.
		trouble = append(trouble, c.markDraining(ctx, u))
	}
	led, gates, err := c.leadBack(ctx, u)
	if err != nil {
		return err
	}
	if gates != "" {
		gate = gates
	}

	u.Reached(StepDrain)
	switch {
	case !service:
		// Those that stand in have no origin to lead to. They serve until nobody
		// finds them any more.
		trouble = append(trouble, c.DeleteGates(ctx, u.Namespace, firstOf(entry.Gate, OwnGate(u.Key))))
	case known:
		trouble = append(trouble, c.drain(ctx, u, gate, led))
	}
	u.Reached(StepEntryRemoved)
	last, rest, err := c.RemoveGateEntry(ctx, u.Namespace, u.Key)
	if err != nil {
		return errors.Join(append(trouble, err)...)
	}
	if known && service {
		// Gates that know of nothing end at once when they are told to.
		push, cancel := context.WithTimeout(ctx, 5*time.Second)
		if err := c.Push(push, u.Namespace, gate, rest); err != nil && !last {
			trouble = append(trouble, err)
		}
		cancel()
	}
	u.Reached(StepOriginDeleted)
	if service {
		trouble = append(trouble, c.DeleteOrigin(ctx, u.Namespace, u.Key))
	}
	u.Reached(StepPolicyDeleted)
	trouble = append(trouble, c.DeletePolicies(ctx, u.Namespace, u.Key))
	u.Reached(StepGatesGone)
	if gate != intercept.GateName {
		trouble = append(trouble, c.DeleteGates(ctx, u.Namespace, gate))
	}
	if last {
		trouble = append(trouble, c.awaitGatesGone(ctx, u))
	}
	return errors.Join(trouble...)
}

// leadBack undoes the head. led: traffic had come to the gates.
func (c *Cluster) leadBack(ctx context.Context, u UndoSpec) (led bool, gate string, err error) {
	if strings.HasPrefix(u.Key, scalePrefix) {
		return c.scaleBack(ctx, u)
	}
	service, err := c.client.Services(u.Namespace).Get(ctx, u.Key, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return false, "", nil
	case err != nil:
		return false, "", translate(fmt.Sprintf("looking at Service %s in namespace %q", u.Key, u.Namespace), err)
	}
	if service.Annotations[AnnotationPreview] != "" {
		if u.Session != "" && service.Labels[LabelSession] != u.Session {
			return false, "", nil
		}
		return true, "", c.deletePreview(ctx, service)
	}
	record, err := RecordOf(service)
	if err != nil || record == nil {
		return false, "", err
	}
	if u.Session != "" && record.Session != u.Session {
		return false, "", nil
	}
	restored, err := c.Restore(ctx, u.Namespace, u.Key, u.Session)
	if err != nil {
		return false, "", err
	}
	for _, done := range restored.Done {
		u.Say(done)
	}
	for _, theirs := range restored.Theirs {
		u.Say(theirs + " is somebody else's and stays")
	}
	return true, record.Gate, nil
}

func (c *Cluster) markDraining(ctx context.Context, u UndoSpec) error {
	_, err := c.ChangeGateState(ctx, u.Namespace, func(s *intercept.State) error {
		if e, ok := s.Entries[u.Key]; ok {
			e.Draining, e.Over = true, u.Dead
			s.Entries[u.Key] = e
		}
		return nil
	})
	return err
}

// drain has the gates lead new connections to the origin, and waits for the open
// ones: at least until every node knows that the gates are out of it.
func (c *Cluster) drain(ctx context.Context, u UndoSpec, gate string, led bool) error {
	if !led {
		return nil // no connection ever came
	}
	begun := time.Now()
	state, err := c.GateState(ctx, u.Namespace)
	if err != nil {
		return err
	}
	push, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := c.Push(push, u.Namespace, gate, state); err != nil {
		return err
	}
	u.Say("open connections are asked to end")
	for {
		open := 0
		statuses, err := c.GateStatuses(ctx, u.Namespace, gate)
		if err != nil && ctx.Err() == nil {
			return err
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
			return nil
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
