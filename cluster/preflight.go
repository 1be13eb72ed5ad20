package cluster

import (
	"context"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"golang.org/x/sync/errgroup"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Check is one verb on one resource that culvert uses, and whether the user
// has it.
type Check struct {
	Verb      string // "create"
	Resource  string // "deployments.apps", "pods/portforward"
	Namespace string // empty: in the whole cluster
	Allowed   bool
	Needed    bool   // false: connect works without, and says what is lost
	Why       string // what it is for, or what is lost without it

	group, resource, subresource string
}

// checks are all verbs of connect, the needed ones first. deploy/rbac has the
// same list.
func (c *Cluster) checks() []Check {
	ns := c.namespace
	need := func(group, resource, sub, why string, verbs ...string) (all []Check) {
		for _, v := range verbs {
			all = append(all, newCheck(v, group, resource, sub, ns, true, why))
		}
		return all
	}
	want := func(namespace, group, resource, why string, verbs ...string) (all []Check) {
		for _, v := range verbs {
			all = append(all, newCheck(v, group, resource, "", namespace, false, why))
		}
		return all
	}
	var all []Check
	for _, some := range [][]Check{
		need("apps", "deployments", "", "the agent's Deployment", "create", "get", "list", "watch", "delete"),
		need("", "pods", "", "to see when the agent's pod is ready", "get", "list", "watch"),
		need("", "pods", "portforward", "the tunnel to the agent", "create"),
		want(ns, "", "pods", "without it a refusal of the agent's pod shows only after the Deployment is made", "create"),
		want(ns, "", "events", "without it a pod that does not start gives no reason", "list", "watch"),
		want(ns, "", "services", "without it Services are routed only where ServiceCIDR objects or the dry run tell the range, and short names do not resolve", "list", "watch"),
		want(ns, "", "services", "without it the Service range is known only from ServiceCIDR objects (asked as a dry run, nothing is created), and --udp nodeport cannot make its Service", "create"),
		want("", "networking.k8s.io", "servicecidrs", "without it the Service range is asked for by a dry run", "list", "watch"),
		want("", "", "nodes", "without it pods are routed one by one instead of by the nodes' ranges", "list", "watch"),
		want("", "", "pods", "without it pods of other namespaces are routed only where nodes tell their ranges", "list", "watch"),
		want("", "", "services", "without it names of other namespaces need the form SERVICE.NAMESPACE.svc", "list", "watch"),
	} {
		all = append(all, some...)
	}
	all = append(all, newCheck("get", "", "pods", "proxy", ns, false, "without it the tunnel stays on port-forward, which is slower"))
	// The WebSocket form is a GET, which older servers authorize as "get";
	// without it SPDY is used.
	return append(all, newCheck("get", "", "pods", "portforward", ns, false, "without it the tunnel uses SPDY instead of WebSocket"))
}

func newCheck(verb, group, resource, sub, ns string, needed bool, why string) Check {
	c := Check{Verb: verb, Namespace: ns, Needed: needed, Why: why, group: group, resource: resource, subresource: sub}
	c.Resource = resource
	if sub != "" {
		c.Resource += "/" + sub
	}
	if group != "" {
		c.Resource += "." + group
	}
	return c
}

// Access reviews every verb that culvert uses. It changes nothing. The error,
// an *api.Error, is for a review that could not be made.
func (c *Cluster) Access(ctx context.Context) ([]Check, error) { return c.review(ctx, c.checks()) }

// review asks for each check whether it is allowed, all at once.
func (c *Cluster) review(ctx context.Context, checks []Check) ([]Check, error) {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for i := range checks {
		check := &checks[i]
		g.Go(func() error {
			review, err := c.client.SelfSubjectAccessReviews().Create(gctx, &authorizationv1.SelfSubjectAccessReview{
				Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &authorizationv1.ResourceAttributes{
					Namespace: check.Namespace, Verb: check.Verb, Group: check.group, Resource: check.resource, Subresource: check.subresource,
				}},
			}, metav1.CreateOptions{})
			if err != nil {
				return translate("asking the API server "+c.Server()+" for your rights", err)
			}
			check.Allowed = review.Status.Allowed
			return nil
		})
	}
	return checks, g.Wait()
}

// Preflight finds, before anything is made, what would stop the agent: an
// unreachable server, refused credentials, a missing right, a missing
// namespace, and what PodSecurity, quota or a policy has against the
// Deployment or its pod (dry runs on the server). Errors are *api.Error.
func (c *Cluster) Preflight(ctx context.Context, spec AgentSpec) error {
	d, err := spec.deployment(c.namespace)
	if err != nil {
		return err
	}
	// One request first: without credentials or network it gives one error
	// instead of a dozen, and runs an exec plugin once.
	if err := c.reach(ctx); err != nil {
		return err
	}
	checks, err := c.review(ctx, c.checks())
	if err != nil {
		return err
	}
	for _, check := range checks {
		if check.Needed && !check.Allowed {
			return c.refused(ctx, check)
		}
	}
	dry := metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}
	what := fmt.Sprintf("creating the agent in namespace %q", c.namespace)
	if _, err := c.client.Deployments(c.namespace).Create(ctx, d, dry); err != nil && !apierrors.IsAlreadyExists(err) {
		return translate(what, err)
	}
	// PodSecurity and quota look at pods only: a Deployment is accepted and its
	// pod refused later.
	pod := &corev1.Pod{ObjectMeta: d.Spec.Template.ObjectMeta, Spec: d.Spec.Template.Spec}
	pod.GenerateName = d.Name + "-"
	_, err = c.client.Pods(c.namespace).Create(ctx, pod, dry)
	if err != nil && !isMissingRight(err) && !c.agentExists(ctx, d.Name) {
		return translate(what, err)
	}
	return nil
}

// reachTimeout is for one small request: a server that takes longer makes no
// usable tunnel.
const reachTimeout = 10 * time.Second

// reach makes one small request.
func (c *Cluster) reach(ctx context.Context) error {
	short, cancel := context.WithTimeout(ctx, reachTimeout)
	defer cancel()
	err := c.client.Version(short)
	if err == nil || apierrors.IsForbidden(err) {
		return nil
	}
	return translate("asking the API server "+c.Server(), err)
}

// agentExists: then its quota is in use already, and a second pod that does not
// fit is no reason to refuse.
func (c *Cluster) agentExists(ctx context.Context, name string) bool {
	_, err := c.client.Deployments(c.namespace).Get(ctx, name, metav1.GetOptions{})
	return err == nil
}

// refused names what is missing; a namespace that does not exist looks like a
// missing right to whoever has rights elsewhere only.
func (c *Cluster) refused(ctx context.Context, check Check) error {
	user := ""
	if who, err := c.client.SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{}); err == nil {
		user = who.Status.UserInfo.Username
	}
	err := forbidden(check, user)
	if e, ok := err.(*api.Error); ok && check.resource == "deployments" {
		e.Hint = fmt.Sprintf("use --namespace with one where you may, if %q is not the one you meant; else ", c.namespace) + hintRBAC
	}
	return err
}
