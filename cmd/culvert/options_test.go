package main

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

func TestOptions(t *testing.T) {
	t.Setenv(imageEnv, "")
	opts, stderr, code := parse(t, "--context", "dev", "-n", "shop",
		"--exclude-ips", "10.1.2.3, db.example.com", "--exclude-ips", "fd00::/48", "--include-ips=192.168.4.0/24",
		"--image", "r.example.com:5000/team/agent@sha256:0", "--image-pull-policy", "always", "--image-pull-secret", "a,b",
		"--node-selector", "kubernetes.io/arch=amd64", "--labels", "team=web", "--annotations", "Example.com/why=because of x",
		"--service-account", "sa", "--pod-quota", "0.5c,512m", "--cluster-domain", ".corp.example.", "--dns", "None",
		"--timeout", "2m", "-d")
	if code != 0 || stderr != "" {
		t.Fatalf("code %d: %s", code, stderr)
	}
	want := api.Options{
		Context: "dev", Namespace: "shop",
		ExcludeIPs: []string{"10.1.2.3", "db.example.com", "fd00::/48"}, IncludeIPs: []string{"192.168.4.0/24"},
		Image: "r.example.com:5000/team/agent@sha256:0", ImagePullPolicy: "Always", ImagePullSecrets: []string{"a", "b"},
		NodeSelector: map[string]string{"kubernetes.io/arch": "amd64"}, Labels: map[string]string{"team": "web"},
		Annotations:    map[string]string{"Example.com/why": "because of x"},
		ServiceAccount: "sa", PodQuota: "0.5c,512m", ClusterDomain: "corp.example", DNS: "none", Timeout: 2 * time.Minute, Debug: true,
	}
	if !reflect.DeepEqual(opts, want) {
		t.Errorf("options\n%+v, want\n%+v", opts, want)
	}
}

func TestDefaultImage(t *testing.T) {
	t.Setenv(imageEnv, "")
	if opts, _, _ := parse(t); opts.Image != releasedImage() {
		t.Errorf("image %q", opts.Image)
	}
	t.Setenv(imageEnv, "r.example.com/agent:1")
	if opts, _, _ := parse(t); opts.Image != "r.example.com/agent:1" {
		t.Errorf("image %q", opts.Image)
	}
	if opts, _, _ := parse(t, "-i", "x:2"); opts.Image != "x:2" {
		t.Errorf("image %q", opts.Image)
	}
}

func TestBadOptions(t *testing.T) {
	for _, c := range []struct {
		args  []string
		words []string // in the message or its hint
	}{
		{[]string{"--exclude-ips", "10.96.0.0/33"}, []string{"--exclude-ips", "10.96.0.0/33"}},
		{[]string{"--exclude-ips", "::/0"}, []string{"--exclude-ips", "::/0"}},
		{[]string{"--include-ips", "0.0.0.0/0"}, []string{"--include-ips", "0.0.0.0/0"}},
		{[]string{"--includeIps", "1.2.3.4,10.300.0.1"}, []string{"--include-ips", "10.300.0.1"}},
		{[]string{"--carrier", "udp", "--udp", "off"}, []string{"--carrier udp", "--udp off", "leave one"}},
		{[]string{"--carrier", "pods-proxy", "--udp", "nodeport"}, []string{"--carrier pods-proxy", "--udp nodeport", "leave one"}},
		{[]string{"--output", "yaml"}, []string{"--output", "yaml", "json"}},
		{[]string{"--output", "wide"}, []string{"--output", "wide"}},
		{[]string{"--labels", "a b=c"}, []string{"--labels", "a b"}},
		{[]string{"--labels", "a"}, []string{"labels"}},
		{[]string{"--labels", "a=b c"}, []string{"--labels", "b c"}},
		{[]string{"--annotations", "-x=1"}, []string{"--annotations", "-x"}},
		{[]string{"--node-selector", "a==b"}, []string{"--node-selector"}},
		{[]string{"--namespace", "Shop"}, []string{"--namespace", "Shop"}},
		{[]string{"--service-account", "a/b"}, []string{"--service-account"}},
		{[]string{"--cluster-domain", "a_b"}, []string{"--cluster-domain"}},
		{[]string{"--image", "https://r/x"}, []string{"--image", "https://r/x"}},
		{[]string{"--image-pull-policy", "Often"}, []string{"--image-pull-policy", "Often", "IfNotPresent"}},
		{[]string{"--image-pull-secret", "A B"}, []string{"--image-pull-secret"}},
		{[]string{"--pod-quota", "lots"}, []string{"--pod-quota", "lots", "0.5c,512m"}},
		{[]string{"--dns", "hosts"}, []string{"--dns", "hosts", "resolvconf"}},
		{[]string{"--timeout", "soon"}, []string{"--timeout", "soon", "90s"}},
		{[]string{"--timeout", "-1s"}, []string{"--timeout", "not positive"}},
		{[]string{"--exclude-ip", "1.2.3.4"}, []string{"--exclude-ip", "did you mean --exclude-ips?"}},
		{[]string{"--nodeselector", "a=b"}, []string{"did you mean --node-selector?"}},
		{[]string{"-z"}, []string{"-z"}},
		{[]string{"extra"}, []string{"extra"}},
	} {
		t.Run(strings.Join(c.args, " "), func(t *testing.T) {
			_, stderr, code := parse(t, c.args...)
			if code != exitUsage {
				t.Errorf("exit code %d, want %d: %s", code, exitUsage, stderr)
			}
			for _, w := range c.words {
				if !strings.Contains(stderr, w) {
					t.Errorf("the error does not name %q: %s", w, stderr)
				}
			}
		})
	}
}
