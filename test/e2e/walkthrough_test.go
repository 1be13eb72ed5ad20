//go:build e2e

package e2e

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// TestWalkthrough is kt-connect's quick start with culvert in the place of ktctl,
// its flags and spellings included. The programs that it starts there are an
// ordinary web server in the cluster, and another version of it on the machine.
func TestWalkthrough(t *testing.T) {
	const manifest = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: tomcat, namespace: demo, labels: {app: tomcat}}
spec:
  selector: {matchLabels: {app: tomcat}}
  template:
    metadata: {labels: {app: tomcat}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsNonRoot: true, runAsUser: 65534, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: tomcat
        image: testapp.local/testapp:1
        args: [serve, --name, demo-v1]
        readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: tomcat, namespace: demo, labels: {app: tomcat}}
spec: {selector: {app: tomcat}, ports: [{port: 8080, targetPort: 8080}]}
`
	openShop(t) // for the clients
	apply(t, manifest)
	kubectl(t, "-n", "demo", "rollout", "status", "deployment/tomcat", "--timeout=60s")
	before := listNamespace(t, "demo")
	config := kubeconfig(t, "", "developer")
	culvert := func(t *testing.T, args ...string) netlab.Result {
		t.Helper()
		r := lab.Culvert(netlab.Alice, append(args, "-c", config, "-n", "demo")...)
		if r.Code != 0 {
			t.Fatalf("culvert %v: %v\nlogs: %v", args, r, lab.Culvert(netlab.Alice, "logs"))
		}
		t.Logf("culvert %v: %v\n%s", args, r.Took.Round(10*time.Millisecond), r.Stdout)
		return r
	}
	curl := func(t *testing.T, url, want string) {
		t.Helper()
		if got := sh(t, "curl -sS --max-time 10 "+url+"/who"); !strings.HasPrefix(got, want+" ") {
			t.Errorf("%s is answered by %q, want %s", url, got, want)
		}
	}
	t.Cleanup(func() {
		lab.Culvert(netlab.Alice, "disconnect")
		sameNamespace(t, "demo", before, 30*time.Second)
	})
	// 1 connect
	culvert(t, "connect", "--image", image)
	pod := words(t, "-n", "demo", "get", "pods", "-l", "app=tomcat", "-o", "jsonpath={.items[0].status.podIP}")[0]
	service := words(t, "-n", "demo", "get", "service", "tomcat", "-o", "jsonpath={.spec.clusterIP}")[0]
	for _, host := range []string{pod, service, "tomcat", "tomcat.demo", "tomcat.demo.svc.cluster.local"} {
		curl(t, "http://"+host+":8080", "demo-v1")
	}
	// The local application
	local := developer{lab, netlab.Alice}
	local.serve(t, "0.0.0.0")
	// 2 exchange
	culvert(t, "exchange", "tomcat", "--expose", "8080")
	eventuallyServed(t, "tomcat.demo:8080", "alice", 3*time.Second)
	curl(t, "http://tomcat:8080", "alice")
	curl(t, "http://"+pod+":8080", "demo-v1")
	culvert(t, "leave", "tomcat")
	curl(t, "http://tomcat:8080", "demo-v1")
	// 3 mesh; its second developer comes with kt-connect's flag
	said := culvert(t, "mesh", "tomcat", "--expose", "8080").Stdout
	mark := regexp.MustCompile(`VERSION: \w+`).FindString(said)
	bob := bobNextDoor(t)
	bob.serve(t, "127.0.0.1")
	if r := bob.culvert("mesh", "tomcat", "-n", "demo", "--expose", "8080", "--versionMark", "ci"); r.Code != 0 {
		t.Fatalf("mesh of the second: %v", r)
	}
	meshed(t, "tomcat.demo:8080", "alice", 3*time.Second, strings.Replace(mark, ": ", ":", 1))
	meshed(t, "tomcat.demo:8080", "bob", 3*time.Second, "VERSION:ci")
	curl(t, "http://tomcat:8080", "demo-v1")
	curl(t, "-H '"+mark+"' http://tomcat:8080", "alice")
	curl(t, "-H 'VERSION: ci' http://tomcat:8080", "bob")
	culvert(t, "leave", "tomcat")
	if r := bob.culvert("leave", "tomcat", "-n", "demo"); r.Code != 0 {
		t.Errorf("leave of the second: %v", r)
	}
	curl(t, "-H 'VERSION: ci' http://tomcat:8080", "demo-v1")
	// 4 preview
	culvert(t, "preview", "tomcat-v2", "--expose", "8080")
	curl(t, "http://tomcat-v2:8080", "alice")
	served(t, "http", "tomcat-v2.demo:8080", "alice")
	// 5 forward, by another developer
	ctx, cancel := context.WithCancel(context.Background())
	cmd := bob.command(ctx, "forward", "tomcat-v2", "6060:8080", "-n", "demo")
	printed := &output{}
	cmd.Stdout, cmd.Stderr = printed, printed
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
	eventually(t, 15*time.Second, func() error {
		r := bob.Run(netlab.Bob, "curl", "-sS", "--max-time", "5", "http://localhost:6060/who")
		if r.Code != 0 || !strings.HasPrefix(r.Stdout, "alice ") {
			return fmt.Errorf("%v\n%s", r, printed)
		}
		return nil
	})
}
