package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

const (
	// LabelGate is on the gates' Deployment, its pods and their budget: the
	// Deployment's name.
	LabelGate = "culvert.dev/gate"
	// LabelGateState is on the same: the uid of the ConfigMap that they belong to.
	// Gates of an older one are about to end.
	LabelGateState = "culvert.dev/gate-state"
	// AnnotationGateProtocol says what gates understand of State and of the
	// control API. Any image that understands GateProtocol will do.
	AnnotationGateProtocol = "culvert.dev/gate-protocol"
	GateProtocol           = "1"
)

const (
	gateApp       = "culvert-gate"
	gateContainer = "gate"
	gateConfigDir = "/etc/culvert-gate"     // the ConfigMap
	gateKeepDir   = "/var/run/culvert-gate" // what was pushed last

	// gateGrace is for connections that are open when a gate ends, in seconds:
	// the 30 s that --drain has by default, and some for the end itself.
	gateGrace = 45
)

// GateSpec says how a Deployment of gates shall look. Name and Agent.Image must be
// set.
type GateSpec struct {
	Name string // of the Deployment: intercept.GateName, or OwnGate of an entry
	// Agent has what users choose about pods: image, pull policy and Secrets, node
	// selector, labels, annotations, service account, quota. Session, Name, User and
	// Origin are not used, gates belong to everybody.
	Agent    AgentSpec
	Replicas int32 // 0: 2
	// PodLabels are those of pods that these gates stand in for, so that Services
	// and policies find them. They win over culvert's, but for LabelGate.
	PodLabels map[string]string
	// Ports are the target ports at which gates of their own listen, with the names
	// that Services and policies may use. Empty for those of a namespace.
	Ports []corev1.ContainerPort
}

// OwnGate is the name of the gates' Deployment that serves one entry alone.
func OwnGate(key string) string { return hashed(gateApp, key) }

// maxName is how long a label's value and most names may be.
const maxName = 63

// hashed joins parts to a name with dashes; what is too long, or holds characters
// that labels and names do not both take, is replaced by a hash in part.
func hashed(parts ...string) string {
	whole := strings.Join(parts, "-")
	name := strings.ToLower(strings.NewReplacer(".", "-", "/", "-", "_", "-").Replace(whole))
	if name == whole && len(name) <= maxName {
		return name
	}
	sum := digest(whole)
	return strings.TrimRight(name[:min(len(name), maxName-1-len(sum))], "-") + "-" + sum
}

// digest is a name's hash, short enough to be part of another name.
func digest(name string) string {
	sum := sha256.Sum256([]byte(name))
	return hex.EncodeToString(sum[:5])
}

// GateSelector are the labels by which Services select the pods of gates.
func GateSelector(gate string) map[string]string { return map[string]string{LabelGate: gate} }

// ownLabels are those of the objects of a gate, below a ConfigMap.
func (s GateSpec) ownLabels(owner types.UID) map[string]string {
	return map[string]string{
		LabelName:      gateApp,
		LabelManagedBy: "culvert",
		LabelGate:      s.Name,
		LabelGateState: string(owner),
	}
}

// selector holds the ConfigMap's uid, so that a Deployment never takes pods of an
// older one for its own.
func (s GateSpec) selector(owner types.UID) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{LabelGate: s.Name, LabelGateState: string(owner)}}
}

func gateOwner(owner *corev1.ConfigMap) []metav1.OwnerReference {
	// Without blockOwnerDeletion, which needs the right to update finalizers where
	// OwnerReferencesPermissionEnforcement is on (OpenShift).
	return []metav1.OwnerReference{{APIVersion: "v1", Kind: "ConfigMap", Name: owner.Name, UID: owner.UID}}
}

func (s GateSpec) replicas() int32 {
	if s.Replicas > 0 {
		return s.Replicas
	}
	return 2
}

// deployment is the gates' Deployment, owned by the ConfigMap. Its errors are
// *api.Error with CodeUsage.
func (s GateSpec) deployment(owner *corev1.ConfigMap) (*appsv1.Deployment, error) {
	if s.Name == "" || s.Agent.Image == "" {
		return nil, &api.Error{Code: api.CodeUsage, Message: "gates need a name and an image", Hint: "use --image"}
	}
	pod, err := s.podSpec(owner.UID)
	if err != nil {
		return nil, err
	}
	own := s.ownLabels(owner.UID)
	annotations := merge(s.Agent.Annotations, noSidecarAnnotations, map[string]string{
		defaultContainer:       gateContainer,
		AnnotationGateProtocol: GateProtocol,
	})
	replicas, noHistory, none, one := s.replicas(), int32(0), intstr.FromInt32(0), intstr.FromInt32(1)
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{
			Name:            s.Name,
			Namespace:       owner.Namespace,
			Labels:          merge(s.Agent.Labels, own),
			Annotations:     maps.Clone(annotations),
			OwnerReferences: gateOwner(owner),
		},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Strategy: appsv1.DeploymentStrategy{
				Type:          appsv1.RollingUpdateDeploymentStrategyType,
				RollingUpdate: &appsv1.RollingUpdateDeployment{MaxUnavailable: &none, MaxSurge: &one},
			},
			RevisionHistoryLimit: &noHistory,
			Selector:             s.selector(owner.UID),
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{
					Labels:      s.templateLabels(owner.UID),
					Annotations: annotations,
				},
				Spec: pod,
			},
		},
	}
	return d, stampSpec(d)
}

