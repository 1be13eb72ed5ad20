package cluster

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// Istio's kinds. v1 came with Istio 1.22; the fields that culvert uses are older.
var (
	istioVersions = []string{"v1", "v1beta1"}

	virtualServices     = custom{kind: "VirtualService", resource: "virtualservices", group: "networking.istio.io", versions: istioVersions}
	destinationRules    = custom{kind: "DestinationRule", resource: "destinationrules", group: "networking.istio.io", versions: istioVersions}
	peerAuthentications = custom{kind: "PeerAuthentication", resource: "peerauthentications", group: "security.istio.io", versions: istioVersions}
)

// istioRoot is the namespace whose objects hold for all others, unless Istio was
// installed elsewhere (meshConfig.rootNamespace, which is not for users to read).
const istioRoot = "istio-system"

// istioProxy is the container that has a pod's traffic.
const istioProxy = "istio-proxy"

// istio puts rules into VirtualServices
// (https://istio.io/latest/docs/reference/config/networking/virtual-service/).
type istio struct{}

func (istio) kind() custom    { return virtualServices }
func (istio) rules() []string { return []string{"spec", "http"} }

func (istio) check(h *ruleHead) error {
	_, err := istioMatch(h.spec.Match)
	return err
}

// fqdn is a Service's full name, as Istio has it whatever the cluster's domain is.
func fqdn(service, namespace string) string { return service + "." + namespace + ".svc.cluster.local" }

// istioHost tells whether a host of a VirtualService or DestinationRule in a namespace
// means a Service of another, the same one mostly.
func istioHost(host, in, service, namespace string) bool {
	full := service + "." + namespace + ".svc"
	switch {
	case host == service:
		return in == namespace
	case host == service+"."+namespace, host == full, strings.HasPrefix(host, full+"."):
		return true
	case strings.HasPrefix(host, "*"):
		return strings.HasSuffix(fqdn(service, namespace), strings.TrimPrefix(host, "*"))
	}
	return false
}

// governs: hosts have the Service, and the rules are those of the pods' own proxies
// and not of a gateway's only.
func (istio) governs(o *unstructured.Unstructured, service, namespace string) bool {
	hosts, _, _ := unstructured.NestedStringSlice(o.Object, "spec", "hosts")
	gateways, _, _ := unstructured.NestedStringSlice(o.Object, "spec", "gateways")
	return (len(gateways) == 0 || slices.Contains(gateways, "mesh")) &&
		slices.ContainsFunc(hosts, func(host string) bool { return istioHost(host, o.GetNamespace(), service, namespace) })
}

func (istio) made(h *ruleHead, governing []*unstructured.Unstructured) map[string]map[string]any {
	if len(governing) > 0 {
		return nil
	}
	var routes []any
	for _, p := range tcpPorts(h.plan.Ports) {
		routes = append(routes, map[string]any{
			"match": []any{map[string]any{"port": int64(p.Port)}},
			"route": []any{istioDestination(h.plan.Name, h.plan.Namespace, p.Port)},
		})
	}
	return map[string]map[string]any{routerName(h.plan.Name): {"spec": map[string]any{
		"hosts": []any{fqdn(h.plan.Name, h.plan.Namespace)},
		"http":  routes,
	}}}
}

func istioDestination(service, namespace string, port int32) map[string]any {
	return map[string]any{"destination": map[string]any{"host": fqdn(service, namespace), "port": map[string]any{"number": int64(port)}}}
}

// insert: the proxies take the oldest of several objects for one host, and the first
// rule that matches.
func (istio) insert(h *ruleHead, o *unstructured.Unstructured, others []*unstructured.Unstructured) ([]any, error) {
	if others[0].GetUID() != o.GetUID() {
		return nil, nil
	}
	spec, _ := o.Object["spec"].(map[string]any)
	if spec["http"] == nil && (spec["tcp"] != nil || spec["tls"] != nil) {
		return nil, &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("VirtualService %s leads connections to %s and no requests", o.GetName(), h.plan), Hint: "--mode router"}
	}
	match, err := istioMatch(h.spec.Match)
	if err != nil {
		return nil, err
	}
	var rules []any
	for _, p := range h.list {
		block := map[string]any{}
		for k, v := range match {
			block[k] = v
		}
		if len(h.plan.Ports) > 1 { // of a gateway that also has these rules the port is another
			block["port"] = int64(p.Port)
		}
		rules = append(rules, map[string]any{
			"name":  fmt.Sprintf("%s-%d", h.name, p.Port),
			"match": []any{block},
			"route": []any{istioDestination(h.name, h.plan.Namespace, p.Port)},
		})
	}
	return rules, nil
}

