package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// AnnotationPreview marks a Service that culvert made; its value is the Record.
const AnnotationPreview = "culvert.dev/preview"

// isPreview tells whether a Service is one of culvert's previews: the annotation alone
// may have been copied with somebody's manifest.
func isPreview(s *corev1.Service) bool {
	return s.Labels[LabelManagedBy] == "culvert" && s.Labels[LabelName] == previewApp && s.Annotations[AnnotationPreview] != ""
}

// previewApp is the LabelName of previews.
const previewApp = "culvert-preview"

// previewHead is a Service, and perhaps an Ingress, of culvert's own.
type previewHead struct {
	c    *Cluster
	spec *InterceptSpec
	list []PlanPort
}

// CheckPreview finds what is wrong with the name of a preview, and with its host if
// it has one, without a cluster. The error is an *api.Error with CodeUsage.
func CheckPreview(name, host string) error {
	if bad := validation.IsDNS1035Label(name); len(bad) > 0 {
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%q is no name for a Service: %s", name, bad[0]), Hint: "give a short name such as tomcat-v2"}
	}
	if host == "" {
		return nil
	}
	if bad := validation.IsDNS1123Subdomain(host); len(bad) > 0 {
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("--host %q is no host name: %s", host, bad[0]), Hint: "--host tomcat.example.com"}
	}
	return nil
}

func (c *Cluster) planPreviewHead(ctx context.Context, i *Intercept) error {
	name, ns := i.spec.Target, i.spec.Namespace
	usage := func(hint, format string, args ...any) error {
		return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf(format, args...), Hint: hint}
	}
	if err := CheckPreview(name, i.spec.Host); err != nil {
		return err
	}
	if ns == metav1.NamespaceSystem && !i.spec.Force {
		return &api.Error{Code: api.CodeConflict, Message: fmt.Sprintf("a preview in %s could stand in the cluster's way", ns), Hint: "--force, or another --namespace"}
	}
	there, err := c.client.Services(ns).Get(ctx, name, metav1.GetOptions{})
	switch {
	case err == nil && there.Labels[LabelSession] == i.spec.Holder.Session:
		return &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("you preview %s already", name), Hint: "culvert leave " + name}
	case err == nil && isPreview(there):
		var r Record
		_ = json.Unmarshal([]byte(there.Annotations[AnnotationPreview]), &r) // the names of nobody, if it is no record
		return heldBy(ns, name, name, intercept.Holder{Session: r.Session, User: r.User, Since: r.Since})
	case err == nil:
		return &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("Service %s in namespace %q exists already", name, ns), Hint: "choose another name, or `culvert exchange " + name + "` to have its traffic"}
	case !apierrors.IsNotFound(err):
		return translate(fmt.Sprintf("looking for Service %s in namespace %q", name, ns), err)
	}
	h := &previewHead{c: c, spec: &i.spec}
	for _, e := range i.spec.Expose {
		port := int32(e.Local)
		if e.Remote != "" {
			n, err := parsePort(e.Remote)
			if err != nil {
				return usage("--expose 8080:80", "--expose %s: the port of a new Service is a number, not %q", e, e.Remote)
			}
			port = int32(n)
		}
		p := PlanPort{Protocol: protocol(e.Protocol), Port: port, Local: e.Local}
		p.Name = fmt.Sprintf("%s-%d", map[corev1.Protocol]string{corev1.ProtocolTCP: "tcp", corev1.ProtocolUDP: "udp"}[p.Protocol], port)
		for _, other := range h.list {
			if other.Port == p.Port && other.Protocol == p.Protocol {
				return usage("each port once", "port %d of the new Service is given twice", port)
			}
		}
		h.list = append(h.list, p)
	}
	if i.spec.Host != "" && h.list[0].Protocol != corev1.ProtocolTCP {
		return usage("--expose 8080:80", "an Ingress leads to a TCP port")
	}
	i.Key, i.head = name, h
	return nil
}

func (h *previewHead) service() string   { return h.spec.Target }
func (h *previewHead) ports() []PlanPort { return h.list }
func (h *previewHead) gates(*GateSpec)   {}

func (h *previewHead) mapping() []string {
	var lines []string
	for _, p := range h.list {
		lines = append(lines, fmt.Sprintf("port %d/%s -> localhost:%d", p.Port, p.Protocol, p.Local))
	}
	return lines
}

