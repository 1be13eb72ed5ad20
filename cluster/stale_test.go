package cluster

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// Only what the same user made from the same daemon goes, and only if no
// session of his owns it.
func TestRemoveStale(t *testing.T) {
	ours := AgentSpec{Session: "now", User: "dev", Origin: "o1", Image: "x:1"}
	server := &deploymentServer{}
	c := &Cluster{namespace: "demo", client: (&apiServer{answer: server.answer}).client(t)}
	make := func(namespace string, change func(*AgentSpec)) {
		t.Helper()
		s := ours
		change(&s)
		d, err := s.deployment(namespace)
		if err != nil {
			t.Fatal(err)
		}
		d.UID = types.UID(s.Session)
		server.all = append(server.all, *d)
	}
	make("demo", func(s *AgentSpec) {})
	make("demo", func(s *AgentSpec) { s.Session = "stale" })
	make("demo", func(s *AgentSpec) { s.Session = "other-context" })
	make("demo", func(s *AgentSpec) { s.Session, s.User = "colleague", "eve" })
	make("demo", func(s *AgentSpec) { s.Session, s.Origin = "other-machine", "o2" })
	make("demo", func(s *AgentSpec) { s.Session, s.Origin = "no-origin", "" })
	make("other", func(s *AgentSpec) { s.Session = "elsewhere" })
	live := func(ids ...string) func(context.Context) ([]string, error) {
		return func(context.Context) ([]string, error) { return ids, nil }
	}
	left := func() (names []string) {
		server.mu.Lock()
		defer server.mu.Unlock()
		for _, d := range server.all {
			names = append(names, d.Labels[LabelSession])
		}
		slices.Sort(names)
		return names
	}
	all := left()

	// Whoever cannot say what lives removes nothing.
	for name, ask := range map[string]func(context.Context) ([]string, error){
		"an error":        func(context.Context) ([]string, error) { return nil, errors.New("x") },
		"no sessions":     live(),
		"not even itself": live("other-context"),
	} {
		if removed, err := c.RemoveStale(t.Context(), ours, ask); err == nil || len(removed) != 0 {
			t.Errorf("%s: removed %v, %v", name, removed, err)
		}
	}
	for _, blind := range []AgentSpec{{Session: "now", User: "dev"}, {Session: "now", Origin: "o1"}} {
		if removed, err := c.RemoveStale(t.Context(), blind, live("now")); err != nil || len(removed) != 0 {
			t.Errorf("%+v: removed %v, %v", blind, removed, err)
		}
	}
	if got := left(); !slices.Equal(got, all) {
		t.Fatalf("left %v", got)
	}

	removed, err := c.RemoveStale(t.Context(), ours, live("now", "other-context"))
	if err != nil || !slices.Equal(removed, []string{AgentName("stale")}) {
		t.Errorf("removed %v, %v", removed, err)
	}
	if got, want := left(), slices.DeleteFunc(slices.Clone(all), func(s string) bool { return s == "stale" }); !slices.Equal(got, want) {
		t.Errorf("left %v, want %v", got, want)
	}
}

// deploymentServer keeps Deployments, as far as RemoveStale needs it.
type deploymentServer struct {
	mu  sync.Mutex
	all []appsv1.Deployment
}

func (s *deploymentServer) answer(r *http.Request, body runtime.Object) (int, runtime.Object) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := func(d appsv1.Deployment, path string) bool {
		return path == "/apis/apps/v1/namespaces/"+d.Namespace+"/deployments"
	}
	switch r.Method {
	case http.MethodGet:
		selector, err := labels.Parse(r.URL.Query().Get("labelSelector"))
		if err != nil {
			break
		}
		found := &appsv1.DeploymentList{}
		for _, d := range s.all {
			if in(d, r.URL.Path) && selector.Matches(labels.Set(d.Labels)) {
				found.Items = append(found.Items, d)
			}
		}
		return 200, found
	case http.MethodDelete:
		uid := body.(*metav1.DeleteOptions).Preconditions.UID
		before := len(s.all)
		s.all = slices.DeleteFunc(s.all, func(d appsv1.Deployment) bool {
			return strings.HasSuffix(r.URL.Path, "/"+d.Name) && in(d, strings.TrimSuffix(r.URL.Path, "/"+d.Name)) && *uid == d.UID
		})
		if len(s.all) < before {
			return 200, &metav1.Status{Status: metav1.StatusSuccess}
		}
	}
	status := apierrors.NewBadRequest(r.Method + " " + r.URL.String()).Status()
	return 400, &status
}
