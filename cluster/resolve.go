package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Target is something to probe.
type Target struct {
	Name string // for people: "pod demo/echo-0", "Service demo/echo"; empty for a bare IP
	Addr netip.Addr
	Port uint16 // TCP connect to this port; 0: ICMP echo
}

// Resolve says what `culvert ping TARGET` probes. TARGET is an IP, IP:PORT,
// pod/NAME, svc/NAME or NAME (a Service, else a pod), and each name may be
// NAME.NAMESPACE, or NAMESPACE/NAME. A pod is probed by ICMP; a Service at its cluster IP and first TCP
// port, since a cluster IP answers no ICMP; a headless Service through its pods.
// Errors are *api.Error.
func (c *Cluster) Resolve(ctx context.Context, target, defaultNamespace string) ([]Target, error) {
	if a, err := netip.ParseAddr(strings.Trim(target, "[]")); err == nil {
		return []Target{{Addr: a.Unmap()}}, nil
	}
	if ap, err := netip.ParseAddrPort(target); err == nil {
		return []Target{{Addr: ap.Addr().Unmap(), Port: ap.Port()}}, nil
	}
	kind, name, ns, err := splitTarget(target)
	if err != nil {
		return nil, err
	}
	ns = firstOf(ns, defaultNamespace, c.namespace)
	if kind != "pod" {
		service, err := c.client.Services(ns).Get(ctx, name, metav1.GetOptions{})
		switch {
		case err == nil:
			return c.serviceTargets(ctx, service)
		case kind == "svc", !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err):
			return nil, translate(fmt.Sprintf("looking for Service %s/%s", ns, name), notFoundHere(err, target))
		}
	}
	pod, err := c.client.Pods(ns).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, translate(fmt.Sprintf("looking for %q in namespace %q", name, ns), notFoundHere(err, target))
	}
	targets := podTargets(pod)
	if len(targets) == 0 {
		return nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("pod %s/%s has no address: it is %s", ns, name, pod.Status.Phase)}
	}
	return targets, nil
}

// splitTarget reads [KIND/]NAME[.NAMESPACE] and NAMESPACE/NAME; further labels
// (.svc.cluster.local) are the full name's.
func splitTarget(target string) (kind, name, ns string, err error) {
	name = target
	if before, after, ok := strings.Cut(target, "/"); ok {
		name = after
		switch strings.ToLower(before) {
		case "svc", "service", "services":
			kind = "svc"
		case "po", "pod", "pods":
			kind = "pod"
		default:
			ns = before
		}
	}
	if ns == "" {
		name, ns, _ = strings.Cut(name, ".")
		ns, _, _ = strings.Cut(ns, ".")
	}
	if name == "" || strings.ContainsAny(name, "/:") {
		return "", "", "", &api.Error{
			Code:    api.CodeUsage,
			Message: fmt.Sprintf("%q is no target", target),
			Hint:    "give an IP, IP:PORT, svc/NAME, pod/NAME, NAME or NAME.NAMESPACE",
		}
	}
	return kind, name, ns, nil
}

func (c *Cluster) serviceTargets(ctx context.Context, service *corev1.Service) ([]Target, error) {
	name := fmt.Sprintf("Service %s/%s", service.Namespace, service.Name)
	none := func(why string) ([]Target, error) {
		return nil, &api.Error{Code: api.CodeNotFound, Message: name + " " + why}
	}
	if service.Spec.Type == corev1.ServiceTypeExternalName {
		return none("is an alias of " + service.Spec.ExternalName)
	}
	var ips []netip.Addr
	for _, ip := range service.Spec.ClusterIPs {
		ips = appendAddr(ips, ip)
	}
	if len(ips) > 0 {
		for _, port := range service.Spec.Ports {
			if port.Protocol != corev1.ProtocolTCP && port.Protocol != "" {
				continue
			}
			var targets []Target
			for _, ip := range ips {
				targets = append(targets, Target{Name: name, Addr: ip, Port: uint16(port.Port)})
			}
			return targets, nil
		}
	} else if len(service.Spec.Selector) == 0 {
		return none("is headless and selects no pods")
	}
	// Headless, or without a TCP port to connect to: its pods answer ICMP.
	if len(service.Spec.Selector) == 0 {
		return none("has no TCP port and selects no pods")
	}
	pods, err := c.client.Pods(service.Namespace).List(ctx, metav1.ListOptions{
		LabelSelector: labels.SelectorFromSet(service.Spec.Selector).String(),
		Limit:         pageSize,
	})
	if err != nil {
		return nil, translate("listing the pods of "+name, err)
	}
	var targets []Target
	for i := range pods.Items {
		targets = append(targets, podTargets(&pods.Items[i])...)
	}
	if len(targets) == 0 {
		return none("has no running pod")
	}
	return targets, nil
}

func podTargets(pod *corev1.Pod) []Target {
	if pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed {
		return nil
	}
	var targets []Target
	for _, ip := range pod.Status.PodIPs {
		for _, a := range appendAddr(nil, ip.IP) {
			targets = append(targets, Target{Name: fmt.Sprintf("pod %s/%s", pod.Namespace, pod.Name), Addr: a})
		}
	}
	return targets
}

// notFoundHere makes a missing object an error of its own.
func notFoundHere(err error, target string) error {
	if !apierrors.IsNotFound(err) {
		return err
	}
	return &api.Error{
		Code:    api.CodeNotFound,
		Message: fmt.Sprintf("no %q: %v", target, err),
		Hint:    "give svc/NAME, pod/NAME or NAME.NAMESPACE; `kubectl get svc,pods -A` shows what there is",
	}
}
