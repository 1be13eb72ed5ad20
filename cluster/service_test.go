package cluster

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
)

// serviceServer keeps the Services of one namespace, and answers with the rest of
// what a plan asks for.
type serviceServer struct {
	mu       sync.Mutex
	services map[string]*corev1.Service
	version  int
	others   map[string]runtime.Object // by path, for GET
	denied   string                    // a verb on Services
	patches  int
	// before is called before each patch, to come in between.
	before func(patch int, s *corev1.Service)
}

func newServiceServer(t *testing.T, services ...*corev1.Service) (*Cluster, *serviceServer) {
	s := &serviceServer{services: map[string]*corev1.Service{}, others: map[string]runtime.Object{
		"/apis/apps/v1/namespaces/demo/statefulsets": &appsv1.StatefulSetList{},
		"/api/v1/namespaces/demo/pods":               &corev1.PodList{},
	}}
	for _, service := range services {
		s.services[service.Name] = service
		s.touch(service)
	}
	return &Cluster{namespace: "demo", client: (&apiServer{answer: s.answer}).client(t)}, s
}

func (s *serviceServer) touch(service *corev1.Service) {
	s.version++
	service.ResourceVersion = strconv.Itoa(s.version)
}

func (s *serviceServer) answer(r *http.Request, body runtime.Object) (int, runtime.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	refuse := func(err *apierrors.StatusError) (int, runtime.Object) {
		return int(err.ErrStatus.Code), &err.ErrStatus
	}
	if review, ok := body.(*authorizationv1.SelfSubjectAccessReview); ok {
		review.Status.Allowed = review.Spec.ResourceAttributes.Verb != s.denied
		return 201, review
	}
	path, name := r.URL.Path, ""
	if before, after, ok := strings.Cut(path, "/services/"); ok {
		path, name = before+"/services", after
	}
	if !strings.HasSuffix(path, "/services") {
		if o := s.others[path]; o != nil && r.Method == http.MethodGet {
			return 200, o
		}
		return refuse(apierrors.NewNotFound(corev1.Resource("things"), path))
	}
	if name == "" {
		if r.Method == http.MethodPost {
			made := body.(*corev1.Service)
			if s.services[made.Name] != nil {
				return refuse(apierrors.NewAlreadyExists(corev1.Resource("services"), made.Name))
			}
			made.Spec.ClusterIP = "10.96.0.7"
			s.services[made.Name] = made
			s.touch(made)
			return 201, made
		}
		list := &corev1.ServiceList{}
		for _, name := range slices.Sorted(maps.Keys(s.services)) {
			list.Items = append(list.Items, *s.services[name])
		}
		return 200, list
	}
	service := s.services[name]
	if service == nil {
		return refuse(apierrors.NewNotFound(corev1.Resource("services"), name))
	}
	switch r.Method {
	case http.MethodDelete:
		delete(s.services, name)
		return 200, &metav1.Status{Status: metav1.StatusSuccess}
	case http.MethodPatch:
		if s.before != nil {
			s.before(s.patches, service)
		}
		s.patches++
		next := &corev1.Service{}
		if err := applyPatch(service, next, body.(*runtime.Unknown).Raw); err != nil {
			return refuse(apierrors.NewBadRequest(err.Error()))
		}
		if next.ResourceVersion != service.ResourceVersion {
			return refuse(apierrors.NewConflict(corev1.Resource("services"), name, fmt.Errorf("it changed")))
		}
		s.services[name] = next
		s.touch(next)
		return 200, next
	}
	return 200, service
}

// applyPatch knows of RFC 6902 what patchOp uses.
func applyPatch(from, to any, data []byte) error {
	var ops []patchOp
	if err := json.Unmarshal(data, &ops); err != nil {
		return err
	}
	text, err := json.Marshal(from)
	if err != nil {
		return err
	}
	var whole any
	if err := json.Unmarshal(text, &whole); err != nil {
		return err
	}
	for _, op := range ops {
		at, steps := whole, strings.Split(op.Path, "/")[1:]
		for _, step := range steps[:len(steps)-1] {
			switch v := at.(type) {
			case map[string]any:
				at = v[step]
			case []any:
				i, err := strconv.Atoi(step)
				if err != nil || i >= len(v) {
					return fmt.Errorf("%s", op.Path)
				}
				at = v[i]
			}
		}
		m, ok := at.(map[string]any)
		key := strings.ReplaceAll(steps[len(steps)-1], "~1", "/")
		switch {
		case !ok:
			return fmt.Errorf("nothing at %s", op.Path)
		case op.Op == "add":
			m[key] = op.Value
		case op.Op == "remove" && m[key] != nil:
			delete(m, key)
		default:
			return fmt.Errorf("%s %s", op.Op, op.Path)
		}
	}
	if text, err = json.Marshal(whole); err != nil {
		return err
	}
	return json.Unmarshal(text, to)
}

