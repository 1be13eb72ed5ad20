package cluster

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// readPolicies reads specs by name.
func readPolicies(t *testing.T, text string) (all []networkingv1.NetworkPolicy) {
	t.Helper()
	specs := map[string]networkingv1.NetworkPolicySpec{}
	if err := yaml.UnmarshalStrict([]byte(text), &specs); err != nil {
		t.Fatal(err)
	}
	for _, name := range sortedNames(specs) {
		all = append(all, networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "demo"}, Spec: specs[name]})
	}
	return all
}

func sortedNames[T any](m map[string]T) (names []string) {
	for name := range m {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

func testPolicySpec() PolicySpec {
	return PolicySpec{
		Service: "web", Session: "s1", Gate: "culvert-gate",
		OriginSelector: map[string]string{"app": "web"},
		Ports: []PolicyPort{
			{Target: intstr.FromString("http"), Gate: 20001},
			{Target: intstr.FromInt32(9090), Gate: 20002},
			{Protocol: "UDP", Target: intstr.FromInt32(53), Gate: 20003},
		},
		AgentLabels: map[string]string{LabelName: agentApp, LabelSession: "s1"},
	}
}

func testView(policies []networkingv1.NetworkPolicy) *policyView {
	return &policyView{
		namespace: "demo", agentNamespace: "demo", spec: testPolicySpec(), policies: policies, atAgent: policies,
		origin: []corev1.Pod{{
			ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"app": "web", "tier": "front"}},
			Spec: corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{
				{Name: "http", ContainerPort: 8080}, {Name: "metrics", ContainerPort: 9090, Protocol: "TCP"}, {Name: "dns", ContainerPort: 53, Protocol: "UDP"},
			}}}},
		}},
		gates:  []labels.Set{{LabelGate: "culvert-gate", LabelManagedBy: "culvert"}},
		agents: []labels.Set{{LabelName: agentApp, LabelSession: "s1"}},
	}
}

// say writes a policy so that a person sees what it allows.
func say(p *networkingv1.NetworkPolicy) string {
	ports := func(all []networkingv1.NetworkPolicyPort) string {
		var texts []string
		for _, p := range all {
			texts = append(texts, fmt.Sprintf("%s/%s", p.Port, *p.Protocol))
		}
		return strings.Join(texts, " ")
	}
	peers := func(all []networkingv1.NetworkPolicyPeer) string {
		if len(all) == 0 {
			return "all"
		}
		var texts []string
		for _, p := range all {
			text := ""
			if p.NamespaceSelector != nil {
				text += "ns(" + metav1.FormatLabelSelector(p.NamespaceSelector) + ")"
			}
			if p.PodSelector != nil {
				text += metav1.FormatLabelSelector(p.PodSelector)
			}
			if p.IPBlock != nil {
				text += p.IPBlock.CIDR
			}
			texts = append(texts, text)
		}
		return strings.Join(texts, " or ")
	}
	text := strings.TrimPrefix(p.Name, "culvert-web-")
	if i := strings.IndexByte(text, '-'); i > 0 {
		text = text[:i] // the hash
	}
	text += " " + metav1.FormatLabelSelector(&p.Spec.PodSelector)
	for _, r := range p.Spec.Ingress {
		text += fmt.Sprintf("; from %s at %s", peers(r.From), ports(r.Ports))
	}
	for _, r := range p.Spec.Egress {
		text += fmt.Sprintf("; to %s at %s", peers(r.To), ports(r.Ports))
	}
	return text
}