// templateLabels leave out what controllers write onto their own pods.
func (s GateSpec) templateLabels(owner types.UID) map[string]string {
	theirs := maps.Clone(s.PodLabels)
	for _, key := range []string{
		appsv1.DefaultDeploymentUniqueLabelKey, appsv1.ControllerRevisionHashLabelKey, appsv1.StatefulSetPodNameLabel, appsv1.PodIndexLabel,
	} {
		delete(theirs, key)
	}
	return merge(s.Agent.Labels, s.ownLabels(owner), noSidecarLabels, theirs, s.selector(owner).MatchLabels)
}

// podSpec varies the agent's: what makes that one pass PodSecurity is the same.
func (s GateSpec) podSpec(owner types.UID) (corev1.PodSpec, error) {
	spec, err := s.Agent.podSpec()
	if err != nil {
		return spec, err
	}
	grace, size := int64(gateGrace), resource.MustParse("16Mi")
	spec.TerminationGracePeriodSeconds = &grace
	spec.SecurityContext.Sysctls = s.sysctls()
	spec.TopologySpreadConstraints = []corev1.TopologySpreadConstraint{{
		MaxSkew:           1,
		TopologyKey:       corev1.LabelHostname,
		WhenUnsatisfiable: corev1.ScheduleAnyway,
		LabelSelector:     s.selector(owner),
	}}
	spec.Affinity = &corev1.Affinity{PodAntiAffinity: &corev1.PodAntiAffinity{
		PreferredDuringSchedulingIgnoredDuringExecution: []corev1.WeightedPodAffinityTerm{{
			Weight:          100,
			PodAffinityTerm: corev1.PodAffinityTerm{LabelSelector: s.selector(owner), TopologyKey: corev1.LabelHostname},
		}},
	}}
	spec.Volumes = []corev1.Volume{
		{Name: "state", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: intercept.GateName},
		}}},
		{Name: "keep", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{SizeLimit: &size}}},
	}
	gate := &spec.Containers[0]
	gate.Name = gateContainer
	gate.Args = []string{"gate", "--name", s.Name}
	gate.Ports = s.Ports
	gate.VolumeMounts = []corev1.VolumeMount{
		{Name: "state", MountPath: gateConfigDir, ReadOnly: true},
		{Name: "keep", MountPath: gateKeepDir},
	}
	return spec, nil
}

// sysctls are "safe" ones: low ports without a capability, where they are needed,
// and ports of outgoing connections that are none of those at which gates listen.
func (s GateSpec) sysctls() (all []corev1.Sysctl) {
	is := func(in func(int32) bool) bool {
		return slices.ContainsFunc(s.Ports, func(p corev1.ContainerPort) bool { return in(p.ContainerPort) })
	}
	if is(func(port int32) bool { return port < 1024 }) {
		all = append(all, corev1.Sysctl{Name: "net.ipv4.ip_unprivileged_port_start", Value: "0"})
	}
	outgoing := fmt.Sprintf("%d 65535", lastGatePort+1)
	if is(func(port int32) bool { return port > lastGatePort }) && !is(func(port int32) bool { return port >= 1024 && port <= lastGatePort }) {
		outgoing = fmt.Sprintf("1024 %d", lastGatePort)
	}
	return append(all, corev1.Sysctl{Name: "net.ipv4.ip_local_port_range", Value: outgoing})
}

// budget keeps a drain of nodes from ending all gates at once.
func (s GateSpec) budget(owner *corev1.ConfigMap) *policyv1.PodDisruptionBudget {
	one, always := intstr.FromInt32(1), policyv1.AlwaysAllow
	return &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{
			Name:            s.Name,
			Namespace:       owner.Namespace,
			Labels:          s.ownLabels(owner.UID),
			OwnerReferences: gateOwner(owner),
		},
		Spec: policyv1.PodDisruptionBudgetSpec{
			MaxUnavailable: &one,
			Selector:       s.selector(owner.UID),
			// A gate that is not ready serves nobody: it keeps no drain waiting.
			UnhealthyPodEvictionPolicy: &always,
		},
	}
}