func tcp(name string, port int32, target string) corev1.ServicePort {
	return corev1.ServicePort{Name: name, Protocol: corev1.ProtocolTCP, Port: port, TargetPort: intstr.Parse(target)}
}

func udp(name string, port int32, target string) corev1.ServicePort {
	p := tcp(name, port, target)
	p.Protocol = corev1.ProtocolUDP
	return p
}

func testService(name string, ports ...corev1.ServicePort) *corev1.Service {
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "demo", UID: "uid-1"},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.96.0.1", Selector: map[string]string{"app": name}, Ports: ports,
		},
	}
}

func exposed(t *testing.T, texts ...string) []Expose {
	t.Helper()
	e, err := ParseExpose(texts)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

func TestServicePorts(t *testing.T) {
	pod := corev1.Pod{Spec: corev1.PodSpec{Containers: []corev1.Container{{Ports: []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}}}}}}
	shop := []corev1.ServicePort{tcp("http", 80, "web"), tcp("echo", 9000, "9000"), udp("game", 7000, "7001")}
	dns := []corev1.ServicePort{udp("dns", 53, "5353"), tcp("dns-tcp", 53, "5353")}
	crossed := []corev1.ServicePort{tcp("http", 80, "8080"), tcp("admin", 8080, "9090"), tcp("twin", 81, "8080")}
	for _, test := range []struct {
		name   string
		ports  []corev1.ServicePort
		expose string
		want   []string // lines of Mapping
		says   []string // of the error
	}{
		{"by number", shop, "3000:80", []string{"port 80 (http, targetPort web) -> localhost:3000", "port 9000 (echo): stays with the origin", "port 7000/UDP (game): stays with the origin"}, nil},
		{"by name", shop, "3000:http", []string{"port 80 (http, targetPort web) -> localhost:3000"}, nil},
		{"by targetPort's name", shop, "3000:web", []string{"port 80 (http, targetPort web) -> localhost:3000"}, nil},
		{"by the number of targetPort's name", shop, "8080", []string{"port 80 (http, targetPort web) -> localhost:8080"}, nil},
		{"local alone", shop, "9000", []string{"port 9000 (echo) -> localhost:9000"}, nil},
		{"UDP", shop, "7000", []string{"port 7000/UDP (game, targetPort 7001) -> localhost:7000"}, nil},
		{"several", shop, "8080:80,9001:9000/tcp", []string{"-> localhost:8080", "-> localhost:9001"}, nil},
		{"TCP and UDP of a number", dns, "5353", []string{"port 53/UDP (dns, targetPort 5353) -> localhost:5353", "port 53 (dns-tcp, targetPort 5353) -> localhost:5353"}, nil},
		{"one of them", dns, "5353/udp", []string{"port 53/UDP (dns, targetPort 5353) -> localhost:5353", "port 53 (dns-tcp): stays with the origin"}, nil},
		{"each its own", dns, "1053:53/udp,2053:53/tcp", []string{"-> localhost:1053", "-> localhost:2053"}, nil},

		{"none", shop, "3000", nil, []string{"3000", "80 (http, targetPort web), 9000 (echo), 7000/UDP (game, targetPort 7001)", "--expose 3000:80"}},
		{"wrong protocol", shop, "3000:80/udp", nil, []string{"is TCP, not UDP", "--expose 3000:80"}},
		{"wrong protocol, UDP", shop, "7000/tcp", nil, []string{"is UDP, not TCP"}},
		{"ambiguous", crossed, "8080", nil, []string{"80 (http, targetPort 8080)", "8080 (admin, targetPort 9090)", "--expose 8080:http or --expose 8080:admin or --expose 8080:twin"}},
		{"twice", shop, "3000:80,3001:http", nil, []string{"3000:80", "3001:http", "port 80 (http"}},
		{"twice by a dual port", dns, "5353,1053:53/udp", nil, []string{"5353", "1053:53/udp"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, s := newServiceServer(t, testService("web", test.ports...))
			s.others["/api/v1/namespaces/demo/pods"] = &corev1.PodList{Items: []corev1.Pod{pod}}
			plan, err := c.PlanExchange(t.Context(), "", "web", exposed(t, test.expose), false)
			if test.says != nil {
				wantError(t, err, api.CodeUsage, append(test.says, "demo/web")...)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(plan.Mapping(), "\n")
			for _, want := range test.want {
				if !strings.Contains(got, want) {
					t.Errorf("no %q in\n%s", want, got)
				}
			}
			if lines := strings.Count(got, "\n") + 1; lines != len(test.ports) {
				t.Errorf("%d lines", lines)
			}
		})
	}
}

