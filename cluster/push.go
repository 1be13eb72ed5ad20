package cluster

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

const (
	// gateTimeout bounds one request to a gate: a port-forward is open after a few
	// round trips, and a gate answers at once. To reach, it dials first.
	gateTimeout  = 5 * time.Second
	reachOrigins = 15 * time.Second
	// pushAgain is the pause before a gate that did not take a State is asked again.
	pushAgain = 200 * time.Millisecond
	// straggle is how much longer pods that are not ready may take than the others.
	straggle = 500 * time.Millisecond
	// maxGateAnswer bounds what a gate says, in bytes.
	maxGateAnswer = 4 << 20
	// maxGateCalls bounds how many gates are asked at once.
	maxGateCalls = 16
)

// Paths of the control API, see intercept.GatePort.
const (
	pathState    = "/v1/state"
	pathReach    = "/v1/reach"
	pathRequests = "/v1/requests"
)

// callGate makes one request of the control API by a port-forward of its own.
func (c *Cluster) callGate(ctx context.Context, namespace, pod, method, path string, in, out any) error {
	limit := gateTimeout
	if path == pathReach {
		limit = reachOrigins
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var body io.Reader
	if in != nil {
		text, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encoding a request to gate %s: %w", pod, err)
		}
		body = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://gate"+path, body)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	forward := c.PortForward(&Agent{Namespace: namespace, Pod: pod}, intercept.GatePort)
	t := &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return forward.Dial(ctx) },
	}
	defer t.CloseIdleConnections()
	resp, err := t.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("gate %s: %w", pod, err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxGateAnswer))
	if err != nil {
		return fmt.Errorf("reading the answer of gate %s: %w", pod, err)
	}
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("gate %s: %s: %s", pod, resp.Status, strings.TrimSpace(string(text[:min(len(text), 500)])))
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("reading the answer of gate %s: %w", pod, err)
	}
	return nil
}

// runningGates are the pods of gates that may answer.
func (c *Cluster) runningGates(ctx context.Context, namespace, gate string) ([]*corev1.Pod, error) {
	list, err := c.client.Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: labels.SelectorFromSet(GateSelector(gate)).String()})
	if err != nil {
		return nil, translate(fmt.Sprintf("listing the gates in namespace %q", namespace), err)
	}
	var running []*corev1.Pod
	for i := range list.Items {
		if pod := &list.Items[i]; pod.Status.Phase == corev1.PodRunning {
			running = append(running, pod)
		}
	}
	return running, nil
}

// eachGate calls ask for all pods at once and waits for all.
func eachGate(pods []*corev1.Pod, ask func(*corev1.Pod)) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, maxGateCalls)
	for _, pod := range pods {
		slots <- struct{}{}
		wg.Go(func() {
			ask(pod)
			<-slots
		})
	}
	wg.Wait()
}

// Push tells all running gates what they shall know, and returns when every ready
// one listens as s says. Those that are not ready, or on their way out, are told
// and not waited for; without a ready one there is nobody to wait for. When ctx
// ends before, the *api.Error says which gate did not, and why.
func (c *Cluster) Push(ctx context.Context, namespace, gate string, s *intercept.State) error {
	told := map[string]bool{} // by pod
	for {
		pods, err := c.runningGates(ctx, namespace, gate)
		if err != nil {
			return err
		}
		trouble := c.pushOnce(ctx, pods, s, told)
		if trouble == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return &api.Error{
				Code:    api.CodeAgent,
				Message: fmt.Sprintf("the gates in namespace %q are not all as they shall be: %v", namespace, trouble),
				Hint:    fmt.Sprintf("`kubectl -n %s get pod -l %s=%s` shows them", namespace, LabelGate, gate),
			}
		case <-time.After(pushAgain):
		}
	}
}

