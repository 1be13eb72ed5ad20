package cluster

import (
	"context"
	"fmt"
	"maps"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// expand replaces $(NAME) by what lookup knows, as Kubernetes does: what it does
// not know stays as it is, $$ is one $, and a $ before anything else is itself
// (k8s.io/kubernetes/third_party/forked/golang/expansion).
func expand(s string, lookup func(name string) (string, bool)) string {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, '$')
		if i < 0 || i+1 == len(s) {
			b.WriteString(s)
			return b.String()
		}
		b.WriteString(s[:i])
		s = s[i+1:]
		switch s[0] {
		case '$':
			b.WriteByte('$')
			s = s[1:]
		case '(':
			name, rest, closed := strings.Cut(s[1:], ")")
			if !closed {
				b.WriteString("$(")
				s = s[1:]
				continue
			}
			if v, ok := lookup(name); ok {
				b.WriteString(v)
			} else {
				b.WriteString("$(" + name + ")")
			}
			s = rest
		default:
			b.WriteByte('$')
			b.WriteByte(s[0])
			s = s[1:]
		}
	}
}

// field is what the downward API says of the pod. Without a running pod it knows
// only what the template has.
func (e *Environ) field(path string) (string, error) {
	p := e.pod
	if before, key, ok := subscript(path); ok {
		switch before {
		case "metadata.labels":
			return p.Labels[key], nil
		case "metadata.annotations":
			return p.Annotations[key], nil
		}
		return "", fmt.Errorf("field %q is unknown", path)
	}
	known := func(value string) (string, error) {
		if value == "" {
			return "", fmt.Errorf("%s is known of a running pod only", path)
		}
		return value, nil
	}
	switch path {
	case "metadata.name":
		return known(p.Name)
	case "metadata.namespace":
		return p.Namespace, nil
	case "metadata.uid":
		return known(string(p.UID))
	case "metadata.labels":
		return formatMap(p.Labels), nil
	case "metadata.annotations":
		return formatMap(p.Annotations), nil
	case "spec.nodeName", "spec.host":
		return known(p.Spec.NodeName)
	case "spec.serviceAccountName":
		return p.Spec.ServiceAccountName, nil
	case "status.hostIP":
		return known(p.Status.HostIP)
	case "status.hostIPs":
		var ips []string
		for _, ip := range p.Status.HostIPs {
			ips = append(ips, ip.IP)
		}
		return known(firstOf(strings.Join(ips, ","), p.Status.HostIP))
	case "status.podIP":
		return known(p.Status.PodIP)
	case "status.podIPs":
		var ips []string
		for _, ip := range p.Status.PodIPs {
			ips = append(ips, ip.IP)
		}
		return known(firstOf(strings.Join(ips, ","), p.Status.PodIP))
	}
	return "", fmt.Errorf("field %q is unknown", path)
}

// subscript takes metadata.labels['KEY'] apart.
func subscript(path string) (before, key string, ok bool) {
	path, ok = strings.CutSuffix(path, "']")
	if !ok {
		return "", "", false
	}
	before, key, ok = strings.Cut(path, "['")
	return before, key, ok && before != ""
}

// formatMap is how the downward API writes labels and annotations: a line
// KEY="VALUE" each, sorted.
func formatMap(m map[string]string) string {
	var lines []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		lines = append(lines, k+"="+strconv.Quote(m[k]))
	}
	return strings.Join(lines, "\n")
}

// resource is a container's limit or request, divided and rounded up. A
// container without a limit has what its node can give.
func (e *Environ) resource(ctx context.Context, ref *corev1.ResourceFieldSelector) (string, error) {
	c := e.container
	if ref.ContainerName != "" {
		var err error
		if c, err = chooseContainer(e.pod, ref.ContainerName, "the pod"); err != nil {
			return "", err
		}
	}
	of, name, _ := strings.Cut(ref.Resource, ".")
	resources := c.Resources.Requests
	if of == "limits" {
		resources = c.Resources.Limits
	}
	r := corev1.ResourceName(name)
	switch {
	case of != "limits" && of != "requests":
		return "", fmt.Errorf("resource %q is unknown", ref.Resource)
	case r != corev1.ResourceCPU && r != corev1.ResourceMemory && r != corev1.ResourceEphemeralStorage && !strings.HasPrefix(name, corev1.ResourceHugePagesPrefix):
		return "", fmt.Errorf("resource %q is unknown", ref.Resource)
	}
	q := resources[r]
	if of == "limits" && q.IsZero() && !strings.HasPrefix(name, corev1.ResourceHugePagesPrefix) {
		node, err := e.allocatable(ctx)
		if err != nil {
			return "", fmt.Errorf("container %s has no limit of %s, and what its node has to give is not known: %w", c.Name, name, err)
		}
		q = node[r]
	}
	return quotient(r, q, ref.Divisor), nil
}

// quotient rounds up. CPU is counted in thousandths, all else in whole units.
func quotient(r corev1.ResourceName, q, divisor resource.Quantity) string {
	if divisor.IsZero() {
		divisor = resource.MustParse("1")
	}
	n, d := float64(q.Value()), float64(divisor.Value())
	if r == corev1.ResourceCPU {
		n, d = float64(q.MilliValue()), float64(divisor.MilliValue())
	}
	return strconv.FormatInt(int64(math.Ceil(n/d)), 10)
}

func (e *Environ) allocatable(ctx context.Context) (corev1.ResourceList, error) {
	if e.node == nil {
		if e.pod.Spec.NodeName == "" {
			return nil, fmt.Errorf("no pod runs")
		}
		node, err := e.cluster.client.Nodes().Get(ctx, e.pod.Spec.NodeName, metav1.GetOptions{})
		if err != nil {
			return nil, err
		}
		e.node = node
	}
	return e.node.Status.Allocatable, nil
}

func joinHostPort(host string, port int32) string {
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}
