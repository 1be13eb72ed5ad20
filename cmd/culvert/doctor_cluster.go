package main

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// doctorTimeout bounds all that the doctor asks of the API server.
const doctorTimeout = 30 * time.Second

// cluster checks kubeconfig, credentials, rights, ranges and agent.
func (e *examination) cluster(ctx context.Context) {
	paths, err := kubeconfigPaths(e.app.kubeconfig, e.caller.env, e.caller.home)
	if err == nil {
		e.opts.Kubeconfig = strings.Join(paths, ":")
		e.target, err = newTarget(e.opts, e.caller.env, e.caller.home)
	}
	if err != nil {
		e.addError("kubeconfig", bad, err)
		e.add("cluster", skip, "", "not known without a kubeconfig")
		return
	}
	t := e.target
	e.opts.Context, e.opts.Namespace = t.Context, t.Namespace
	e.add("kubeconfig", good, "", "context %q, namespace %q, %s", t.Context, t.Namespace, t.Server)

	start := time.Now()
	name, err := whoAmI(ctx, t, term.IsTerminal(int(e.app.in.Fd())))
	if err != nil {
		e.addError("api server", bad, err)
		e.add("cluster", skip, "", "not known without the API server")
		return
	}
	t.User = name
	e.add("api server", good, "", "it answers in %s and knows you as %s", took(time.Since(start)), or(name, "somebody who may use it"))
	e.findSession(ctx)

	c, err := cluster.Open(e.opts)
	if err != nil {
		e.addError("cluster", bad, err)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, doctorTimeout)
	defer cancel()
	e.rights(ctx, c)
	e.interceptRights(ctx, c)
	e.ranges(ctx, c)
	e.agent(ctx, c)
}

// findSession finds the caller's session of the target.
func (e *examination) findSession(ctx context.Context) {
	if e.facts == nil {
		return
	}
	sessions, err := e.client.Sessions(ctx)
	if err != nil {
		return // the daemon's own check said so
	}
	i := slices.IndexFunc(sessions, func(s api.Session) bool {
		return s.UID == e.caller.uid && s.Context == e.target.Context && s.Server == e.target.Server && s.State != api.Disconnected
	})
	if i < 0 {
		return
	}
	e.session = &sessions[i]
	switch s := e.session; s.State {
	case api.Connected:
		e.add("session", good, "", "connected since %s", s.Since.Format(time.DateTime))
	default:
		e.add("session", warn, e.app.name+" logs", "%s", strings.TrimSuffix(string(s.State)+": "+detail(*s), ": "))
	}
}

// rights checks each verb that connect uses, needed or not.
func (e *examination) rights(ctx context.Context, c *cluster.Cluster) {
	checks, err := c.Access(ctx)
	if err != nil {
		e.addError("rights", bad, err)
		return
	}
	told := "" // the same command once, not once per verb
	for len(checks) > 0 {
		k, verbs := checks[0], []string{checks[0].Verb}
		for checks = checks[1:]; len(checks) > 0 && sameRight(k, checks[0]); checks = checks[1:] {
			verbs = append(verbs, checks[0].Verb)
		}
		where := "in the whole cluster"
		binding := "clusterrolebinding culvert --clusterrole=culvert-viewer"
		if k.Namespace != "" {
			where = "in namespace " + k.Namespace
			binding = "rolebinding culvert --clusterrole=culvert-user -n " + k.Namespace
		}
		what := fmt.Sprintf("%s %s %s", strings.Join(verbs, ", "), k.Resource, where)
		if k.Allowed {
			e.add("rights", good, "", "you may %s", what)
			continue
		}
		v := warn
		if k.Needed {
			v = bad
		}
		fix := fmt.Sprintf("an administrator: kubectl apply -f deploy/rbac/culvert.yaml; kubectl create %s --user=%q", binding, or(e.target.User, "YOU"))
		if fix == told && !e.app.json() {
			fix = ""
		} else {
			told = fix
		}
		e.add("rights", v, fix, "you may not %s: %s", what, k.Why)
	}
}

