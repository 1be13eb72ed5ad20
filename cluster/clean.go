package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

// RecoverSpec names what shall be its own again.
type RecoverSpec struct {
	Namespace string
	Target    string // as typed: a Service, or KIND/NAME of a workload
	Force     bool   // although its owner lives
	Drain     time.Duration
	Say       func(string)
}

// Recovered is what Recover found.
type Recovered struct {
	Service string `json:"service"`
	Found   bool   `json:"found"` // it was intercepted
	User    string `json:"user,omitempty"`
	Session string `json:"session,omitempty"`
}

// Recover ends an intercept, whoever's it is. Errors are *api.Error.
func (c *Cluster) Recover(ctx context.Context, spec RecoverSpec) (Recovered, error) {
	key, err := c.recoverKey(spec.Target)
	if err != nil {
		return Recovered{}, err
	}
	all, err := c.List(ctx, spec.Namespace)
	if err != nil {
		return Recovered{}, err
	}
	r := Recovered{Service: spec.Target}
	known := false
	for _, s := range all {
		if s.Name != key && scaleKeyOf(s.Name) != key {
			continue
		}
		known = true
		r.Service, r.User, r.Session, r.Found = s.Name, s.User, s.Session, s.Kind != ""
		if s.Alive && !spec.Force {
			return r, &api.Error{Code: api.CodeExists,
				Message: fmt.Sprintf("%s in namespace %q is intercepted by %s, whose session is alive", s.Name, spec.Namespace, s.owners()),
				Hint:    "ask for `culvert leave " + s.Name + "` there, or take it with --force"}
		}
	}
	if !known && !strings.HasPrefix(key, scalePrefix) {
		_, err := c.findService(ctx, spec.Namespace, key) // it knows what may be meant
		return r, err
	}
	keys := []string{key}
	if state, err := c.GateState(ctx, spec.Namespace); err == nil {
		keys = append(rulesFor(state, key), key)
	}
	var trouble []error
	for _, key := range keys {
		// Also when nothing seems to be there: what is left of a half undone one goes.
		trouble = append(trouble, c.Undo(ctx, UndoSpec{Namespace: spec.Namespace, Key: key, Drain: spec.Drain, Say: spec.Say}))
	}
	return r, errors.Join(trouble...)
}

// owners are whose an intercept is, for people: of a mesh those who are alive.
func (s ServiceState) owners() string {
	var who []string
	for _, m := range s.Members {
		if m.Alive {
			who = append(who, firstOf(m.User, m.Session))
		}
	}
	if len(who) == 0 {
		return firstOf(s.User, s.Session)
	}
	return list(who)
}

// recoverKey is the key in the gates' state of what a person typed.
func (c *Cluster) recoverKey(target string) (string, error) {
	kind, name, ok := strings.Cut(target, "/")
	if !ok {
		return target, nil
	}
	switch kind {
	case "svc", "service", "services":
		return name, nil
	}
	if key := scaleKeyOf(target); key != "" {
		return key, nil
	}
	return "", &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%q is neither a Service nor a workload", target), Hint: "culvert recover NAME, or deployment/NAME, statefulset/NAME, replicaset/NAME"}
}

// CleanSpec says what Clean may take away.
type CleanSpec struct {
	Namespaces []string
	OlderThan  time.Duration // since the session was seen, by the API server's clock
	DryRun     bool
}

// Clean gives back and deletes what no living session owns, and returns what it
// was, with Leftover.Action saying what was, or would be, done, and what could not be
// looked at. It goes on after errors.
func (c *Cluster) Clean(ctx context.Context, spec CleanSpec) (left []Leftover, notes []string, err error) {
	found, notes, err := c.Leftovers(ctx, spec.Namespaces, spec.OlderThan)
	if err != nil || spec.DryRun {
		return found, notes, err
	}
	var trouble []error
	kept := map[string]bool{} // what a Service that could not be given back still needs
	for k := range found {
		l := &found[k]
		of := l.Namespace + "/" + l.Session
		if l.Action == LeftoverDelete && kept[of] {
			l.Action = "kept: what it serves could not be given back"
			continue
		}
		if err := c.removeLeftover(ctx, *l); err != nil {
			kept[of] = true
			l.Action = "failed: " + err.Error()
			trouble = append(trouble, fmt.Errorf("%s %s/%s: %w", l.Kind, l.Namespace, l.Name, err))
		}
	}
	return found, notes, errors.Join(trouble...)
}

// removeLeftover does what Action says. What belongs to one intercept goes with
// the first of its parts; the others are gone then, which is fine.
func (c *Cluster) removeLeftover(ctx context.Context, l Leftover) error {
	undo := func(key string) error {
		return c.Undo(ctx, UndoSpec{Namespace: l.Namespace, Key: key, Session: l.Session, Dead: true})
	}
	switch l.Action {
	case LeftoverRestore:
		return undo(l.Name)
	case LeftoverRescale:
		return undo(scaleKeyOf(l.Kind + "/" + l.Name))
	case LeftoverTakeOut:
		if l.Name != "" {
			return undo(l.Name)
		}
		_, _, err := c.RemoveGateEntry(ctx, l.Namespace, "", "")
		return err
	case LeftoverDelete:
		return c.RemoveLeftover(ctx, l)
	}
	return nil // of LeftoverUnknown nobody knows whether it is left over
}

// NamespaceNames are all namespaces of the cluster.
func (c *Cluster) NamespaceNames(ctx context.Context) ([]string, error) {
	var names []string
	options := metav1.ListOptions{Limit: pageSize}
	for {
		page, err := c.client.Namespaces().List(ctx, options)
		if err != nil {
			return nil, translate("listing namespaces", err)
		}
		for k := range page.Items {
			names = append(names, page.Items[k].Name)
		}
		if options.Continue = page.Continue; options.Continue == "" {
			return names, nil
		}
	}
}