// yields: of several for one host the oldest counts, and others' are younger.
func (istio) yields(_ *unstructured.Unstructured, theirs []*unstructured.Unstructured, _ string) bool {
	return len(theirs) > 0
}

func (istio) leadsTo(rule map[string]any, service, namespace string) bool {
	routes, _ := rule["route"].([]any)
	return slices.ContainsFunc(routes, func(route any) bool {
		m, _ := route.(map[string]any)
		host, _, _ := unstructured.NestedString(m, "destination", "host")
		return host != "" && istioHost(host, namespace, service, namespace)
	})
}

// istioMatch is the HTTPMatchRequest of conditions. All that a member's gates test,
// the proxies do, too; where these cannot, it is an *api.Error.
func istioMatch(match []intercept.Condition) (map[string]any, error) {
	headers, block := map[string]any{}, map[string]any{}
	for _, c := range match {
		at, key := block, map[string]string{intercept.OnPath: "uri", intercept.OnMethod: "method"}[c.On]
		if key == "" {
			at, key = headers, headerOf(c)
		}
		if at[key] != nil {
			return nil, twice(c, "Istio")
		}
		how, value := headerTest(c)
		at[key] = map[string]any{how: value}
	}
	if len(headers) > 0 {
		block["headers"] = headers
	}
	return block, nil
}

func twice(c intercept.Condition, whose string) error {
	return &api.Error{Code: api.CodeUnsupported, Message: fmt.Sprintf("a rule of %s takes one condition for each header, the path and the method: %s is one too many", whose, c), Hint: "fewer conditions, or --mode router"}
}

// headerOf is the header that a condition is on, in lower case.
func headerOf(c intercept.Condition) string {
	switch c.On {
	case intercept.OnCookie:
		return "cookie"
	case intercept.OnBaggage:
		return "baggage"
	}
	return strings.ToLower(c.Key)
}

// headerTest is a condition as exact, prefix or regex on a whole value, in RE2, which
// has to match all of it.
func headerTest(c intercept.Condition) (how, value string) {
	quoted := regexp.QuoteMeta(c.Value)
	switch c.How {
	case intercept.Prefix:
		quoted += `[^;,]*`
	case intercept.Regex:
		quoted = "(?:" + c.Value + ")"
	}
	switch {
	case c.On == intercept.OnCookie: // one of the pairs (RFC 6265, 4.2.1)
		return "regex", `(?:.*;)?\s*` + regexp.QuoteMeta(c.Key) + "=" + quoted + `\s*(?:;.*)?`
	case c.On == intercept.OnBaggage: // one of the members, which may have properties (W3C Baggage, 3.3)
		return "regex", `(?:.*,)?\s*` + regexp.QuoteMeta(c.Key) + `\s*=\s*` + quoted + `\s*(?:[;,].*)?`
	case c.On == intercept.OnMethod && strings.Contains(c.Value, ","):
		return "regex", strings.ReplaceAll(quoted, ",", "|")
	case c.How == intercept.Prefix && c.Value == "":
		return "regex", ".*"
	}
	return map[string]string{intercept.Exact: "exact", intercept.Prefix: "prefix", intercept.Regex: "regex"}[c.How], c.Value
}

// accepted: Istio says nothing of a VirtualService that it took up.
func (istio) accepted(context.Context, *ruleHead, *unstructured.Unstructured) (string, error) {
	return "", nil
}

// beside makes a DestinationRule where another one would have the proxies speak TLS to
// the gates, which have no proxy: where that cannot be seen, too.
func (istio) beside(ctx context.Context, h *ruleHead) error {
	needed := false
	for _, ns := range []string{h.plan.Namespace, istioRoot} {
		all, err := h.c.client.customs(destinationRules, ns).list(ctx)
		switch {
		case errors.Is(err, errNoKind):
			return nil
		case apierrors.IsForbidden(err):
			needed = true
			continue
		case err != nil:
			return translate("listing DestinationRules in namespace "+ns, err)
		}
		for _, o := range all {
			host, _, _ := unstructured.NestedString(o.Object, "spec", "host")
			mode, _, _ := unstructured.NestedString(o.Object, "spec", "trafficPolicy", "tls", "mode")
			switch {
			case o.GetName() == h.name && ns == h.plan.Namespace:
				return nil
			case mode != "" && mode != "DISABLE" && istioHost(host, ns, h.name, h.plan.Namespace):
				needed = true
			}
		}
	}
	if !needed {
		return nil
	}
	objects := h.c.client.customs(destinationRules, h.plan.Namespace)
	if _, err := objects.list(ctx); err != nil { // which version there is
		return ruleError(istio{}, h.plan.Namespace, "looking for DestinationRules", err)
	}
	_, err := objects.create(ctx, map[string]any{
		"metadata": map[string]any{
			"name": h.name, "namespace": h.plan.Namespace,
			"labels":          map[string]any{LabelName: routerApp, LabelManagedBy: "culvert"},
			"ownerReferences": []any{map[string]any{"apiVersion": "v1", "kind": "Service", "name": h.name, "uid": string(h.made)}},
		},
		"spec": map[string]any{"host": fqdn(h.name, h.plan.Namespace), "trafficPolicy": map[string]any{"tls": map[string]any{"mode": "DISABLE"}}},
	})
	if err != nil && !apierrors.IsAlreadyExists(err) {
		return ruleError(istio{}, h.plan.Namespace, "making a DestinationRule without TLS for the gates", err)
	}
	return nil
}

