package cluster

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
)

// agentServicePort is what the agent's Service calls its one port.
const agentServicePort = "wireguard"

// NodePort makes a UDP port of the agent reachable at its node, by a Service of that
// name and of type NodePort, which is owned by the agent's Deployment and goes with
// it, or finds the one that is there. It returns where to try: the addresses of the agent's node, as
// its pod and, if the user may read it, the Node name them. Errors are *api.Error.
func (c *Cluster) NodePort(ctx context.Context, a *Agent, name string, port int) ([]netip.AddrPort, error) {
	s, err := c.nodePortService(ctx, a, name, port)
	if err != nil {
		return nil, err
	}
	nodePort := 0
	for _, p := range s.Spec.Ports {
		if p.Name == agentServicePort {
			nodePort = int(p.NodePort)
		}
	}
	if nodePort <= 0 || nodePort > 65535 {
		return nil, &api.Error{Code: api.CodeAgent, Message: fmt.Sprintf("Service %s/%s has no node port", s.Namespace, s.Name)}
	}
	addrs := slices.Clone(a.HostIPs)
	// The Node also knows addresses outside the cluster; without the right to read
	// it the pod's will do.
	if node, err := c.client.Nodes().Get(ctx, a.Node, metav1.GetOptions{}); err == nil {
		for _, want := range []corev1.NodeAddressType{corev1.NodeExternalIP, corev1.NodeInternalIP} {
			for _, addr := range node.Status.Addresses {
				if addr.Type == want {
					addrs = appendAddr(addrs, addr.Address)
				}
			}
		}
	}
	var targets []netip.AddrPort
	for _, addr := range addrs {
		if to := netip.AddrPortFrom(addr, uint16(nodePort)); !slices.Contains(targets, to) {
			targets = append(targets, to)
		}
	}
	return targets, nil
}

func (c *Cluster) nodePortService(ctx context.Context, a *Agent, name string, port int) (*corev1.Service, error) {
	what := fmt.Sprintf("creating Service %s of type NodePort in namespace %q", name, a.Namespace)
	d, err := c.client.Deployments(a.Namespace).Get(ctx, a.Name, metav1.GetOptions{})
	if err != nil {
		return nil, translate(what, err)
	}
	dual := corev1.IPFamilyPolicyPreferDualStack
	want := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Name: name, Namespace: a.Namespace, Labels: d.Spec.Selector.MatchLabels,
			// Not blocking: that would take a right to the Deployment's finalizers.
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "Deployment", Name: d.Name, UID: d.UID}},
		},
		Spec: corev1.ServiceSpec{
			Type:           corev1.ServiceTypeNodePort,
			Selector:       d.Spec.Selector.MatchLabels,
			IPFamilyPolicy: &dual,
			// Only the agent's node answers, without a second hop and without hiding
			// whom it answers.
			ExternalTrafficPolicy: corev1.ServiceExternalTrafficPolicyLocal,
			Ports: []corev1.ServicePort{{
				Name: agentServicePort, Protocol: corev1.ProtocolUDP, Port: int32(port), TargetPort: intstr.FromInt32(int32(port)),
			}},
		},
	}
	services := c.client.Services(a.Namespace)
	for {
		made, err := services.Create(ctx, want, metav1.CreateOptions{})
		if !apierrors.IsAlreadyExists(err) {
			if err != nil {
				return nil, translate(what, err)
			}
			return made, nil
		}
		there, err := services.Get(ctx, want.Name, metav1.GetOptions{})
		switch {
		case err != nil && !apierrors.IsNotFound(err):
			return nil, translate(what, err)
		case err == nil && ownedBy(there, d):
			return there, nil
		case err == nil && there.Labels[LabelSession] != want.Labels[LabelSession]:
			return nil, &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("Service %s in namespace %q exists and is not this session's", want.Name, a.Namespace)}
		}
		// That of a Deployment before this one: it is going.
		select {
		case <-ctx.Done():
			return nil, translate(what, ctx.Err())
		case <-time.After(pollGone):
		}
	}
}

func ownedBy(o metav1.Object, owner metav1.Object) bool {
	for _, r := range o.GetOwnerReferences() {
		if r.UID == owner.GetUID() {
			return true
		}
	}
	return false
}
