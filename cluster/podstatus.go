package cluster

import (
	"fmt"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-dev/culvert/daemon/api"
)

func ready(pod *corev1.Pod) bool {
	if pod.DeletionTimestamp != nil {
		return false
	}
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

func agentOf(name string, pod *corev1.Pod) *Agent {
	a := &Agent{
		Namespace: pod.Namespace,
		Name:      name,
		Pod:       pod.Name,
		UID:       string(pod.UID),
		Node:      pod.Spec.NodeName,
		Image:     imageOf(pod),
	}
	for _, ip := range pod.Status.HostIPs {
		a.HostIPs = appendAddr(a.HostIPs, ip.IP)
	}
	a.HostIPs = appendAddr(a.HostIPs, pod.Status.HostIP) // servers before 1.28 have no list
	for _, ip := range pod.Status.PodIPs {
		a.IPs = appendAddr(a.IPs, ip.IP)
	}
	return a
}

// roleOf says for people what of culvert's runs in a pod.
func roleOf(pod *corev1.Pod) string {
	if pod.Labels[LabelGate] != "" {
		return "gate"
	}
	return "agent"
}

func imageOf(pod *corev1.Pod) string { return pod.Spec.Containers[0].Image }

// stepOf says for people how far a pod is.
func stepOf(pod *corev1.Pod) string {
	if pod.Spec.NodeName == "" {
		return "scheduling the " + roleOf(pod) + "'s pod"
	}
	for _, s := range pod.Status.ContainerStatuses {
		if s.State.Running != nil {
			return "waiting until the " + roleOf(pod) + " on " + pod.Spec.NodeName + " is ready"
		}
	}
	return "starting the " + roleOf(pod) + " on " + pod.Spec.NodeName
}

// diagnose says what keeps a pod from becoming ready, in the cluster's own
// words; nil: nothing known. Patient means that it may settle within a moment.
func diagnose(pod *corev1.Pod) (trouble *api.Error, patient bool) {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodScheduled && c.Status == corev1.ConditionFalse && c.Reason == corev1.PodReasonUnschedulable {
			return &api.Error{
				Code:    api.CodeAgent,
				Message: fmt.Sprintf("the %s's pod %s cannot be scheduled: %s", roleOf(pod), pod.Name, c.Message),
				Hint:    "--node-selector chooses other nodes, --pod-quota (e.g. 0.1c,64m) asks for less",
			}, true
		}
	}
	for _, s := range pod.Status.ContainerStatuses {
		if w := s.State.Waiting; w != nil {
			if e := diagnoseWaiting(pod, s.Image, w); e != nil {
				return e, false
			}
		}
		for _, t := range []*corev1.ContainerStateTerminated{s.State.Terminated, s.LastTerminationState.Terminated} {
			if t != nil {
				return exited(pod, t), false
			}
		}
	}
	if pod.Status.Phase == corev1.PodFailed {
		return &api.Error{
			Code:    api.CodeAgent,
			Message: fmt.Sprintf("the %s's pod %s failed: %s", roleOf(pod), pod.Name, strings.TrimSpace(pod.Status.Reason+" "+pod.Status.Message)),
		}, false
	}
	return nil, false
}

// diagnoseWaiting knows the kubelet's reasons that do not go away by waiting.
func diagnoseWaiting(pod *corev1.Pod, image string, w *corev1.ContainerStateWaiting) *api.Error {
	if image == "" {
		image = imageOf(pod)
	}
	message := firstOf(w.Message, w.Reason)
	switch w.Reason {
	case "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ImageInspectError", "RegistryUnavailable", "SignatureValidationFailed":
		return &api.Error{
			Code:    api.CodeImage,
			Message: fmt.Sprintf("the agent's image %s cannot be pulled on node %s: %s", image, pod.Spec.NodeName, message),
			Hint:    "--image names another one, --image-pull-secret the Secret for its registry",
		}
	case "ErrImageNeverPull":
		return &api.Error{
			Code:    api.CodeImage,
			Message: fmt.Sprintf("the agent's image %s is not on node %s and may not be pulled: %s", image, pod.Spec.NodeName, message),
			Hint:    "use --image-pull-policy IfNotPresent, or --node-selector with a node that has it",
		}
	case "CreateContainerConfigError", "CreateContainerError", "RunContainerError":
		hint := ""
		if strings.Contains(message, "runAsNonRoot") {
			hint = "the image must have a numeric USER other than 0; culvert's own has: --image"
		}
		return &api.Error{
			Code:    api.CodeAgent,
			Message: fmt.Sprintf("the %s does not start on node %s: %s", roleOf(pod), pod.Spec.NodeName, message),
			Hint:    hint,
		}
	}
	return nil
}

func exited(pod *corev1.Pod, t *corev1.ContainerStateTerminated) *api.Error {
	why := ""
	if t.Reason != "" && t.Reason != "Error" {
		why = ", " + t.Reason
	}
	message := fmt.Sprintf("the %s in pod %s exited (code %d%s)", roleOf(pod), pod.Name, t.ExitCode, why)
	if text := strings.TrimSpace(t.Message); text != "" {
		message += ": " + text
	}
	e := &api.Error{Code: api.CodeAgent, Message: message, Hint: "is the image a culvert-agent of this version? --image names another one"}
	if t.Reason == "OOMKilled" {
		e.Hint = "--pod-quota gives it more memory, e.g. 0.5c,512m"
	}
	return e
}

// refusedPod is what the ReplicaSet controller met when it created the pod:
// quota, PodSecurity, a policy.
func refusedPod(role, namespace, message string) *api.Error {
	err := translateStatusText(fmt.Sprintf("creating the %s's pod in namespace %q", role, namespace), message)
	if err.Code == api.CodeInternal {
		err.Code = api.CodeNamespace
	}
	return err
}
