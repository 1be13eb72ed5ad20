package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"strings"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Labels and annotations of culvert's objects.
const (
	LabelName      = "app.kubernetes.io/name"
	LabelManagedBy = "app.kubernetes.io/managed-by"
	LabelSession   = "culvert.dev/session" // the session's id

	AnnotationUser = "culvert.dev/user" // who connected, for people who look
	// AnnotationOrigin tells which user's daemon on which machine made it, for
	// finding what a crash left (RemoveStale). It names neither.
	AnnotationOrigin = "culvert.dev/origin"
	// AnnotationHeartbeat, with the value HeartbeatLease, is on agents whose
	// session keeps a Lease: without one they are left over.
	AnnotationHeartbeat = "culvert.dev/heartbeat"
	HeartbeatLease      = "lease"
	// AnnotationSpec is a hash of the Deployment as culvert wrote it: an agent
	// whose hash differs is replaced, not adopted.
	AnnotationSpec = "culvert.dev/spec"
)

const (
	agentApp       = "culvert-agent"
	agentContainer = "agent"
	agentBinary    = "/culvert-agent" // in the image
)

// AgentSpec says how the agent's Deployment shall look. Session and Image must
// be set.
type AgentSpec struct {
	Session        string // session id
	Name           string // of the Deployment; empty: AgentName(Session)
	User           string // for AnnotationUser
	Origin         string // for AnnotationOrigin
	Image          string
	PullPolicy     string // Always, IfNotPresent or Never; empty: IfNotPresent
	PullSecrets    []string
	NodeSelector   map[string]string // besides kubernetes.io/os: linux
	Labels         map[string]string // on Deployment and pod; culvert's own win
	Annotations    map[string]string // on Deployment and pod; culvert's own win
	ServiceAccount string            // empty: the namespace's default; the token is never mounted
	PodQuota       string            // "0.5c,512m": requests and limits
	Heartbeat      bool              // a Lease tells that the session lives (Cluster.Heartbeat)
}

// AgentName is the name of the Deployment of a session.
func AgentName(session string) string { return agentApp + "-" + session }

// Agent is the ready pod of an agent's Deployment.
type Agent struct {
	Namespace string
	Name      string // of the Deployment
	Pod       string
	UID       string // of the pod
	Node      string
	Image     string
	IPs       []netip.Addr
	HostIPs   []netip.Addr // of the node
}

func (s AgentSpec) name() string { return firstOf(s.Name, AgentName(s.Session)) }

// deployment is the whole of what culvert creates in the cluster for connect.
// Its errors are *api.Error with CodeUsage.
func (s AgentSpec) deployment(namespace string) (*appsv1.Deployment, error) {
	if s.Session == "" || s.Image == "" {
		return nil, &api.Error{Code: api.CodeUsage, Message: "the agent needs a session id and an image", Hint: "use --image"}
	}
	pod, err := s.podSpec()
	if err != nil {
		return nil, err
	}
	own := map[string]string{
		LabelName:      agentApp,
		LabelManagedBy: "culvert",
		LabelSession:   s.Session,
	}
	labels := merge(s.Labels, own, noSidecarLabels)
	annotations := merge(s.Annotations, noSidecarAnnotations, map[string]string{defaultContainer: agentContainer})
	if s.User != "" {
		annotations[AnnotationUser] = s.User
	}
	if s.Origin != "" {
		annotations[AnnotationOrigin] = s.Origin
	}
	if s.Heartbeat {
		annotations[AnnotationHeartbeat] = HeartbeatLease
	}
	one, noHistory := int32(1), int32(0)
	d := &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{
			Name:        s.name(),
			Namespace:   namespace,
			Labels:      labels,
			Annotations: maps.Clone(annotations),
		},
		Spec: appsv1.DeploymentSpec{
			Replicas: &one,
			// Two agents of a session never run at once: the second would have
			// no peer, and the quota may have no room.
			Strategy:             appsv1.DeploymentStrategy{Type: appsv1.RecreateDeploymentStrategyType},
			RevisionHistoryLimit: &noHistory,
			Selector:             &metav1.LabelSelector{MatchLabels: own},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels, Annotations: annotations},
				Spec:       pod,
			},
		},
	}
	return d, stampSpec(d)
}

