package main

import (
	"bytes"
	"context"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

// parse runs args through the real flag set of connect and returns the options.
func parse(t *testing.T, args ...string) (opts api.Options, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	a := newApp("culvert", os.Stdin, &out, &errs)
	var o optionFlags
	try := &cobra.Command{Use: "try", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) (err error) {
		opts, err = a.options(&o)
		return err
	}}
	o.add(try)
	root := a.rootCommand()
	root.AddCommand(try)
	root.SetArgs(append([]string{"try"}, args...))
	cmd, err := root.ExecuteContextC(context.Background())
	if err != nil {
		if !a.started {
			err = usageError(cmd, err)
		}
		a.printError(err)
		code = codeOf(err)
	}
	return opts, errs.String(), code
}

// TestKtConnectFlags has every flag that `ktctl connect` of kt-connect 0.3.7
// knows, as its users type it.
func TestKtConnectFlags(t *testing.T) {
	t.Setenv(imageEnv, "")
	same := func(api.Options) bool { return true }
	for _, c := range []struct {
		args   string
		holds  func(o api.Options) bool
		stderr string // a word of the notice or error; "-" is silence
		code   int
	}{
		// global
		{"--namespace shop", func(o api.Options) bool { return o.Namespace == "shop" }, "-", 0},
		{"-n shop", func(o api.Options) bool { return o.Namespace == "shop" }, "-", 0},
		{"--kubeconfig /a", same, "-", 0},
		{"-c /a", same, "-", 0},
		{"--context dev", func(o api.Options) bool { return o.Context == "dev" }, "-", 0},
		{"--image a/b:c", func(o api.Options) bool { return o.Image == "a/b:c" }, "-", 0},
		{"-i a/b:c", func(o api.Options) bool { return o.Image == "a/b:c" }, "-", 0},
		{"--imagePullSecret reg", func(o api.Options) bool { return reflect.DeepEqual(o.ImagePullSecrets, []string{"reg"}) }, "-", 0},
		{"--serviceAccount me", func(o api.Options) bool { return o.ServiceAccount == "me" }, "-", 0},
		{"--nodeSelector a=b,c=d", func(o api.Options) bool { return o.NodeSelector["a"] == "b" && o.NodeSelector["c"] == "d" }, "-", 0},
		{"--debug", func(o api.Options) bool { return o.Debug }, "-", 0},
		{"-d", func(o api.Options) bool { return o.Debug }, "-", 0},
		{"--withLabel a=b", func(o api.Options) bool { return o.Labels["a"] == "b" }, "-", 0},
		{"-l a=b", func(o api.Options) bool { return o.Labels["a"] == "b" }, "-", 0},
		{"--withAnnotation a=b", func(o api.Options) bool { return o.Annotations["a"] == "b" }, "-", 0},
		{"--portForwardTimeout 20", func(o api.Options) bool { return o.Timeout == 0 }, "redialled", 0},
		{"--podCreationTimeout 90", func(o api.Options) bool { return o.Timeout == 90*time.Second }, "-", 0},
		{"--useShadowDeployment", same, "always a Deployment", 0},
		{"--useLocalTime", same, "clock", 0},
		{"--forceUpdate", func(o api.Options) bool { return o.ImagePullPolicy == "Always" }, "--image-pull-policy Always", 0},
		{"-f", func(o api.Options) bool { return o.ImagePullPolicy == "Always" }, "--image-pull-policy Always", 0},
		{"--forceUpdate=false", func(o api.Options) bool { return o.ImagePullPolicy == "" }, "-", 0},
		{"-f --image-pull-policy Never", same, "contradicts", 2},
		{"--asWorker", same, "no effect", 0},
		{"--podQuota 0.5c,512m", func(o api.Options) bool { return o.PodQuota == "0.5c,512m" }, "-", 0},
		{"--ipVersion 6", same, "both", 0},
		// connect
		{"--mode tun2socks", same, "one mode", 0},
		{"--mode sshuttle", same, "one mode", 0},
		{"--dnsMode localDNS", func(o api.Options) bool { return o.DNS == "auto" }, "--dns auto", 0},
		{"--dnsMode localDNS:cluster,upstream", func(o api.Options) bool { return o.DNS == "auto" }, "not needed", 0},
		{"--dnsMode localDNS --dns resolvconf", func(o api.Options) bool { return o.DNS == "resolvconf" }, "", 0},
		{"--dnsMode podDNS", same, "--dns none", 2},
		{"--dnsMode hosts", same, "/etc/hosts", 2},
		{"--dnsMode hosts:a,b", same, "/etc/hosts", 2},
		{"--dnsMode bad", same, "unknown", 2},
		{"--shareShadow", same, "agent of its own", 0},
		{"--clusterDomain corp.example", func(o api.Options) bool { return o.ClusterDomain == "corp.example" }, "-", 0},
		{"--disablePodIp", same, "--exclude-ips", 2},
		{"--disablePodIp=false", same, "-", 0},
		{"--skipCleanup", same, "not needed", 0},
		{"--includeIps 10.1.0.0/16,10.2.0.1", func(o api.Options) bool { return len(o.IncludeIPs) == 2 }, "-", 0},
		{"--excludeIps 10.1.0.0/16,10.2.0.1", func(o api.Options) bool { return len(o.ExcludeIPs) == 2 }, "-", 0},
		{"--ingressIp 10.0.0.1", same, "--ingressIp", 2},
		{"--disableTunDevice", same, "doctor", 2},
		{"--disableTunRoute", same, "--exclude-ips", 2},
		{"--proxyPort 2223", same, "SOCKS", 0},
		{"--proxyAddr 127.0.0.1", same, "SOCKS", 0},
		{"--dnsCacheTtl 60", same, "TTL", 0},
		{"--dnsPort 10053", same, "port", 0},
		{"--skipPortChecking", same, "no reason to refuse", 0},
		{"--recoverWaitTime 60", same, "ready again", 0},
		{"--routerImage r.example/router:1", same, "--image", 0},
		{"--includeDomains a.example", same, "--cluster-domain", 2},
	} {
		t.Run(c.args, func(t *testing.T) {
			opts, stderr, code := parse(t, strings.Fields(c.args)...)
			if code != c.code {
				t.Fatalf("exit code %d, want %d: %s", code, c.code, stderr)
			}
			if !c.holds(opts) {
				t.Errorf("options: %+v", opts)
			}
			if c.stderr == "-" && stderr != "" || c.stderr != "-" && !strings.Contains(stderr, c.stderr) {
				t.Errorf("stderr %q, want %q", stderr, c.stderr)
			}
			if code == 0 && strings.Count(stderr, "\n") > 1 {
				t.Errorf("more than one line: %q", stderr)
			}
		})
	}
}

