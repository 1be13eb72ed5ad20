//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/culvert-dev/culvert/test/netlab"
)

// shopManifest is the namespace whose traffic tests lead to a machine. Its owner
// applies it, server-side and under this name, as GitOps would.
const shopManifest = `
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {pod-security.kubernetes.io/enforce: restricted}}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-user, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-user}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: developers}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-intercept, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-intercept}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: developers}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-scale, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-scale}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: developers}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: culvert-environ, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: culvert-environ}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: Group, name: developers}]
---
apiVersion: v1
kind: ConfigMap
metadata: {name: cart, namespace: shop}
data: {CURRENCY: EUR, limits.yaml: "items: 7\n"}
---
apiVersion: v1
kind: Secret
metadata: {name: cart, namespace: shop}
stringData: {PASSWORD: "pass word's", token: t0ken}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: cart}}
  template:
    metadata: {labels: {app: cart, tier: back}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsNonRoot: true, runAsUser: 65534, seccompProfile: {type: RuntimeDefault}}
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: cart}}, matchLabelKeys: [pod-template-hash]}
      volumes:
      - {name: config, configMap: {name: cart}}
      - {name: keys, secret: {secretName: cart, items: [{key: token, path: sub/token}]}}
      containers:
      - name: app
        image: testapp.local/testapp:1
        args: [serve]
        envFrom: [{configMapRef: {name: cart}}]
        env:
        - {name: PASSWORD, valueFrom: {secretKeyRef: {name: cart, key: PASSWORD}}}
        - {name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}
        - {name: APP, valueFrom: {fieldRef: {fieldPath: "metadata.labels['app']"}}}
        - {name: GREETING, value: "hello $(APP)"}
        volumeMounts:
        - {name: config, mountPath: /etc/cart}
        - {name: keys, mountPath: /etc/keys, readOnly: true}
        ports:
        - {name: web, containerPort: 8080}
        - {name: echo, containerPort: 9000}
        - {name: dgram, containerPort: 9001, protocol: UDP}
        readinessProbe: {httpGet: {path: /healthz, port: web}, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: stock, namespace: shop}
spec:
  replicas: 2
  serviceName: stock
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: stock}}
  template:
    metadata: {labels: {app: stock}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsNonRoot: true, runAsUser: 65534, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: app
        image: testapp.local/testapp:1
        args: [serve]
        ports: [{name: web, containerPort: 8080}, {name: echo, containerPort: 9000}]
        readinessProbe: {httpGet: {path: /healthz, port: web}, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: stock, namespace: shop}
spec:
  clusterIP: None
  ipFamilyPolicy: PreferDualStack
  selector: {app: stock}
  ports: [{name: http, port: 8080, targetPort: web}]
---
apiVersion: v1
kind: Service
metadata: {name: shelf, namespace: shop}
spec:
  selector: {app: cart}
  ports: [{name: http, port: 80, targetPort: web}]
---
apiVersion: v1
kind: Service
metadata: {name: twins, namespace: shop}
spec:
  selector: {app: cart}
  ports: [{name: one, port: 9000, targetPort: 8080}, {name: other, port: 8080, targetPort: 9000}]
---
apiVersion: v1
kind: Service
metadata: {name: outside, namespace: shop}
spec: {type: ExternalName, externalName: www.example.test}
---
apiVersion: v1
kind: Service
metadata: {name: manual, namespace: shop}
spec: {ports: [{name: http, port: 80}]}
---
` + cartNarrow

// The two states of the Service cart between which its owner changes. Both lead
// to the same pods.
const (
	cartWide = `
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, labels: {team: shop}, annotations: {owner: shop}}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: cart}
` + cartPorts
	cartNarrow = `
apiVersion: v1
kind: Service
metadata: {name: cart, namespace: shop, labels: {team: shop}, annotations: {owner: shop}}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: cart, tier: back}
` + cartPorts
	cartPorts = `  ports:
  - {name: http, port: 80, targetPort: web, appProtocol: http}
  - {name: echo, port: 7000, targetPort: 9000}
  - {name: dgram, port: 7001, targetPort: dgram, protocol: UDP}
  - {name: spare, port: 7002, targetPort: echo}
`
)

