package cluster

import (
	"context"
	"fmt"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

// A session writes a heartbeat every HeartbeatEvery into each namespace where it
// owns something. One that did not for GoneAfter is gone: another may take over
// what it holds.
const (
	HeartbeatEvery = 20 * time.Second
	GoneAfter      = 10 * time.Minute
)

// LeaseName is the name of a session's Lease.
func LeaseName(session string) string { return "culvert-" + session }

// Heartbeat makes or renews a session's Lease, once, with the API server's time.
// user and origin are as in AgentSpec. With an owner, of the same
// namespace, the Lease goes when that does; nil: only DeleteLease removes it. Errors are *api.Error.
func (c *Cluster) Heartbeat(ctx context.Context, namespace, session, user, origin string, owner *metav1.OwnerReference) error {
	name := LeaseName(session)
	what := fmt.Sprintf("renewing Lease %s in namespace %q", name, namespace)
	leases := c.client.Leases(namespace)
	return c.contend(ctx, what, func() error {
		// Read first, even when it was written a moment ago: the answer brings
		// the time, which this machine may have slept through.
		lease, err := leases.Get(ctx, name, metav1.GetOptions{})
		missing := apierrors.IsNotFound(err)
		if err != nil && !missing {
			return err
		}
		now := metav1.NewMicroTime(c.Now())
		if missing {
			lease = newLease(namespace, session, user, origin, now)
		} else if lease.Labels[LabelSession] != session {
			return &api.Error{
				Code:    api.CodeExists,
				Message: fmt.Sprintf("Lease %s in namespace %q exists and is not this session's", name, namespace),
				Hint:    fmt.Sprintf("`kubectl -n %s get lease %s -o yaml` shows whose it is", namespace, name),
			}
		}
		lease.Spec.RenewTime = &now
		if owner != nil {
			lease.OwnerReferences = []metav1.OwnerReference{*owner}
		}
		if missing {
			_, err = leases.Create(ctx, lease, metav1.CreateOptions{FieldManager: fieldManager})
		} else {
			_, err = leases.Update(ctx, name, lease, metav1.UpdateOptions{FieldManager: fieldManager})
		}
		if lostRace(err) {
			return errLostRace
		}
		return err
	})
}

func newLease(namespace, session, user, origin string, now metav1.MicroTime) *coordinationv1.Lease {
	seconds := int32(GoneAfter / time.Second)
	l := &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{
			Name: LeaseName(session), Namespace: namespace,
			Labels:      map[string]string{LabelName: "culvert", LabelManagedBy: "culvert", LabelSession: session},
			Annotations: map[string]string{},
		},
		Spec: coordinationv1.LeaseSpec{HolderIdentity: &session, LeaseDurationSeconds: &seconds, AcquireTime: &now},
	}
	if user != "" {
		l.Annotations[AnnotationUser] = user
	}
	if origin != "" {
		l.Annotations[AnnotationOrigin] = origin
	}
	return l
}

// DeleteLease says that a session owns nothing in the namespace any more. A Lease
// that does not exist is no error.
func (c *Cluster) DeleteLease(ctx context.Context, namespace, session string) error {
	err := c.client.Leases(namespace).Delete(ctx, LeaseName(session), metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return translate(fmt.Sprintf("deleting Lease %s in namespace %q", LeaseName(session), namespace), err)
}

// SeenSession returns when a session wrote its heartbeat last, to be compared
// with Now; not ok means that it has no Lease there. Errors are *api.Error.
func (c *Cluster) SeenSession(ctx context.Context, namespace, session string) (last time.Time, ok bool, err error) {
	lease, err := c.client.Leases(namespace).Get(ctx, LeaseName(session), metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return time.Time{}, false, nil
	}
	if err != nil {
		return time.Time{}, false, translate(fmt.Sprintf("reading Lease %s in namespace %q", LeaseName(session), namespace), err)
	}
	return renewed(lease), true, nil
}

func renewed(l *coordinationv1.Lease) time.Time {
	if l.Spec.RenewTime != nil {
		return l.Spec.RenewTime.Time
	}
	return l.CreationTimestamp.Time
}
