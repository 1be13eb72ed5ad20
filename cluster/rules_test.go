package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// parsed is an object as it would be read from the API server.
func parsed(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	raw, err := yaml.YAMLToJSON([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	o := &unstructured.Unstructured{}
	if err := o.UnmarshalJSON(raw); err != nil {
		t.Fatal(err)
	}
	return o
}

// asJSON is what a rule looks like, on one line.
func asJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// rulePlan is Service web in namespace demo, and a mesh of it by alice.
func rulePlan(t *testing.T, r router, conditions []string, ports ...int32) *ruleHead {
	t.Helper()
	match, err := ParseMatch(conditions)
	if err != nil {
		t.Fatal(err)
	}
	h := &ruleHead{spec: &InterceptSpec{Match: match}, router: r, name: "web-culvert-a",
		plan: &ServicePlan{Namespace: "demo", Name: "web"}}
	for _, p := range ports {
		h.plan.Ports = append(h.plan.Ports, PlanPort{Port: p, Number: p, Protocol: corev1.ProtocolTCP})
	}
	h.list = h.plan.Ports[:1]
	return h
}

// What a proxy is told matches the headers that the gates match, and no others.
func TestHeaderTest(t *testing.T) {
	for text, values := range map[string]map[string]bool{
		"header:V=a.b":    {"a.b": true, "axb": false, "a.bc": false},
		"header:V=a*":     {"a": true, "ab": true, "ba": false},
		"header:V~a[0-9]": {"a1": true, "a1x": false, "xa1": false},
		"header:V=*":      {"": true, "x": true},
		"cookie:dev=a":    {"dev=a": true, "x=1; dev=a": true, "dev=a; x=1": true, "xdev=a": false, "dev=ab": false, "x=dev=a": false},
		"cookie:dev=a*":   {"dev=a": true, "dev=abc; y=2": true, "dev=b; x=a": false},
		"cookie:dev~a|b":  {"x=1; dev=b": true, "dev=c": false},
		"baggage:dev=a":   {"dev=a": true, "x=1,dev=a;p=1": true, "x=1, dev = a ,y=2": true, "dev=ab": false, "ydev=a": false},
		"method:GET,PUT":  {"GET": true, "PUT": true, "GETPUT": false, "POST": false},
		"path:/a/b":       {"/a/b": true, "/a/b/c": false},
		"path:/a/*":       {"/a/b": true, "/ab": false},
	} {
		match, err := ParseMatch([]string{text})
		if err != nil {
			t.Fatal(err)
		}
		how, value := headerTest(match[0])
		for sample, want := range values {
			var got bool
			switch how {
			case "exact":
				got = sample == value
			case "prefix":
				got = strings.HasPrefix(sample, value)
			case "regex":
				got = regexp.MustCompile("^(?:" + value + ")$").MatchString(sample)
			}
			if got != want {
				t.Errorf("%s is %s %q, which says %v of %q", text, how, value, got, sample)
			}
		}
	}
}

func TestIstioInsert(t *testing.T) {
	o := parsed(t, `{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: web, namespace: demo, uid: u1}, spec: {hosts: [web], http: [{route: [{destination: {host: web}}]}]}}`)
	governing := []*unstructured.Unstructured{o}
	for want, c := range map[string]struct {
		match []string
		ports []int32
	}{
		`[{"match":[{"headers":{"version":{"exact":"Feature/X"}}}],"name":"web-culvert-a-80","route":[{"destination":{"host":"web-culvert-a.demo.svc.cluster.local","port":{"number":80}}}]}]`: {[]string{"header:VERSION=Feature/X"}, []int32{80}},
		`[{"match":[{"headers":{"v":{"prefix":"a"}},"method":{"exact":"GET"},"port":80,"uri":{"regex":"/x/.*"}}],"name":"web-culvert-a-80","route":[{"destination":{"host":"web-culvert-a.demo.svc.cluster.local","port":{"number":80}}}]}]`: {
			[]string{"header:V=a*", "method:GET", "path~/x/.*"}, []int32{80, 81}},
	} {
		rules, err := istio{}.insert(rulePlan(t, istio{}, c.match, c.ports...), o, governing)
		if err != nil || asJSON(t, rules) != want {
			t.Errorf("%v: %s, %v; want %s", c.match, asJSON(t, rules), err, want)
		}
	}
	if _, err := (istio{}).insert(rulePlan(t, istio{}, []string{"cookie:a=1", "cookie:b=1"}, 80), o, governing); err == nil || !strings.Contains(err.Error(), "cookie:b=1") {
		t.Errorf("two conditions on one header: %v", err)
	}
	tcp := parsed(t, `{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: web, namespace: demo, uid: u1}, spec: {hosts: [web], tcp: [{route: []}]}}`)
	if _, err := (istio{}).insert(rulePlan(t, istio{}, []string{"cookie:a=1"}, 80), tcp, []*unstructured.Unstructured{tcp}); err == nil || !strings.Contains(err.Error(), "connections") {
		t.Errorf("a VirtualService of TCP: %v", err)
	}
	younger := parsed(t, `{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: other, namespace: demo, uid: u2}, spec: {hosts: [web]}}`)
	if rules, err := (istio{}).insert(rulePlan(t, istio{}, []string{"cookie:a=1"}, 80), younger, append(governing, younger)); err != nil || rules != nil {
		t.Errorf("of two for one host the younger counts: %v, %v", rules, err)
	}
}

func TestIstioGoverns(t *testing.T) {
	for spec, want := range map[string]bool{
		`{hosts: [web]}`:                                       true,
		`{hosts: [web.demo]}`:                                  true,
		`{hosts: [web.demo.svc.cluster.local]}`:                true,
		`{hosts: ["*.demo.svc.cluster.local"]}`:                true,
		`{hosts: [example.com], gateways: [front]}`:            false,
		`{hosts: [web], gateways: [front]}`:                    false,
		`{hosts: [web, example.com], gateways: [mesh, front]}`: true,
		`{hosts: [web2]}`:                                      false,
		`{hosts: [web.other]}`:                                 false,
	} {
		o := parsed(t, `{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {name: x, namespace: demo}, spec: `+spec+`}`)
		if got := (istio{}).governs(o, "web", "demo"); got != want {
			t.Errorf("%s: %v", spec, got)
		}
	}
}

// Of all matches the most specific one counts: the member's conditions stand with each
// of the owner's.
func TestGatewayInsert(t *testing.T) {
	o := parsed(t, `
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: web, namespace: demo, uid: u1}
spec:
  parentRefs: [{group: "", kind: Service, name: web, port: 80}]
  rules:
  - matches:
    - path: {type: PathPrefix, value: /api}
    - {path: {type: Exact, value: /x}, headers: [{name: Version, value: beta, type: Exact}]}
    - {path: {type: PathPrefix, value: /}, headers: [{name: team, value: red, type: Exact}]}
    backendRefs: [{name: api, port: 80}]
  - backendRefs: [{name: web, port: 80}]
`)
	h := rulePlan(t, gatewayAPI{}, []string{"header:VERSION=alice"}, 80, 81)
	rules, err := gatewayAPI{}.insert(h, o, []*unstructured.Unstructured{o})
	const mark = `{"name":"version","type":"Exact","value":"alice"}`
	want := `[{"backendRefs":[{"name":"web-culvert-a","port":80}],"matches":[{"headers":[` + mark + `]},` +
		`{"headers":[` + mark + `],"path":{"type":"PathPrefix","value":"/api"}},` +
		`{"headers":[` + mark + `,{"name":"team","type":"Exact","value":"red"}],"path":{"type":"PathPrefix","value":"/"}}]}]`
	if err != nil || asJSON(t, rules) != want {
		t.Errorf("%s, %v; want\n%s", asJSON(t, rules), err, want)
	}
	if got := len((gatewayAPI{}).made(h, []*unstructured.Unstructured{o})); got != 0 {
		t.Errorf("%d made beside the owner's", got)
	}
	h.list = h.plan.Ports[1:]
	if made := (gatewayAPI{}).made(h, []*unstructured.Unstructured{o}); len(made) != 1 || made["web-culvert-81"] == nil {
		t.Errorf("for a port that no route is for: %v", made)
	}
	all := parsed(t, `{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: web, namespace: demo, uid: u1}, spec: {parentRefs: [{group: "", kind: Service, name: web}]}}`)
	if _, err := (gatewayAPI{}).insert(h, all, []*unstructured.Unstructured{all}); err == nil || !strings.Contains(err.Error(), "several ports") {
		t.Errorf("a route for all ports of several: %v", err)
	}
}

func TestBothPaths(t *testing.T) {
	path := func(kind, value string) map[string]any { return map[string]any{"type": kind, "value": value} }
	for _, c := range []struct {
		mine, theirs, want map[string]any
	}{
		{path("Exact", "/a/b"), path("PathPrefix", "/a"), path("Exact", "/a/b")},
		{path("PathPrefix", "/"), path("Exact", "/x"), path("Exact", "/x")},
		{path("PathPrefix", "/a"), path("PathPrefix", "/a/b"), path("PathPrefix", "/a/b")},
		{path("PathPrefix", "/a"), path("PathPrefix", "/ab"), nil},
		{path("Exact", "/a"), path("Exact", "/b"), nil},
		{path("RegularExpression", "/a.*"), path("PathPrefix", "/"), path("RegularExpression", "/a.*")},
		{path("RegularExpression", "/a.*"), path("PathPrefix", "/a"), nil},
	} {
		got := bothPaths(c.mine, c.theirs)
		if asJSON(t, got) != asJSON(t, c.want) {
			t.Errorf("%v and %v: %v", c.mine, c.theirs, got)
		}
	}
}

func TestCovers(t *testing.T) {
	have := parsed(t, `{apiVersion: v1, kind: X, spec: {rules: [{matches: [{path: {type: PathPrefix, value: /}, headers: [{name: v, value: a}]}], backendRefs: [{name: w, port: 80, weight: 1}]}]}}`).Object["spec"]
	for text, want := range map[string]bool{
		`{rules: [{matches: [{headers: [{name: v, value: a}]}], backendRefs: [{name: w, port: 80}]}]}`: true,
		`{rules: [{matches: [{headers: [{name: v, value: b}]}], backendRefs: [{name: w, port: 80}]}]}`: false,
		`{rules: [{matches: [{headers: []}]}]}`:                                                        false,
		`{rules: []}`:                                                                                  false,
		`{other: 1}`:                                                                                   false,
	} {
		if got := covers(have, parsed(t, `{apiVersion: v1, kind: X, spec: `+text+`}`).Object["spec"]); got != want {
			t.Errorf("%s: %v", text, got)
		}
	}
}

func TestStrictPort(t *testing.T) {
	authn := func(ns, spec string) *unstructured.Unstructured {
		return parsed(t, `{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: x, namespace: `+ns+`}, spec: `+spec+`}`)
	}
	root, own := authn("istio-system", `{mtls: {mode: STRICT}}`), authn("demo", `{mtls: {mode: PERMISSIVE}}`)
	pods := authn("demo", `{selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {"80": {mode: DISABLE}}}`)
	elsewhere := authn("demo", `{selector: {matchLabels: {app: other}}, mtls: {mode: STRICT}}`)
	unset := authn("demo", `{mtls: {mode: UNSET}}`)
	ports := []PlanPort{{Port: 8080, Number: 80, Protocol: corev1.ProtocolTCP}, {Port: 81, Number: 81, Protocol: corev1.ProtocolTCP}}
	for _, c := range []struct {
		all  []*unstructured.Unstructured
		want int32
	}{
		{nil, 0}, {[]*unstructured.Unstructured{root}, 8080}, {[]*unstructured.Unstructured{root, own}, 0},
		{[]*unstructured.Unstructured{root, unset}, 8080}, {[]*unstructured.Unstructured{own, pods}, 81}, {[]*unstructured.Unstructured{own, elsewhere}, 0},
	} {
		if got := strictPort(c.all, "demo", map[string]string{"app": "web"}, ports); got != c.want {
			t.Errorf("%d objects: port %d, want %d", len(c.all), got, c.want)
		}
	}
}

func TestMemberName(t *testing.T) {
	if got := memberName("web", "f8c42f91"); got != "web-culvert-f8c42f91" {
		t.Error(got)
	}
	if got := memberName(strings.Repeat("x", 63), "f8c42f91"); len(got) != 63 || !strings.HasSuffix(got, "-culvert-f8c42f91") {
		t.Error(got)
	}
}

// A list of Services shows who meshes one by a rule, beside who does by the router.
func TestListOfRules(t *testing.T) {
	server, c := newFleetAPI(t)
	server.put(&corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "demo"}, Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{{Port: 80}}}})
	e := meshOf("a")
	e.Service, e.Mode = "web", intercept.ModeIstio
	putMeshAt(t, server, "web-culvert-a", e)
	all, err := c.List(t.Context(), "demo")
	if err != nil || len(all) != 1 || all[0].Kind != intercept.Mesh || all[0].Mode != "istio" || len(all[0].Members) != 1 || all[0].Members[0].Mode != "istio" {
		t.Errorf("%+v, %v", all, err)
	}
}

