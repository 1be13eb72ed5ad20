package main

import (
	"fmt"
	"os"
	"regexp"
	"slices"
	"sort"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
)

var (
	dnsModes     = []string{"auto", "resolved", "resolvconf", "none"}
	carriers     = []string{api.CarrierAuto, api.CarrierPortForward, api.CarrierPodsProxy, api.CarrierUDP}
	udpModes     = []string{api.UDPAuto, api.UDPNodePort, api.UDPOff}
	pullPolicies = []string{"Always", "IfNotPresent", "Never"}
)

// imageEnv names the agent's image where --image does not: the copy in a
// company's own registry.
const imageEnv = "CULVERT_IMAGE"

// releasedImage is the image that `make image` builds with this program.
func releasedImage() string { return "culvert-agent:" + version.Version }

// optionFlags are the flags that say what to connect to and how; connect and
// doctor have them.
type optionFlags struct {
	include, exclude []string
	image            string
	pullPolicy       string
	pullSecrets      []string
	nodeSelector     map[string]string
	labels           map[string]string
	annotations      map[string]string
	serviceAccount   string
	podQuota         string
	clusterDomain    string
	dns              string
	carrier          string
	udp              string
	timeout          seconds

	kt []*ktValue
}

func (o *optionFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.SortFlags = false
	f.StringSliceVar(&o.exclude, "exclude-ips", nil, "leave these out of the tunnel: IPs, CIDRs or host names, comma-separated or repeated")
	f.StringSliceVar(&o.include, "include-ips", nil, "reach these through the cluster too: IPs, CIDRs or host names")
	f.StringVar(&o.clusterDomain, "cluster-domain", "", "domain of the cluster's names (default: what its pods use)")
	f.StringVar(&o.dns, "dns", "", "how names get resolved: auto, resolved, resolvconf or none (default auto)")
	complete(cmd, "dns", fixedCompletion(dnsModes...))
	for _, free := range []string{"exclude-ips", "include-ips", "cluster-domain"} {
		complete(cmd, free, fixedCompletion())
	}
	o.addAgent(cmd)
	o.kt = addKt(f)
}

// addAgent adds those that concern the agent and the way to it, and not this
// machine's network.
func (o *optionFlags) addAgent(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&o.image, "image", "i", "", "image of the agent (default: $"+imageEnv+", then "+releasedImage()+")")
	f.StringVar(&o.pullPolicy, "image-pull-policy", "", "Always, IfNotPresent or Never (default IfNotPresent)")
	f.StringSliceVar(&o.pullSecrets, "image-pull-secret", nil, "Secret with the registry's credentials, in the agent's namespace")
	f.StringToStringVar(&o.nodeSelector, "node-selector", nil, "run the agent on nodes with these labels (`key=value,...`)")
	f.StringToStringVarP(&o.labels, "labels", "l", nil, "further labels of the agent's pod (`key=value,...`)")
	f.StringToStringVar(&o.annotations, "annotations", nil, "further annotations of the agent's pod (`key=value,...`)")
	f.StringVar(&o.serviceAccount, "service-account", "", "ServiceAccount of the agent's pod; its token is never mounted")
	f.StringVar(&o.podQuota, "pod-quota", "", "CPU and memory of the agent's pod, as in `0.5c,512m`")
	f.StringVar(&o.carrier, "carrier", "", "the packets' way to the agent: auto (the best that works), port-forward, pods-proxy or udp (default auto)")
	f.StringVar(&o.udp, "udp", "", "try UDP straight to the agent: auto (to its pod), nodeport (also through a NodePort Service made for it) or off (default auto)")
	f.Var(&o.timeout, "timeout", "how long connecting may take (default 60s)")
	for _, name := range []string{"node-selector", "labels", "annotations"} {
		f.Lookup(name).DefValue = "" // else help says (default [])
	}
	complete(cmd, "carrier", fixedCompletion(carriers...))
	complete(cmd, "udp", fixedCompletion(udpModes...))
	complete(cmd, "image-pull-policy", fixedCompletion(pullPolicies...))
	for _, free := range []string{"image", "image-pull-secret", "node-selector", "labels", "annotations", "service-account", "pod-quota", "timeout"} {
		complete(cmd, free, fixedCompletion())
	}
}

// options checks the flags and makes the request's options of them, all but the
// kubeconfig's part. Every error is one of usage.
func (a *app) options(o *optionFlags) (api.Options, error) {
	notices, err := o.applyKt()
	if err != nil {
		return api.Options{}, err
	}
	for _, n := range notices {
		a.notice(n)
	}
	image := o.image
	if image == "" {
		image = or(os.Getenv(imageEnv), releasedImage())
	}
	opts := api.Options{
		Context: a.context, Namespace: a.namespace,
		IncludeIPs: trimmed(o.include), ExcludeIPs: trimmed(o.exclude),
		Image: image, ImagePullSecrets: trimmed(o.pullSecrets),
		NodeSelector: o.nodeSelector, Labels: o.labels, Annotations: o.annotations,
		ServiceAccount: o.serviceAccount, PodQuota: o.podQuota,
		ClusterDomain: strings.Trim(o.clusterDomain, "."), Timeout: time.Duration(o.timeout), Debug: a.debug,
	}
	if opts.DNS, err = oneOf("--dns", o.dns, dnsModes); err != nil {
		return opts, err
	}
	if opts.Carrier, err = oneOf("--carrier", o.carrier, carriers); err != nil {
		return opts, err
	}
	if opts.UDP, err = oneOf("--udp", o.udp, udpModes); err != nil {
		return opts, err
	}
	if stream := opts.Carrier == api.CarrierPortForward || opts.Carrier == api.CarrierPodsProxy; stream && opts.UDP == api.UDPNodePort {
		return opts, usageErrorf("leave one of them out", "--carrier %s and --udp nodeport contradict each other", opts.Carrier)
	}
	if opts.UDP == api.UDPOff && opts.Carrier == api.CarrierUDP {
		return opts, usageErrorf("leave one of them out", "--carrier udp and --udp off contradict each other")
	}
	if opts.ImagePullPolicy, err = oneOf("--image-pull-policy", o.pullPolicy, pullPolicies); err != nil {
		return opts, err
	}
	for _, check := range []error{
		checkSelectors("--exclude-ips", opts.ExcludeIPs),
		checkSelectors("--include-ips", opts.IncludeIPs),
		checkLabels("--node-selector", opts.NodeSelector),
		checkLabels("--labels", opts.Labels),
		checkAnnotations(opts.Annotations),
		checkName("--namespace", opts.Namespace, validation.IsDNS1123Label),
		checkName("--service-account", opts.ServiceAccount, validation.IsDNS1123Subdomain),
		checkName("--cluster-domain", opts.ClusterDomain, validation.IsDNS1123Subdomain),
		checkImage(opts.Image),
		checkQuota(opts.PodQuota),
	} {
		if check != nil {
			return opts, check
		}
	}
	for _, s := range opts.ImagePullSecrets {
		if err := checkName("--image-pull-secret", s, validation.IsDNS1123Subdomain); err != nil {
			return opts, err
		}
	}
	return opts, nil
}

