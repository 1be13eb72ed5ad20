package cluster

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

func TestInterceptAccess(t *testing.T) {
	server, c := newFleetAPI(t)
	all := []string{"exchange", "preview", "scale"}
	if err := c.InterceptAccess(t.Context(), "demo", all...); err != nil {
		t.Error(err)
	}
	for verb, kinds := range map[string][]string{
		"update configmaps": {"exchange"}, "create poddisruptionbudgets": {"preview"}, "patch services": {"exchange"}, "patch statefulsets": {"scale"},
	} {
		server.denied = []string{verb}
		err := server.open(t).InterceptAccess(t.Context(), "demo", kinds...)
		v, resource, _ := strings.Cut(verb, " ")
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeForbidden || !strings.Contains(e.Message, v+" "+resource) || !strings.Contains(e.Message, `"demo"`) {
			t.Errorf("%s: %v", verb, err)
		}
	}
	server.denied = []string{"list networkpolicies", "patch deployments"}
	if err := c.InterceptAccess(t.Context(), "demo", "exchange", "preview"); err != nil {
		t.Errorf("what exchange works without: %v", err)
	}
}

// What is checked is what the shipped roles give, each where the manifest says.
func TestInterceptAccessIsInTheManifest(t *testing.T) {
	text, err := os.ReadFile("../deploy/rbac/culvert.yaml")
	if err != nil {
		t.Fatal(err)
	}
	type role struct {
		Metadata struct{ Name string }
		Rules    []struct{ APIGroups, Resources, Verbs []string }
	}
	roles := map[string]role{}
	for _, part := range strings.Split(string(text), "\n---\n") {
		var r role
		if err := yaml.Unmarshal([]byte(part), &r); err != nil {
			t.Fatal(err)
		}
		roles[r.Metadata.Name] = r
	}
	has := func(name string, c Check) bool {
		resource := c.resource
		if c.subresource != "" {
			resource += "/" + c.subresource
		}
		return slices.ContainsFunc(roles[name].Rules, func(r struct{ APIGroups, Resources, Verbs []string }) bool {
			return slices.Contains(r.APIGroups, c.group) && slices.Contains(r.Resources, resource) && slices.Contains(r.Verbs, c.Verb)
		})
	}
	for _, c := range interceptChecks("demo", intercept.Exchange, intercept.Preview) {
		if !has("culvert-intercept", c) {
			t.Errorf("culvert-intercept lacks %s %s", c.Verb, c.Resource)
		}
	}
	for _, c := range interceptChecks("demo", intercept.Scale) {
		if !has("culvert-intercept", c) && !has("culvert-scale", c) {
			t.Errorf("neither role has %s %s", c.Verb, c.Resource)
		}
	}
}
