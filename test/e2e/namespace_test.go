//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// namespaceKinds are all kinds of objects that a namespace can hold, but for what
// changes by itself.
var namespaceKinds = sync.OnceValues(listKinds)

func listKinds() (string, error) {
	r := lab.Kubectl("", nil, "api-resources", "--namespaced", "--verbs=list", "-o", "name")
	if r.Code != 0 {
		return "", fmt.Errorf("listing the kinds of objects: %v", r)
	}
	kinds := slices.DeleteFunc(strings.Fields(r.Stdout), func(kind string) bool {
		return slices.Contains([]string{"events", "events.events.k8s.io", "endpoints", "endpointslices.discovery.k8s.io"}, kind)
	})
	return strings.Join(kinds, ","), nil
}

// listNamespace is all objects of a namespace, a line for each field that is a
// leaf. Pods count by what they are like: those that were re-created have other
// names, addresses and nodes.
func listNamespace(t *testing.T, namespace string) []string {
	t.Helper()
	kinds, err := namespaceKinds()
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		Items []map[string]any `json:"items"`
	}
	text := kubectl(t, "-n", namespace, "get", kinds, "-o", "json", "--show-managed-fields")
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatalf("the objects of %s: %v", namespace, err)
	}
	var lines []string
	pods := map[string]int{}
	for _, o := range list.Items {
		name, o := plainObject(o)
		if strings.HasPrefix(name, "Pod/") {
			pods[name]++
			name = fmt.Sprintf("%s#%d", name, pods[name])
		}
		lines = appendLeaves(lines, name, o)
	}
	return lines
}

// plainObject takes from an object what changes without anybody's doing, and
// gives it a name.
func plainObject(o map[string]any) (string, map[string]any) {
	meta := o["metadata"].(map[string]any)
	kind := o["kind"].(string)
	name := kind + "/" + meta["name"].(string)
	if kind == "Pod" {
		owner, labels := "nobody", meta["labels"]
		if owners, ok := meta["ownerReferences"].([]any); ok {
			owner = owners[0].(map[string]any)["name"].(string)
		}
		containers := o["spec"].(map[string]any)["containers"].([]any)[0].(map[string]any)
		plain := map[string]any{"image": containers["image"], "args": containers["args"], "labels": labels}
		if meta["deletionTimestamp"] != nil {
			plain["ending"] = true
		}
		return "Pod/" + owner, plain
	}
	for _, field := range []string{"resourceVersion", "generation"} {
		delete(meta, field)
	}
	delete(o, "status")
	if kind == "Lease" { // of a session that lives: it is renewed all the time
		delete(o["spec"].(map[string]any), "renewTime")
	}
	var managers []any
	all, _ := meta["managedFields"].([]any)
	for _, m := range all {
		if m := m.(map[string]any); m["subresource"] == nil {
			delete(m, "time")
			managers = append(managers, m)
		}
	}
	meta["managedFields"] = managers
	return name, o
}

// appendLeaves adds a line for each leaf of a JSON value, which reads well in a
// comparison.
func appendLeaves(lines []string, path string, v any) []string {
	switch v := v.(type) {
	case map[string]any:
		if len(v) == 0 {
			return append(lines, path+" {}")
		}
		for _, key := range sortedKeys(v) {
			lines = appendLeaves(lines, path+" "+key, v[key])
		}
		return lines
	case []any:
		for i, e := range v {
			lines = appendLeaves(lines, fmt.Sprintf("%s[%d]", path, i), e)
		}
		return lines
	}
	b, _ := json.Marshal(v) // it came from JSON
	return append(lines, path+" "+string(b))
}

func sortedKeys(m map[string]any) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// sameNamespace waits until a namespace holds what it held before, in full.
func sameNamespace(t *testing.T, namespace string, before []string, within time.Duration) {
	t.Helper()
	sameLines(t, before, within, func() []string { return listNamespace(t, namespace) })
}

// sameOwn is sameNamespace without what bears culvert's name: agent, gates, Leases.
func sameOwn(t *testing.T, namespace string, before []string, within time.Duration) {
	t.Helper()
	sameLines(t, withoutOurs(before), within, func() []string { return withoutOurs(listNamespace(t, namespace)) })
}

func sameLines(t *testing.T, before []string, within time.Duration, now func() []string) {
	t.Helper()
	begun := time.Now()
	for {
		diff := compare(before, now())
		if diff == "" {
			return
		}
		if time.Since(begun) > within {
			t.Fatalf("after %v it is not as before:\n%s\nlogs: %v\ndaemon:\n%s", within, diff, lab.Culvert(netlab.Alice, "logs"), lab.Tail(20))
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// withoutOurs drops the lines of objects that have culvert's label.
func withoutOurs(lines []string) (own []string) {
	ours := map[string]bool{}
	for _, l := range lines {
		if object, _, ok := strings.Cut(l, ` labels app.kubernetes.io/managed-by "culvert"`); ok {
			ours[strings.Fields(object)[0]] = true
		}
	}
	for _, l := range lines {
		if !ours[strings.Fields(l)[0]] {
			own = append(own, l)
		}
	}
	return own
}