// clientsManifest is a client on each node.
const clientsManifest = `
apiVersion: v1
kind: Namespace
metadata: {name: clients}
---
apiVersion: v1
kind: Pod
metadata: {name: node1, namespace: clients}
spec:
  nodeSelector: {kubernetes.io/hostname: node1}
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: testapp.local/testapp:1, args: [serve]}]
---
apiVersion: v1
kind: Pod
metadata: {name: node2, namespace: clients}
spec:
  nodeSelector: {kubernetes.io/hostname: node2}
  terminationGracePeriodSeconds: 1
  containers: [{name: app, image: testapp.local/testapp:1, args: [serve]}]
`

// clients are the pods that tests call the shop from, one on each node.
var clients = []string{"node1", "node2"}

// openShop makes the shop and its clients where a cluster has none: once for all
// tests, and once more when one had to start the cluster anew. The cluster's end
// takes them away. What is in it when a test begins has to be in it afterwards.
func openShop(t *testing.T) {
	t.Helper()
	if r := lab.Kubectl("", nil, "-n", "clients", "get", "pods", clients[0], clients[1]); r.Code != 0 {
		ownerApplies(t, shopManifest)
		ownerApplies(t, clientsManifest)
	}
	// Again each time: a test before may have taken pods away.
	kubectl(t, "-n", "shop", "rollout", "status", "deployment/cart", "--timeout=60s")
	kubectl(t, "-n", "shop", "rollout", "status", "statefulset/stock", "--timeout=60s")
	kubectl(t, "-n", "clients", "wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s")
}

// ownerApplies is an unforced server-side apply, which fails where somebody else
// holds a field.
func ownerApplies(t *testing.T, manifest string, flags ...string) {
	t.Helper()
	args := append([]string{"apply", "--server-side", "--field-manager=owner", "-f", "-"}, flags...)
	if r := lab.Kubectl("", strings.NewReader(manifest), args...); r.Code != 0 {
		t.Fatalf("the owner's server-side apply: %v", r)
	}
}

// fromPod runs testapp in a client's pod.
func fromPod(client string, args ...string) netlab.Result {
	return lab.Kubectl("", nil, append([]string{"-n", "clients", "exec", client, "--", "/testapp"}, args...)...)
}

// whoAnswers asks from a client's pod for the name of who serves an address, and
// for the caller's as he sees it.
func whoAnswers(client, network, addr string) (name, caller string, err error) {
	r := fromPod(client, "--json", "who", network, addr)
	if r.Code != 0 {
		return "", "", fmt.Errorf("asking %s %s from %s: %v", network, addr, client, r)
	}
	var answer struct{ Name, Caller string }
	err = json.Unmarshal([]byte(r.Stdout), &answer)
	return answer.Name, answer.Caller, err
}

// served wants that a name answers at an address, for the clients on both nodes.
func served(t *testing.T, network, addr, name string) {
	t.Helper()
	var asked sync.WaitGroup
	for _, c := range clients {
		asked.Go(func() {
			if got, _, err := whoAnswers(c, network, addr); err != nil || !serves(got, name) {
				t.Errorf("%s %s from %s is answered by %q (%v), want %s", network, addr, c, got, err, name)
			}
		})
	}
	asked.Wait()
}

// serves says whether an answer is from a server, or from any pod of a workload.
func serves(got, name string) bool {
	workload, ok := strings.CutSuffix(name, "-*")
	return got == name || ok && strings.HasPrefix(got, workload+"-")
}

// serviceAddrs are the addresses of a Service of the shop, both families and the name.
func serviceAddrs(t *testing.T, service string) []string {
	t.Helper()
	ips := words(t, "-n", "shop", "get", "service", service, "-o", "jsonpath={.spec.clusterIPs[*]}")
	return append(slices.DeleteFunc(ips, func(ip string) bool { return ip == "None" }), service+".shop")
}

// clusterIP is the first of them.
func clusterIP(t *testing.T, service string) string {
	t.Helper()
	return serviceAddrs(t, service)[0]
}
