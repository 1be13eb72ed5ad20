package cluster

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

var httpRoutes = custom{kind: "HTTPRoute", resource: "httproutes", group: "gateway.networking.k8s.io", versions: []string{"v1", "v1beta1"}}

const (
	// maxRouteMatches is how many matches a rule may have, and maxRouteRules how many
	// rules a route (the CRD's own bounds).
	maxRouteMatches = 64
	maxRouteRules   = 16
	// acceptTime is how long a controller has to say that it took a route up.
	acceptTime = 5 * time.Second
)

// gatewayAPI puts rules into HTTPRoutes whose parent is the Service itself (GAMMA, GEP-1294:
// https://gateway-api.sigs.k8s.io/mesh/).
type gatewayAPI struct{}

func (gatewayAPI) kind() custom    { return httpRoutes }
func (gatewayAPI) rules() []string { return []string{"spec", "rules"} }

func (gatewayAPI) check(h *ruleHead) error {
	_, err := routeMatches(h.spec.Match)
	return err
}

// parentPorts are the ports of a Service that a route is for; all says that it names
// none.
func parentPorts(o *unstructured.Unstructured, service, namespace string) (ports []int32, all bool) {
	refs, _, _ := unstructured.NestedSlice(o.Object, "spec", "parentRefs")
	for _, one := range refs {
		ref, _ := one.(map[string]any)
		in := o.GetNamespace()
		if ns, _ := ref["namespace"].(string); ns != "" {
			in = ns
		}
		group, _ := ref["group"].(string)
		if ref["kind"] != "Service" || group != "" && group != "core" || ref["name"] != service || in != namespace {
			continue
		}
		if port, ok := number(ref["port"]); ok {
			ports = append(ports, int32(port))
		} else {
			all = true
		}
	}
	return ports, all
}

// number is a JSON number, which is int64 or float64 after it was read.
func number(v any) (int64, bool) {
	switch n := v.(type) {
	case int64:
		return n, true
	case float64:
		return int64(n), true
	}
	return 0, false
}

func (gatewayAPI) governs(o *unstructured.Unstructured, service, namespace string) bool {
	ports, all := parentPorts(o, service, namespace)
	return all || len(ports) > 0
}

// routesFor are those that decide about one port.
func routesFor(h *ruleHead, governing []*unstructured.Unstructured, port int32) []*unstructured.Unstructured {
	var some []*unstructured.Unstructured
	for _, o := range governing {
		if ports, all := parentPorts(o, h.plan.Name, h.plan.Namespace); all || slices.Contains(ports, port) {
			some = append(some, o)
		}
	}
	return some
}

func (gatewayAPI) made(h *ruleHead, governing []*unstructured.Unstructured) map[string]map[string]any {
	all := map[string]map[string]any{}
	for _, p := range h.list {
		if len(routesFor(h, governing, p.Port)) > 0 {
			continue
		}
		all[hashed(h.plan.Name, "culvert", fmt.Sprint(p.Port))] = map[string]any{"spec": map[string]any{
			"parentRefs": []any{map[string]any{"group": "", "kind": "Service", "name": h.plan.Name, "port": int64(p.Port)}},
			"rules":      []any{map[string]any{"backendRefs": []any{routeBackend(h.plan.Name, p.Port)}}},
		}}
	}
	return all
}

func routeBackend(service string, port int32) map[string]any {
	return map[string]any{"name": service, "port": int64(port)}
}

