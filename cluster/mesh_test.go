package cluster

import (
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-dev/culvert/wire/intercept"
)

func TestHTTPOf(t *testing.T) {
	for _, c := range []struct {
		name, app string
		protocol  corev1.Protocol
		want      string
	}{
		{"", "", corev1.ProtocolTCP, intercept.HTTPSniff},
		{"web", "", corev1.ProtocolTCP, intercept.HTTPSniff},
		{"http", "", corev1.ProtocolTCP, intercept.HTTPKnown},
		{"http-admin", "", corev1.ProtocolTCP, intercept.HTTPKnown},
		{"https-admin", "", corev1.ProtocolTCP, intercept.HTTPNever},
		{"httpfoo", "", corev1.ProtocolTCP, intercept.HTTPSniff},
		{"grpc-web-x", "", corev1.ProtocolTCP, intercept.HTTPKnown},
		{"mysql", "", corev1.ProtocolTCP, intercept.HTTPNever},
		{"mysql", "HTTP", corev1.ProtocolTCP, intercept.HTTPKnown},
		{"http", "kubernetes.io/wss", corev1.ProtocolTCP, intercept.HTTPNever},
		{"http", "example.com/own", corev1.ProtocolTCP, intercept.HTTPSniff},
		{"http", "", corev1.ProtocolUDP, intercept.HTTPNever},
	} {
		p := PlanPort{Name: c.name, Protocol: c.protocol}
		if c.app != "" {
			p.AppProtocol = &c.app
		}
		if got := httpOf(p); got != c.want {
			t.Errorf("%+v is %q", c, got)
		}
	}
}

func meshOf(sessions ...string) intercept.Entry {
	e := intercept.Entry{Kind: intercept.Mesh, Service: "web", Gate: intercept.GateName, Holder: intercept.Holder{Session: "mesh-1"}}
	for _, s := range sessions {
		e.Members = append(e.Members, intercept.Member{Holder: intercept.Holder{Session: s, User: "u-" + s}})
	}
	return e
}

// TestMeshAlive: what bears the mesh's id is nobody's once none of its members lives.
func TestMeshAlive(t *testing.T) {
	s := &sweep{state: &gateState{State: intercept.State{Entries: map[string]intercept.Entry{"web": meshOf("a", "b")}}}}
	if s.alive("mesh-1") {
		t.Error("without Leases it lives")
	}
	s.seen = map[string]time.Time{"b": {}}
	s.now = time.Time{}
	if !s.alive("mesh-1") || s.alive("mesh-2") || s.alive("a") || !s.alive("b") {
		t.Errorf("alive: mesh-1 %v, mesh-2 %v, a %v, b %v", s.alive("mesh-1"), s.alive("mesh-2"), s.alive("a"), s.alive("b"))
	}
}

// TestMember: a member that comes again takes his own place, and others' are theirs.
func TestMember(t *testing.T) {
	before := meshOf("a", "b", "c")
	i := &Intercept{spec: InterceptSpec{Kind: intercept.Mesh, Holder: intercept.Holder{Session: "b"}, OnGone: intercept.GoneFails}, mesh: before.Holder}
	var e intercept.Entry
	m := i.member(&e, before)
	m.Ports = append(m.Ports, intercept.MemberPort{Port: 80})
	if len(e.Members) != 3 || e.Members[1].OnGone != intercept.GoneFails || len(e.Members[1].Ports) != 1 || e.Members[0].Holder.Session != "a" || e.Members[2].Holder.Session != "c" {
		t.Errorf("members %+v", e.Members)
	}
	if before.Members[1].OnGone != "" {
		t.Error("the entry of before was changed")
	}
	i.spec.Holder.Session = "d"
	if i.member(&e, before); len(e.Members) != 4 || e.Members[3].Holder.Session != "d" {
		t.Errorf("members %+v", e.Members)
	}
	if i.owns(before) {
		t.Error("it owns a mesh that it is not in")
	}
	i.spec.Holder.Session = "a"
	if !i.owns(before) {
		t.Error("it does not own its own")
	}
	if before.Holder.Session = "mesh-2"; i.owns(before) {
		t.Error("it owns another mesh")
	}
}

// TestMemberPolicies: the way to an agent is its member's own, and goes with him; what
// is the Service's is the mesh's.
func TestMemberPolicies(t *testing.T) {
	of := func(session string) *policyView {
		return &policyView{namespace: "shop", agentNamespace: "home", spec: PolicySpec{Service: "web", Session: "mesh-1", Member: session, Gate: intercept.GateName,
			AgentNamespace: "home", AgentLabels: map[string]string{LabelSession: session}}}
	}
	a, b := of("a"), of("b")
	if a.intoAgent().Name == b.intoAgent().Name || a.outOfGates().Name == b.outOfGates().Name {
		t.Errorf("two members share %s or %s", a.intoAgent().Name, a.outOfGates().Name)
	}
	if p := a.intoAgent(); p.Labels[LabelSession] != "a" || p.Namespace != "home" {
		t.Errorf("the way to the agent: %s %v", p.Namespace, p.Labels)
	}
	if p := a.outOfGates(); p.Labels[LabelSession] != "a" {
		t.Errorf("out of the gates: %v", p.Labels)
	}
	if p, q := a.intoGates(nil), b.intoGates(nil); p.Name != q.Name || p.Labels[LabelSession] != "mesh-1" {
		t.Errorf("into the gates: %s, %s, %v", p.Name, q.Name, p.Labels)
	}
	exchange := of("")
	exchange.spec.Member, exchange.spec.Session = "", "a"
	if p := exchange.intoAgent(); p.Labels[LabelSession] != "a" || p.Name == a.intoAgent().Name {
		t.Errorf("of an exchange: %s %v", p.Name, p.Labels)
	}
}
