package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
)

// backendAge is how old the list of a Backend's pods may be.
const backendAge = time.Second

// Backend is what a forwarded local port leads to: the ready pods of a Service or
// workload, or one pod. Its methods are safe for concurrent use.
type Backend struct {
	Name string // for people: "Service demo/web"
	// IPs are the Service's addresses; empty: a headless one, or pods, which are
	// reached at their own.
	IPs   []netip.Addr
	Ports []BackendPort // TCP only
	// Undeclared: other ports than Ports may be listened at too, as in a pod.
	Undeclared bool

	cluster  *Cluster
	workload *workload

	// mu guards the pods that were ready at the time seen.
	mu   sync.Mutex
	pods []*corev1.Pod
	seen time.Time
}

// BackendPort is one TCP port of a Backend.
type BackendPort struct {
	Number uint16
	Name   string // may be empty
	target intstr.IntOrString
}

func (p BackendPort) String() string {
	if p.Name == "" {
		return strconv.Itoa(int(p.Number))
	}
	return fmt.Sprintf("%d (%s)", p.Number, p.Name)
}

// Endpoint is one ready pod of a Backend, and the port that serves there.
type Endpoint struct {
	Namespace, Pod string
	Addr           netip.AddrPort // of the pod; invalid: it has none
	Port           uint16
}

// Backend finds what target means: an IP of a pod or Service, KIND/NAME, a Service
// NAME, NAME.NAMESPACE or NAMESPACE/NAME. Errors are *api.Error.
func (c *Cluster) Backend(ctx context.Context, target, namespace string) (*Backend, error) {
	if a, err := netip.ParseAddr(strings.Trim(target, "[]")); err == nil {
		w, err := c.workloadWithIP(ctx, a.Unmap(), firstOf(namespace, c.namespace))
		if err != nil {
			return nil, err
		}
		return c.backend(w)
	}
	kind := kindService
	before, name, ok := strings.Cut(target, "/")
	if ok && kindNames[strings.ToLower(before)] != "" {
		kind = kindNames[strings.ToLower(before)]
	}
	ns := ""
	if kind == kindService || kind == kindPod {
		var err error
		if _, name, ns, err = splitTarget(target); err != nil {
			return nil, err
		}
	}
	ns = firstOf(ns, namespace, c.namespace)
	w, err := c.getWorkload(ctx, kind, ns, name)
	if apierrors.IsNotFound(err) {
		return nil, c.missingWorkload(ctx, []string{kind}, ns, name)
	}
	if err != nil {
		return nil, translate(fmt.Sprintf("reading %s %s/%s", kind, ns, name), err)
	}
	return c.backend(w)
}

// backend checks that there is something to forward to.
func (c *Cluster) backend(w *workload) (*Backend, error) {
	b := &Backend{Name: w.String(), cluster: c, workload: w, Undeclared: w.service == nil}
	refuse := func(format string, args ...any) (*Backend, error) {
		return nil, &api.Error{Code: api.CodeUnsupported, Message: w.String() + " " + fmt.Sprintf(format, args...), Hint: "name a Service that selects pods, or a pod"}
	}
	if s := w.service; s != nil {
		switch {
		case s.Spec.Type == corev1.ServiceTypeExternalName:
			return refuse("is an alias of %s, outside of the cluster", s.Spec.ExternalName)
		case len(s.Spec.Ports) == 0:
			return refuse("has no port")
		}
		for _, ip := range s.Spec.ClusterIPs {
			b.IPs = appendAddr(b.IPs, ip)
		}
		for _, p := range s.Spec.Ports {
			if p.Protocol == corev1.ProtocolTCP || p.Protocol == "" {
				b.Ports = append(b.Ports, BackendPort{Number: uint16(p.Port), Name: p.Name, target: p.TargetPort})
			}
		}
		if len(b.Ports) == 0 {
			return refuse("has no TCP port, and only TCP can be forwarded")
		}
		return b, nil
	}
	for _, container := range w.template.Spec.Containers {
		for _, p := range container.Ports {
			if p.Protocol == corev1.ProtocolTCP || p.Protocol == "" {
				b.Ports = append(b.Ports, BackendPort{Number: uint16(p.ContainerPort), Name: p.Name})
			}
		}
	}
	return b, nil
}

// Port finds a port by its number or name.
func (b *Backend) Port(numberOrName string) (BackendPort, error) {
	n, notNumber := strconv.ParseUint(numberOrName, 10, 16)
	for _, p := range b.Ports {
		if notNumber == nil && p.Number == uint16(n) || p.Name == numberOrName && p.Name != "" {
			return p, nil
		}
	}
	if b.Undeclared && notNumber == nil && n > 0 {
		return BackendPort{Number: uint16(n)}, nil
	}
	return BackendPort{}, &api.Error{
		Code:    api.CodeNotFound,
		Message: fmt.Sprintf("%s has no TCP port %q", b.Name, numberOrName),
		Hint:    "it has " + b.PortList(),
	}
}

// PortList is for people.
func (b *Backend) PortList() string {
	var ports []string
	for _, p := range b.Ports {
		ports = append(ports, p.String())
	}
	return list(ports)
}