// interceptRights tells whether exchange, mesh and preview would work: connect does
// without.
func (e *examination) interceptRights(ctx context.Context, c *cluster.Cluster) {
	checks, err := c.InterceptRights(ctx, c.Namespace(), intercept.Exchange, intercept.Preview) // mesh needs what exchange does
	if err != nil {
		e.addError("intercepts", warn, err)
		return
	}
	var missing []string
	for _, k := range checks {
		if what := k.Verb + " " + k.Resource; k.Needed && !k.Allowed && !slices.Contains(missing, what) {
			missing = append(missing, what)
		}
	}
	if len(missing) == 0 {
		e.add("intercepts", good, "", "you may exchange, mesh and preview Services in namespace %s", c.Namespace())
		return
	}
	e.add("intercepts", warn, fmt.Sprintf("an administrator: kubectl create rolebinding culvert-intercept --clusterrole=culvert-intercept -n %s --user=%q", c.Namespace(), or(e.target.User, "YOU")),
		"you may not exchange, mesh or preview Services in namespace %s: %s", c.Namespace(), strings.Join(missing, ", "))
}

// sameRight says whether two checks differ in the verb only.
func sameRight(a, b cluster.Check) bool {
	return a.Resource == b.Resource && a.Namespace == b.Namespace && a.Allowed == b.Allowed && a.Needed == b.Needed && a.Why == b.Why
}

func (e *examination) ranges(ctx context.Context, c *cluster.Cluster) {
	r, err := c.Ranges(ctx)
	if err != nil {
		e.addError("ranges", bad, err)
		return
	}
	for i, route := range r.Routes {
		if i == summaryRoutes {
			e.add("ranges", good, "", "and %d more", len(r.Routes)-i)
			break
		}
		e.add("ranges", good, "", "%s (%s)", route.Prefix, route.Source)
	}
	for _, n := range r.Notes {
		e.add("ranges", warn, e.app.name+" connect --include-ips RANGE adds what is missing", "%s", n)
	}
	e.plan = e.planned(r.Routes)
	if len(e.plan) == 0 {
		e.add("ranges", bad, e.app.name+" connect --include-ips RANGE", "no range of the cluster is visible to you")
	}
}

// planned is what connect would route: the cluster's ranges and --include-ips,
// without what --exclude-ips covers whole. A part of a range that is excluded
// stays in the plan; resolved passes over the conflicts that it resolves.
func (e *examination) planned(routes []api.Route) []api.Route {
	include, _, _ := cluster.ParseSelectors(e.opts.IncludeIPs)
	for _, p := range include {
		routes = append(routes, api.Route{Prefix: p, Source: "--include-ips"})
	}
	exclude, _, _ := cluster.ParseSelectors(e.opts.ExcludeIPs)
	return slices.DeleteFunc(routes, func(r api.Route) bool {
		return covered(r.Prefix, exclude)
	})
}

// covered says whether p lies in one of the prefixes.
func covered(p netip.Prefix, in []netip.Prefix) bool {
	return slices.ContainsFunc(in, func(x netip.Prefix) bool { return x.Bits() <= p.Bits() && x.Overlaps(p) })
}

// resolved says whether --exclude-ips has what a conflict's flag asks for.
func (e *examination) resolved(c api.Conflict) bool {
	value, ok := strings.CutPrefix(c.Flag, "--exclude-ips ")
	if !ok {
		return false
	}
	wanted, _, err := cluster.ParseSelectors([]string{value})
	have, _, _ := cluster.ParseSelectors(e.opts.ExcludeIPs)
	return err == nil && len(wanted) > 0 && !slices.ContainsFunc(wanted, func(p netip.Prefix) bool { return !covered(p, have) })
}

// agent checks the image and whether the namespace would take the agent's pod.
func (e *examination) agent(ctx context.Context, c *cluster.Cluster) {
	if s := e.session; s != nil && s.Agent.Pod != "" {
		e.add("agent", good, "", "%s runs %s", agentText(s.Agent), strings.TrimSpace(s.Agent.Image+" "+s.Agent.Version))
		return
	}
	policy := or(e.opts.ImagePullPolicy, "IfNotPresent")
	spec := cluster.AgentSpec{
		Session: "doctor", Image: e.opts.Image, PullPolicy: policy, PullSecrets: e.opts.ImagePullSecrets,
		NodeSelector: e.opts.NodeSelector, Labels: e.opts.Labels, Annotations: e.opts.Annotations,
		ServiceAccount: e.opts.ServiceAccount, PodQuota: e.opts.PodQuota,
	}
	if err := c.Preflight(ctx, spec); err != nil {
		e.addError("agent", bad, err)
		return
	}
	e.add("agent", good, "", "namespace %q would take the agent's pod (image %s, pull policy %s; pulling is tried by connect)", e.opts.Namespace, e.opts.Image, policy)
}
