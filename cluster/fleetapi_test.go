package cluster

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/culvert-dev/culvert/daemon/api"
)

// fleetAPI is an API server that keeps objects: with resourceVersions,
// preconditions, label selectors, watches, and port-forwards to gates.
type fleetAPI struct {
	*httptest.Server
	t *testing.T

	mu      sync.Mutex
	objects map[string]runtime.Object // by path
	version int
	watches map[chan watchedEvent]string // by collection
	gates   map[string]http.Handler      // by pod
	denied  []string                     // "verb resource"
	writes  int
	date    time.Time // zero: now
	// Hooks, called without mu; nil: none.
	created func(runtime.Object)
	before  func(r *http.Request)
}

type watchedEvent struct {
	Type   watch.EventType `json:"type"`
	Object runtime.Object  `json:"object"`
}

func newFleetAPI(t *testing.T) (*fleetAPI, *Cluster) {
	t.Helper()
	s := &fleetAPI{t: t, objects: map[string]runtime.Object{}, watches: map[chan watchedEvent]string{}, gates: map[string]http.Handler{}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s, s.open(t)
}

// open makes a Cluster with connections and limits of its own.
func (s *fleetAPI) open(t *testing.T) *Cluster {
	t.Helper()
	text := fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: x
clusters: [{name: x, cluster: {server: %q}}]
users: [{name: x, user: {token: t}}]
contexts: [{name: x, context: {cluster: x, user: x, namespace: demo}}]
`, s.URL)
	c, err := Open(api.Options{Kubeconfig: writeKubeconfig(t, text)})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

var fleetResources = map[string]string{
	"ConfigMap": "/api/v1/namespaces/%s/configmaps", "Pod": "/api/v1/namespaces/%s/pods", "Service": "/api/v1/namespaces/%s/services",
	"Event":      "/api/v1/namespaces/%s/events",
	"Deployment": "/apis/apps/v1/namespaces/%s/deployments", "StatefulSet": "/apis/apps/v1/namespaces/%s/statefulsets",
	"ReplicaSet":          "/apis/apps/v1/namespaces/%s/replicasets",
	"Lease":               "/apis/coordination.k8s.io/v1/namespaces/%s/leases",
	"PodDisruptionBudget": "/apis/policy/v1/namespaces/%s/poddisruptionbudgets",
	"NetworkPolicy":       "/apis/networking.k8s.io/v1/namespaces/%s/networkpolicies",
	"Ingress":             "/apis/networking.k8s.io/v1/namespaces/%s/ingresses",
}

func kindOf(o runtime.Object) schema.GroupVersionKind {
	kinds, _, err := known.ObjectKinds(o)
	if err != nil {
		panic(err)
	}
	return kinds[0]
}

func metaOf(o runtime.Object) metav1.Object {
	m, err := meta.Accessor(o)
	if err != nil {
		panic(err)
	}
	return m
}

func collectionOf(o runtime.Object) string {
	return fmt.Sprintf(fleetResources[kindOf(o).Kind], metaOf(o).GetNamespace())
}

// put writes an object as it is, as a controller would.
func (s *fleetAPI) put(o runtime.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.store(collectionOf(o), o)
}

// remove ends an object without asking.
func (s *fleetAPI) remove(o runtime.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drop(collectionOf(o), metaOf(o).GetName())
}

func (s *fleetAPI) store(collection string, o runtime.Object) {
	m := metaOf(o)
	s.version++
	m.SetResourceVersion(fmt.Sprint(s.version))
	if m.GetUID() == "" {
		m.SetUID(types.UID(fmt.Sprintf("uid-%d", s.version)))
	}
	o.GetObjectKind().SetGroupVersionKind(kindOf(o))
	path := collection + "/" + m.GetName()
	kind := watch.Modified
	if s.objects[path] == nil {
		kind = watch.Added
	}
	s.objects[path] = o.DeepCopyObject()
	s.tell(collection, kind, o)
}

func (s *fleetAPI) drop(collection, name string) {
	path := collection + "/" + name
	if o := s.objects[path]; o != nil {
		delete(s.objects, path)
		s.tell(collection, watch.Deleted, o)
	}
}

func (s *fleetAPI) tell(collection string, kind watch.EventType, o runtime.Object) {
	for ch, of := range s.watches {
		if of == collection {
			ch <- watchedEvent{kind, o.DeepCopyObject()}
		}
	}
}

// list returns the names of a kind in namespace demo.
func (s *fleetAPI) list(kind string) (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	prefix := fmt.Sprintf(fleetResources[kind], "demo") + "/"
	for path := range s.objects {
		if name, ok := strings.CutPrefix(path, prefix); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func (s *fleetAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if s.before != nil {
		s.before(r)
	}
	if !s.date.IsZero() {
		w.Header().Set("Date", s.date.Format(http.TimeFormat))
	}
	if strings.HasSuffix(r.URL.Path, "/portforward") {
		s.forward(w, r)
		return
	}
	var body runtime.Object
	if b, _ := io.ReadAll(r.Body); len(b) > 0 {
		var err error
		if body, _, err = codecs.UniversalDeserializer().Decode(b, nil, nil); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
	}
	code, o := s.answer(w, r, body)
	if o == nil {
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(o)
}

func statusOf(err *apierrors.StatusError) (int, any) {
	err.ErrStatus.Kind, err.ErrStatus.APIVersion = "Status", "v1"
	return int(err.ErrStatus.Code), &err.ErrStatus
}

func (s *fleetAPI) answer(w http.ResponseWriter, r *http.Request, body runtime.Object) (int, any) {
	if review, ok := body.(*authorizationv1.SelfSubjectAccessReview); ok {
		a := review.Spec.ResourceAttributes
		review.Status.Allowed = !slices.Contains(s.denied, a.Verb+" "+a.Resource)
		review.GetObjectKind().SetGroupVersionKind(kindOf(review))
		return 201, review
	}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	i := slices.Index(parts, "namespaces")
	if i < 0 || len(parts) < i+3 {
		return statusOf(apierrors.NewBadRequest(r.URL.Path))
	}
	resource := schema.GroupResource{Resource: parts[i+2]}
	collection, name := "/"+strings.Join(parts[:i+3], "/"), strings.Join(parts[i+3:], "/")
	verb := map[string]string{"GET": "get", "POST": "create", "PUT": "update", "DELETE": "delete"}[r.Method]
	if r.Method == "GET" && name == "" {
		verb = "list"
	}
	if slices.Contains(s.denied, verb+" "+resource.Resource) {
		return statusOf(apierrors.NewForbidden(resource, name, fmt.Errorf("User \"x\" cannot %s resource %q", verb, resource.Resource)))
	}
	if r.URL.Query().Get("watch") == "true" {
		s.watchAll(w, r, collection)
		return 0, nil
	}
	s.mu.Lock()
	present := s.objects[collection+"/"+name]
	if name != "" && present == nil {
		s.mu.Unlock()
		return statusOf(apierrors.NewNotFound(resource, name))
	}
	code, answer, made := 200, any(present), runtime.Object(nil)
	switch r.Method {
	case "GET":
		if name == "" {
			answer = s.listAll(r, collection)
		}
	case "POST":
		name = metaOf(body).GetName()
		if s.objects[collection+"/"+name] != nil {
			s.mu.Unlock()
			return statusOf(apierrors.NewAlreadyExists(resource, name))
		}
		metaOf(body).SetNamespace(parts[i+1])
		s.writes++
		s.store(collection, body)
		code, answer, made = 201, body, body
	case "PUT":
		if v := metaOf(body).GetResourceVersion(); v != "" && v != metaOf(present).GetResourceVersion() {
			s.mu.Unlock()
			return statusOf(apierrors.NewConflict(resource, name, fmt.Errorf("changed")))
		}
		s.writes++
		s.store(collection, body)
		answer = body
	case "DELETE":
		if p := body.(*metav1.DeleteOptions).Preconditions; p != nil {
			m := metaOf(present)
			if p.UID != nil && *p.UID != m.GetUID() || p.ResourceVersion != nil && *p.ResourceVersion != m.GetResourceVersion() {
				s.mu.Unlock()
				return statusOf(apierrors.NewConflict(resource, name, fmt.Errorf("precondition")))
			}
		}
		s.drop(collection, name)
		answer = &metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: metav1.StatusSuccess}
	}
	s.mu.Unlock()
	if made != nil && s.created != nil {
		s.created(made)
	}
	return code, answer
}

func matches(r *http.Request, o runtime.Object) bool {
	q := r.URL.Query()
	selector, err := labels.Parse(q.Get("labelSelector"))
	m := metaOf(o)
	if err != nil || !selector.Matches(labels.Set(m.GetLabels())) {
		return false
	}
	name, is := strings.CutPrefix(q.Get("fieldSelector"), "metadata.name=")
	return !is || name == m.GetName()
}

func (s *fleetAPI) listAll(r *http.Request, collection string) any {
	items, kind, version := []runtime.Object{}, "", ""
	for k, path := range fleetResources {
		if strings.HasSuffix(collection, path[strings.LastIndex(path, "/"):]) {
			kind = k
		}
	}
	for path, o := range s.objects {
		if strings.HasPrefix(path, collection+"/") && matches(r, o) {
			items = append(items, o)
		}
	}
	version = strings.TrimPrefix(strings.TrimPrefix(collection[:strings.Index(collection, "/namespaces")], "/apis/"), "/api/")
	return map[string]any{"kind": kind + "List", "apiVersion": version, "metadata": map[string]any{}, "items": items}
}

// watchAll sends what there is, and then what happens.
func (s *fleetAPI) watchAll(w http.ResponseWriter, r *http.Request, collection string) {
	events := make(chan watchedEvent, 1000)
	s.mu.Lock()
	for path, o := range s.objects {
		if strings.HasPrefix(path, collection+"/") {
			events <- watchedEvent{watch.Added, o.DeepCopyObject()}
		}
	}
	s.watches[events] = collection
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.watches, events)
		s.mu.Unlock()
	}()
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(200)
	_ = http.NewResponseController(w).Flush()
	for {
		select {
		case <-r.Context().Done():
			return
		case e := <-events:
			if !matches(r, e.Object) {
				continue
			}
			e.Object.GetObjectKind().SetGroupVersionKind(kindOf(e.Object))
			if json.NewEncoder(w).Encode(e) != nil {
				return
			}
			_ = http.NewResponseController(w).Flush()
		}
	}
}

// forward leads a port-forward by SPDY to a gate's handler.
func (s *fleetAPI) forward(w http.ResponseWriter, r *http.Request) {
	if strings.EqualFold(r.Header.Get("Upgrade"), "websocket") {
		http.Error(w, "unable to upgrade: unable to negotiate protocol", http.StatusBadRequest)
		return
	}
	parts := strings.Split(r.URL.Path, "/")
	s.mu.Lock()
	gate := s.gates[parts[len(parts)-2]]
	s.mu.Unlock()
	if _, err := httpstream.Handshake(r, w, []string{portForwardProtocol}); err != nil {
		return
	}
	streams := make(chan httpstream.Stream, 2)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(stream httpstream.Stream, _ <-chan struct{}) error {
		streams <- stream
		return nil
	})
	if conn == nil {
		return
	}
	defer conn.Close()
	byType := map[string]httpstream.Stream{}
	for range 2 {
		select {
		case stream := <-streams:
			byType[stream.Headers().Get("streamType")] = stream
		case <-conn.CloseChan():
			return
		}
	}
	data, trouble := byType["data"], byType["error"]
	if gate == nil {
		data.Close()
		fmt.Fprint(trouble, "connect: connection refused")
		trouble.Close()
		<-conn.CloseChan()
		return
	}
	server := httptest.NewServer(gate)
	defer server.Close()
	there, err := net.Dial("tcp", server.Listener.Addr().String())
	if err != nil {
		s.t.Error(err)
		return
	}
	defer there.Close()
	go io.Copy(there, data)
	go func() {
		_, _ = io.Copy(data, there)
		data.Close()
	}()
	<-conn.CloseChan()
}

// gatePod is a running pod of gates.
func gatePod(name, gate string, owner types.UID, isReady bool) *corev1.Pod {
	status := corev1.ConditionFalse
	if isReady {
		status = corev1.ConditionTrue
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: "demo", UID: types.UID(name),
			Labels: map[string]string{LabelGate: gate, LabelGateState: string(owner), LabelManagedBy: "culvert"},
		},
		Spec: corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Image: "x:1"}}},
		Status: corev1.PodStatus{
			Phase:      corev1.PodRunning,
			Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: status}},
		},
	}
}
