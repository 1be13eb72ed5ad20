package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/culvert-dev/culvert/daemon/api"
)

func TestParseServiceRanges(t *testing.T) {
	for message, want := range map[string]string{
		`Service "x" is invalid: spec.clusterIPs: Invalid value: []string{"192.0.2.1"}: failed to allocate IP 192.0.2.1: the provided IP (192.0.2.1) is not in the valid range. The range of valid IPs is 10.96.0.0/16`: "[10.96.0.0/16]",
		`spec.clusterIP: Invalid value: "1.1.1.1": provided IP is not in the valid range. The range of valid IPs is 10.96.0.0/12`:                                                                                       "[10.96.0.0/12]",
		`spec.clusterIPs: Invalid value: []string{"2001:db8::1"}: failed to allocate IP 2001:db8::1: the provided IP (2001:db8::1) is not in the valid range. The range of valid IPs is fd00:10:96::/112`:               "[fd00:10:96::/112]",
		`spec.ipFamilies[0]: Invalid value: "IPv6": not configured on this cluster`:                                                                                                                                     "[]",
		`admission webhook "net.example" denied the request: only from 10.0.0.0/8 please`:                                                                                                                               "[]",
		`spec.clusterIPs: failed to allocate IP: valid ranges are 10.96.0.0/16, 10.112.0.0/16, 0.0.0.0/0`:                                                                                                               "[10.96.0.0/16 10.112.0.0/16]",
	} {
		if got := fmt.Sprint(parseServiceRanges(message)); got != want {
			t.Errorf("%s\ngot %s, want %s", message, got, want)
		}
	}
}

func fixed(what string, rows map[string]row) *table {
	sc := everything
	if rows == nil {
		sc = nothing
	}
	return &table{what: what, rows: rows, scope: sc}
}

func prefixes(list ...string) (r row) {
	for _, s := range list {
		r.prefixes = appendPrefix(r.prefixes, s)
	}
	return r
}

func TestRangesFromSources(t *testing.T) {
	pod := func(o *corev1.Pod) row { return (&Cluster{}).podTable().row(o) }
	s := &sources{
		serviceCIDRs: fixed("servicecidrs", map[string]row{"kubernetes": prefixes("10.96.0.0/16", "fd00:96::/112")}),
		nodes: fixed("nodes", map[string]row{
			"n1": {prefixes: prefixes("10.244.1.0/24").prefixes, hosts: appendAddr(nil, "192.168.30.81")},
			"n2": {prefixes: prefixes("0.0.0.0/0").prefixes},
		}),
		services: fixed("services", map[string]row{"a/in": {addrs: appendAddr(nil, "10.96.3.3")}, "a/out": {addrs: appendAddr(nil, "10.112.0.9")}}),
		pods: fixed("pods", map[string]row{
			"a/in":   pod(&corev1.Pod{Status: corev1.PodStatus{PodIP: "10.244.1.255", HostIP: "192.168.30.81"}}),
			"a/out":  pod(&corev1.Pod{Status: corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: "10.9.0.0"}, {IP: "fd00::5"}}, HostIP: "192.168.30.82"}}),
			"a/host": pod(&corev1.Pod{Spec: corev1.PodSpec{HostNetwork: true}, Status: corev1.PodStatus{PodIP: "192.168.30.90", HostIP: "192.168.30.90"}}),
			"a/node": pod(&corev1.Pod{Status: corev1.PodStatus{PodIP: "192.168.30.82"}}),
			"a/done": pod(&corev1.Pod{Status: corev1.PodStatus{PodIP: "10.8.0.1", Phase: corev1.PodSucceeded}}),
			"a/link": pod(&corev1.Pod{Status: corev1.PodStatus{PodIP: "169.254.1.1"}}),
		}),
	}
	r := s.ranges("a")
	got := fmt.Sprint(r.Routes)
	want := "[{10.9.0.0/32 pod a/out} {10.96.0.0/16 ServiceCIDR kubernetes} {10.112.0.9/32 Service a/out} {10.244.1.0/24 node n1} {fd00::5/128 pod a/out} {fd00:96::/112 ServiceCIDR kubernetes}]"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "0.0.0.0/0") {
		t.Errorf("notes %q", r.Notes)
	}
	if s.podsCovered() {
		t.Error("a pod lies outside the nodes' ranges")
	}
	blind := &sources{serviceCIDRs: fixed("", nil), nodes: fixed("", nil), services: fixed("", nil), pods: fixed("", nil), probeErr: errors.New("no right")}
	if r := blind.ranges("a"); len(r.Routes) != 0 || len(r.Notes) != 3 || !strings.Contains(r.Notes[0], "no right") {
		t.Errorf("%+v", r)
	}
}

