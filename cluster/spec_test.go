package cluster

import (
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/daemon/api"
)

var update = flag.Bool("update", false, "write testdata anew")

func TestDeploymentGolden(t *testing.T) {
	d, err := AgentSpec{
		Session: "s1", Image: "registry.example/culvert-agent:1", User: "dev", PullSecrets: []string{"regcred"},
		NodeSelector: map[string]string{"disk": "ssd"}, Labels: map[string]string{"team": "a", LabelSession: "forged"},
		Annotations: map[string]string{"note": "x"}, ServiceAccount: "agent", PodQuota: "0.5c,512m",
	}.deployment("demo")
	if err != nil {
		t.Fatal(err)
	}
	got, err := yaml.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	const path = "testdata/deployment.yaml"
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != string(want) {
		t.Errorf("the Deployment changed (go test -update writes %s):\n%s", path, got)
	}
}

func TestSpecHashTellsOptionsApart(t *testing.T) {
	hash := func(s AgentSpec) string {
		d, err := s.deployment("demo")
		if err != nil {
			t.Fatal(err)
		}
		return d.Annotations[AnnotationSpec]
	}
	a := AgentSpec{Session: "s1", Image: "x:1", Labels: map[string]string{"a": "1", "b": "2", "c": "3"}}
	b := a
	b.Image = "x:2"
	if hash(a) != hash(a) || hash(a) == hash(b) {
		t.Error("the hash does not follow the spec")
	}
}

func TestSpecErrors(t *testing.T) {
	for _, s := range []AgentSpec{
		{Session: "s"},
		{Session: "s", Image: "x", PodQuota: "lots"},
		{Session: "s", Image: "x", PodQuota: "500m,1g"},
		{Session: "s", Image: "x", PodQuota: "0c"},
		{Session: "s", Image: "x", PodQuota: "-1c"},
		{Session: "s", Image: "x", PodQuota: "1e9c"},
		{Session: "s", Image: "x", PullPolicy: "sometimes"},
	} {
		_, err := s.deployment("demo")
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeUsage {
			t.Errorf("%+v: %v", s, err)
		}
	}
	r, err := parseQuota("0.25C, 1G")
	if err != nil || r.Limits.Cpu().MilliValue() != 250 || r.Requests.Memory().Value() != 1<<30 {
		t.Errorf("%v, %v", r, err)
	}
}

func TestDiagnose(t *testing.T) {
	waiting := func(reason, message string) *corev1.Pod {
		return &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "p"},
			Spec:       corev1.PodSpec{NodeName: "n1", Containers: []corev1.Container{{Image: "x:1"}}},
			Status: corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{{
				State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: reason, Message: message}},
			}}},
		}
	}
	crashed := waiting("CrashLoopBackOff", "back-off 10s")
	crashed.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ExitCode: 1, Reason: "Error", Message: "no such flag"}
	for _, test := range []struct {
		pod  *corev1.Pod
		code string
		says string
	}{
		{waiting("ContainerCreating", ""), "", ""},
		{waiting("ErrImagePull", "no such host"), api.CodeImage, "no such host"},
		{waiting("InvalidImageName", "bad"), api.CodeImage, "x:1"},
		{waiting("ErrImageNeverPull", ""), api.CodeImage, "--image-pull-policy"},
		{waiting("CreateContainerConfigError", "container has runAsNonRoot and image will run as root"), api.CodeAgent, "USER"},
		{crashed, api.CodeAgent, "no such flag"},
	} {
		e, _ := diagnose(test.pod)
		if e == nil {
			e = &api.Error{}
		}
		if e.Code != test.code || !strings.Contains(e.Error(), test.says) {
			t.Errorf("%+v: %+v", test.pod.Status, e)
		}
	}
}