func (h *previewHead) led(ctx context.Context, i *Intercept) (bool, error) {
	s, err := h.c.client.Services(i.spec.Namespace).Get(ctx, i.Key, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return err == nil && s.Labels[LabelSession] == i.spec.Holder.Session, translate("looking at Service "+i.Key, err)
}

// origin: nobody served it before.
func (h *previewHead) origin(context.Context, string) (map[PortKey]string, error) { return nil, nil }

func (h *previewHead) policies(ctx context.Context, i *Intercept, routes []intercept.Route) ([]string, error) {
	_, notes, err := h.c.EnsurePolicies(ctx, i.spec.Namespace, i.policySpec(routes))
	return notes, err
}

func (h *previewHead) lead(ctx context.Context, i *Intercept, routes []intercept.Route) error {
	r := i.record()
	text, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encoding the record of a preview: %w", err)
	}
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Name: h.spec.Target, Namespace: i.spec.Namespace,
			Labels:      map[string]string{LabelName: previewApp, LabelManagedBy: "culvert", LabelSession: r.Session},
			Annotations: map[string]string{AnnotationPreview: string(text), AnnotationUser: r.User},
		},
		Spec: corev1.ServiceSpec{Selector: GateSelector(i.Gate)},
	}
	if h.spec.External && h.spec.Host == "" {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
	}
	for k, p := range h.list {
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: p.Name, Protocol: p.Protocol, Port: p.Port, TargetPort: intstr.FromInt32(int32(routes[k].Listen))})
	}
	made, err := h.c.client.Services(i.spec.Namespace).Create(ctx, s, metav1.CreateOptions{FieldManager: fieldManager})
	if apierrors.IsAlreadyExists(err) {
		if made, err = h.c.again(ctx, s); err == nil && made == nil {
			return &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("Service %s in namespace %q was made by somebody else meanwhile", s.Name, s.Namespace), Hint: "choose another name"}
		}
	}
	if err != nil {
		return translate(fmt.Sprintf("creating Service %s in namespace %q", s.Name, s.Namespace), err)
	}
	if h.spec.Host == "" {
		return nil
	}
	// Owned by the Service: it goes with it.
	kind := networkingv1.PathTypePrefix
	ingress := &networkingv1.Ingress{
		ObjectMeta: metav1.ObjectMeta{
			Name: s.Name, Namespace: s.Namespace, Labels: s.Labels, Annotations: map[string]string{AnnotationUser: r.User},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "v1", Kind: "Service", Name: made.Name, UID: made.UID}},
		},
		Spec: networkingv1.IngressSpec{Rules: []networkingv1.IngressRule{{
			Host: h.spec.Host,
			IngressRuleValue: networkingv1.IngressRuleValue{HTTP: &networkingv1.HTTPIngressRuleValue{Paths: []networkingv1.HTTPIngressPath{{
				Path: "/", PathType: &kind,
				Backend: networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: made.Name, Port: networkingv1.ServiceBackendPort{Number: h.list[0].Port}}},
			}}}},
		}}},
	}
	if h.spec.IngressClass != "" {
		ingress.Spec.IngressClassName = &h.spec.IngressClass
	}
	if _, err := h.c.client.Ingresses(i.spec.Namespace).Create(ctx, ingress, metav1.CreateOptions{FieldManager: fieldManager}); err != nil && !apierrors.IsAlreadyExists(err) {
		return translate(fmt.Sprintf("creating Ingress %s in namespace %q", ingress.Name, ingress.Namespace), err)
	}
	return nil
}

// again leads a preview that is there already to the gates' ports as they are now;
// nil: it is somebody else's.
func (c *Cluster) again(ctx context.Context, want *corev1.Service) (*corev1.Service, error) {
	live, err := c.client.Services(want.Namespace).Get(ctx, want.Name, metav1.GetOptions{})
	if err != nil || live.Labels[LabelSession] != want.Labels[LabelSession] || len(live.Spec.Ports) != len(want.Spec.Ports) {
		return nil, err
	}
	var ops []patchOp
	for k, p := range want.Spec.Ports {
		ops = append(ops, set(fmt.Sprintf("/spec/ports/%d/targetPort", k), p.TargetPort))
	}
	return c.patchService(ctx, live, append(ops, set("/spec/selector", want.Spec.Selector)))
}

// deletePreview deletes a preview's Ingress and Service.
func (c *Cluster) deletePreview(ctx context.Context, s *corev1.Service) error {
	ingress, err := c.client.Ingresses(s.Namespace).Get(ctx, s.Name, metav1.GetOptions{})
	if err == nil && ingress.Labels[LabelSession] == s.Labels[LabelSession] && ingress.Labels[LabelManagedBy] == "culvert" {
		err = c.client.Ingresses(s.Namespace).Delete(ctx, s.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &ingress.UID}})
	}
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsForbidden(err) { // who may not see any made none
		return translate("deleting Ingress "+s.Name, err)
	}
	err = c.client.Services(s.Namespace).Delete(ctx, s.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &s.UID}})
	if err != nil && !apierrors.IsNotFound(err) {
		return translate("deleting Service "+s.Name, err)
	}
	return nil
}

// Address waits for the address that the cluster gives a preview that is seen
// outside: of the load balancer, or of the Ingress. It is empty for one that is
// not.
func (i *Intercept) Address(ctx context.Context) ([]string, error) {
	if i.spec.Kind != intercept.Preview || !i.spec.External && i.spec.Host == "" {
		return nil, nil
	}
	for {
		var found []string
		if i.spec.Host != "" {
			o, err := i.c.client.Ingresses(i.spec.Namespace).Get(ctx, i.Key, metav1.GetOptions{})
			if err != nil {
				return nil, translate("waiting for the address of Ingress "+i.Key, err)
			}
			for _, a := range o.Status.LoadBalancer.Ingress {
				found = append(found, "http://"+i.spec.Host+"/ at "+firstOf(a.IP, a.Hostname))
			}
		} else {
			s, err := i.c.client.Services(i.spec.Namespace).Get(ctx, i.Key, metav1.GetOptions{})
			if err != nil {
				return nil, translate("waiting for the address of Service "+i.Key, err)
			}
			for _, a := range s.Status.LoadBalancer.Ingress {
				for _, p := range s.Spec.Ports {
					found = append(found, hostPortOf(firstOf(a.IP, a.Hostname), p.Port))
				}
			}
		}
		if len(found) > 0 {
			return found, nil
		}
		select {
		case <-time.After(pollGone):
		case <-ctx.Done():
			return nil, translate("waiting for the preview's address", ctx.Err())
		}
	}
}
