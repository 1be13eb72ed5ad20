package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/watch"
)

// pageSize is a page of a list. It bounds what is decoded at a time: 500 pods
// are a few megabytes.
const pageSize = 500

// row is all that is kept of an object: a cluster of 5,000 Services and 10,000
// pods costs a few megabytes.
type row struct {
	prefixes []netip.Prefix // ranges that it declares
	addrs    []netip.Addr   // addresses that it has
	hosts    []netip.Addr   // addresses of nodes that it shows
}

// table follows the objects of one resource, in the whole cluster or, where the
// user may not see that, in his namespace. Objects become rows as they are
// decoded, page by page; an informer would hold them all.
type table struct {
	what  string // "pods"
	list  func(ctx context.Context, namespace string, o metav1.ListOptions) (runtime.Object, error)
	watch func(ctx context.Context, namespace string, o metav1.ListOptions) (watch.Interface, error)
	row   func(runtime.Object) row
	local bool // there is a namespaced form to fall back to

	mu      sync.RWMutex
	rows    map[string]row // by "namespace/name", or "name"
	scope   scope
	version string // resource version of rows
}

// scope is how much of a resource the user may list.
type scope int

const (
	unknown   scope = iota // not asked yet
	nothing                // forbidden, or the server does not have it
	namespace              // his namespace
	everything
)

// refresh lists the resource in the widest scope that is allowed. Being
// forbidden is no error: the scope says it.
func (t *table) refresh(ctx context.Context, own string) error {
	err := t.read(ctx, metav1.NamespaceAll, everything)
	if t.local && apierrors.IsForbidden(err) {
		err = t.read(ctx, own, namespace)
	}
	if apierrors.IsForbidden(err) || apierrors.IsNotFound(err) {
		t.mu.Lock()
		t.rows, t.scope, t.version = nil, nothing, ""
		t.mu.Unlock()
		return nil
	}
	return err
}

// read replaces the rows by a new list. A continue token that expires half-way
// (the list takes longer than the server's compaction, 5 minutes) begins again,
// and the second time in one piece.
func (t *table) read(ctx context.Context, ns string, sc scope) error {
	o := metav1.ListOptions{Limit: pageSize}
	rows, expired := map[string]row{}, 0
	for {
		page, err := t.list(ctx, ns, o)
		if apierrors.IsResourceExpired(err) && o.Continue != "" && expired < 2 {
			expired++
			rows, o.Continue = map[string]row{}, ""
			if expired == 2 {
				o.Limit = 0
			}
			continue
		}
		if err != nil {
			return err
		}
		m, err := meta.ListAccessor(page)
		if err != nil {
			return fmt.Errorf("reading a list of %s: %w", t.what, err)
		}
		err = meta.EachListItem(page, func(o runtime.Object) error {
			rows[key(o)] = t.row(o)
			return nil
		})
		if err != nil {
			return fmt.Errorf("reading a list of %s: %w", t.what, err)
		}
		if o.Continue = m.GetContinue(); o.Continue != "" {
			continue
		}
		t.mu.Lock()
		t.rows, t.scope, t.version = rows, sc, m.GetResourceVersion()
		t.mu.Unlock()
		return nil
	}
}

const (
	retryFirst = 200 * time.Millisecond
	retryMost  = 5 * time.Second // a new node must arrive within seconds of the server's return
	pollUnseen = 30 * time.Second
)

