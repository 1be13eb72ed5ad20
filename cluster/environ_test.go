package cluster

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	autoscalingv2 "k8s.io/api/autoscaling/v2"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/daemon/api"
)

// shelf is an API server that gives out objects: one by its path, or a list of
// those below a path that a selector picks.
type shelf struct {
	objects   map[string]metav1.Object
	forbidden string // resource that nobody may use
}

func (s *shelf) answer(r *http.Request, _ runtime.Object) (int, runtime.Object) {
	parts := strings.Split(r.URL.Path, "/")
	name, kind := parts[len(parts)-1], parts[len(parts)-2]
	refuse := func(e *apierrors.StatusError) (int, runtime.Object) { return int(e.ErrStatus.Code), &e.ErrStatus }
	if strings.Contains(r.URL.Path+"/", "/"+s.forbidden+"/") && s.forbidden != "" {
		return refuse(apierrors.NewForbidden(schema.GroupResource{Resource: s.forbidden}, name, os.ErrPermission))
	}
	if o, ok := s.objects[r.URL.Path]; ok {
		return 200, o.(runtime.Object)
	}
	if kind != "namespaces" || len(parts) < 2 || r.Method != http.MethodGet {
		if list := s.list(r); list != nil {
			return 200, list
		}
		return refuse(apierrors.NewNotFound(schema.GroupResource{Resource: kind}, name))
	}
	return refuse(apierrors.NewNotFound(schema.GroupResource{Resource: kind}, name))
}

func (s *shelf) list(r *http.Request) runtime.Object {
	selector, err := labels.Parse(r.URL.Query().Get("labelSelector"))
	if err != nil {
		return nil
	}
	var found []metav1.Object
	for path, o := range s.objects {
		if strings.HasPrefix(path, r.URL.Path+"/") && selector.Matches(labels.Set(o.GetLabels())) {
			found = append(found, o)
		}
	}
	switch r.URL.Path[strings.LastIndexByte(r.URL.Path, '/')+1:] {
	case "pods":
		l := &corev1.PodList{}
		for _, o := range found {
			l.Items = append(l.Items, *o.(*corev1.Pod))
		}
		return l
	case "services":
		l := &corev1.ServiceList{}
		for _, o := range found {
			l.Items = append(l.Items, *o.(*corev1.Service))
		}
		return l
	case "deployments":
		l := &appsv1.DeploymentList{}
		for _, o := range found {
			l.Items = append(l.Items, *o.(*appsv1.Deployment))
		}
		return l
	case "statefulsets":
		l := &appsv1.StatefulSetList{}
		for _, o := range found {
			l.Items = append(l.Items, *o.(*appsv1.StatefulSet))
		}
		return l
	case "replicasets":
		l := &appsv1.ReplicaSetList{}
		for _, o := range found {
			l.Items = append(l.Items, *o.(*appsv1.ReplicaSet))
		}
		return l
	case "horizontalpodautoscalers":
		l := &autoscalingv2.HorizontalPodAutoscalerList{}
		for _, o := range found {
			l.Items = append(l.Items, *o.(*autoscalingv2.HorizontalPodAutoscaler))
		}
		return l
	case "poddisruptionbudgets":
		l := &policyv1.PodDisruptionBudgetList{}
		for _, o := range found {
			l.Items = append(l.Items, *o.(*policyv1.PodDisruptionBudget))
		}
		return l
	}
	return nil
}

// resources are where objects of a kind are, below the API's root.
var resources = map[string]string{
	"Pod": "/api/v1/namespaces/a/pods/", "Service": "/api/v1/namespaces/a/services/",
	"ConfigMap": "/api/v1/namespaces/a/configmaps/", "Secret": "/api/v1/namespaces/a/secrets/",
	"Deployment": "/apis/apps/v1/namespaces/a/deployments/", "StatefulSet": "/apis/apps/v1/namespaces/a/statefulsets/",
	"ReplicaSet":              "/apis/apps/v1/namespaces/a/replicasets/",
	"HorizontalPodAutoscaler": "/apis/autoscaling/v2/namespaces/a/horizontalpodautoscalers/",
	"PodDisruptionBudget":     "/apis/policy/v1/namespaces/a/poddisruptionbudgets/",
}