// stampSpec notes in AnnotationSpec how culvert wrote a Deployment.
func stampSpec(d *appsv1.Deployment) error {
	text, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("encoding Deployment %s: %w", d.Name, err)
	}
	sum := sha256.Sum256(text)
	d.Annotations[AnnotationSpec] = hex.EncodeToString(sum[:8])
	return nil
}

// graceSeconds is what an agent has to end: 20 s for connections from the cluster
// that are open (agent.Config.Drain), and some for the rest. One that has none ends
// at once.
const graceSeconds = 25

// defaultContainer is the annotation by which a pod says which of its containers
// people mean (kubectl's own).
const defaultContainer = "kubectl.kubernetes.io/default-container"

// Istio reads the label, older versions the annotation. A sidecar would take the
// connections of agents and gates through the mesh's own rules.
var (
	noSidecarLabels      = map[string]string{"sidecar.istio.io/inject": "false"}
	noSidecarAnnotations = map[string]string{"sidecar.istio.io/inject": "false", "linkerd.io/inject": "disabled"}
)

// podSpec is the agent's pod, of which gates are a variation. It passes
// PodSecurity "restricted"
// (https://kubernetes.io/docs/concepts/security/pod-security-standards/). It
// fixes no uid: the image's USER is numeric and not 0, and OpenShift wants to
// choose its own. Its errors are *api.Error with CodeUsage.
func (s AgentSpec) podSpec() (corev1.PodSpec, error) {
	resources, err := parseQuota(s.PodQuota)
	if err != nil {
		return corev1.PodSpec{}, err
	}
	policy, err := parsePullPolicy(s.PullPolicy)
	if err != nil {
		return corev1.PodSpec{}, err
	}
	yes, no, grace := true, false, int64(graceSeconds)
	spec := corev1.PodSpec{
		ServiceAccountName:            s.ServiceAccount,
		AutomountServiceAccountToken:  &no,
		EnableServiceLinks:            &no,
		TerminationGracePeriodSeconds: &grace,
		NodeSelector:                  merge(s.NodeSelector, map[string]string{"kubernetes.io/os": "linux"}),
		Tolerations:                   []corev1.Toleration{awayFor(corev1.TaintNodeUnreachable), awayFor(corev1.TaintNodeNotReady)},
		SecurityContext: &corev1.PodSecurityContext{
			RunAsNonRoot:   &yes,
			SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
			// Both are "safe" sysctls, which PodSecurity allows: ICMP echo
			// without CAP_NET_RAW, and 64k source ports to one destination.
			Sysctls: []corev1.Sysctl{
				{Name: "net.ipv4.ping_group_range", Value: "0 2147483647"},
				{Name: "net.ipv4.ip_local_port_range", Value: "1024 65535"},
			},
		},
		Containers: []corev1.Container{{
			Name:            agentContainer,
			Image:           s.Image,
			ImagePullPolicy: policy,
			Resources:       resources,
			Env: []corev1.EnvVar{{
				Name:      "POD_IPS",
				ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{APIVersion: "v1", FieldPath: "status.podIPs"}},
			}},
			SecurityContext: &corev1.SecurityContext{
				AllowPrivilegeEscalation: &no,
				ReadOnlyRootFilesystem:   &yes,
				Capabilities:             &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			},
			// The agent's ports are on loopback, so the probes run inside the pod.
			// No startup probe: the kubelet looks at readiness only in the second
			// after it succeeded, and connect waits for that (2.1 s, without it
			// 0.9 s). Liveness is patient enough for any start.
			ReadinessProbe: probe(2, 3, "health", "--ready"),
			LivenessProbe:  probe(30, 3, "health"),
			// A crashed agent's last words come with its status, without the
			// right to read logs.
			TerminationMessagePolicy: corev1.TerminationMessageFallbackToLogsOnError,
		}},
	}
	for _, name := range s.PullSecrets {
		spec.ImagePullSecrets = append(spec.ImagePullSecrets, corev1.LocalObjectReference{Name: name})
	}
	return spec, nil
}