// insert: of all routes for one parent the most specific match counts, wherever it is.
// So the member's conditions go together with each match that others have: it is more
// specific than theirs.
func (gatewayAPI) insert(h *ruleHead, o *unstructured.Unstructured, governing []*unstructured.Unstructured) ([]any, error) {
	own, err := routeMatches(h.spec.Match)
	if err != nil {
		return nil, err
	}
	var rules []any
	for _, p := range h.list {
		routes := routesFor(h, governing, p.Port)
		if len(routes) == 0 || routes[0].GetUID() != o.GetUID() {
			continue
		}
		if ports, all := parentPorts(o, h.plan.Name, h.plan.Namespace); len(tcpPorts(h.plan.Ports)) > 1 && (all || len(ports) > 1) {
			return nil, &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("HTTPRoute %s is for several ports of %s, and a rule could not tell them apart", o.GetName(), h.plan), Hint: "--mode router"}
		}
		matches := slices.Clone(own)
		for _, route := range routes {
			for _, rule := range rulesOf(gatewayAPI{}, route) {
				if ofCulverts(gatewayAPI{}, rule, append(h.members, h.name), h.plan.Namespace) {
					continue
				}
				theirs, _ := rule["matches"].([]any)
				for _, m := range theirs {
					match, _ := m.(map[string]any)
					for _, mine := range own {
						if both := bothMatches(mine.(map[string]any), match); both != nil && !slices.ContainsFunc(matches, func(m any) bool { return covers(m, both) && covers(both, m) }) {
							matches = append(matches, both)
						}
					}
				}
			}
		}
		if len(matches) > maxRouteMatches || len(rulesOf(gatewayAPI{}, o)) >= maxRouteRules && !ofCulverts(gatewayAPI{}, firstRule(o), []string{h.name}, h.plan.Namespace) {
			return nil, &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("HTTPRoute %s has no room for one more rule (%d rules, %d matches in one, are possible)", o.GetName(), maxRouteRules, maxRouteMatches), Hint: "--mode router"}
		}
		rules = append(rules, map[string]any{"matches": matches, "backendRefs": []any{routeBackend(h.name, p.Port)}})
	}
	return rules, nil
}

func firstRule(o *unstructured.Unstructured) map[string]any {
	if all := rulesOf(gatewayAPI{}, o); len(all) > 0 {
		return all[0]
	}
	return nil
}

// yields: of matches that are alike those of the oldest route count.
func (gatewayAPI) yields(o *unstructured.Unstructured, theirs []*unstructured.Unstructured, service string) bool {
	own, _ := parentPorts(o, service, o.GetNamespace())
	return slices.ContainsFunc(theirs, func(t *unstructured.Unstructured) bool {
		ports, all := parentPorts(t, service, o.GetNamespace())
		return all || slices.ContainsFunc(own, func(p int32) bool { return slices.Contains(ports, p) })
	})
}

func (gatewayAPI) leadsTo(rule map[string]any, service, namespace string) bool {
	backends, _ := rule["backendRefs"].([]any)
	return slices.ContainsFunc(backends, func(b any) bool {
		ref, _ := b.(map[string]any)
		ns, _ := ref["namespace"].(string)
		kind, _ := ref["kind"].(string)
		return ref["name"] == service && (ns == "" || ns == namespace) && (kind == "" || kind == "Service")
	})
}

// routeMatches are the HTTPRouteMatches of conditions; several methods are several.
func routeMatches(match []intercept.Condition) ([]any, error) {
	one := map[string]any{}
	var headers []any
	methods := []string{""}
	used := map[string]bool{}
	for _, c := range match {
		at := c.On
		if c.On != intercept.OnPath && c.On != intercept.OnMethod {
			at = "header " + headerOf(c)
		}
		if used[at] {
			return nil, twice(c, "Gateway API")
		}
		used[at] = true
		switch c.On {
		case intercept.OnMethod:
			methods = strings.Split(c.Value, ",")
		case intercept.OnPath:
			one["path"] = routePath(c)
		default:
			kind := "Exact"
			how, value := headerTest(c)
			if how == "prefix" {
				how, value = "regex", regexp.QuoteMeta(value)+".*"
			}
			if how == "regex" {
				kind = "RegularExpression"
			}
			headers = append(headers, map[string]any{"type": kind, "name": headerOf(c), "value": value})
		}
	}
	if len(headers) > 0 {
		one["headers"] = headers
	}
	var all []any
	for _, m := range methods {
		with := map[string]any{}
		for k, v := range one {
			with[k] = v
		}
		if m != "" {
			with["method"] = m
		}
		all = append(all, with)
	}
	return all, nil
}

// routePath: a PathPrefix of Gateway API ends at a slash.
func routePath(c intercept.Condition) map[string]any {
	switch {
	case c.How == intercept.Exact:
		return map[string]any{"type": "Exact", "value": c.Value}
	case c.How == intercept.Prefix && strings.HasSuffix(c.Value, "/"):
		value := strings.TrimSuffix(c.Value, "/")
		if value == "" {
			value = "/"
		}
		return map[string]any{"type": "PathPrefix", "value": value}
	case c.How == intercept.Prefix:
		return map[string]any{"type": "RegularExpression", "value": regexp.QuoteMeta(c.Value) + ".*"}
	}
	return map[string]any{"type": "RegularExpression", "value": c.Value}
}