// Who may not list a kind is told so also where the cluster has no such kind: that is
// no reason to say that something is not known.
func TestCustomsForbidden(t *testing.T) {
	groups := map[string]bool{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		code, reason := http.StatusForbidden, metav1.StatusReasonForbidden
		if group, ok := strings.CutPrefix(r.URL.Path, "/apis/"); ok && !strings.Contains(group, "/") {
			if groups[group] {
				w.Header().Set("Content-Type", "application/json")
				_, _ = w.Write([]byte(`{"kind":"APIGroup","apiVersion":"v1"}`))
				return
			}
			code, reason = http.StatusNotFound, metav1.StatusReasonNotFound
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: reason, Code: int32(code)})
	}))
	t.Cleanup(server.Close)
	c, err := NewClient(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.customs(virtualServices, "demo").list(t.Context()); err != errNoKind {
		t.Errorf("without the kind: %v", err)
	}
	groups[virtualServices.group] = true
	if _, err := c.customs(virtualServices, "demo").list(t.Context()); !apierrors.IsForbidden(err) {
		t.Errorf("with it: %v", err)
	}
}

// Whose mark it is may have it by the router or by a rule: who waits for him, or takes
// over, undoes the very entry.
func TestTakenByRule(t *testing.T) {
	h := rulePlan(t, istio{}, []string{"header:VERSION=alice"}, 80)
	h.list[0].Local = 8080
	i := &Intercept{Key: h.name, head: h, spec: InterceptSpec{Kind: intercept.Mesh, Namespace: "demo", Holder: intercept.Holder{Session: "a"}, Match: h.spec.Match}}
	e := meshOf("b")
	e.Mode, e.Members[0].Match, e.Members[0].Ports = intercept.ModeIstio, h.spec.Match, []intercept.MemberPort{{Port: 80}}
	state := &intercept.State{Entries: map[string]intercept.Entry{"web-culvert-b": e, "other": meshOf("c")}}
	var held *Held
	if err := i.checkTaken(state); !errors.As(err, &held) || held.Key != "web-culvert-b" || held.Holder.Session != "b" {
		t.Errorf("it is %+v", err)
	}
	e.Members[0].Ports[0].Port = 81
	if err := i.checkTaken(state); err != nil {
		t.Errorf("at another port: %v", err)
	}
}