// follow keeps the rows up to date until ctx is done, and calls changed after
// each change. It begins with the rows that refresh left.
func (t *table) follow(ctx context.Context, own string, changed func()) {
	wait := retryFirst
	for ctx.Err() == nil {
		t.mu.RLock()
		version, sc := t.version, t.scope
		t.mu.RUnlock()
		if sc == nothing {
			return
		}
		var err error
		if version == "" {
			if err = t.refresh(ctx, own); err == nil {
				changed()
				wait = retryFirst
				continue
			}
		} else {
			begun := time.Now()
			err = t.stream(ctx, own, changed)
			switch {
			case apierrors.IsResourceExpired(err), apierrors.IsGone(err):
				t.forgetVersion()
				continue
			case apierrors.IsForbidden(err), apierrors.IsMethodNotSupported(err):
				// May list but not watch: look again now and then.
				t.forgetVersion()
				wait = pollUnseen
			case time.Since(begun) > retryMost:
				wait = retryFirst // it worked for a while
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, retryMost)
	}
}

func (t *table) forgetVersion() {
	t.mu.Lock()
	t.version = ""
	t.mu.Unlock()
}

// stream applies one watch's events. It ends when the server ends the watch,
// which it does every few minutes; nil is returned then.
func (t *table) stream(ctx context.Context, own string, changed func()) error {
	t.mu.RLock()
	ns, version := metav1.NamespaceAll, t.version
	if t.scope == namespace {
		ns = own
	}
	t.mu.RUnlock()
	w, err := t.watch(ctx, ns, metav1.ListOptions{ResourceVersion: version, AllowWatchBookmarks: true})
	if err != nil {
		return err
	}
	defer w.Stop()
	for event := range w.ResultChan() {
		if event.Type == watch.Error {
			return apierrors.FromObject(event.Object)
		}
		if t.apply(event) {
			changed()
		}
	}
	return ctx.Err()
}

func (t *table) apply(event watch.Event) bool {
	m, err := meta.Accessor(event.Object)
	if err != nil {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.version = m.GetResourceVersion()
	switch event.Type {
	case watch.Added, watch.Modified:
		t.rows[key(event.Object)] = t.row(event.Object)
	case watch.Deleted:
		delete(t.rows, key(event.Object))
	default:
		return false
	}
	return true
}

// each calls f for every row, in no order.
func (t *table) each(f func(key string, r row)) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for k, r := range t.rows {
		f(k, r)
	}
}

func (t *table) visible() scope {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.scope
}

func key(o runtime.Object) string {
	m, err := meta.Accessor(o)
	if err != nil {
		return ""
	}
	if m.GetNamespace() == "" {
		return m.GetName()
	}
	return m.GetNamespace() + "/" + m.GetName()
}

func (c *Cluster) serviceCIDRTable() *table {
	return &table{
		what: "servicecidrs",
		list: func(ctx context.Context, _ string, o metav1.ListOptions) (runtime.Object, error) {
			return c.client.ServiceCIDRs().List(ctx, o)
		},
		watch: func(ctx context.Context, _ string, o metav1.ListOptions) (watch.Interface, error) {
			return c.watch.ServiceCIDRs().Watch(ctx, o)
		},
		row: func(o runtime.Object) (r row) {
			for _, s := range o.(*networkingv1.ServiceCIDR).Spec.CIDRs {
				r.prefixes = appendPrefix(r.prefixes, s)
			}
			return r
		},
	}
}

func (c *Cluster) nodeTable() *table {
	return &table{
		what: "nodes",
		list: func(ctx context.Context, _ string, o metav1.ListOptions) (runtime.Object, error) {
			return c.client.Nodes().List(ctx, o)
		},
		watch: func(ctx context.Context, _ string, o metav1.ListOptions) (watch.Interface, error) {
			return c.watch.Nodes().Watch(ctx, o)
		},
		row: func(o runtime.Object) (r row) {
			node := o.(*corev1.Node)
			for _, s := range node.Spec.PodCIDRs {
				r.prefixes = appendPrefix(r.prefixes, s)
			}
			if len(r.prefixes) == 0 {
				r.prefixes = appendPrefix(r.prefixes, node.Spec.PodCIDR)
			}
			for _, a := range node.Status.Addresses {
				r.hosts = appendAddr(r.hosts, a.Address) // host names are no addresses and fall out
			}
			return r
		},
	}
}

func (c *Cluster) serviceTable() *table {
	return &table{
		what:  "services",
		local: true,
		list: func(ctx context.Context, ns string, o metav1.ListOptions) (runtime.Object, error) {
			return c.client.Services(ns).List(ctx, o)
		},
		watch: func(ctx context.Context, ns string, o metav1.ListOptions) (watch.Interface, error) {
			return c.watch.Services(ns).Watch(ctx, o)
		},
		row: func(o runtime.Object) (r row) {
			spec := &o.(*corev1.Service).Spec
			for _, s := range spec.ClusterIPs {
				r.addrs = appendAddr(r.addrs, s) // "None" is no address and falls out
			}
			if len(spec.ClusterIPs) == 0 {
				r.addrs = appendAddr(r.addrs, spec.ClusterIP)
			}
			return r
		},
	}
}

func (c *Cluster) podTable() *table {
	return &table{
		what:  "pods",
		local: true,
		list: func(ctx context.Context, ns string, o metav1.ListOptions) (runtime.Object, error) {
			return c.client.Pods(ns).List(ctx, o)
		},
		watch: func(ctx context.Context, ns string, o metav1.ListOptions) (watch.Interface, error) {
			return c.watch.Pods(ns).Watch(ctx, o)
		},
		row: func(o runtime.Object) (r row) {
			pod := o.(*corev1.Pod)
			r.hosts = appendAddr(r.hosts, pod.Status.HostIP)
			for _, h := range pod.Status.HostIPs {
				r.hosts = appendAddr(r.hosts, h.IP)
			}
			// The address of a finished pod may be another pod's by now.
			if pod.Spec.HostNetwork || pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
				return r
			}
			for _, ip := range pod.Status.PodIPs {
				r.addrs = appendAddr(r.addrs, ip.IP)
			}
			if len(pod.Status.PodIPs) == 0 {
				r.addrs = appendAddr(r.addrs, pod.Status.PodIP)
			}
			return r
		},
	}
}

func appendPrefix(to []netip.Prefix, s string) []netip.Prefix {
	if p, err := netip.ParsePrefix(s); err == nil {
		to = append(to, p.Masked())
	}
	return to
}

func appendAddr(to []netip.Addr, s string) []netip.Addr {
	if a, err := netip.ParseAddr(s); err == nil {
		to = append(to, a.Unmap().WithZone(""))
	}
	return to
}
