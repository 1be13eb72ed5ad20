package cluster

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/structured-merge-diff/v6/fieldpath"
)

// fieldManager is culvert's name as an owner of fields.
//
// The API server notes in metadata.managedFields who set which field, and makes
// us the owner of what we change. After undo that would have the owner's next
// server-side apply fail with a conflict, so undo gives ownership back. It takes
// a request of its own: whoever changes a value owns it, whatever the request
// says of ownership (https://kubernetes.io/docs/reference/using-api/server-side-apply/).
const fieldManager = "culvert"

// isReplicas is what --mode scale changes of a workload, beside its annotation.
func isReplicas(p fieldpath.Path) bool { return fieldAt(p, 0) == "spec" && fieldAt(p, 1) == "replicas" }

// Fields of a Service. An intercept changes selector and targetPorts, beside its
// annotation.
func isSelector(p fieldpath.Path) bool   { return fieldAt(p, 0) == "spec" && fieldAt(p, 1) == "selector" }
func isPort(p fieldpath.Path) bool       { return fieldAt(p, 0) == "spec" && fieldAt(p, 1) == "ports" }
func isTargetPort(p fieldpath.Path) bool { return isPort(p) && fieldAt(p, 3) == "targetPort" } // 2 is the port's key
func isTouched(p fieldpath.Path) bool    { return isSelector(p) || isTargetPort(p) }

func fieldAt(p fieldpath.Path, i int) string {
	if i >= len(p) || p[i].FieldName == nil {
		return ""
	}
	return *p[i].FieldName
}

// only is the part of fields that is wanted.
func only(fields *fieldpath.Set, wanted func(fieldpath.Path) bool) *fieldpath.Set {
	part := fieldpath.NewSet()
	fields.Iterate(func(p fieldpath.Path) {
		if wanted(p) {
			part.Insert(p.Copy())
		}
	})
	return part
}

// owners says who owns the fields that an intercept touches, ourselves left out:
// of what is ours now those that had it before (saved), of all else those that
// have it now.
func owners(live, saved []metav1.ManagedFieldsEntry, touched func(fieldpath.Path) bool) ([]metav1.ManagedFieldsEntry, error) {
	ours, theirs, err := splitOwners(live)
	if err != nil {
		return nil, err
	}
	var all []metav1.ManagedFieldsEntry
	for _, e := range theirs {
		fields, err := fieldsOf(e)
		if err != nil {
			return nil, err
		}
		if all, err = addFields(all, e, only(fields, touched)); err != nil {
			return nil, err
		}
	}
	return addSaved(all, saved, ours)
}

// giveBack is live without ourselves, and with those of saved as owners of what
// was ours. What somebody else took from us meanwhile stays his.
func giveBack(live, saved []metav1.ManagedFieldsEntry) ([]metav1.ManagedFieldsEntry, error) {
	ours, theirs, err := splitOwners(live)
	if err != nil {
		return nil, err
	}
	all, err := addSaved(theirs, saved, ours)
	if err == nil && len(all) == 0 {
		// No entry would mean "as they are"; one empty entry means none.
		all = []metav1.ManagedFieldsEntry{{}}
	}
	return all, err
}

// splitOwners takes our own entries out, and returns what they name.
func splitOwners(live []metav1.ManagedFieldsEntry) (ours *fieldpath.Set, theirs []metav1.ManagedFieldsEntry, err error) {
	ours = fieldpath.NewSet()
	for _, e := range live {
		if e.Manager != fieldManager {
			theirs = append(theirs, *e.DeepCopy())
			continue
		}
		fields, err := fieldsOf(e)
		if err != nil {
			return nil, nil, err
		}
		ours = ours.Union(fields)
	}
	return ours, theirs, nil
}

// addSaved adds to all what saved and ours have in common.
func addSaved(all, saved []metav1.ManagedFieldsEntry, ours *fieldpath.Set) ([]metav1.ManagedFieldsEntry, error) {
	for _, e := range saved {
		fields, err := fieldsOf(e)
		if err != nil {
			return nil, err
		}
		if all, err = addFields(all, e, fields.Intersection(ours)); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// addFields has e's manager own fields in all, beside what it owns there already.
func addFields(all []metav1.ManagedFieldsEntry, e metav1.ManagedFieldsEntry, fields *fieldpath.Set) ([]metav1.ManagedFieldsEntry, error) {
	if fields.Empty() {
		return all, nil
	}
	i := slices.IndexFunc(all, func(a metav1.ManagedFieldsEntry) bool {
		// An apply in another version replaces the manager's entry.
		return a.Manager == e.Manager && a.Operation == e.Operation && a.Subresource == e.Subresource &&
			(a.APIVersion == e.APIVersion || a.Operation == metav1.ManagedFieldsOperationApply)
	})
	if i < 0 {
		i, all = len(all), append(all, *e.DeepCopy())
	} else {
		has, err := fieldsOf(all[i])
		if err != nil {
			return nil, err
		}
		fields = fields.Union(has)
	}
	text, err := fields.ToJSON()
	if err != nil {
		return nil, fmt.Errorf("encoding the fields of manager %q: %w", e.Manager, err)
	}
	all[i].FieldsType, all[i].FieldsV1 = "FieldsV1", metav1.NewFieldsV1(string(text))
	return all, nil
}

func fieldsOf(e metav1.ManagedFieldsEntry) (*fieldpath.Set, error) {
	set := fieldpath.NewSet()
	if e.FieldsV1 == nil {
		return set, nil
	}
	if err := set.FromJSON(bytes.NewReader(e.FieldsV1.GetRawBytes())); err != nil {
		return nil, fmt.Errorf("reading the fields of manager %q: %w", e.Manager, err)
	}
	return set, nil
}

// changedBy is the manager other than ourselves that wrote one of the wanted fields
// last, as far as the object tells; empty for nobody.
func changedBy(o metav1.Object, wanted func(fieldpath.Path) bool) string {
	var last metav1.ManagedFieldsEntry
	for _, e := range o.GetManagedFields() {
		if set, err := fieldsOf(e); err != nil || e.Manager == fieldManager || only(set, wanted).Empty() {
			continue
		}
		if last.Manager == "" || e.Time != nil && !e.Time.Before(last.Time) {
			last = e
		}
	}
	return last.Manager
}

// managerNames are for people.
func managerNames(all []metav1.ManagedFieldsEntry) string {
	var names []string
	for _, e := range all {
		if !slices.Contains(names, e.Manager) {
			names = append(names, e.Manager)
		}
	}
	return strings.Join(names, ", ")
}
