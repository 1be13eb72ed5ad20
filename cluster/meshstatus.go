package cluster

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"sync"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// MeshStatus is a mesh and what its gates counted. JSON of `culvert mesh --show`.
type MeshStatus struct {
	Namespace string `json:"namespace"`
	Service   string `json:"service"`
	// Members are all, in the order in which they came.
	Members []MemberState `json:"members"`
	// Routes are the Service's ports, summed over Gates pods that answered. One that a
	// member has by a rule is another than that of all others.
	Routes []MeshRoute `json:"routes"`
	Gates  int         `json:"gates"`
}

// MeshRoute is one port of a meshed Service at the gates.
type MeshRoute struct {
	Port int32  `json:"port"` // of the Service
	Mode string `json:"mode"` // "router", "istio", ...
	intercept.RouteStatus
}

// MeshStatus asks the gates of a meshed Service. Errors are *api.Error; CodeNotFound
// if nobody meshes it.
func (c *Cluster) MeshStatus(ctx context.Context, namespace, service string) (*MeshStatus, error) {
	namespace = firstOf(namespace, c.namespace)
	entries, err := c.meshEntries(ctx, namespace, service)
	if err != nil {
		return nil, err
	}
	st := &MeshStatus{Namespace: namespace, Service: service}
	asked := map[string]map[string]intercept.GateStatus{}
	for _, key := range slices.Sorted(maps.Keys(entries)) {
		e := entries[key]
		if _, ok := asked[e.Gate]; !ok {
			if asked[e.Gate], err = c.GateStatuses(ctx, namespace, e.Gate); err != nil {
				return nil, err
			}
			st.Gates += len(asked[e.Gate])
		}
		st.Members = append(st.Members, membersOf(e)...)
		for _, r := range e.Routes {
			sum := intercept.RouteStatus{Key: key, Listen: r.Listen, Protocol: r.Protocol}
			for _, s := range asked[e.Gate] {
				for _, one := range s.Routes {
					if one.Key == key && one.Listen == r.Listen && one.Protocol == r.Protocol {
						addRoute(&sum, one)
					}
				}
			}
			st.Routes = append(st.Routes, MeshRoute{Port: r.Port, Mode: firstOf(e.Mode, api.ModeRouter), RouteStatus: sum})
		}
	}
	return st, c.addMembersSeen(ctx, namespace, st.Members)
}

// addRoute adds what one gate counted.
func addRoute(sum *intercept.RouteStatus, one intercept.RouteStatus) {
	sum.OpenToOrigin += one.OpenToOrigin
	sum.TotalToOrigin += one.TotalToOrigin
	sum.Refused += one.Refused
	sum.RequestsToOrigin += one.RequestsToOrigin
	for _, m := range one.Members {
		at := slices.IndexFunc(sum.Members, func(s intercept.MemberStatus) bool { return s.Session == m.Session })
		if at < 0 {
			sum.Members = append(sum.Members, intercept.MemberStatus{Session: m.Session})
			at = len(sum.Members) - 1
		}
		s := &sum.Members[at]
		if s.Machine == "" || m.Machine != intercept.Accepted.String() { // the worst is of interest
			s.Machine = firstOf(m.Machine, s.Machine)
		}
		s.Open += m.Open
		s.Requests += m.Requests
		s.ToOrigin += m.ToOrigin
		s.Failed += m.Failed
	}
}

// meshEntries are all that mesh a Service, by key.
func (c *Cluster) meshEntries(ctx context.Context, namespace, service string) (map[string]intercept.Entry, error) {
	state, err := c.GateState(ctx, namespace)
	if err != nil {
		return nil, err
	}
	entries := map[string]intercept.Entry{}
	for key, e := range state.Entries {
		if e.Kind == intercept.Mesh && e.Service == service {
			entries[key] = e
		}
	}
	if len(entries) > 0 {
		return entries, nil
	}
	if _, err := c.findService(ctx, namespace, service); err != nil {
		return nil, err
	}
	return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("nobody meshes Service %s in namespace %q", service, namespace), Hint: "culvert list"}
}

// MeshRequests are the newest requests of a meshed Service that its gates remember,
// oldest first. after has, by gate and key, the Seq of the last one that is known
// already, and is brought up to date: nil asks once. Errors are *api.Error.
func (c *Cluster) MeshRequests(ctx context.Context, namespace, service string, after map[string]int64) ([]intercept.Request, error) {
	namespace = firstOf(namespace, c.namespace)
	entries, err := c.meshEntries(ctx, namespace, service)
	if err != nil {
		return nil, err
	}
	var (
		mu      sync.Mutex
		all     []intercept.Request
		trouble error
		good    int
	)
	for key, e := range entries {
		pods, err := c.runningGates(ctx, namespace, e.Gate)
		if err != nil {
			return nil, err
		}
		eachGate(pods, func(pod *corev1.Pod) {
			at := pod.Name + "/" + key
			mu.Lock()
			last := after[at]
			mu.Unlock()
			var some []intercept.Request
			path := fmt.Sprintf("%s?key=%s&after=%d", pathRequests, url.QueryEscape(key), last)
			err := c.callGate(ctx, namespace, pod.Name, http.MethodGet, path, nil, &some)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				trouble = err
				return
			}
			good++
			all = append(all, some...)
			if n := len(some); n > 0 && after != nil {
				after[at] = some[n-1].Seq
			}
		})
	}
	if good == 0 && trouble != nil {
		return nil, translate("asking the gates for their requests", trouble)
	}
	slices.SortStableFunc(all, func(a, b intercept.Request) int { return cmp.Compare(a.Time.UnixNano(), b.Time.UnixNano()) })
	return all, nil
}