// Every hint of an ambiguous --expose is one that works.
func TestServicePortTyped(t *testing.T) {
	p := &ServicePlan{Ports: []PlanPort{
		{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(8080)},
		{Name: "admin", Port: 8080, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromString("http")},
		{Port: 90, Protocol: corev1.ProtocolUDP, TargetPort: intstr.FromInt32(8080)},
	}}
	for i := range p.Ports {
		e, err := parseExpose("1:" + p.typed(i))
		if err != nil {
			t.Fatal(err)
		}
		if found, ambiguous := p.matches(e); ambiguous || !slices.Contains(found, i) {
			t.Errorf("%q for port %s means %v", p.typed(i), p.Ports[i], found)
		}
	}
}

func TestServiceRefused(t *testing.T) {
	local := corev1.ServiceInternalTrafficPolicyLocal
	for _, test := range []struct {
		name   string
		change func(*corev1.Service)
		forced bool // --force exchanges it
		says   string
	}{
		{"ExternalName", func(s *corev1.Service) {
			s.Spec.Type, s.Spec.ExternalName, s.Spec.Selector = corev1.ServiceTypeExternalName, "db.example", nil
		}, false, "ExternalName, an alias of db.example"},
		{"no selector", func(s *corev1.Service) { s.Spec.Selector = nil }, false, "no selector"},
		{"no ports", func(s *corev1.Service) { s.Spec.Ports, s.Spec.ClusterIP = nil, corev1.ClusterIPNone }, false, "no ports"},
		{"SCTP", func(s *corev1.Service) { s.Spec.Ports[0].Protocol = corev1.ProtocolSCTP }, false, "SCTP"},
		{"going", func(s *corev1.Service) { s.DeletionTimestamp = &metav1.Time{} }, false, "being deleted"},
		{"origin", func(s *corev1.Service) {
			s.Labels = map[string]string{LabelName: originApp, LabelManagedBy: "culvert"}
		}, false, "culvert's own"},
		{"external Local", func(s *corev1.Service) { s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal }, true, "externalTrafficPolicy Local"},
		{"internal Local", func(s *corev1.Service) { s.Spec.InternalTrafficPolicy = &local }, true, "internalTrafficPolicy Local"},
		{"governs a StatefulSet", func(s *corev1.Service) { s.Spec.ClusterIP = corev1.ClusterIPNone }, true, "db-0.web"},
	} {
		t.Run(test.name, func(t *testing.T) {
			service := testService("web", tcp("http", 80, "8080"))
			test.change(service)
			c, s := newServiceServer(t, service)
			s.others["/apis/apps/v1/namespaces/demo/statefulsets"] = &appsv1.StatefulSetList{Items: []appsv1.StatefulSet{
				{ObjectMeta: metav1.ObjectMeta{Name: "db"}, Spec: appsv1.StatefulSetSpec{ServiceName: "web"}},
			}}
			_, err := c.PlanExchange(t.Context(), "demo", "svc/web", exposed(t, "8080"), false)
			code := api.CodeUsage
			if test.forced { // it is there, and no bad input
				code = api.CodeConflict
			}
			wantError(t, err, code, "demo/web", test.says)
			plan, err := c.PlanExchange(t.Context(), "demo", "svc/web", exposed(t, "8080"), true)
			if !test.forced {
				wantError(t, err, api.CodeUsage, test.says)
			} else if err != nil || !slices.ContainsFunc(plan.Notes, func(n string) bool { return strings.Contains(n, test.says) }) {
				t.Errorf("forced: %v, %v", plan, err)
			}
		})
	}
}

func TestServiceReserved(t *testing.T) {
	for _, test := range []struct {
		ns, name string
		forced   bool
	}{{"default", "kubernetes", false}, {"kube-system", "kube-dns", true}} {
		for _, force := range []bool{false, true} {
			service := testService(test.name, tcp("http", 80, "8080"))
			service.Namespace = test.ns
			c, _ := newServiceServer(t, service)
			_, err := c.PlanExchange(t.Context(), "", test.name+"."+test.ns+".svc.cluster.local", exposed(t, "8080"), force)
			if force && test.forced {
				if err != nil {
					t.Error(err)
				}
				continue
			}
			code := api.CodeUsage
			if test.forced {
				code = api.CodeConflict
			}
			wantError(t, err, code, test.ns+"/"+test.name)
		}
	}
}

func TestServiceNotes(t *testing.T) {
	service := testService("web", tcp("http", 80, "8080"))
	service.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
	c, _ := newServiceServer(t, service)
	plan, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080"), false)
	if err != nil || len(plan.Notes) != 1 || !strings.Contains(plan.Notes[0], "sessionAffinity") {
		t.Errorf("%v, %v", plan, err)
	}
}