// sidecar is a pod of a Service with Istio's proxy, nil for none. One is enough: the
// others of a Deployment have it, too.
func (c *Cluster) sidecar(ctx context.Context, plan *ServicePlan) (*corev1.Pod, error) {
	pods, err := c.client.Pods(plan.Namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(plan.below.Spec.Selector).String(), Limit: pageSize})
	if err != nil {
		return nil, translate("looking at the pods of "+plan.String(), err)
	}
	for k := range pods.Items {
		pod := &pods.Items[k]
		proxy := func(c corev1.Container) bool { return c.Name == istioProxy }
		if slices.ContainsFunc(pod.Spec.Containers, proxy) || slices.ContainsFunc(pod.Spec.InitContainers, proxy) {
			return pod, nil
		}
	}
	return nil, nil
}

// strict tells which port of a pod with a proxy takes nothing but mutual TLS, 0 for
// none; known is false where the objects that say so may not be read.
func (c *Cluster) strict(ctx context.Context, plan *ServicePlan, pod *corev1.Pod) (port int32, known bool, err error) {
	known = true
	var all []*unstructured.Unstructured
	for _, ns := range []string{istioRoot, plan.Namespace} {
		some, err := c.client.customs(peerAuthentications, ns).list(ctx)
		switch {
		case errors.Is(err, errNoKind):
			return 0, true, nil
		case apierrors.IsForbidden(err):
			known = false
		case err != nil:
			return 0, false, translate("listing PeerAuthentications in namespace "+ns, err)
		}
		all = append(all, some...)
	}
	return strictPort(all, plan.Namespace, pod.Labels, plan.Ports), known, nil
}

// strictPort finds the first port that takes nothing but mutual TLS at a pod: what
// selects the pod goes before what is for the namespace, and that before what is for
// all (https://istio.io/latest/docs/reference/config/security/peer_authentication/).
func strictPort(all []*unstructured.Unstructured, namespace string, pod map[string]string, ports []PlanPort) int32 {
	best, rank := "", -1
	var byPort map[string]any
	for _, o := range all {
		selected, _, _ := unstructured.NestedStringMap(o.Object, "spec", "selector", "matchLabels")
		at := 0
		switch {
		case len(selected) > 0 && (o.GetNamespace() != namespace || !labels.SelectorFromSet(selected).Matches(labels.Set(pod))):
			continue
		case len(selected) > 0:
			at = 2
			if some, ok, _ := unstructured.NestedMap(o.Object, "spec", "portLevelMtls"); ok {
				byPort = some
			}
		case o.GetNamespace() == namespace:
			at = 1
		}
		if mode, _, _ := unstructured.NestedString(o.Object, "spec", "mtls", "mode"); mode != "" && mode != "UNSET" && at > rank {
			best, rank = mode, at
		}
	}
	for _, p := range tcpPorts(ports) {
		mode := best
		if m, ok := byPort[fmt.Sprint(p.Number)].(map[string]any); ok {
			mode, _ = m["mode"].(string)
		}
		if mode == "STRICT" {
			return p.Port
		}
	}
	return 0
}

// checkStrict refuses what has to reach the Service's pods by way of gates, where
// these take nothing but mutual TLS. need says that it has to.
func (c *Cluster) checkStrict(ctx context.Context, plan *ServicePlan, need bool, hint string) error {
	pod, err := c.sidecar(ctx, plan)
	if err != nil || pod == nil {
		return err
	}
	port, known, err := c.strict(ctx, plan, pod)
	switch {
	case err != nil:
		return err
	case port != 0 && need:
		return plan.unlessForced(hint, fmt.Sprintf("takes nothing but Istio's mutual TLS at port %d (PeerAuthentication STRICT): its pods would refuse what comes by way of gates; ", port))
	case !known:
		plan.note(fmt.Sprintf("whether %s takes nothing but Istio's mutual TLS is not known, since PeerAuthentications may not be listed: if so, its pods refuse what comes by way of gates", plan))
	}
	return nil
}
