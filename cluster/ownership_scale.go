package cluster

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// fieldManager is the name under which culvert changes objects of others.
const scaleFieldManager = "culvert"

// Owner is one who owned a field before culvert changed it: an entry of
// metadata.managedFields without its fields.
type Owner struct {
	Manager     string       `json:"manager"`
	Operation   string       `json:"operation"`
	APIVersion  string       `json:"apiVersion"`
	Subresource string       `json:"subresource,omitempty"`
	Time        *metav1.Time `json:"time,omitempty"`
}

func (o Owner) is(e metav1.ManagedFieldsEntry) bool {
	return o.Manager == e.Manager && o.Operation == string(e.Operation) && o.APIVersion == e.APIVersion && o.Subresource == e.Subresource
}

// fieldPath is a way into FieldsV1: "f:spec", "f:replicas".
type fieldPath []string

// ownersOf are those who own the field, culvert excepted.
func ownersOf(fields []metav1.ManagedFieldsEntry, path fieldPath) (owners []Owner) {
	for _, e := range fields {
		if e.Manager == scaleFieldManager || e.FieldsV1 == nil {
			continue
		}
		set, err := decodeFields(e.FieldsV1)
		if err == nil && set.has(path) {
			owners = append(owners, Owner{Manager: e.Manager, Operation: string(e.Operation), APIVersion: e.APIVersion, Subresource: e.Subresource, Time: e.Time})
		}
	}
	return owners
}

// giveBack is fields after culvert has given up what it touched: its own entries
// lose the paths of given and dropped, and each of given is its owners' again. An
// owner whose entry ended with that field gets a new one. Without it the owner's
// next server-side apply would conflict with culvert.
func giveBack(fields []metav1.ManagedFieldsEntry, given map[string][]Owner, paths map[string]fieldPath, dropped ...fieldPath) ([]metav1.ManagedFieldsEntry, error) {
	var all []metav1.ManagedFieldsEntry
	for _, e := range fields {
		if e.Manager != scaleFieldManager || e.FieldsV1 == nil {
			all = append(all, e)
			continue
		}
		set, err := decodeFields(e.FieldsV1)
		if err != nil {
			return nil, err
		}
		for _, p := range dropped {
			set.remove(p)
		}
		for name := range given {
			set.remove(paths[name])
		}
		if set.empty() {
			continue
		}
		if e.FieldsV1, err = set.encode(); err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	for name, owners := range given {
		for _, o := range owners {
			i := slices.IndexFunc(all, o.is)
			if i < 0 {
				i = len(all)
				all = append(all, metav1.ManagedFieldsEntry{
					Manager: o.Manager, Operation: metav1.ManagedFieldsOperationType(o.Operation), APIVersion: o.APIVersion,
					Subresource: o.Subresource, Time: o.Time, FieldsType: "FieldsV1", FieldsV1: &metav1.FieldsV1{Raw: []byte("{}")},
				})
			}
			set, err := decodeFields(all[i].FieldsV1)
			if err != nil {
				return nil, err
			}
			set.insert(paths[name])
			if all[i].FieldsV1, err = set.encode(); err != nil {
				return nil, err
			}
		}
	}
	return all, nil
}

// fieldSet is FieldsV1: what is owned, as nested maps. "." beside others says that
// the map itself is owned too.
type fieldSet map[string]any

func decodeFields(f *metav1.FieldsV1) (fieldSet, error) {
	set := fieldSet{}
	if f == nil || len(bytes.TrimSpace(f.Raw)) == 0 {
		return set, nil
	}
	if err := json.Unmarshal(f.Raw, (*map[string]any)(&set)); err != nil {
		return nil, fmt.Errorf("reading managedFields: %w", err)
	}
	return set, nil
}

func (s fieldSet) encode() (*metav1.FieldsV1, error) {
	b, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("writing managedFields: %w", err)
	}
	return &metav1.FieldsV1{Raw: b}, nil
}

func (s fieldSet) below(name string) (fieldSet, bool) {
	m, ok := s[name].(map[string]any)
	return m, ok
}

func (s fieldSet) has(path fieldPath) bool {
	for i, name := range path {
		if i == len(path)-1 {
			_, ok := s[name]
			return ok
		}
		var ok bool
		if s, ok = s.below(name); !ok {
			return false
		}
	}
	return true
}

func (s fieldSet) insert(path fieldPath) {
	for _, name := range path {
		next, ok := s.below(name)
		if !ok {
			next = fieldSet{}
			s[name] = map[string]any(next)
		}
		s = next
	}
}

// remove takes the path out, and what is empty then.
func (s fieldSet) remove(path fieldPath) {
	if len(path) == 1 {
		delete(s, path[0])
		return
	}
	next, ok := s.below(path[0])
	if !ok {
		return
	}
	next.remove(path[1:])
	if next.empty() {
		delete(s, path[0])
	}
}

// empty says whether nothing is owned but, perhaps, the maps that held it.
func (s fieldSet) empty() bool {
	for name := range s {
		if name != "." {
			return false
		}
	}
	return true
}