// TestKtConnectFlagsAreAll compares the table with the list above: a flag
// without a test does not exist.
func TestKtConnectFlagsAreAll(t *testing.T) {
	want := strings.Fields(`namespace kubeconfig context image imagePullSecret serviceAccount nodeSelector debug
		withLabel withAnnotation podCreationTimeout portForwardTimeout useShadowDeployment useLocalTime forceUpdate
		asWorker podQuota ipVersion help version
		mode dnsMode shareShadow clusterDomain disablePodIp skipCleanup includeIps excludeIps ingressIp
		disableTunDevice disableTunRoute proxyPort proxyAddr dnsCacheTtl dnsPort skipPortChecking recoverWaitTime routerImage includeDomains`)
	var got []string
	for _, k := range ktFlags {
		got = append(got, k.name)
		ways := 0
		for _, set := range []bool{k.to != "", k.notice != "", k.use != nil} {
			if set {
				ways++
			}
		}
		if ways != 1 {
			t.Errorf("%s: %d of to, notice, use are set", k.name, ways)
		}
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("flags %v, want %v", got, want)
	}
}

func TestKebab(t *testing.T) {
	for in, want := range map[string]string{
		"excludeIps": "exclude-ips", "excludeIPs": "exclude-ips", "exclude-ips": "exclude-ips",
		"nodeSelector": "node-selector", "dnsCacheTtl": "dns-cache-ttl", "": "", "X": "x",
	} {
		if got := kebab(in); got != want {
			t.Errorf("kebab(%q) = %q, want %q", in, got, want)
		}
	}
}