// What culvert made where there was nothing yields to what an owner makes later.
func TestYields(t *testing.T) {
	own := parsed(t, `{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: web-culvert-80, namespace: demo}, spec: {parentRefs: [{group: "", kind: Service, name: web, port: 80}]}}`)
	for refs, want := range map[string]bool{
		`[{group: "", kind: Service, name: web, port: 80}]`: true, `[{group: "", kind: Service, name: web}]`: true,
		`[{group: "", kind: Service, name: web, port: 81}]`: false, `[{group: "", kind: Service, name: other}]`: false,
	} {
		theirs := parsed(t, `{apiVersion: gateway.networking.k8s.io/v1, kind: HTTPRoute, metadata: {name: x, namespace: demo}, spec: {parentRefs: `+refs+`}}`)
		if got := (gatewayAPI{}).yields(own, []*unstructured.Unstructured{theirs}, "web"); got != want {
			t.Errorf("to %s: %v", refs, got)
		}
	}
}

// Who may not see the rules cannot lead back what they lead, and then nothing is
// deleted from under them. Of a rule that is the user's own there is nothing to see.
func TestRemoveRulesForbidden(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if strings.Count(r.URL.Path, "/") == 2 { // a group
			_, _ = w.Write([]byte(`{"kind":"APIGroup","apiVersion":"v1"}`))
			return
		}
		w.WriteHeader(http.StatusForbidden)
		_ = json.NewEncoder(w).Encode(metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusFailure, Reason: metav1.StatusReasonForbidden, Code: http.StatusForbidden})
	}))
	t.Cleanup(server.Close)
	client, err := NewClient(&rest.Config{Host: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	c := &Cluster{client: client}
	for mode, want := range map[string]string{intercept.ModeIstio: "culvert-mesh-istio", intercept.ModeGateway: "culvert-mesh-gateway", "": "culvert-mesh-", intercept.ModeManual: ""} {
		err := c.removeRules(t.Context(), "demo", "web-culvert-a", mode)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(fmt.Sprintf("%+v", asAPIError(err).Hint)+err.Error(), want)) {
			t.Errorf("mode %q: %+v", mode, err)
		}
	}
}
