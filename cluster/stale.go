package cluster

import (
	"context"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

// RemoveStale deletes the agents in the namespace that sessions of the same user
// and daemon (spec.User and spec.Origin) made and nobody owns any more, because
// session and daemon died at once. live is asked after the agents were listed
// and returns the sessions that exist: a session exists before its agent does,
// so whatever is listed and not live is left over. Of two contexts of one
// cluster, of another machine or without an origin, nothing is touched. It
// returns the Deployments that it deleted, whose pods end on their own.
func (c *Cluster) RemoveStale(ctx context.Context, spec AgentSpec, live func(context.Context) ([]string, error)) (removed []string, err error) {
	if spec.User == "" || spec.Origin == "" {
		return nil, nil
	}
	deployments := c.client.Deployments(c.namespace)
	ours := labels.Set{LabelName: agentApp, LabelManagedBy: "culvert"}
	list, err := deployments.List(ctx, metav1.ListOptions{LabelSelector: ours.String()})
	if err != nil {
		return nil, translate("listing agents that a crash left", err)
	}
	var sessions []string
	for _, d := range list.Items {
		if d.Annotations[AnnotationUser] != spec.User || d.Annotations[AnnotationOrigin] != spec.Origin || d.DeletionTimestamp != nil {
			continue
		}
		if sessions == nil {
			if sessions, err = live(ctx); err != nil {
				return nil, err
			}
			if !slices.Contains(sessions, spec.Session) {
				return nil, fmt.Errorf("removing agents that a crash left: the daemon knows no session %s", spec.Session)
			}
		}
		id := d.Labels[LabelSession]
		if id == "" || id == spec.Session || slices.Contains(sessions, id) {
			continue
		}
		background := metav1.DeletePropagationBackground
		err := deployments.Delete(ctx, d.Name, metav1.DeleteOptions{
			PropagationPolicy: &background,
			Preconditions:     &metav1.Preconditions{UID: &d.UID},
		})
		if err != nil {
			return removed, translate("deleting Deployment "+d.Name+" that a crash left", err)
		}
		removed = append(removed, d.Name)
		if d.Annotations[AnnotationHeartbeat] != "" {
			if err := c.DeleteLease(ctx, c.namespace, id); err != nil {
				return removed, err
			}
		}
	}
	return removed, nil
}
