package cluster

import (
	"context"
	"errors"
	"slices"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"
)

// Only what the same user made from the same daemon goes, and only if no
// session of his owns it.
func TestRemoveStale(t *testing.T) {
	ours := AgentSpec{Session: "now", User: "dev", Origin: "o1", Image: "x:1"}
	client := fake.NewClientset()
	c := &Cluster{namespace: "demo", client: client}
	make := func(namespace string, change func(*AgentSpec)) {
		t.Helper()
		s := ours
		change(&s)
		d, err := s.deployment(namespace)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := client.AppsV1().Deployments(namespace).Create(t.Context(), d, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
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
		list, err := client.AppsV1().Deployments("").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range list.Items {
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
