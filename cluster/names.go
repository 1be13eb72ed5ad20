package cluster

import "strings"

// Names knows which Services exist, as far as the user may see. It is empty
// until the first Ranges and live while WatchRanges runs. Safe for concurrent
// use.
type Names struct {
	services *table
}

// Services are the cluster's Services, live while WatchRanges runs.
func (c *Cluster) Services() *Names { return c.names }

// HasService says whether a Service of that name is known to exist. It is false
// for namespaces that the user may not see.
func (n *Names) HasService(namespace, name string) bool {
	n.services.mu.RLock()
	defer n.services.mu.RUnlock()
	_, ok := n.services.rows[namespace+"/"+name]
	return ok
}

// Namespaces are those that have a Service, in no order.
func (n *Names) Namespaces() []string {
	seen := map[string]bool{}
	n.services.each(func(k string, _ row) {
		ns, _, _ := strings.Cut(k, "/")
		seen[ns] = true
	})
	all := make([]string, 0, len(seen))
	for ns := range seen {
		all = append(all, ns)
	}
	return all
}

// HasNamespace says whether a namespace of that name is known to have a Service.
func (n *Names) HasNamespace(name string) bool {
	n.services.mu.RLock()
	defer n.services.mu.RUnlock()
	for k := range n.services.rows {
		if ns, _, _ := strings.Cut(k, "/"); ns == name {
			return true
		}
	}
	return false
}
