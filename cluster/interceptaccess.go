package cluster

import (
	"context"
	"fmt"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// interceptChecks are the verbs of intercepts of the given kinds (of package
// intercept) in a namespace, beside those of connect. deploy/rbac has the same
// list.
func interceptChecks(namespace string, kinds ...string) (all []Check) {
	add := func(needed bool, group, resource, sub, why string, verbs ...string) {
		for _, v := range verbs {
			all = append(all, newCheck(v, group, resource, sub, namespace, needed, why))
		}
	}
	need := func(group, resource, why string, verbs ...string) { add(true, group, resource, "", why, verbs...) }
	want := func(group, resource, why string, verbs ...string) { add(false, group, resource, "", why, verbs...) }

	need("", "configmaps", "what the gates know, in ConfigMap "+intercept.GateName, "get", "create", "update", "delete", "watch")
	need("coordination.k8s.io", "leases", "the session's heartbeat, by which others see that it lives", "get", "create", "update", "delete")
	need("apps", "deployments", "the gates", "create", "get", "list", "watch", "delete")
	need("policy", "poddisruptionbudgets", "a drain of nodes must not end all gates at once", "list", "create", "delete")
	need("", "pods", "to see when the gates are ready", "list", "watch")
	add(true, "", "pods", "portforward", "to tell the gates where to lead traffic", "create")
	for _, kind := range kinds {
		switch kind {
		case intercept.Exchange, intercept.Mesh:
			need("", "services", "the intercepted Service, and the one that leads to its origin", "get", "patch", "create", "delete", "watch")
			need("discovery.k8s.io", "endpointslices", "to see which pods serve the Service now", "list")
		case intercept.Preview:
			need("", "services", "the Service of the preview", "get", "create", "delete", "watch")
		case intercept.Scale:
			for _, workloads := range []string{"deployments", "statefulsets", "replicasets"} {
				need("apps", workloads, "to replace a workload's pods, and put them back", "get", "patch")
			}
		}
	}
	want("networking.k8s.io", "networkpolicies", "without it nobody sees whether one keeps the gates from the origin", "list")
	want("networking.k8s.io", "networkpolicies", "without it no intercept works where a NetworkPolicy selects gates, origin or agent", "get", "create", "update", "delete")
	want("coordination.k8s.io", "leases", "without it `culvert clean` cannot tell what is left over", "list")
	return all
}

// InterceptRights reviews every verb that intercepts of the given kinds use in a
// namespace. It changes nothing. The error, an *api.Error, is for a review that
// could not be made.
func (c *Cluster) InterceptRights(ctx context.Context, namespace string, kinds ...string) ([]Check, error) {
	return c.review(ctx, interceptChecks(namespace, kinds...))
}

// InterceptAccess finds, before anything is changed, a missing right that would
// stop an intercept: an *api.Error with CodeForbidden that names verb and resource.
func (c *Cluster) InterceptAccess(ctx context.Context, namespace string, kinds ...string) error {
	checks, err := c.InterceptRights(ctx, namespace, kinds...)
	if err != nil {
		return err
	}
	for _, check := range checks {
		if check.Needed && !check.Allowed {
			err := c.refused(ctx, check)
			if e, ok := err.(*api.Error); ok {
				e.Hint = grantHint(check)
			}
			return err
		}
	}
	return nil
}

// ruleAccess finds a missing right to rules of one kind: an *api.Error with
// CodeForbidden.
func (c *Cluster) ruleAccess(ctx context.Context, r router, namespace string) error {
	var checks []Check
	for _, verb := range []string{"list", "get", "create", "patch", "delete"} {
		checks = append(checks, newCheck(verb, r.kind().group, r.kind().resource, "", namespace, true, "the rule that leads marked requests to this machine"))
	}
	if r == (istio{}) {
		checks = append(checks, newCheck("create", destinationRules.group, destinationRules.resource, "", namespace, true, "one without TLS for the gates, where another would have it"))
	}
	checks, err := c.review(ctx, checks)
	if err != nil {
		return err
	}
	for _, check := range checks {
		if !check.Allowed {
			err := c.refused(ctx, check)
			if e, ok := err.(*api.Error); ok {
				e.Hint = grantHint(check) + "; --mode router needs no such right"
			}
			return err
		}
	}
	return nil
}

// grantHint names the role that has a verb of interceptChecks.
func grantHint(check Check) string {
	role := "culvert-intercept"
	if check.group == "apps" && check.Verb == "patch" {
		role = "culvert-scale"
	}
	if check.resource == "secrets" {
		role = "culvert-environ"
	}
	for mode, r := range routers {
		if check.group == r.kind().group {
			role = meshRole(mode)
		}
	}
	return fmt.Sprintf("an administrator can grant it with the role %s of deploy/rbac/culvert.yaml: `kubectl create rolebinding %s --clusterrole=%s --user=YOU -n %s`",
		role, role, role, check.Namespace)
}

// meshRole is the role that has what a mode's rules need.
func meshRole(mode string) string { return "culvert-mesh-" + mode }
