package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

const (
	generationKey = "generation" // of the ConfigMap: a decimal number
	entrySuffix   = ".json"      // one key for each Entry

	// maxGateState bounds the ConfigMap's data, in bytes: Kubernetes takes 1 MiB.
	maxGateState = 900 << 10
	// maxTries bounds the writers that one writer lets pass.
	maxTries = 100
)

// gateState is the ConfigMap of a namespace's gates as it was read. What this
// version does not know of others' entries stays in raw, and goes back unchanged.
type gateState struct {
	object *corev1.ConfigMap // nil: there is none
	raw    map[string]string
	intercept.State
}

// GateState returns what the namespace's gates shall know. Without ConfigMap it
// is empty, of Generation 0. Errors are *api.Error.
func (c *Cluster) GateState(ctx context.Context, namespace string) (*intercept.State, error) {
	s, err := c.readGateState(ctx, namespace)
	if err != nil {
		return nil, err
	}
	return &s.State, nil
}

func (c *Cluster) readGateState(ctx context.Context, namespace string) (*gateState, error) {
	what := fmt.Sprintf("reading ConfigMap %s in namespace %q", intercept.GateName, namespace)
	object, err := c.client.ConfigMaps(namespace).Get(ctx, intercept.GateName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return &gateState{State: intercept.State{Entries: map[string]intercept.Entry{}}}, nil
	}
	if err != nil {
		return nil, translate(what, err)
	}
	if object.Labels[LabelManagedBy] != "culvert" {
		return nil, &api.Error{
			Code:    api.CodeExists,
			Message: fmt.Sprintf("ConfigMap %s in namespace %q exists and is not culvert's", intercept.GateName, namespace),
			Hint:    fmt.Sprintf("`kubectl -n %s get configmap %s -o yaml` shows whose it is", namespace, intercept.GateName),
		}
	}
	return parseGateState(object)
}

func parseGateState(object *corev1.ConfigMap) (*gateState, error) {
	s := &gateState{object: object, raw: object.Data, State: intercept.State{Entries: map[string]intercept.Entry{}}}
	broken := func(key string, err error) error {
		return &api.Error{
			Code:    api.CodeInternal,
			Message: fmt.Sprintf("ConfigMap %s in namespace %q: %s is not what culvert wrote: %v", object.Name, object.Namespace, key, err),
			Hint:    fmt.Sprintf("`kubectl -n %s edit configmap %s` can take it out", object.Namespace, object.Name),
		}
	}
	for key, text := range object.Data {
		if key == generationKey {
			n, err := strconv.ParseInt(text, 10, 64)
			if err != nil {
				return nil, broken(key, err)
			}
			s.Generation = n
		}
		name, ok := strings.CutSuffix(key, entrySuffix)
		if !ok {
			continue
		}
		var e intercept.Entry
		if json.Unmarshal([]byte(text), &e) != nil {
			continue // one that somebody spoilt is no reason to lose the others; it stays in raw
		}
		s.Entries[name] = e
	}
	return s, nil
}

// data is the ConfigMap's data for entries. Those that did not change keep their
// text: a newer version may have written more into it than this one knows.
func (s *gateState) data(entries map[string]intercept.Entry) (data map[string]string, changed bool, err error) {
	data = maps.Clone(s.raw)
	if data == nil {
		data = map[string]string{}
	}
	for name := range s.Entries {
		if _, ok := entries[name]; !ok {
			delete(data, name+entrySuffix)
			changed = true
		}
	}
	for name, e := range entries {
		if old, ok := s.Entries[name]; ok && reflect.DeepEqual(old, e) {
			continue
		}
		text, err := json.Marshal(e)
		if err != nil {
			return nil, false, fmt.Errorf("encoding the gates' entry %s: %w", name, err)
		}
		if data[name+entrySuffix] != string(text) {
			data[name+entrySuffix] = string(text)
			changed = true
		}
	}
	size := 0
	for key, text := range data {
		size += len(key) + len(text)
	}
	if size > maxGateState {
		return nil, false, &api.Error{
			Code:    api.CodeNamespace,
			Message: fmt.Sprintf("ConfigMap %s has no room for more: its %d intercepts take %d bytes, where %d are possible", intercept.GateName, len(entries), size, maxGateState),
			Hint:    "`culvert clean` removes what nobody owns any more",
		}
	}
	return data, changed, nil
}

// entries is a copy that its owner may change, slices included.
func (s *gateState) entries() (map[string]intercept.Entry, error) {
	text, err := json.Marshal(s.Entries)
	if err != nil {
		return nil, fmt.Errorf("copying the gates' entries: %w", err)
	}
	entries := map[string]intercept.Entry{}
	return entries, json.Unmarshal(text, &entries)
}

// ChangeGateState has change make a new State of the present one, writes it with
// the next Generation and returns it, so that no other writer's change is lost:
// when somebody was faster, change is called again with what he wrote. It may
// refuse; its error is returned as it is. The ConfigMap is made if there is none;
// a change that changes nothing is not written. Errors are *api.Error.
func (c *Cluster) ChangeGateState(ctx context.Context, namespace string, change func(*intercept.State) error) (*intercept.State, error) {
	what := fmt.Sprintf("changing ConfigMap %s in namespace %q", intercept.GateName, namespace)
	var made *intercept.State
	var refused error
	err := c.contend(ctx, what, func() error {
		now, err := c.readGateState(ctx, namespace)
		if err != nil {
			return err
		}
		made = &intercept.State{Generation: now.Generation}
		if made.Entries, err = now.entries(); err != nil {
			return err
		}
		if refused = change(made); refused != nil {
			return refused
		}
		made.Generation = now.Generation
		data, changed, err := now.data(made.Entries)
		if err != nil || !changed {
			return err
		}
		made.Generation++
		data[generationKey] = strconv.FormatInt(made.Generation, 10)
		return c.writeGateState(ctx, namespace, now.object, data)
	})
	switch {
	case refused != nil:
		return nil, refused
	case err != nil:
		return nil, err
	}
	return made, nil
}

