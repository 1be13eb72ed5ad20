package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// nginxImage is the name of an image of Debian's nginx. It is made of the package,
// which is unpacked and not installed, and the libraries of this machine.
const nginxImage = "nginx.local/nginx:1"

// loadNginx gives that image to the cluster's nodes.
func (l *lab) loadNginx() error {
	dir, err := os.MkdirTemp("", "culvert-nginx")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o777); err != nil { // apt downloads as a user of its own
		return err
	}
	run := func(name string, args ...string) (string, error) {
		cmd := exec.Command(name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			return "", fmt.Errorf("%s %v: %w: %s", name, args, err, strings.TrimSpace(string(out)))
		}
		return string(out), nil
	}
	if _, err := run("apt-get", "download", "-q", "nginx"); err != nil {
		if _, e := run("apt-get", "update", "-q"); e != nil {
			return e
		}
		if _, err = run("apt-get", "download", "-q", "nginx"); err != nil {
			return err
		}
	}
	packages, _ := filepath.Glob(filepath.Join(dir, "*.deb"))
	if len(packages) != 1 {
		return fmt.Errorf("apt-get brought %q", packages)
	}
	if _, err := run("dpkg", "-x", packages[0], "root"); err != nil {
		return err
	}
	binary := filepath.Join(dir, "root/usr/sbin/nginx")
	needs, err := run("ldd", binary)
	if err != nil {
		return err
	}
	files := []string{binary + "=/nginx"}
	for line := range strings.Lines(needs) {
		for _, word := range strings.Fields(line) {
			if !strings.HasPrefix(word, "/") {
				continue
			}
			file, err := filepath.EvalSymlinks(word)
			if err != nil {
				return fmt.Errorf("a library of nginx: %w", err)
			}
			files = append(files, file+"="+word)
			break
		}
	}
	tar := filepath.Join(dir, "nginx.tar")
	args := append([]string{"image", "build", "--name", nginxImage, "-o", tar, "--entrypoint", "/nginx", "--user", "65534:65534"}, files...)
	if r := l.Cluster(args...); r.Code != 0 {
		return fmt.Errorf("building an image of nginx: %v", r)
	}
	if r := l.Cluster("load", tar); r.Code != 0 {
		return fmt.Errorf("loading the image of nginx: %v", r)
	}
	return nil
}

// nginxWorkload is nginx that does what gates do: by a header to the machine, else to
// the origin, with kept connections, and as many of its pods as there are gates.
func nginxWorkload(origin string) string {
	return fmt.Sprintf(`
apiVersion: v1
kind: ConfigMap
metadata: {name: bench-nginx, namespace: demo}
data:
  nginx.conf: |
    daemon off;
    pid /tmp/nginx.pid;
    error_log stderr;
    worker_processes %d;
    events { worker_connections 4096; }
    http {
      access_log off;
      client_body_temp_path /tmp/b; proxy_temp_path /tmp/p; fastcgi_temp_path /tmp/f; uwsgi_temp_path /tmp/u; scgi_temp_path /tmp/s;
      keepalive_requests 1000000;
      upstream origin { server %s; keepalive 256; keepalive_requests 1000000; }
      upstream machine { server 127.0.0.1:9; keepalive 256; }
      map $http_version $behind { default origin; bench machine; }
      server {
        listen 8080;
        location / {
          proxy_pass http://$behind;
          proxy_http_version 1.1;
          proxy_set_header Connection "";
          proxy_set_header Host $http_host;
          proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
        }
      }
    }
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: bench-nginx, namespace: demo}
spec:
  replicas: 2
  selector: {matchLabels: {app: bench-nginx}}
  template:
    metadata: {labels: {app: bench-nginx}}
    spec:
      terminationGracePeriodSeconds: 1
      securityContext: {runAsNonRoot: true, runAsUser: 65534, seccompProfile: {type: RuntimeDefault}}
      topologySpreadConstraints:
      - {maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {app: bench-nginx}}}
      volumes:
      - {name: config, configMap: {name: bench-nginx}}
      - {name: tmp, emptyDir: {}}
      containers:
      - name: nginx
        image: %s
        imagePullPolicy: IfNotPresent
        args: [-p, /tmp, -e, stderr, -c, /etc/nginx/nginx.conf]
        volumeMounts: [{name: config, mountPath: /etc/nginx}, {name: tmp, mountPath: /tmp}]
        readinessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
---
apiVersion: v1
kind: Service
metadata: {name: bench-nginx, namespace: demo}
spec:
  selector: {app: bench-nginx}
  ports: [{name: http, port: 80, targetPort: 8080}]
`, runtime.NumCPU(), origin, nginxImage)
}