// newShelf reads manifests, which are all put into namespace a.
func newShelf(t *testing.T, manifests string) (*shelf, *Cluster) {
	t.Helper()
	s := &shelf{objects: map[string]metav1.Object{}}
	for doc := range strings.SplitSeq(manifests, "\n---\n") {
		var head metav1.TypeMeta
		if err := yaml.Unmarshal([]byte(doc), &head); err != nil {
			t.Fatal(err)
		}
		o, err := known.New(schema.FromAPIVersionAndKind(head.APIVersion, head.Kind))
		if err != nil {
			t.Fatal(err)
		}
		if err := yaml.UnmarshalStrict([]byte(doc), o); err != nil {
			t.Fatal(err)
		}
		m := o.(metav1.Object)
		m.SetNamespace("a")
		s.objects[resources[head.Kind]+m.GetName()] = m
	}
	server := httptest.NewServer(&apiServer{answer: s.answer})
	t.Cleanup(server.Close)
	return s, &Cluster{namespace: "a", client: unlimited(t, server.URL)}
}

// unlimited is a client that may ask as often as a test likes.
func unlimited(t *testing.T, url string) *Client {
	t.Helper()
	c, err := NewClient(&rest.Config{Host: url, QPS: -1})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const environManifests = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, uid: d1}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}, annotations: {kubectl.kubernetes.io/default-container: main}}
    spec:
      containers:
      - {name: main, env: [{name: T, value: template}, {name: NS, valueFrom: {fieldRef: {fieldPath: metadata.namespace}}}, {name: IP, valueFrom: {fieldRef: {fieldPath: status.podIP}}}]}
      - {name: side}
---
apiVersion: v1
kind: Pod
metadata:
  name: web-77-x
  uid: p1
  labels: {app: web, pod-template-hash: "77", "team/x": blue}
  annotations: {kubectl.kubernetes.io/default-container: main, note: "a \"b\""}
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: web-77, uid: r1, controller: true}]
spec:
  nodeName: node1
  serviceAccountName: robot
  initContainers:
  - {name: init, env: [{name: I, value: "1"}]}
  containers:
  - name: main
    resources: {limits: {cpu: 1500m, memory: 100Mi}, requests: {cpu: 250m}}
    envFrom:
    - {configMapRef: {name: base}}
    - {prefix: DB_, secretRef: {name: db}}
    - {configMapRef: {name: nowhere, optional: true}}
    env:
    - {name: PLAIN, value: x}
    - {name: COLOUR, value: red}
    - {name: URL, value: "http://$(HOST):$(REDIS_SERVICE_PORT)/$(NOT_THERE)$$(HOST)"}
    - {name: LATER, value: "$(AFTER)"}
    - {name: AFTER, value: "1"}
    - {name: KEY, valueFrom: {secretKeyRef: {name: db, key: password}}}
    - {name: MAYBE, valueFrom: {secretKeyRef: {name: db, key: none, optional: true}}}
    - {name: MAYBE2, valueFrom: {configMapKeyRef: {name: nowhere, key: k, optional: true}}}
    - {name: POD, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
    - {name: TEAM, valueFrom: {fieldRef: {fieldPath: "metadata.labels['team/x']"}}}
    - {name: NOTE, valueFrom: {fieldRef: {fieldPath: "metadata.annotations['note']"}}}
    - {name: UID_, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}
    - {name: NODE, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
    - {name: SA, valueFrom: {fieldRef: {fieldPath: spec.serviceAccountName}}}
    - {name: IPS, valueFrom: {fieldRef: {fieldPath: status.podIPs}}}
    - {name: HOSTIP, valueFrom: {fieldRef: {fieldPath: status.hostIP}}}
    - {name: CPU, valueFrom: {resourceFieldRef: {resource: limits.cpu}}}
    - {name: MILLI, valueFrom: {resourceFieldRef: {resource: requests.cpu, divisor: 1m}}}
    - {name: MEM, valueFrom: {resourceFieldRef: {resource: limits.memory, divisor: 1Mi}}}
    - {name: REDIS_PORT, value: mine}
    volumeMounts:
    - {name: config, mountPath: /etc/app}
    - {name: db, mountPath: /etc/app/secret}
    - {name: config, mountPath: /one.conf, subPath: app.conf}
    - {name: items, mountPath: /items}
    - {name: all, mountPath: /all}
    - {name: info, mountPath: /info}
    - {name: data, mountPath: /data}
    - {name: items, mountPath: /sub, subPathExpr: "$(PLAIN)"}
  - {name: side}
  volumes:
  - {name: config, configMap: {name: files}}
  - {name: db, secret: {secretName: db}}
  - {name: items, configMap: {name: files, items: [{key: app.conf, path: x/y.conf}]}}
  - {name: all, projected: {sources: [{configMap: {name: files}}, {secret: {name: db}}, {serviceAccountToken: {path: token}}, {configMap: {name: nowhere, optional: true}}]}}
  - {name: info, downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}, {path: cpu, resourceFieldRef: {containerName: main, resource: limits.cpu}}]}}
  - {name: data, emptyDir: {}}