// awayFor has the agent replaced soon after its node went silent, which takes the
// cluster 40 to 50 s to say; by default 5 minutes more would pass. An agent that
// lives on in spite of it is used as long as a carrier reaches it.
func awayFor(taint string) corev1.Toleration {
	seconds := int64(10)
	return corev1.Toleration{Key: taint, Operator: corev1.TolerationOpExists, Effect: corev1.TaintEffectNoExecute, TolerationSeconds: &seconds}
}

// probe runs the agent's own binary every period seconds.
func probe(period, failures int32, args ...string) *corev1.Probe {
	return &corev1.Probe{
		ProbeHandler:     corev1.ProbeHandler{Exec: &corev1.ExecAction{Command: append([]string{agentBinary}, args...)}},
		PeriodSeconds:    period,
		FailureThreshold: failures,
		TimeoutSeconds:   5, // a node under load starts a process slowly
	}
}

// parseQuota reads --pod-quota: CPU in cores with "c", memory with "m" or "g"
// (MiB, GiB), either alone or both with a comma, as in kt-connect; Kubernetes
// quantities are not accepted ("500m" would mean half a core there). The same
// values are requested and limited.
func parseQuota(quota string) (corev1.ResourceRequirements, error) {
	if quota == "" {
		// The agent idles below 40 MB and bounds its buffers well below the
		// limit. No CPU limit: throttling costs latency and protects nobody who
		// has requests of his own.
		return corev1.ResourceRequirements{
			Requests: corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("50m"), corev1.ResourceMemory: resource.MustParse("64Mi")},
			Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("256Mi")},
		}, nil
	}
	bad := func(entry, why string) error {
		return &api.Error{
			Code:    api.CodeUsage,
			Message: fmt.Sprintf("--pod-quota %q: %q %s", quota, entry, why),
			Hint:    "give CPU and memory, e.g. 0.5c,512m",
		}
	}
	r := corev1.ResourceRequirements{Requests: corev1.ResourceList{}, Limits: corev1.ResourceList{}}
	for _, entry := range strings.Split(quota, ",") {
		entry = strings.ToLower(strings.TrimSpace(entry))
		number, name, suffix := "", corev1.ResourceName(""), ""
		switch {
		case strings.HasSuffix(entry, "c"):
			number, name = strings.TrimSuffix(entry, "c"), corev1.ResourceCPU
		case strings.HasSuffix(entry, "m"):
			number, name, suffix = strings.TrimSuffix(entry, "m"), corev1.ResourceMemory, "Mi"
		case strings.HasSuffix(entry, "g"):
			number, name, suffix = strings.TrimSuffix(entry, "g"), corev1.ResourceMemory, "Gi"
		default:
			return r, bad(entry, "ends neither in c (cores) nor in m or g (memory)")
		}
		if strings.Trim(number, "0123456789.") != "" {
			return r, bad(entry, "is not a number with a unit")
		}
		q, err := resource.ParseQuantity(number + suffix)
		if err != nil || q.Sign() <= 0 {
			return r, bad(entry, "is not a positive number with a unit")
		}
		if _, twice := r.Limits[name]; twice {
			return r, bad(entry, "comes twice")
		}
		r.Requests[name], r.Limits[name] = q, q
	}
	return r, nil
}

func parsePullPolicy(policy string) (corev1.PullPolicy, error) {
	switch p := corev1.PullPolicy(policy); p {
	case "":
		return corev1.PullIfNotPresent, nil
	case corev1.PullAlways, corev1.PullIfNotPresent, corev1.PullNever:
		return p, nil
	}
	return "", &api.Error{
		Code:    api.CodeUsage,
		Message: fmt.Sprintf("--image-pull-policy %q is none of Always, IfNotPresent, Never", policy),
	}
}

// merge is the union of maps; the later ones win.
func merge(all ...map[string]string) map[string]string {
	m := map[string]string{}
	for _, one := range all {
		maps.Copy(m, one)
	}
	return m
}
