package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
)

// custom is one kind of custom resources (CRDs). They are read as JSON, and no field
// that culvert does not know is lost.
type custom struct {
	kind, resource, group string
	versions              []string // that culvert can read, the best one first
}

func (k custom) String() string { return k.kind + "." + k.group }

// errNoKind says that the cluster has no such kind.
var errNoKind = errors.New("the cluster has no such kind")

// customs are those of one kind in a namespace, of a version that the server has.
type customs struct {
	c         *Client
	kind      custom
	namespace string
	version   string // "" before the first list
}

func (c *Client) customs(k custom, namespace string) *customs {
	return &customs{c: c, kind: k, namespace: namespace}
}

func (r *customs) path(version string) string {
	return fmt.Sprintf("/apis/%s/%s/namespaces/%s/%s", r.kind.group, version, r.namespace, r.kind.resource)
}

// list returns all, in pages. The error is errNoKind where the server does not know
// the kind, else the API's.
func (r *customs) list(ctx context.Context) ([]*unstructured.Unstructured, error) {
	for _, version := range r.kind.versions {
		all, err := r.pages(ctx, version)
		if apierrors.IsNotFound(err) {
			continue
		}
		// Who may not list a kind is told so also where there is no such kind. The groups
		// are for everybody to see (ClusterRole system:discovery).
		if apierrors.IsForbidden(err) && apierrors.IsNotFound(r.c.rest().Get().AbsPath("/apis/"+r.kind.group).Do(ctx).Error()) {
			return nil, errNoKind
		}
		r.version = version
		return all, err
	}
	return nil, errNoKind
}

func (r *customs) pages(ctx context.Context, version string) (all []*unstructured.Unstructured, err error) {
	options := metav1.ListOptions{Limit: pageSize}
	for {
		raw, err := r.c.rest().Get().AbsPath(r.path(version)).VersionedParams(&options, params).SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Raw()
		if err != nil {
			return nil, err
		}
		var page unstructured.UnstructuredList
		if err := page.UnmarshalJSON(raw); err != nil {
			return nil, fmt.Errorf("reading the list of %s: %w", r.kind, err)
		}
		all = append(all, pointers(page.Items)...)
		if options.Continue = page.GetContinue(); options.Continue == "" {
			return all, nil
		}
	}
}

// watch tells of each change of an object, by whomever, until the server ends it or ctx
// ends. It is for customs of a Client whose requests may last.
func (r *customs) watch(ctx context.Context, changed func()) error {
	options := metav1.ListOptions{Watch: true}
	stream, err := r.c.rest().Get().AbsPath(r.path(r.version)).VersionedParams(&options, params).SetHeader("Accept", runtime.ContentTypeJSON).Stream(ctx)
	if err != nil {
		return err
	}
	defer stream.Close()
	events := json.NewDecoder(stream)
	for {
		var event struct{ Type string }
		if err := events.Decode(&event); err != nil {
			return err
		}
		changed()
	}
}

func read(raw []byte, err error) (*unstructured.Unstructured, error) {
	if err != nil {
		return nil, err
	}
	o := &unstructured.Unstructured{}
	return o, o.UnmarshalJSON(raw)
}

func (r *customs) get(ctx context.Context, name string) (*unstructured.Unstructured, error) {
	return read(r.c.rest().Get().AbsPath(r.path(r.version), name).SetHeader("Accept", runtime.ContentTypeJSON).Do(ctx).Raw())
}

// create makes an object of the kind; apiVersion and kind are filled in.
func (r *customs) create(ctx context.Context, o map[string]any) (*unstructured.Unstructured, error) {
	o["apiVersion"], o["kind"] = r.kind.group+"/"+r.version, r.kind.kind
	body, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	return read(r.c.rest().Post().AbsPath(r.path(r.version)).VersionedParams(&metav1.CreateOptions{FieldManager: fieldManager}, params).
		SetHeader("Content-Type", runtime.ContentTypeJSON).SetHeader("Accept", runtime.ContentTypeJSON).Body(body).Do(ctx).Raw())
}

// patch changes an object that is still what it was when it was read: otherwise the
// error is a conflict.
func (r *customs) patch(ctx context.Context, o *unstructured.Unstructured, ops ...patchOp) (*unstructured.Unstructured, error) {
	body, err := json.Marshal(append([]patchOp{
		set("/metadata/resourceVersion", o.GetResourceVersion()), // a precondition: the server compares it
	}, ops...))
	if err != nil {
		return nil, err
	}
	return read(r.c.rest().Patch(types.JSONPatchType).AbsPath(r.path(r.version), o.GetName()).
		VersionedParams(&metav1.PatchOptions{FieldManager: fieldManager}, params).SetHeader("Accept", runtime.ContentTypeJSON).Body(body).Do(ctx).Raw())
}

// remove deletes an object, if it is still what it was when it was read.
func (r *customs) remove(ctx context.Context, o *unstructured.Unstructured) error {
	uid, version := o.GetUID(), o.GetResourceVersion()
	body, err := json.Marshal(metav1.DeleteOptions{TypeMeta: metav1.TypeMeta{Kind: "DeleteOptions", APIVersion: "v1"},
		Preconditions: &metav1.Preconditions{UID: &uid, ResourceVersion: &version}})
	if err != nil {
		return err
	}
	return r.c.rest().Delete().AbsPath(r.path(r.version), o.GetName()).SetHeader("Content-Type", runtime.ContentTypeJSON).
		SetHeader("Accept", runtime.ContentTypeJSON).Body(body).Do(ctx).Error()
}