status: {phase: Running, podIP: 10.0.0.7, podIPs: [{ip: 10.0.0.7}, {ip: "fd00::7"}], hostIP: 192.168.0.1, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Pod
metadata:
  name: culvert-gate-web-5-y
  labels: {app: web, pod-template-hash: "5"}
  creationTimestamp: "2030-01-01T00:00:00Z"
  ownerReferences: [{apiVersion: apps/v1, kind: ReplicaSet, name: culvert-gate-web-5, uid: r2, controller: true}]
spec: {containers: [{name: gate}]}
status: {phase: Running, conditions: [{type: Ready, status: "True"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web, uid: s1}
spec: {clusterIP: None, selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: redis}
spec: {clusterIP: 10.96.0.9, ports: [{port: 6379, name: redis-tcp}]}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: base}
data: {HOST: h, COLOUR: blue, "dotted.name": d}
---
apiVersion: v1
kind: Secret
metadata: {name: db}
data: {password: czNjcmV0, user: cm9vdA==}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: files}
data: {app.conf: hello}
binaryData: {blob: AAE=}
`

func TestEnviron(t *testing.T) {
	_, c := newShelf(t, environManifests)
	for _, target := range []string{"deploy/web", "Deployment.apps/web", "pod/web-77-x", "svc/web", "web"} {
		e, err := c.Environ(t.Context(), "", target, "")
		if err != nil {
			t.Errorf("%s: %v", target, err)
			continue
		}
		if e.Pod != "web-77-x" || e.Container != "main" {
			t.Errorf("%s: pod %q, container %q", target, e.Pod, e.Container)
		}
		want := map[string]string{
			"HOST": "h", "dotted.name": "d", "DB_password": "s3cret", "DB_user": "root", "PLAIN": "x", "COLOUR": "red",
			"URL": "http://h:6379/$(NOT_THERE)$(HOST)", "LATER": "$(AFTER)", "AFTER": "1", "KEY": "s3cret", "POD": "web-77-x", "TEAM": "blue",
			"NOTE": `a "b"`, "UID_": "p1", "NODE": "node1", "SA": "robot", "IPS": "10.0.0.7,fd00::7", "HOSTIP": "192.168.0.1",
			"CPU": "2", "MILLI": "250", "MEM": "100", "REDIS_PORT": "mine",
			"REDIS_SERVICE_HOST": "10.96.0.9", "REDIS_SERVICE_PORT": "6379", "REDIS_SERVICE_PORT_REDIS_TCP": "6379",
			"REDIS_PORT_6379_TCP": "tcp://10.96.0.9:6379", "REDIS_PORT_6379_TCP_PROTO": "tcp",
			"REDIS_PORT_6379_TCP_PORT": "6379", "REDIS_PORT_6379_TCP_ADDR": "10.96.0.9",
		}
		got := map[string]string{}
		for _, v := range e.Vars {
			if _, twice := got[v.Name]; twice {
				t.Errorf("%s twice", v.Name)
			}
			got[v.Name] = v.Value
		}
		for k, v := range want {
			if got[k] != v {
				t.Errorf("%s: %s = %q, want %q", target, k, got[k], v)
			}
			delete(got, k)
		}
		if len(got) > 0 {
			t.Errorf("%s: also %v", target, got)
		}
		if e.Vars[0].Name != "COLOUR" || e.Vars[0].Source != "" || e.Vars[1].Source != "ConfigMap base" {
			t.Errorf("order: %+v", e.Vars[:2])
		}
	}
	e, err := c.Environ(t.Context(), "a", "deploy/web", "init")
	if err != nil || e.Container != "init" || !slices.ContainsFunc(e.Vars, func(v Var) bool { return v.Name == "I" }) {
		t.Errorf("%+v, %v", e, err)
	}
}

// Without a pod the template serves, less what only a pod has.
func TestEnvironWithoutPod(t *testing.T) {
	s, c := newShelf(t, environManifests)
	delete(s.objects, resources["Pod"]+"web-77-x")
	e, err := c.Environ(t.Context(), "a", "deploy/web", "")
	if err != nil {
		t.Fatal(err)
	}
	if e.Pod != "" || e.values["T"] != "template" || e.values["NS"] != "a" {
		t.Errorf("%+v", e)
	}
	if _, ok := e.values["IP"]; ok || !strings.Contains(strings.Join(e.Notes, "\n"), "IP is left out: status.podIP") {
		t.Errorf("%q", e.Notes)
	}
	if _, err := c.Environ(t.Context(), "a", "svc/web", ""); err == nil {
		t.Error("an environment of a Service whose only pod is a gate")
	}
}

// A Service that is intercepted selects gates; what it had selected is found by
// the Service that it owns.
func TestEnvironOfIntercepted(t *testing.T) {
	s, c := newShelf(t, environManifests)
	s.objects[resources["Service"]+"web"].(*corev1.Service).Spec.Selector = map[string]string{"gate": "yes"}
	s.objects[resources["Service"]+"web-origin"] = &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: "web-origin", Namespace: "a", OwnerReferences: []metav1.OwnerReference{{UID: "s1"}}},
		Spec:       corev1.ServiceSpec{Selector: map[string]string{"app": "web"}},
	}
	if e, err := c.Environ(t.Context(), "a", "svc/web", ""); err != nil || e.Pod != "web-77-x" {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestEnvironErrors(t *testing.T) {
	for name, x := range map[string]struct {
		target, container string
		change            func(*shelf)
		code, message     string
	}{
		"bad kind":        {target: "job/x", code: api.CodeUsage, message: `"job/x"`},
		"no name":         {target: "deploy/", code: api.CodeUsage, message: `"deploy/"`},
		"missing":         {target: "deploy/wep", code: api.CodeNotFound, message: "did you mean deployment/web?"},
		"nothing of it":   {target: "zzzzz", code: api.CodeNotFound, message: `"zzzzz"`},
		"no container":    {target: "deploy/web", container: "x", code: api.CodeNotFound, message: "main, side, init"},
		"which container": {target: "deploy/web", change: func(s *shelf) { s.objects[resources["Pod"]+"web-77-x"].SetAnnotations(nil) }, code: api.CodeUsage, message: "--container"},
		"no secret":       {target: "deploy/web", change: func(s *shelf) { delete(s.objects, resources["Secret"]+"db") }, code: api.CodeNotFound, message: "Secret a/db"},
		"no key": {target: "deploy/web", change: func(s *shelf) {
			delete(s.objects[resources["Secret"]+"db"].(*corev1.Secret).Data, "password")
		}, code: api.CodeNotFound, message: `no key "password"`},
		"secrets forbidden":    {target: "deploy/web", change: func(s *shelf) { s.forbidden = "secrets" }, code: api.CodeForbidden, message: `get secrets "db"`},
		"configmaps forbidden": {target: "deploy/web", change: func(s *shelf) { s.forbidden = "configmaps" }, code: api.CodeForbidden, message: `get configmaps "base"`},
	} {
		t.Run(name, func(t *testing.T) {
			s, c := newShelf(t, environManifests)
			if x.change != nil {
				x.change(s)
			}
			_, err := c.Environ(t.Context(), "a", x.target, x.container)
			e, ok := err.(*api.Error)
			if !ok || e.Code != x.code || !strings.Contains(e.Error(), x.message) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestEnvironExpand(t *testing.T) {
	lookup := func(name string) (string, bool) {
		v, ok := map[string]string{"A": "a", "B_1": "$(A)", "": "empty"}[name]
		return v, ok
	}
	// As k8s.io/kubernetes/third_party/forked/golang/expansion has them.
	for in, want := range map[string]string{
		"": "", "$": "$", "$$": "$", "$(A)": "a", "x$(A)y$(A)": "xaya", "$$(A)": "$(A)", "$$$(A)": "$a", "$(NO)": "$(NO)",
		"$(A": "$(A", "$A": "$A", "$(B_1)": "$(A)", "$()": "empty", "a$": "a$", "$x$(A)": "$xa", "$($(A)": "$($(A)", "ü$ü$(A)": "ü$üa",
	} {
		if got := expand(in, lookup); got != want {
			t.Errorf("%q is %q, want %q", in, got, want)
		}
	}
}

func TestEnvironQuotient(t *testing.T) {
	for _, x := range []struct {
		r                corev1.ResourceName
		q, divisor, want string
	}{
		{corev1.ResourceCPU, "250m", "0", "1"},
		{corev1.ResourceCPU, "1500m", "1", "2"},
		{corev1.ResourceCPU, "1500m", "1m", "1500"},
		{corev1.ResourceMemory, "1Gi", "1Mi", "1024"},
		{corev1.ResourceMemory, "1000001", "1M", "2"},
		{corev1.ResourceMemory, "0", "1", "0"},
	} {
		if got := quotient(x.r, resource.MustParse(x.q), resource.MustParse(x.divisor)); got != x.want {
			t.Errorf("%s / %s: %s, want %s", x.q, x.divisor, got, x.want)
		}
	}
}

func TestMounts(t *testing.T) {
	_, c := newShelf(t, environManifests)
	e, err := c.Environ(t.Context(), "a", "deploy/web", "")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "m")
	written, err := e.WriteMounts(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"etc/app/app.conf": "hello", "etc/app/blob": "\x00\x01", "etc/app/secret/password": "s3cret", "etc/app/secret/user": "root",
		"one.conf": "hello", "items/x/y.conf": "hello", "sub/y.conf": "hello",
		"all/app.conf": "hello", "all/blob": "\x00\x01", "all/password": "s3cret", "all/user": "root",
		"info/cpu": "2", "info/labels": "app=\"web\"\npod-template-hash=\"77\"\nteam/x=\"blue\"",
	}
	for name, data := range want {
		p := filepath.Join(dir, name)
		if b, err := os.ReadFile(p); err != nil || string(b) != data {
			t.Errorf("%s: %q, %v", name, b, err)
		}
		if !slices.Contains(written, p) {
			t.Errorf("%s is not returned", p)
		}
	}
	if len(written) != len(want) || !slices.IsSorted(written) {
		t.Errorf("%q", written)
	}
	_ = filepath.WalkDir(dir, func(p string, d os.DirEntry, _ error) error {
		info, _ := d.Info()
		if mode := info.Mode(); mode != 0o600 && mode != os.ModeDir|0o700 {
			t.Errorf("%s has mode %v", p, mode)
		}
		return nil
	})
	notes := strings.Join(e.Notes, "\n")
	for _, n := range []string{"/data: volume data is an emptyDir", "token of ServiceAccount robot"} {
		if !strings.Contains(notes, n) {
			t.Errorf("%q is not in %q", n, notes)
		}
	}
}

// What is there is replaced, and nothing outside of the directory is touched.
func TestMountDir(t *testing.T) {
	outside := t.TempDir()
	victim := filepath.Join(outside, "victim")
	dir := filepath.Join(t.TempDir(), "m")
	for _, err := range []error{
		os.WriteFile(victim, []byte("old"), 0o644), os.Mkdir(dir, 0o755), os.Mkdir(filepath.Join(dir, "real"), 0o755),
		os.Symlink(victim, filepath.Join(dir, "file")), os.Symlink(outside, filepath.Join(dir, "link")), os.Symlink("real", filepath.Join(dir, "inner")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	d, err := openMountDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for name, ok := range map[string]bool{
		"file": true, "a/b": true, "real/x": true,
		"link/victim": false, "inner/x": false, "../x": false, "a/../../x": false, "real": false, "file/x": false,
	} {
		if err := d.write(name, []byte("new")); (err == nil) != ok {
			t.Errorf("%s: %v", name, err)
		}
	}
	if b, _ := os.ReadFile(victim); string(b) != "old" {
		t.Errorf("a file outside is %q", b)
	}
	if info, err := os.Lstat(filepath.Join(dir, "file")); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	if err := d.write("a/b", []byte("newer")); err != nil {
		t.Error(err)
	}
	entries, _ := os.ReadDir(filepath.Join(dir, "a"))
	if b, _ := os.ReadFile(filepath.Join(dir, "a/b")); string(b) != "newer" || len(entries) != 1 {
		t.Errorf("%q, %v", b, entries)
	}
}

// A file of a volume stays below its mount, whatever the server says.
func TestMountsHostile(t *testing.T) {
	s, c := newShelf(t, environManifests)
	s.objects[resources["ConfigMap"]+"files"].(*corev1.ConfigMap).Data["../../x"] = "y"
	e, err := c.Environ(t.Context(), "a", "deploy/web", "")
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "m")
	if written, err := e.WriteMounts(t.Context(), dir); err == nil {
		t.Errorf("%q", written)
	}
	for _, p := range []string{"/", "", "..", "/.."} {
		if local, err := localPath(p); err == nil {
			t.Errorf("%q is %q", p, local)
		}
	}
}

// A pod that is ready comes first, then the newest, then one that ends.
func TestEnvironBestPod(t *testing.T) {
	s, c := newShelf(t, environManifests)
	base := s.objects[resources["Pod"]+"web-77-x"].(*corev1.Pod)
	add := func(name string, change func(*corev1.Pod)) {
		p := base.DeepCopy()
		p.Name = name
		change(p)
		s.objects[resources["Pod"]+name] = p
	}
	now := metav1.Now()
	add("newer", func(p *corev1.Pod) { p.CreationTimestamp = now })
	add("unready", func(p *corev1.Pod) {
		p.CreationTimestamp, p.Status.Conditions = metav1.NewTime(now.Add(time.Hour)), nil
	})
	add("going", func(p *corev1.Pod) {
		p.CreationTimestamp, p.DeletionTimestamp = metav1.NewTime(now.Add(2*time.Hour)), &now
	})
	add("over", func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed })
	w, err := c.findWorkload(t.Context(), "a", "deploy/web")
	if err != nil {
		t.Fatal(err)
	}
	pods, err := c.podsOf(t.Context(), w, w.selector)
	var names []string
	for _, p := range pods {
		names = append(names, p.Name)
	}
	if got := strings.Join(names, " "); err != nil || got != "newer web-77-x unready going" {
		t.Errorf("%s, %v", got, err)
	}
}
