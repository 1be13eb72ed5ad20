package cluster

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"reflect"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

const (
	originApp    = "culvert-origin"
	originSuffix = "-" + originApp
)

// OriginName is the name of a Service's origin. A name that gets too long (63,
// as every Service's) is cut, with a hash.
func OriginName(service string) string {
	if name := service + originSuffix; len(name) <= 63 {
		return name
	}
	sum := sha256.Sum256([]byte(service))
	hash := "-" + hex.EncodeToString(sum[:4])
	return service[:63-len(hash)-len(originSuffix)] + hash + originSuffix
}

// EnsureOrigin makes the Service by which the gates reach what served plan's
// Service, or brings it up to date, and returns it with its cluster IP. It goes
// with the Service that it belongs to. A Service of that name that is not
// culvert's is an *api.Error.
func (c *Cluster) EnsureOrigin(ctx context.Context, plan *ServicePlan, session string) (*corev1.Service, error) {
	want := plan.origin(session)
	doing := fmt.Sprintf("making Service %s/%s", want.Namespace, want.Name)
	services := c.client.Services(want.Namespace)
	for try := 1; ; try++ {
		made, err := services.Create(ctx, want, metav1.CreateOptions{FieldManager: fieldManager})
		if !apierrors.IsAlreadyExists(err) {
			return made, translateService(doing, err)
		}
		live, err := services.Get(ctx, want.Name, metav1.GetOptions{})
		if err == nil {
			if !isOrigin(live) {
				return nil, &api.Error{
					Code:    api.CodeExists,
					Message: fmt.Sprintf("%s: there is one already, and it is not culvert's", doing),
					Hint:    fmt.Sprintf("delete or rename it: `kubectl get service %s -n %s -o yaml`", want.Name, want.Namespace),
				}
			}
			ops := originOps(live, want)
			if len(ops) == 0 {
				return live, nil
			}
			if made, err = c.patchService(ctx, live, ops); err == nil {
				return made, nil
			}
		}
		// Deleted or changed at the same time: once more.
		if again := apierrors.IsConflict(err) || apierrors.IsNotFound(err); !again || try == conflictTries {
			return nil, translateService(doing, err)
		}
	}
}

// DeleteOrigin deletes the origin of a Service; with a session only its own. What
// is not there, or not culvert's, is left alone.
func (c *Cluster) DeleteOrigin(ctx context.Context, namespace, service, session string) error {
	doing := fmt.Sprintf("deleting Service %s/%s", namespace, OriginName(service))
	services := c.client.Services(namespace)
	live, err := services.Get(ctx, OriginName(service), metav1.GetOptions{})
	if err == nil && isOrigin(live) && (session == "" || live.Labels[LabelSession] == session) {
		err = services.Delete(ctx, live.Name, metav1.DeleteOptions{Preconditions: &metav1.Preconditions{UID: &live.UID, ResourceVersion: &live.ResourceVersion}})
	}
	// A conflict says that another one has the name, or the object, by now.
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return translateService(doing, err)
}

func isOrigin(service *corev1.Service) bool {
	return service.Labels[LabelManagedBy] == "culvert" && service.Labels[LabelName] == originApp
}

// origin copies what decides who answers and how: never type, node ports,
// external addresses, labels or annotations, which mean something to others.
func (p *ServicePlan) origin(session string) *corev1.Service {
	below, no := p.below.Spec, false
	o := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Name:      OriginName(p.Name),
			Namespace: p.Namespace,
			Labels:    map[string]string{LabelName: originApp, LabelManagedBy: "culvert", LabelSession: session, labelHidden: "culvert"},
			OwnerReferences: []metav1.OwnerReference{{
				APIVersion: "v1", Kind: "Service", Name: p.Name, UID: p.service.UID, BlockOwnerDeletion: &no,
			}},
		},
		Spec: corev1.ServiceSpec{
			Type:                     corev1.ServiceTypeClusterIP,
			Selector:                 maps.Clone(below.Selector),
			IPFamilies:               below.IPFamilies,
			IPFamilyPolicy:           below.IPFamilyPolicy,
			PublishNotReadyAddresses: below.PublishNotReadyAddresses,
			SessionAffinity:          below.SessionAffinity,
			SessionAffinityConfig:    below.SessionAffinityConfig,
		},
	}
	for _, port := range below.Ports {
		o.Spec.Ports = append(o.Spec.Ports, corev1.ServicePort{
			Name: port.Name, Protocol: port.Protocol, Port: port.Port, TargetPort: port.TargetPort, AppProtocol: port.AppProtocol,
		})
	}
	return o
}

// originOps bring live up to date.
func originOps(live, want *corev1.Service) (ops []patchOp) {
	change := func(path string, has, wants any) {
		if !reflect.DeepEqual(has, wants) {
			ops = append(ops, set(path, wants))
		}
	}
	labels := maps.Clone(want.Labels)
	if live.Labels[labelHidden] == "" { // it was shown to the nodes, and stays so
		delete(labels, labelHidden)
	}
	change("/metadata/labels", live.Labels, labels)
	change("/metadata/ownerReferences", live.OwnerReferences, want.OwnerReferences)
	change("/spec/selector", live.Spec.Selector, want.Spec.Selector)
	change("/spec/ports", live.Spec.Ports, want.Spec.Ports)
	change("/spec/publishNotReadyAddresses", live.Spec.PublishNotReadyAddresses, want.Spec.PublishNotReadyAddresses)
	if want.Spec.SessionAffinity != "" {
		change("/spec/sessionAffinity", live.Spec.SessionAffinity, want.Spec.SessionAffinity)
	}
	if c := want.Spec.SessionAffinityConfig; c != nil {
		change("/spec/sessionAffinityConfig", live.Spec.SessionAffinityConfig, c)
	} else if live.Spec.SessionAffinityConfig != nil {
		ops = append(ops, patchOp{Op: "remove", Path: "/spec/sessionAffinityConfig"})
	}
	if want.Spec.IPFamilyPolicy != nil {
		change("/spec/ipFamilyPolicy", live.Spec.IPFamilyPolicy, want.Spec.IPFamilyPolicy)
	}
	if len(want.Spec.IPFamilies) > 0 {
		change("/spec/ipFamilies", live.Spec.IPFamilies, want.Spec.IPFamilies)
	}
	return ops
}