func TestPoliciesWanted(t *testing.T) {
	const (
		gates     = "culvert.dev/gate=culvert-gate"
		origin    = "origin %s; from " + gates + " at http/TCP 9090/TCP 53/UDP"
		intoAgent = "agent app.kubernetes.io/name=culvert-agent,culvert.dev/session=s1; from " + gates + " at 7535/TCP"
		outOf     = "out " + gates + "; to all at 53/UDP 53/TCP; to app=web at http/TCP 9090/TCP 53/UDP; to app.kubernetes.io/name=culvert-agent,culvert.dev/session=s1 at 7535/TCP"
		openGates = "gates " + gates + "; from all at 20001/TCP 20002/TCP 20003/UDP"
	)
	for _, test := range []struct {
		name     string
		policies string
		change   func(*policyView)
		want     []string
	}{
		{name: "none"},
		{name: "of others", policies: `{a: {podSelector: {matchLabels: {app: db}}, ingress: [{}]}}`},
		{
			name:     "egress of the origin is no business of ours",
			policies: `{a: {podSelector: {matchLabels: {app: web}}, policyTypes: [Egress], egress: [{}]}}`,
		},
		{
			name:     "the origin by a label that the Service does not select by, a port by its number",
			policies: `{a: {podSelector: {matchLabels: {tier: front}}, ingress: [{from: [{podSelector: {matchLabels: {app: cart}}}], ports: [{port: 8080}]}]}}`,
			want: []string{
				fmt.Sprintf(origin, "app in (web),tier=front"),
				"gates " + gates + "; from app=cart at 20001/TCP",
			},
		},
		{
			name: "by name, by range, of the right protocol, and everything",
			policies: `{a: {podSelector: {matchExpressions: [{key: app, operator: Exists}]}, ingress: [
				{from: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: metrics}]},
				{from: [{namespaceSelector: {matchLabels: {x: one}}}], ports: [{port: 9000, endPort: 9100}]},
				{ports: [{port: 53}]},
				{ports: [{port: 53, protocol: UDP}]},
				{from: [{podSelector: {}}]}]}}`,
			want: []string{
				fmt.Sprintf(origin, "app,app in (web)"),
				"gates " + gates + "; from 10.0.0.0/8 at 20002/TCP; from ns(x=one) at 20002/TCP; from all at 20003/UDP; from <none> at 20001/TCP 20002/TCP 20003/UDP",
			},
		},
		{
			name:     "default deny closes everything, and nothing is opened but what the intercept needs",
			policies: `{deny: {podSelector: {}, policyTypes: [Ingress, Egress]}}`,
			want: []string{
				fmt.Sprintf(origin, "app in (web)"),
				"gates " + gates,
				outOf,
				intoAgent,
			},
		},
		{
			name:     "default deny with an exception for the origin",
			policies: `{deny: {podSelector: {}}, web: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: http}]}]}}`,
			want: []string{
				fmt.Sprintf(origin, "app in (web)"),
				fmt.Sprintf(origin, "app=web,app in (web)"),
				"gates " + gates + "; from all at 20001/TCP",
				intoAgent,
			},
		},
		{
			name:     "gates are closed, the origin is not",
			policies: `{a: {podSelector: {matchExpressions: [{key: app, operator: DoesNotExist}]}}}`,
			want:     []string{openGates, intoAgent},
		},
		{
			name:     "a preview has no origin",
			policies: `{deny: {podSelector: {}}}`,
			change:   func(v *policyView) { v.spec.OriginSelector, v.origin = nil, nil },
			want:     []string{openGates, intoAgent},
		},
		{
			name:     "gates with the labels of what they replace have its policies",
			policies: `{web: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {}}]}]}}`,
			change: func(v *policyView) {
				v.spec.OriginSelector, v.origin, v.spec.StandIn = nil, nil, true
				v.gates[0]["app"] = "web"
			},
			want: []string{"out " + gates + "; to all at 53/UDP 53/TCP; to app.kubernetes.io/name=culvert-agent,culvert.dev/session=s1 at 7535/TCP"},
		},
		{
			name: "clients that may go to the origin only",
			policies: `{cart: {podSelector: {matchLabels: {app: cart}}, policyTypes: [Egress], egress: [{to: [{podSelector: {matchLabels: {app: web}}}], ports: [{port: 8080}]}]},
				free: {podSelector: {matchLabels: {app: x}}, policyTypes: [Egress], egress: [{to: [{podSelector: {}}]}]},
				far: {podSelector: {matchLabels: {app: y}}, policyTypes: [Egress], egress: [{to: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: other}}, podSelector: {}}]}]}}`,
			want: []string{"clients app=cart; to " + gates + " at 20001/TCP"},
		},
		{
			name:     "an agent in another namespace",
			policies: `{deny: {podSelector: {}, policyTypes: [Egress]}}`,
			change: func(v *policyView) {
				v.agentNamespace = "home"
				v.atAgent = []networkingv1.NetworkPolicy{{Spec: networkingv1.NetworkPolicySpec{}}}
			},
			want: []string{
				strings.Replace(outOf, "to app.k", "to ns(kubernetes.io/metadata.name=home)app.k", 1),
				strings.Replace(intoAgent, "from ", "from ns(kubernetes.io/metadata.name=demo)", 1),
			},
		},
		{
			name:     "own ones of before count for nothing",
			policies: `{own: {podSelector: {}, policyTypes: [Ingress, Egress]}}`,
			change: func(v *policyView) {
				v.policies[0].Labels = v.spec.ownLabels("demo")
			},
		},
		{
			name:     "another intercept closed the gates",
			policies: `{other: {podSelector: {matchLabels: {culvert.dev/gate: culvert-gate}}, ingress: [{ports: [{port: 20009}]}]}}`,
			change: func(v *policyView) {
				v.policies[0].Labels = PolicySpec{Service: "db"}.ownLabels("demo")
			},
			want: []string{openGates},
		},
	} {
		v := testView(readPolicies(t, test.policies))
		if test.change != nil {
			test.change(v)
		}
		var got []string
		names := map[string]bool{}
		for _, p := range v.wanted() {
			got = append(got, say(p))
			names[p.Name] = true
			if len(p.Name) > 63 || p.Labels[LabelService] != "web" || len(p.OwnerReferences) != 0 {
				t.Errorf("%s: %+v", test.name, p.ObjectMeta)
			}
		}
		if !slices.Equal(got, test.want) || len(names) != len(got) {
			t.Errorf("%s:\n%s\nwant\n%s", test.name, strings.Join(got, "\n"), strings.Join(test.want, "\n"))
		}
	}
}