// pushOnce tells those pods that were not told yet. The error is that of a ready
// one.
func (c *Cluster) pushOnce(ctx context.Context, pods []*corev1.Pod, s *intercept.State, told map[string]bool) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var (
		mu      sync.Mutex
		waiting int // ready ones that did not answer yet
		trouble error
		todo    []*corev1.Pod
	)
	for _, pod := range pods {
		if told[pod.Name] {
			continue
		}
		todo = append(todo, pod)
		if ready(pod) {
			waiting++
		}
	}
	if len(todo) == 0 {
		return nil
	}
	s = c.keys.with(s, todo[0].Namespace, todo[0].Labels[LabelGate])
	// Ready ones first: they are not to wait for a slot.
	slices.SortStableFunc(todo, func(a, b *corev1.Pod) int { return cmp.Compare(rank(a), rank(b)) })
	if waiting == 0 {
		stop := time.AfterFunc(straggle, cancel)
		defer stop.Stop()
	}
	eachGate(todo, func(pod *corev1.Pod) {
		var status intercept.GateStatus
		err := c.callGate(ctx, pod.Namespace, pod.Name, http.MethodPut, pathState, s, &status)
		if err == nil {
			err = obeys(pod.Name, status, s)
		}
		mu.Lock()
		defer mu.Unlock()
		told[pod.Name] = err == nil
		if !ready(pod) {
			return
		}
		if err != nil {
			trouble = err
		}
		if waiting--; waiting == 0 {
			time.AfterFunc(straggle, cancel)
		}
	})
	return trouble
}

func rank(pod *corev1.Pod) int {
	if ready(pod) {
		return 0
	}
	return 1
}

// obeys says whether a gate does all that s wants, or something newer.
func obeys(pod string, status intercept.GateStatus, s *intercept.State) error {
	if status.Generation < s.Generation {
		return fmt.Errorf("gate %s has generation %d, not %d", pod, status.Generation, s.Generation)
	}
	for key := range s.Keys {
		if !slices.Contains(status.Keys, key) {
			return fmt.Errorf("gate %s has not taken the TLS key of %s", pod, key)
		}
	}
	if len(status.Failed) > 0 {
		return fmt.Errorf("gate %s: %s", pod, strings.Join(status.Failed, "; "))
	}
	return nil
}

// GateStatuses asks all running gates how they are, by pod. Those that do not
// answer are left out; if none does, that is the error.
func (c *Cluster) GateStatuses(ctx context.Context, namespace, gate string) (map[string]intercept.GateStatus, error) {
	pods, err := c.runningGates(ctx, namespace, gate)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var trouble error
	all := map[string]intercept.GateStatus{}
	eachGate(pods, func(pod *corev1.Pod) {
		var status intercept.GateStatus
		err := c.callGate(ctx, namespace, pod.Name, http.MethodGet, pathState, nil, &status)
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			trouble = err
			return
		}
		all[pod.Name] = status
	})
	if len(all) == 0 && trouble != nil {
		return nil, translate("asking the gates how they are", trouble)
	}
	return all, nil
}

// Reach has every ready gate dial the origins of an entry, and returns the worst
// result for each port of the Service, in the order of ports. A gate that does
// not answer is an *api.Error, as is that there is none.
func (c *Cluster) Reach(ctx context.Context, namespace, gate string, ask intercept.ReachRequest) ([]intercept.Reached, error) {
	pods, err := c.runningGates(ctx, namespace, gate)
	if err != nil {
		return nil, err
	}
	pods = slices.DeleteFunc(pods, func(pod *corev1.Pod) bool { return !ready(pod) })
	if len(pods) == 0 {
		return nil, &api.Error{Code: api.CodeAgent, Message: fmt.Sprintf("no gate in namespace %q is ready", namespace)}
	}
	var mu sync.Mutex
	var trouble error
	worst := map[int32]intercept.Reached{}
	eachGate(pods, func(pod *corev1.Pod) {
		var reached []intercept.Reached
		err := c.callGate(ctx, namespace, pod.Name, http.MethodPost, pathReach, ask, &reached)
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			trouble = err
		}
		for _, r := range reached {
			if known, ok := worst[r.Port]; !ok || badness(r) > badness(known) {
				worst[r.Port] = r
			}
		}
	})
	if trouble != nil {
		return nil, translate("asking the gates whether they reach the origin", trouble)
	}
	all := make([]intercept.Reached, 0, len(worst))
	for _, r := range worst {
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b intercept.Reached) int { return cmp.Compare(a.Port, b.Port) })
	return all, nil
}

// badness orders results of dials: something that refuses is at least there.
func badness(r intercept.Reached) int {
	switch r.Error {
	case "":
		return 0
	case "refused":
		return 1
	}
	return 2
}