// checkSelectors refuses what is no IP, CIDR or host name, and default routes.
func checkSelectors(flag string, values []string) error {
	for _, v := range values {
		if _, _, err := cluster.ParseSelectors([]string{v}); err != nil {
			e := asError(err)
			message := e.Message
			if !strings.Contains(message, v) {
				message = fmt.Sprintf("%q: %s", v, message)
			}
			if !strings.Contains(message, flag) {
				message = flag + ": " + message
			}
			return &api.Error{Code: api.CodeUsage, Message: message, Hint: e.Hint}
		}
	}
	return nil
}

func oneOf(flag, value string, known []string) (string, error) {
	if value == "" {
		return "", nil
	}
	for _, k := range known {
		if strings.EqualFold(value, k) {
			return k, nil
		}
	}
	return "", usageErrorf("it is one of "+strings.Join(known, ", "), "%s %q is unknown", flag, value)
}

func checkLabels(flag string, labels map[string]string) error {
	for _, k := range sortedKeys(labels) {
		if errs := validation.IsQualifiedName(k); len(errs) > 0 {
			return usageErrorf("labels are key=value, as in team=web", "%s: key %q: %s", flag, k, errs[0])
		}
		if errs := validation.IsValidLabelValue(labels[k]); len(errs) > 0 {
			return usageErrorf("labels are key=value, as in team=web", "%s: value %q of %s: %s", flag, labels[k], k, errs[0])
		}
	}
	return nil
}

func checkAnnotations(annotations map[string]string) error {
	for _, k := range sortedKeys(annotations) {
		if errs := validation.IsQualifiedName(strings.ToLower(k)); len(errs) > 0 {
			return usageErrorf("annotations are key=value, as in example.com/owner=web", "--annotations: key %q: %s", k, errs[0])
		}
	}
	return nil
}

func checkName(flag, value string, check func(string) []string) error {
	if value == "" {
		return nil
	}
	if errs := check(value); len(errs) > 0 {
		return usageErrorf("", "%s %q: %s", flag, value, errs[0])
	}
	return nil
}

func checkImage(image string) error {
	if strings.ContainsAny(image, " \t\n") || strings.Contains(image, "://") {
		return usageErrorf("images are named as in registry.example.com/team/culvert-agent:TAG", "--image %q is no image name", image)
	}
	return nil
}

var quotaPart = regexp.MustCompile(`^([0-9]+(\.[0-9]+)?[cC]|[0-9]+[kKmMgG])$`)

// checkQuota takes kt-connect's syntax: cores end in c, memory in k, m or g.
func checkQuota(quota string) error {
	if quota == "" {
		return nil
	}
	for part := range strings.SplitSeq(quota, ",") {
		if !quotaPart.MatchString(strings.TrimSpace(part)) {
			return usageErrorf("half a core and 512 MiB are 0.5c,512m", "--pod-quota %q: %q is neither cores (c) nor memory (k, m, g)", quota, part)
		}
	}
	return nil
}

// seconds is a duration that may also be a bare number of seconds, as
// kt-connect's time-outs are.
type seconds time.Duration

func (s *seconds) Set(value string) error {
	if n, err := strconv.Atoi(value); err == nil {
		value = strconv.Itoa(n) + "s"
	}
	d, err := time.ParseDuration(value)
	if err != nil {
		return fmt.Errorf("neither a duration like 90s or 2m nor a number of seconds")
	}
	if d <= 0 {
		return fmt.Errorf("not positive")
	}
	*s = seconds(d)
	return nil
}

func (s *seconds) String() string {
	if *s == 0 {
		return ""
	}
	return time.Duration(*s).String()
}

func (s *seconds) Type() string { return "duration" }

// flagNames are the flags of a command that its help shows.
func flagNames(cmd *cobra.Command) []string {
	var names []string
	add := func(f *pflag.Flag) {
		if !f.Hidden && !slices.Contains(names, f.Name) {
			names = append(names, f.Name)
		}
	}
	cmd.Flags().VisitAll(add)
	cmd.InheritedFlags().VisitAll(add)
	return names
}

func trimmed(values []string) []string {
	var out []string
	for _, v := range values {
		if v = strings.TrimSpace(v); v != "" {
			out = append(out, v)
		}
	}
	return out
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}