// The gates of a headless Service listen at its pods' own port.
func TestServiceHeadless(t *testing.T) {
	headless := func(ports ...corev1.ServicePort) *corev1.Service {
		s := testService("web", ports...)
		s.Spec.ClusterIP = corev1.ClusterIPNone
		return s
	}
	c, _ := newServiceServer(t, headless(tcp("http", 80, "8080")))
	if plan, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080"), false); err != nil || !plan.Headless || plan.Ports[0].Number != 8080 {
		t.Errorf("%+v, %v", plan, err)
	}
	c, _ = newServiceServer(t, headless(tcp("http", 80, "web")))
	_, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080:80"), false)
	wantError(t, err, api.CodeUsage, `"web"`, "--mode scale")
	c, _ = newServiceServer(t, headless(tcp("a", 80, "8080"), tcp("b", 81, "8080")))
	_, err = c.PlanExchange(t.Context(), "", "web", exposed(t, "3000:80"), false)
	wantError(t, err, api.CodeUsage, "the same port")
}

func TestServiceTargets(t *testing.T) {
	labels := map[string]string{"app": "web", "pod-template-hash": "x"}
	template := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}}
	origin := testService("web-culvert-origin", tcp("http", 80, "8080"))
	origin.Spec.Selector, origin.Labels = map[string]string{"app": "web"}, map[string]string{LabelManagedBy: "culvert", LabelName: originApp}
	odd := testService("odd", tcp("http", 80, "8080"))
	odd.Spec.Selector = map[string]string{"app": "other"}
	c, s := newServiceServer(t, testService("web", tcp("http", 80, "8080")), origin, odd)
	for path, o := range map[string]runtime.Object{
		"/apis/apps/v1/namespaces/demo/deployments/web":  &appsv1.Deployment{Spec: appsv1.DeploymentSpec{Template: template}},
		"/apis/apps/v1/namespaces/demo/statefulsets/web": &appsv1.StatefulSet{Spec: appsv1.StatefulSetSpec{Template: template}},
		"/apis/apps/v1/namespaces/demo/replicasets/web":  &appsv1.ReplicaSet{Spec: appsv1.ReplicaSetSpec{Template: template}},
		"/apis/apps/v1/namespaces/demo/deployments/job":  &appsv1.Deployment{},
		"/apis/apps/v1/namespaces/demo/deployments":      &appsv1.DeploymentList{Items: []appsv1.Deployment{{ObjectMeta: metav1.ObjectMeta{Name: "web"}}}},
		"/api/v1/namespaces/demo/pods/web-1":             &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: labels}},
	} {
		s.others[path] = o
	}
	expose := exposed(t, "8080")
	for _, target := range []string{"web", "svc/web", "Service/web", "web.demo", "svc/web.demo.svc.cluster.local", "deployment/web", "deploy/web", "statefulset/web", "sts/web", "rs/web", "pod/web-1"} {
		if plan, err := c.PlanExchange(t.Context(), "", target, expose, false); err != nil || plan.Name != "web" {
			t.Errorf("%s: %v, %v", target, plan, err)
		}
	}
	for target, says := range map[string][]string{
		"":              {api.CodeUsage, "names no Service"},
		"daemonset/web": {api.CodeUsage, "daemonset/web"},
		"svc/":          {api.CodeUsage, "svc/"},
		"a/b/c":         {api.CodeUsage, "a/b/c"},
		"wbe":           {api.CodeNotFound, `did you mean "web"`},
		"zzzzzzzzzz":    {api.CodeNotFound, "it has odd, web"},
		"deploy/none":   {api.CodeNotFound, `no Deployment "none"`},
		"deploy/wbe":    {api.CodeNotFound, "did you mean deployment/web?"},
		"deploy/job":    {api.CodeNotFound, "--mode scale"},
	} {
		_, err := c.PlanExchange(t.Context(), "", target, expose, false)
		wantError(t, err, says[0], says[1])
	}
	s.services["web2"] = testService("web2", tcp("http", 80, "8080"))
	s.services["web2"].Spec.Selector = map[string]string{"app": "web"}
	_, err := c.PlanExchange(t.Context(), "", "deploy/web", expose, false)
	wantError(t, err, api.CodeUsage, "web, web2", "svc/web")
}

func TestServiceRights(t *testing.T) {
	for _, verb := range []string{"patch", "create", "delete"} {
		c, s := newServiceServer(t, testService("web", tcp("http", 80, "8080")))
		s.denied = verb
		_, err := c.PlanExchange(t.Context(), "", "web", exposed(t, "8080"), false)
		wantError(t, err, api.CodeForbidden, verb+" services", "deploy/rbac")
	}
}
