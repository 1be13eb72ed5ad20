package cluster

import (
	"cmp"
	"context"
	"fmt"
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
	// Routes are the Service's ports, summed over Gates pods that answered.
	Routes []intercept.RouteStatus `json:"routes"`
	Gates  int                     `json:"gates"`
}

// MeshStatus asks the gates of a meshed Service. Errors are *api.Error; CodeNotFound
// if nobody meshes it.
func (c *Cluster) MeshStatus(ctx context.Context, namespace, service string) (*MeshStatus, error) {
	namespace = firstOf(namespace, c.namespace)
	e, err := c.meshEntry(ctx, namespace, service)
	if err != nil {
		return nil, err
	}
	statuses, err := c.GateStatuses(ctx, namespace, e.Gate)
	if err != nil {
		return nil, err
	}
	st := &MeshStatus{Namespace: namespace, Service: e.Service, Gates: len(statuses), Members: membersOf(e)}
	if err := c.addMembersSeen(ctx, namespace, st.Members); err != nil {
		return nil, err
	}
	for _, r := range e.Routes {
		sum := intercept.RouteStatus{Key: service, Listen: r.Listen, Protocol: r.Protocol}
		for _, s := range statuses {
			for _, one := range s.Routes {
				if one.Key == service && one.Listen == r.Listen && one.Protocol == r.Protocol {
					addRoute(&sum, one)
				}
			}
		}
		st.Routes = append(st.Routes, sum)
	}
	return st, nil
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

func (c *Cluster) meshEntry(ctx context.Context, namespace, service string) (intercept.Entry, error) {
	state, err := c.GateState(ctx, namespace)
	if err != nil {
		return intercept.Entry{}, err
	}
	e, ok := state.Entries[service]
	if !ok || e.Kind != intercept.Mesh {
		if _, err := c.findService(ctx, namespace, service); err != nil {
			return e, err
		}
		return e, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("nobody meshes Service %s in namespace %q", service, namespace), Hint: "culvert list"}
	}
	return e, nil
}

// MeshRequests are the newest requests of a meshed Service that its gates remember,
// oldest first. after has, by gate, the Seq of the last one that is known already,
// and is brought up to date: nil asks once. Errors are *api.Error.
func (c *Cluster) MeshRequests(ctx context.Context, namespace, service string, after map[string]int64) ([]intercept.Request, error) {
	namespace = firstOf(namespace, c.namespace)
	e, err := c.meshEntry(ctx, namespace, service)
	if err != nil {
		return nil, err
	}
	pods, err := c.runningGates(ctx, namespace, e.Gate)
	if err != nil {
		return nil, err
	}
	var (
		mu      sync.Mutex
		all     []intercept.Request
		trouble error
		good    int
	)
	eachGate(pods, func(pod *corev1.Pod) {
		mu.Lock()
		last := after[pod.Name]
		mu.Unlock()
		var some []intercept.Request
		path := fmt.Sprintf("%s?key=%s&after=%d", pathRequests, url.QueryEscape(service), last)
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
			after[pod.Name] = some[n-1].Seq
		}
	})
	if good == 0 && trouble != nil {
		return nil, translate("asking the gates for their requests", trouble)
	}
	slices.SortStableFunc(all, func(a, b intercept.Request) int { return cmp.Compare(a.Time.UnixNano(), b.Time.UnixNano()) })
	return all, nil
}