// writeGateState replaces present, or makes the ConfigMap if that is nil.
// Whoever lost a race gets errLostRace.
func (c *Cluster) writeGateState(ctx context.Context, namespace string, present *corev1.ConfigMap, data map[string]string) (err error) {
	maps := c.client.ConfigMaps(namespace)
	switch {
	case present == nil:
		_, err = maps.Create(ctx, &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{
				Name: intercept.GateName, Namespace: namespace,
				Labels: map[string]string{LabelName: gateApp, LabelManagedBy: "culvert"},
			},
			Data: data,
		}, metav1.CreateOptions{FieldManager: fieldManager})
	case present.DeletionTimestamp != nil:
		return errLostRace // somebody deletes it, in the foreground: what is written now would vanish
	default:
		next := present.DeepCopy()
		next.Data = data
		_, err = maps.Update(ctx, intercept.GateName, next, metav1.UpdateOptions{FieldManager: fieldManager})
	}
	if lostRace(err) {
		return errLostRace
	}
	return err
}

// errLostRace: somebody else changed, made or removed it first.
var errLostRace = fmt.Errorf("somebody else changes it all the time")

// lostRace tells the answers that mean: look again. A name that is not found was
// there a moment ago, unless the namespace itself is missing.
func lostRace(err error) bool {
	if status, ok := err.(apierrors.APIStatus); ok && apierrors.IsNotFound(err) {
		details := status.Status().Details
		return details == nil || details.Kind != "namespaces"
	}
	return apierrors.IsConflict(err) || apierrors.IsAlreadyExists(err)
}

// contend calls try until it returns something else than errLostRace, with
// random pauses that grow: of many writers at once one succeeds in each round.
func (c *Cluster) contend(ctx context.Context, what string, try func() error) error {
	longest := 20 * time.Millisecond
	for range maxTries {
		err := try()
		if err != errLostRace {
			return translate(what, err)
		}
		select {
		case <-ctx.Done():
			return translate(what, ctx.Err())
		case <-time.After(rand.N(longest)):
		}
		longest = min(2*longest, 500*time.Millisecond)
	}
	return translate(what, errLostRace)
}

// Ports of gates that serve a whole namespace.
const (
	firstGatePort = 20000
	lastGatePort  = 29999
)

// AllocatePorts returns n ports that no entry of the gate has; fewer if there
// are not so many. It belongs into a change of ChangeGateState. The ports begin
// somewhere: kube-proxies that lag behind lead connections to a port which was
// freed a moment ago, and they would come to another Service.
func AllocatePorts(s *intercept.State, gate string, n int) []uint16 {
	const size = lastGatePort - firstGatePort + 1
	taken := map[uint16]bool{}
	for _, e := range s.Entries {
		if e.Gate != gate {
			continue
		}
		for _, r := range e.Routes {
			taken[r.Listen] = true
		}
	}
	var free []uint16
	first := rand.N(size)
	for i := 0; i < size && len(free) < n; i++ {
		if port := uint16(firstGatePort + (first+i)%size); !taken[port] {
			free = append(free, port)
		}
	}
	return free
}

// RemoveGateEntry takes one entry out and returns what is left. The last one out
// deletes the ConfigMap, which takes Deployments and budgets of gates with it;
// whoever comes in at the same moment either keeps it alive or makes it anew. An
// entry that does not exist is no error. Errors are *api.Error.
func (c *Cluster) RemoveGateEntry(ctx context.Context, namespace, key, session string) (last bool, state *intercept.State, err error) {
	what := fmt.Sprintf("removing %s from ConfigMap %s in namespace %q", key, intercept.GateName, namespace)
	err = c.contend(ctx, what, func() error {
		now, err := c.readGateState(ctx, namespace)
		if err != nil {
			return err
		}
		state, last = &now.State, now.object == nil
		if last {
			return nil
		}
		before, err := now.entries()
		if err != nil {
			return err
		}
		if e, ok := now.Entries[key]; ok && session != "" && e.Holder.Session != session {
			return nil // somebody has it by now
		}
		delete(now.Entries, key)
		if len(now.Entries) == 0 {
			last = true
			state.Generation++ // for gates that are told of it: they know this one
			return c.deleteGateState(ctx, namespace, now.object)
		}
		if len(now.Entries) == len(before) {
			return nil
		}
		data := maps.Clone(now.raw)
		delete(data, key+entrySuffix)
		state.Generation++
		data[generationKey] = strconv.FormatInt(state.Generation, 10)
		return c.writeGateState(ctx, namespace, now.object, data)
	})
	if err != nil {
		return false, nil, err
	}
	return last, state, nil
}

func (c *Cluster) deleteGateState(ctx context.Context, namespace string, object *corev1.ConfigMap) error {
	background := metav1.DeletePropagationBackground
	err := c.client.ConfigMaps(namespace).Delete(ctx, object.Name, metav1.DeleteOptions{
		PropagationPolicy: &background,
		Preconditions:     &metav1.Preconditions{UID: &object.UID, ResourceVersion: &object.ResourceVersion},
	})
	switch {
	case apierrors.IsNotFound(err):
		return nil
	case apierrors.IsConflict(err):
		return errLostRace
	}
	return err
}
