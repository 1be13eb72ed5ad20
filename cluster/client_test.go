package cluster

import (
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
)

// apiServer answers a client's requests with what answer returns, in the first
// form that the client accepts or, if plain, as JSON, as an aggregated or old
// server does.
type apiServer struct {
	plain  bool
	answer func(r *http.Request, body runtime.Object) (code int, o runtime.Object)
}

// client starts the server below a path, as Rancher has it.
func (s *apiServer) client(t *testing.T) *Client {
	t.Helper()
	server := httptest.NewServer(http.StripPrefix("/k8s/clusters/c-1", s))
	t.Cleanup(server.Close)
	c, err := NewClient(&rest.Config{Host: server.URL + "/k8s/clusters/c-1", QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (s *apiServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body runtime.Object
	if b, _ := io.ReadAll(r.Body); r.Method == http.MethodPatch {
		body = &runtime.Unknown{Raw: b}
	} else if len(b) > 0 {
		var err error
		if body, _, err = codecs.UniversalDeserializer().Decode(b, nil, nil); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	code, o := s.answer(r, body)
	form, _, _ := strings.Cut(r.Header.Get("Accept"), ",")
	if s.plain {
		form = runtime.ContentTypeJSON
	}
	info, ok := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), form)
	if !ok {
		http.Error(w, form, http.StatusNotAcceptable)
		return
	}
	w.Header().Set("Content-Type", form)
	w.WriteHeader(code)
	if _, ok := o.(*metav1.WatchEvent); ok {
		e := codecs.EncoderForVersion(info.StreamSerializer.Serializer, corev1.SchemeGroupVersion)
		_ = e.Encode(o, info.StreamSerializer.Framer.NewFrameWriter(w))
		return
	}
	_ = codecs.WithoutConversion().EncoderForVersion(info.Serializer, corev1.SchemeGroupVersion).Encode(o, w)
}

// Each method asks for the path and the options that the API documents, and
// objects say their group's version.
func TestClientRequests(t *testing.T) {
	var got string
	var sent schema.GroupVersionKind
	var result runtime.Object
	c := (&apiServer{answer: func(r *http.Request, body runtime.Object) (int, runtime.Object) {
		got, sent = r.Method+" "+r.URL.RequestURI(), schema.GroupVersionKind{}
		if body != nil {
			sent = body.GetObjectKind().GroupVersionKind()
		}
		return 200, result
	}}).client(t)
	ctx := t.Context()
	seconds := int64(7)
	for _, x := range []struct {
		want, kind string
		result     runtime.Object
		do         func() (runtime.Object, error)
	}{
		{"GET /api/v1/namespaces/a/pods/p", "", &corev1.Pod{},
			func() (runtime.Object, error) { return c.Pods("a").Get(ctx, "p", metav1.GetOptions{}) }},
		{"GET /api/v1/pods?continue=x&limit=500", "", &corev1.PodList{},
			func() (runtime.Object, error) {
				return c.Pods("").List(ctx, metav1.ListOptions{Limit: 500, Continue: "x"})
			}},
		{"GET /api/v1/namespaces/a/services?labelSelector=a%3Db", "", &corev1.ServiceList{},
			func() (runtime.Object, error) {
				return c.Services("a").List(ctx, metav1.ListOptions{LabelSelector: "a=b"})
			}},
		{"POST /api/v1/namespaces/a/services?dryRun=All", "/v1, Kind=Service", &corev1.Service{},
			func() (runtime.Object, error) {
				return c.Services("a").Create(ctx, &corev1.Service{}, metav1.CreateOptions{DryRun: []string{"All"}})
			}},
		{"GET /api/v1/nodes", "", &corev1.NodeList{},
			func() (runtime.Object, error) { return c.Nodes().List(ctx, metav1.ListOptions{}) }},
		{"GET /api/v1/namespaces", "", &corev1.NamespaceList{},
			func() (runtime.Object, error) { return c.Namespaces().List(ctx, metav1.ListOptions{}) }},
		{"GET /api/v1/namespaces/a/events", "", &corev1.EventList{},
			func() (runtime.Object, error) { return c.Events("a").List(ctx, metav1.ListOptions{}) }},
		{"GET /apis/networking.k8s.io/v1/servicecidrs", "", &networkingv1.ServiceCIDRList{},
			func() (runtime.Object, error) { return c.ServiceCIDRs().List(ctx, metav1.ListOptions{}) }},
		{"POST /apis/apps/v1/namespaces/a/deployments", "apps/v1, Kind=Deployment", &appsv1.Deployment{},
			func() (runtime.Object, error) {
				return c.Deployments("a").Create(ctx, &appsv1.Deployment{}, metav1.CreateOptions{})
			}},
		{"DELETE /apis/apps/v1/namespaces/a/deployments/d", "/v1, Kind=DeleteOptions", nil,
			func() (runtime.Object, error) {
				return nil, c.Deployments("a").Delete(ctx, "d", metav1.DeleteOptions{GracePeriodSeconds: &seconds})
			}},
		{"POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews", "authorization.k8s.io/v1, Kind=SelfSubjectAccessReview", &authorizationv1.SelfSubjectAccessReview{},
			func() (runtime.Object, error) {
				return c.SelfSubjectAccessReviews().Create(ctx, &authorizationv1.SelfSubjectAccessReview{}, metav1.CreateOptions{})
			}},
		{"POST /apis/authentication.k8s.io/v1/selfsubjectreviews", "authentication.k8s.io/v1, Kind=SelfSubjectReview", &authenticationv1.SelfSubjectReview{},
			func() (runtime.Object, error) {
				return c.SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
			}},
		{"GET /version", "", nil, func() (runtime.Object, error) { return nil, c.Version(ctx) }},
	} {
		if result = x.result; result == nil {
			result = &metav1.Status{Status: metav1.StatusSuccess}
		}
		if accessor, ok := result.(metav1.ListInterface); ok {
			accessor.SetResourceVersion("42")
		} else if accessor, ok := result.(metav1.Object); ok {
			accessor.SetResourceVersion("42")
		}
		o, err := x.do()
		if err != nil || got != x.want {
			t.Errorf("got %s, %v, want %s", got, err, x.want)
		}
		if kind := sent.String(); kind != x.kind && (x.kind != "" || !sent.Empty()) {
			t.Errorf("%s sent %s, want %s", x.want, kind, x.kind)
		}
		if a, ok := o.(interface{ GetResourceVersion() string }); x.result != nil && (!ok || a.GetResourceVersion() != "42") {
			t.Errorf("%s returned %v", x.want, o)
		}
	}
	if u := c.Pods("a").URL("p", "portforward").Path; u != "/k8s/clusters/c-1/api/v1/namespaces/a/pods/p/portforward" {
		t.Error(u)
	}
}

// Protobuf is asked for, JSON is understood: objects, watch events, refusals.
func TestClientForms(t *testing.T) {
	for name, plain := range map[string]bool{"protobuf": false, "JSON": true} {
		t.Run(name, func(t *testing.T) {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p"}, Status: corev1.PodStatus{PodIP: "10.0.0.1"}}
			var mu sync.Mutex
			var accepts []string
			server := &apiServer{plain: plain}
			server.answer = func(r *http.Request, _ runtime.Object) (int, runtime.Object) {
				mu.Lock()
				accepts = append(accepts, r.Header.Get("Accept"))
				mu.Unlock()
				if strings.HasSuffix(r.URL.Path, "/none") {
					status := apierrors.NewNotFound(corev1.Resource("pods"), "none").Status()
					return 404, &status
				}
				if r.URL.Query().Get("watch") != "" {
					return 200, &metav1.WatchEvent{Type: string(watch.Modified), Object: runtime.RawExtension{Raw: encode(t, plain, pod)}}
				}
				return 200, pod
			}
			pods := server.client(t).Pods("a")
			if p, err := pods.Get(t.Context(), "p", metav1.GetOptions{}); err != nil || p.Status.PodIP != "10.0.0.1" {
				t.Errorf("%v, %v", p, err)
			}
			if _, err := pods.Get(t.Context(), "none", metav1.GetOptions{}); !apierrors.IsNotFound(err) || !strings.Contains(err.Error(), `pods "none" not found`) {
				t.Error(err)
			}
			w, err := pods.Watch(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Stop()
			event := <-w.ResultChan()
			if p, ok := event.Object.(*corev1.Pod); !ok || event.Type != watch.Modified || p.Status.PodIP != "10.0.0.1" {
				t.Errorf("%+v", event)
			}
			if i := slices.IndexFunc(accepts, func(a string) bool {
				return !strings.HasPrefix(a, runtime.ContentTypeProtobuf) || !strings.Contains(a, runtime.ContentTypeJSON)
			}); i >= 0 || len(accepts) != 3 {
				t.Errorf("%q", accepts)
			}
		})
	}
}

func encode(t *testing.T, plain bool, o runtime.Object) []byte {
	form := runtime.ContentTypeProtobuf
	if plain {
		form = runtime.ContentTypeJSON
	}
	info, _ := runtime.SerializerInfoForMediaType(codecs.SupportedMediaTypes(), form)
	b, err := runtime.Encode(codecs.WithoutConversion().EncoderForVersion(info.Serializer, corev1.SchemeGroupVersion), o)
	if err != nil {
		t.Error(err)
	}
	return b
}

// The clientset, its tests' helpers and what they bring would each add megabytes
// to every session.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "../cmd/culvert").Output()
	if err != nil {
		t.Fatal(err)
	}
	for dep := range strings.Lines(string(out)) {
		dep = strings.TrimSpace(dep)
		for _, bad := range []string{"k8s.io/client-go/kubernetes", "k8s.io/client-go/testing", "k8s.io/client-go/discovery", "github.com/google/gnostic-models", "github.com/emicklei/go-restful"} {
			if dep == bad || strings.HasPrefix(dep, bad+"/") {
				t.Errorf("culvert links %s", dep)
			}
		}
	}
}