// A policy for the origin must never close a pod that was open.
func TestPoliciesSelectClosedPodsOnly(t *testing.T) {
	v := testView(readPolicies(t, `{a: {podSelector: {matchLabels: {tier: front}}}}`))
	p := v.wanted()[0]
	for _, test := range []struct {
		pod  labels.Set
		want bool
	}{
		{labels.Set{"app": "web", "tier": "front"}, true},
		{labels.Set{"app": "web", "tier": "back"}, false}, // open: the Service selects it, no policy does
		{labels.Set{"app": "db", "tier": "front"}, false}, // closed, and no origin
	} {
		if got := selects(&p.Spec.PodSelector, []labels.Set{test.pod}); got != test.want {
			t.Errorf("%v: %v", test.pod, got)
		}
	}
}

func TestEnsurePolicies(t *testing.T) {
	server, c := newFleetAPI(t)
	if made, notes, err := c.EnsurePolicies(t.Context(), "demo", testPolicySpec()); err != nil || len(made) != 0 || len(notes) != 0 {
		t.Fatalf("%v, %v, %v", made, notes, err)
	}
	theirs := readPolicies(t, `{web: {podSelector: {matchLabels: {app: web}}, ingress: [{from: [{podSelector: {matchLabels: {app: cart}}}]}]}}`)[0]
	server.put(&theirs)
	pod := testView(nil).origin[0]
	pod.Name, pod.Namespace = "web-1", "demo"
	server.put(&pod)
	// Others are at the same gates already.
	for key, e := range map[string]intercept.Entry{
		"web": testEntry("culvert-gate", "s1", 20001), "db": testEntry("culvert-gate", "s2", 20500), "own": testEntry("culvert-gate-own", "s3", 80),
	} {
		if _, err := c.ChangeGateState(t.Context(), "demo", addEntry(key, e)); err != nil {
			t.Fatal(err)
		}
	}
	origin := "culvert-web-origin-" + digest("web")
	for range 2 {
		made, notes, err := c.EnsurePolicies(t.Context(), "demo", testPolicySpec())
		if err != nil || len(notes) != 0 || !slices.Contains(made, "demo/"+origin) {
			t.Fatalf("%v, %v, %v", made, notes, err)
		}
		if got := server.list("NetworkPolicy"); !slices.Equal(got, []string{"culvert-db-gates", "culvert-web-gates", origin, "web"}) {
			t.Fatalf("%v", got)
		}
	}
	db, err := c.client.NetworkPolicies("demo").Get(t.Context(), "culvert-db-gates", metav1.GetOptions{})
	if err != nil || db.Labels[LabelSession] != "s2" || say(db) != "culvert culvert.dev/gate=culvert-gate; from all at 20500/TCP" {
		t.Errorf("%s %v, %v", say(db), db.Labels, err)
	}
	// Ports that moved are written anew.
	moved := testPolicySpec()
	moved.Ports[0].Gate = 20100
	before := server.writes
	if _, _, err := c.EnsurePolicies(t.Context(), "demo", moved); err != nil || server.writes != before+1 {
		t.Errorf("%d writes, %v", server.writes-before, err)
	}
	if err := c.DeletePolicies(t.Context(), "demo", "web", ""); err != nil {
		t.Fatal(err)
	}
	if got := server.list("NetworkPolicy"); !slices.Equal(got, []string{"culvert-db-gates", "web"}) {
		t.Errorf("%v", got)
	}
}

func TestPoliciesWithoutRights(t *testing.T) {
	server, c := newFleetAPI(t)
	deny := readPolicies(t, `{deny: {podSelector: {}}}`)[0]
	server.put(&deny)
	server.denied = []string{"create networkpolicies"}
	var e *api.Error
	if _, _, err := c.EnsurePolicies(t.Context(), "demo", testPolicySpec()); !errors.As(err, &e) || e.Code != api.CodeForbidden || !strings.Contains(e.Hint, "deploy/rbac") {
		t.Errorf("%v", err)
	}
	server.denied = []string{"list networkpolicies"}
	if made, notes, err := c.EnsurePolicies(t.Context(), "demo", testPolicySpec()); err != nil || len(made) != 0 || len(notes) != 1 {
		t.Errorf("%v, %v, %v", made, notes, err)
	}
	if err := c.DeletePolicies(t.Context(), "demo", "web", ""); err != nil {
		t.Error(err)
	}
	server.denied = nil
	server.put(&networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: "culvert-web-gates", Namespace: "demo"}})
	if _, _, err := c.EnsurePolicies(t.Context(), "demo", testPolicySpec()); !errors.As(err, &e) || e.Code != api.CodeExists {
		t.Errorf("somebody else's: %v", err)
	}
}