// bothMatches is what fulfils mine and theirs, nil where no match can say so.
func bothMatches(mine, theirs map[string]any) map[string]any {
	both := map[string]any{}
	for k, v := range theirs {
		both[k] = v
	}
	for k, v := range mine {
		switch {
		case k == "headers":
			list, _ := theirs["headers"].([]any)
			headers := slices.Clone(v.([]any))
			for _, t := range list {
				h, _ := t.(map[string]any)
				name, _ := h["name"].(string)
				at := slices.IndexFunc(headers, func(m any) bool { return strings.EqualFold(m.(map[string]any)["name"].(string), name) })
				switch {
				case at < 0:
					headers = append(headers, t)
				case headers[at].(map[string]any)["value"] != h["value"]:
					return nil
				}
			}
			both["headers"] = headers
		case theirs[k] == nil:
			both[k] = v
		case k == "path":
			path := bothPaths(v.(map[string]any), theirs["path"])
			if path == nil {
				return nil
			}
			both["path"] = path
		case theirs[k] != v:
			return nil
		}
	}
	return both
}

// bothPaths is the narrower of two, nil where neither has the other in it.
func bothPaths(mine map[string]any, their any) map[string]any {
	theirs, _ := their.(map[string]any)
	for _, pair := range [][2]map[string]any{{mine, theirs}, {theirs, mine}} {
		wide, _ := pair[0]["value"].(string)
		narrow, _ := pair[1]["value"].(string)
		switch kind := pair[0]["type"]; {
		case kind == "PathPrefix" && wide == "/",
			kind == "PathPrefix" && pair[1]["type"] != "RegularExpression" && (narrow == wide || strings.HasPrefix(narrow, strings.TrimSuffix(wide, "/")+"/")),
			kind == pair[1]["type"] && wide == narrow:
			return pair[1]
		}
	}
	return nil
}

func (gatewayAPI) beside(context.Context, *ruleHead) error { return nil }

// accepted waits for the conditions that controllers write (GEP-1364).
func (gatewayAPI) accepted(ctx context.Context, h *ruleHead, o *unstructured.Unstructured) (note string, err error) {
	objects := h.c.client.customs(httpRoutes, h.plan.Namespace)
	if _, err := objects.list(ctx); err != nil {
		return "", err
	}
	for end := time.Now().Add(acceptTime); ; {
		live, err := objects.get(ctx, o.GetName())
		if err != nil {
			return "", err
		}
		said, bad := routeSays(live)
		switch {
		case bad != "":
			return "", &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("HTTPRoute %s with the rule for %s was refused: %s", o.GetName(), h.plan, bad), Hint: "other conditions, or --mode router"}
		case said:
			return "", nil
		case time.Now().After(end):
			return fmt.Sprintf("no controller said within %v that it took up HTTPRoute %s: without one requests go where they went", acceptTime, o.GetName()), nil
		}
		select {
		case <-time.After(pollRules):
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

// routeSays tells whether a controller has taken up a route as it is now, or what it
// has against it.
func routeSays(o *unstructured.Unstructured) (accepted bool, bad string) {
	parents, _, _ := unstructured.NestedSlice(o.Object, "status", "parents")
	for _, p := range parents {
		parent, _ := p.(map[string]any)
		conditions, _, _ := unstructured.NestedSlice(parent, "conditions")
		for _, one := range conditions {
			c, _ := one.(map[string]any)
			generation, _ := number(c["observedGeneration"])
			if generation < o.GetGeneration() {
				continue
			}
			switch kind := c["type"]; {
			case (kind == "Accepted" || kind == "ResolvedRefs") && c["status"] == "False":
				return false, fmt.Sprintf("%v %v: %v", c["type"], c["reason"], c["message"])
			case kind == "Accepted" && c["status"] == "True":
				accepted = true
			}
		}
	}
	return accepted, ""
}

// tcpPorts are those that may carry requests.
func tcpPorts(ports []PlanPort) []PlanPort {
	return slices.DeleteFunc(slices.Clone(ports), func(p PlanPort) bool { return p.Protocol != corev1.ProtocolTCP })
}