// Endpoints are the pods that are ready now, or were a second ago, with the port
// that serves p in each: a named target port may differ from pod to pod.
func (b *Backend) Endpoints(ctx context.Context, p BackendPort) ([]Endpoint, error) {
	pods, err := b.ready(ctx)
	if err != nil {
		return nil, err
	}
	var all []Endpoint
	for _, pod := range pods {
		port, ok := portIn(pod, p)
		if !ok {
			continue
		}
		e := Endpoint{Namespace: pod.Namespace, Pod: pod.Name, Port: port}
		if a, err := netip.ParseAddr(pod.Status.PodIP); err == nil {
			e.Addr = netip.AddrPortFrom(a.Unmap(), port)
		}
		all = append(all, e)
	}
	if len(all) == 0 {
		why := "no pod of it is ready"
		if len(pods) > 0 {
			why = "no ready pod of it has a port named " + p.target.StrVal
		}
		return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("%s, port %s: %s", b.Name, p, why)}
	}
	return all, nil
}

// Forget has the next Endpoints look again: a pod turned out to be gone.
func (b *Backend) Forget() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seen = time.Time{}
}

// ready holds mu while it asks, so that many connections at once ask once.
func (b *Backend) ready(ctx context.Context) ([]*corev1.Pod, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if time.Since(b.seen) < backendAge {
		return b.pods, nil
	}
	w := *b.workload
	if w.kind == kindService || w.kind == kindPod {
		// Its selector may have changed, by an intercept for one; a pod of a
		// StatefulSet comes again under its name.
		now, err := b.cluster.getWorkload(ctx, w.kind, w.namespace, w.name)
		if err != nil {
			return nil, translate("reading "+w.String(), err)
		}
		w = *now
	}
	pods := []*corev1.Pod{w.pod}
	if w.pod == nil {
		if w.selector == nil {
			return nil, &api.Error{
				Code:    api.CodeUnsupported,
				Message: w.String() + " selects no pods: a port-forward cannot reach it",
				Hint:    "`culvert connect` reaches whatever the cluster reaches",
			}
		}
		// Gates stand behind an intercepted Service and count: who forwards a
		// Service gets what its other clients get.
		w.gates = true
		var err error
		if pods, err = b.cluster.podsOf(ctx, &w, w.selector); err != nil {
			return nil, err
		}
	}
	b.pods = slices.DeleteFunc(pods, func(p *corev1.Pod) bool { return p.DeletionTimestamp != nil || !ready(p) })
	b.seen = time.Now()
	return b.pods, nil
}

// portIn resolves a Service's target port in a pod.
func portIn(pod *corev1.Pod, p BackendPort) (uint16, bool) {
	if p.target.Type == intstr.Int {
		if p.target.IntVal != 0 {
			return uint16(p.target.IntVal), true
		}
		return p.Number, true
	}
	for _, container := range append(slices.Clone(pod.Spec.Containers), pod.Spec.InitContainers...) {
		for _, port := range container.Ports {
			if port.Name == p.target.StrVal && (port.Protocol == corev1.ProtocolTCP || port.Protocol == "") {
				return uint16(port.ContainerPort), true
			}
		}
	}
	return 0, false
}

// Dial opens a connection to an endpoint through the API server. That nothing
// listens there may become known by the first Read only: see NotDialled.
func (b *Backend) Dial(ctx context.Context, e Endpoint) (net.Conn, error) {
	return b.cluster.PortForward(&Agent{Namespace: e.Namespace, Pod: e.Pod}, int(e.Port)).Dial(ctx)
}

// NotDialled says whether an error of reading from a port-forward means that the
// kubelet could not connect to the port: nothing was sent to anybody.
func NotDialled(err error) bool {
	if err == nil || errors.Is(err, net.ErrClosed) {
		return false
	}
	text := strings.ToLower(err.Error())
	if !strings.Contains(text, "the kubelet says:") {
		return false
	}
	// containerd and CRI-O; socat under older ones.
	return strings.Contains(text, "refused") || strings.Contains(text, "failed to connect") || strings.Contains(text, "failed to dial")
}

// workloadWithIP finds the pod or Service that has an address, as far as the user
// may see.
func (c *Cluster) workloadWithIP(ctx context.Context, ip netip.Addr, namespace string) (*workload, error) {
	has := func(ips []netip.Addr) bool { return slices.Contains(ips, ip) }
	var last error
	for _, ns := range []string{"", namespace} {
		options := metav1.ListOptions{Limit: pageSize}
		for {
			page, err := c.client.Services(ns).List(ctx, options)
			if err != nil {
				last = translate("listing Services, to find the one with address "+ip.String(), err)
				break
			}
			for i := range page.Items {
				s := &page.Items[i]
				var ips []netip.Addr
				for _, clusterIP := range s.Spec.ClusterIPs {
					ips = appendAddr(ips, clusterIP)
				}
				if has(ips) {
					return serviceWorkload(s), nil
				}
			}
			if options.Continue = page.Continue; options.Continue == "" {
				break
			}
		}
		options = metav1.ListOptions{Limit: pageSize}
		for {
			page, err := c.client.Pods(ns).List(ctx, options)
			if err != nil {
				last = translate("listing pods, to find the one with address "+ip.String(), err)
				break
			}
			for i := range page.Items {
				p := &page.Items[i]
				var ips []netip.Addr
				for _, podIP := range p.Status.PodIPs {
					ips = appendAddr(ips, podIP.IP)
				}
				// Addresses of pods that ended belong to others; that of a node is
				// no pod's.
				over := p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
				if has(ips) && !over && !p.Spec.HostNetwork {
					return podWorkload(p), nil
				}
			}
			if options.Continue = page.Continue; options.Continue == "" {
				last = nil
				break
			}
		}
		if last == nil {
			break
		}
	}
	if last != nil {
		return nil, last
	}
	return nil, &api.Error{
		Code:    api.CodeNotFound,
		Message: fmt.Sprintf("no Service and no pod has the address %s", ip),
		Hint:    "after `culvert connect` other addresses that the cluster reaches can be forwarded too",
	}
}
