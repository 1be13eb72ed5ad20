package cluster

import (
	"reflect"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/culvert-dev/culvert/daemon/api"
)

func TestOriginName(t *testing.T) {
	if got := OriginName("web"); got != "web-culvert-origin" {
		t.Error(got)
	}
	seen := map[string]string{}
	for _, service := range []string{strings.Repeat("a", 48), strings.Repeat("a", 49), strings.Repeat("a", 63), strings.Repeat("a", 62) + "b", strings.Repeat("a-", 31) + "c"} {
		name := OriginName(service)
		if len(validation.IsDNS1035Label(name)) > 0 || seen[name] != "" {
			t.Errorf("%q of %s and %s", name, service, seen[name])
		}
		seen[name] = service
	}
}

func TestOriginEnsure(t *testing.T) {
	service := webService()
	dual, http := corev1.IPFamilyPolicyPreferDualStack, "http"
	service.Spec.Type, service.Spec.IPFamilies, service.Spec.IPFamilyPolicy = corev1.ServiceTypeLoadBalancer, []corev1.IPFamily{corev1.IPv6Protocol, corev1.IPv4Protocol}, &dual
	service.Spec.PublishNotReadyAddresses, service.Spec.ExternalIPs = true, []string{"192.0.2.1"}
	service.Spec.SessionAffinity, service.Spec.SessionAffinityConfig = corev1.ServiceAffinityClientIP, &corev1.SessionAffinityConfig{}
	service.Spec.Ports[0].NodePort, service.Spec.Ports[0].AppProtocol = 30080, &http
	service.Labels, service.Annotations = map[string]string{"team": "shop"}, map[string]string{"lb": "yes"}
	c, s := newServiceServer(t, service)
	plan, _ := switched(t, c)
	origin, err := c.EnsureOrigin(t.Context(), plan, "s1")
	if err != nil {
		t.Fatal(err)
	}
	spec := origin.Spec
	if spec.Type != corev1.ServiceTypeClusterIP || spec.ClusterIP != "10.96.0.7" || spec.Selector["app"] != "web" || !reflect.DeepEqual(spec.IPFamilies, service.Spec.IPFamilies) ||
		*spec.IPFamilyPolicy != dual || !spec.PublishNotReadyAddresses || spec.SessionAffinity != corev1.ServiceAffinityClientIP || spec.SessionAffinityConfig == nil || len(spec.ExternalIPs) > 0 {
		t.Errorf("%+v", spec)
	}
	if p := spec.Ports; len(p) != 2 || p[0].NodePort != 0 || *p[0].AppProtocol != "http" || p[0].TargetPort.IntVal != 8080 || p[1].TargetPort.StrVal != "dns" || p[1].Protocol != corev1.ProtocolUDP {
		t.Errorf("%+v", p)
	}
	if len(origin.Annotations) > 0 || origin.Labels["team"] != "" || origin.Labels[LabelSession] != "s1" || origin.OwnerReferences[0].UID != service.UID {
		t.Errorf("%+v", origin.ObjectMeta)
	}
	// Once more changes nothing; what others made of it is put right.
	patches := s.patches
	if _, err := c.EnsureOrigin(t.Context(), plan, "s1"); err != nil || s.patches != patches {
		t.Errorf("%d patches, %v", s.patches-patches, err)
	}
	s.services[origin.Name].Spec.Selector = map[string]string{"app": "nobody"}
	if again, err := c.EnsureOrigin(t.Context(), plan, "s2"); err != nil || again.Spec.Selector["app"] != "web" || again.Labels[LabelSession] != "s2" || again.Spec.ClusterIP != "10.96.0.7" {
		t.Errorf("%+v, %v", again, err)
	}
	for range 2 {
		if err := c.DeleteOrigin(t.Context(), "demo", "web", ""); err != nil || s.services[origin.Name] != nil {
			t.Error(err)
		}
	}
}

// A Service that only has the name is not touched.
func TestOriginOfOthers(t *testing.T) {
	c, s := newServiceServer(t, webService(), testService(OriginName("web"), tcp("x", 1, "1")))
	plan, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080"), false)
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.EnsureOrigin(t.Context(), plan, "s1")
	wantError(t, err, api.CodeExists, OriginName("web"), "not culvert's")
	if err := c.DeleteOrigin(t.Context(), "demo", "web", ""); err != nil || s.services[OriginName("web")] == nil {
		t.Errorf("%v", err)
	}
}