func TestFitKeepsToTheBound(t *testing.T) {
	var nodes, pods []api.Route
	for i := range 5000 { // 5,000 nodes side by side
		a := netip.AddrFrom4([4]byte{10, byte(64 + i>>8), byte(i), 0})
		nodes = append(nodes, api.Route{Prefix: netip.PrefixFrom(a, 24), Source: "node"})
	}
	routes, notes := fit(nodes, nil, nil)
	if len(routes) > 16 || len(notes) != 0 {
		t.Errorf("%d routes, %q: neighbours lose nothing when joined", len(routes), notes)
	}
	hosts := map[netip.Addr]bool{netip.MustParseAddr("172.20.3.200"): true}
	for i := range 4000 { // 40 pods in each of 100 /24
		a := netip.AddrFrom4([4]byte{172, 20, byte(i / 40), byte(i%40*5 + 1)})
		pods = append(pods, api.Route{Prefix: netip.PrefixFrom(a, 32), Source: "pod"})
	}
	exact, notes := fit(nil, pods[:maxRoutes], hosts)
	if len(exact) != maxRoutes || len(notes) != 0 {
		t.Errorf("%d of %d fit exactly, %q", len(exact), maxRoutes, notes)
	}
	routes, notes = fit(nil, pods, hosts)
	if len(routes) > maxRoutes || len(notes) != 1 {
		t.Errorf("%d routes, %q", len(routes), notes)
	}
	for _, p := range pods {
		if !contains(routes, p.Prefix.Addr()) {
			t.Fatalf("%v is lost", p)
		}
	}
	for h := range hosts {
		if contains(routes, h) {
			t.Errorf("the node %v is routed", h)
		}
	}
}

func contains(routes []api.Route, a netip.Addr) bool {
	for _, r := range routes {
		if r.Prefix.Contains(a) {
			return true
		}
	}
	return false
}

// pages serves 1,200 pods page by page; the second continue token expires once.
func TestListSurvivesExpiredToken(t *testing.T) {
	expired, calls := false, 0
	tab := (&Cluster{}).podTable()
	tab.list = func(_ context.Context, ns string, o metav1.ListOptions) (runtime.Object, error) {
		calls++
		if ns == "" {
			return nil, apierrors.NewForbidden(corev1.Resource("pods"), "", errors.New("no"))
		}
		from := 0
		fmt.Sscan(o.Continue, &from)
		if from == 500 && !expired {
			expired = true
			return nil, apierrors.NewResourceExpired("too old")
		}
		page := &corev1.PodList{ListMeta: metav1.ListMeta{ResourceVersion: "7"}}
		for i := from; i < min(from+500, 1200); i++ {
			page.Items = append(page.Items, corev1.Pod{
				ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint(i), Namespace: ns},
				Status:     corev1.PodStatus{PodIP: fmt.Sprintf("10.0.%d.%d", i>>8, i&255)},
			})
		}
		if from+500 < 1200 {
			page.Continue = fmt.Sprint(from + 500)
		}
		return page, nil
	}
	if err := tab.refresh(t.Context(), "demo"); err != nil {
		t.Fatal(err)
	}
	if len(tab.rows) != 1200 || tab.scope != namespace || tab.version != "7" || calls != 6 {
		t.Errorf("%d rows, scope %d, version %s, %d calls", len(tab.rows), tab.scope, tab.version, calls)
	}
}

func TestFollowRelistsAfterGone(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	lists, watches := 0, 0
	tab := (&Cluster{}).serviceTable()
	service := func(name string) *corev1.Service {
		return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "a", Name: name, ResourceVersion: "9"}}
	}
	tab.list = func(context.Context, string, metav1.ListOptions) (runtime.Object, error) {
		lists++
		return &corev1.ServiceList{ListMeta: metav1.ListMeta{ResourceVersion: "1"}, Items: []corev1.Service{*service("x")}}, nil
	}
	tab.watch = func(context.Context, string, metav1.ListOptions) (watch.Interface, error) {
		watches++
		w := watch.NewFakeWithChanSize(3, false)
		switch watches {
		case 1:
			w.Add(service("y"))
			w.Delete(service("x"))
			w.Stop()
		case 2:
			gone := apierrors.NewResourceExpired("too old").Status()
			w.Error(&gone)
			w.Stop()
		case 3:
			w.Add(service("z"))
			w.Stop()
		default:
			cancel()
			return nil, errors.New("over")
		}
		return w, nil
	}
	if err := tab.refresh(ctx, ""); err != nil {
		t.Fatal(err)
	}
	names := &Names{services: tab}
	tab.follow(ctx, "", func() {})
	if lists != 2 {
		t.Errorf("%d lists", lists)
	}
	if !names.HasService("a", "x") || names.HasService("a", "y") || !names.HasService("a", "z") {
		t.Errorf("rows %v", tab.rows)
	}
	if ns := names.Namespaces(); len(ns) != 1 || ns[0] != "a" {
		t.Error(ns)
	}
}
