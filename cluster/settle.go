package cluster

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// labelHidden keeps kube-proxy from a Service
// (https://kubernetes.io/docs/reference/labels-annotations-taints/#servicekubernetesioservice-proxy-name).
//
// An origin has it while its intercept starts. kube-proxy changes a node's rules
// twice at once and then once a second (its minSyncPeriod); with a new Service and
// its endpoints just before, the switch of the intercepted one would be the third
// change, and traffic would come a second later (measured: 1.3 to 1.5 s, without
// 0.1). Until the origin is shown the gates go straight to its pods
// (intercept.Route.Backends).
const labelHidden = "service.kubernetes.io/service-proxy-name"

const (
	// showAfter is when nodes have learnt of the switch.
	showAfter = 500 * time.Millisecond
	// settleEvery is the pause between two questions whether gates reach the origin;
	// what refuses for settleTime does so for another reason.
	settleEvery, settleTime = 300 * time.Millisecond, 30 * time.Second
)

// settle shows the origin to the nodes, and has the gates go by its address alone
// when they reach it. An intercept that is not settled works; but when pods of the
// origin change, their addresses may become others'.
func (i *Intercept) settle(ctx context.Context) error {
	if _, ok := i.head.(*ruleHead); ok {
		return nil // its origin is as old as the Service
	}
	state, err := i.c.GateState(ctx, i.spec.Namespace)
	if err != nil {
		return err
	}
	e := state.Entries[i.Key]
	if !slices.ContainsFunc(e.Routes, func(r intercept.Route) bool { return len(r.Backends) > 0 }) && e.Kind != intercept.Exchange && e.Kind != intercept.Mesh {
		return nil
	}
	select {
	case <-time.After(showAfter):
	case <-ctx.Done():
		return nil
	}
	if err := i.c.showOrigin(ctx, i.spec.Namespace, i.Key); apierrors.IsNotFound(err) {
		// Somebody deleted it: without it nobody serves while the machine is away.
		if err := i.renewOrigin(ctx); err != nil {
			return err
		}
		if err := i.c.showOrigin(ctx, i.spec.Namespace, i.Key); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	for begun := time.Now(); ; {
		reached, err := i.c.Reach(ctx, i.spec.Namespace, i.Gate, intercept.ReachRequest{Key: i.Key, OriginOnly: true})
		if err == nil && !slices.ContainsFunc(reached, func(r intercept.Reached) bool {
			return r.Error != "" && (r.Error != "refused" || time.Since(begun) < settleTime)
		}) {
			break
		}
		pause := settleEvery
		if time.Since(begun) > settleTime {
			pause = settleTime
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return nil
		}
	}
	state, err = i.c.ChangeGateState(ctx, i.spec.Namespace, func(s *intercept.State) error {
		e, ok := s.Entries[i.Key]
		if !ok || e.Holder.Session != i.owner().Session {
			return nil
		}
		for k := range e.Routes {
			e.Routes[k].Backends = nil
		}
		s.Entries[i.Key] = e
		return nil
	})
	if err != nil {
		return err
	}
	return i.c.Push(ctx, i.spec.Namespace, i.Gate, state)
}

// renewOrigin makes the origin anew and has the gates go to its address.
func (i *Intercept) renewOrigin(ctx context.Context) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	if err := i.renew(ctx); err != nil {
		return err
	}
	return i.reapply(ctx)
}

// showOrigin takes labelHidden away. That there is no origin is the API server's own
// error.
func (c *Cluster) showOrigin(ctx context.Context, namespace, service string) error {
	what := fmt.Sprintf("showing Service %s/%s to the nodes", namespace, OriginName(service))
	for try := 1; ; try++ {
		live, err := c.client.Services(namespace).Get(ctx, OriginName(service), metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return err
		}
		if err == nil && live.Labels[labelHidden] == "" {
			return nil
		}
		if err == nil {
			labels := maps.Clone(live.Labels)
			delete(labels, labelHidden)
			_, err = c.patchService(ctx, live, []patchOp{set("/metadata/labels", labels)})
		}
		if err == nil || !apierrors.IsConflict(err) || try == conflictTries {
			return translateService(what, err)
		}
	}
}
