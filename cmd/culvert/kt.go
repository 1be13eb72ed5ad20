package main

import (
	"fmt"
	"strings"
	"unicode"

	"github.com/spf13/pflag"

	"github.com/culvert-dev/culvert/daemon/api"
)

// ktFlag is a flag of kt-connect 0.3.7 that `ktctl connect` takes, and what
// becomes of it here. Exactly one of to, notice and use is set.
type ktFlag struct {
	name   string
	short  string // one letter
	toggle bool   // takes no value
	to     string // the flag of ours that means the same
	notice string // accepted, and why it has no effect
	use    func(o *optionFlags, value string) (notice string, err error)
}

// ktFlags are all of them: the global ones first, then those of connect and
// exchange.
var ktFlags = []ktFlag{
	{name: "namespace", short: "n", to: "namespace"},
	{name: "kubeconfig", short: "c", to: "kubeconfig"},
	{name: "context", to: "context"},
	{name: "image", short: "i", to: "image"},
	{name: "imagePullSecret", to: "image-pull-secret"},
	{name: "serviceAccount", to: "service-account"},
	{name: "nodeSelector", to: "node-selector"},
	{name: "debug", short: "d", toggle: true, to: "debug"},
	{name: "withLabel", short: "l", to: "labels"},
	{name: "withAnnotation", to: "annotations"},
	{name: "podCreationTimeout", to: "timeout"},
	{name: "portForwardTimeout", notice: "lost connections are redialled at once; --timeout limits connecting as a whole"},
	{name: "useShadowDeployment", toggle: true, notice: "the agent is always a Deployment"},
	{name: "useLocalTime", toggle: true, notice: "culvert needs no clock pod"},
	{name: "forceUpdate", short: "f", toggle: true, use: useForceUpdate},
	{name: "asWorker", toggle: true, notice: "it had no effect in kt-connect either"},
	{name: "podQuota", to: "pod-quota"},
	{name: "ipVersion", notice: "IPv4 and IPv6 are both routed where the cluster has them"},
	{name: "help", short: "h", toggle: true, to: "help"},
	{name: "version", short: "v", toggle: true, to: "version"},

	{name: "mode", notice: "culvert has one mode: a TUN device with WireGuard"},
	{name: "dnsMode", use: useDNSMode},
	{name: "shareShadow", toggle: true, notice: "each session has an agent of its own"},
	{name: "clusterDomain", to: "cluster-domain"},
	{name: "disablePodIp", toggle: true, use: refuse("pods are always routed", "--exclude-ips with the pods' range leaves them out")},
	{name: "skipCleanup", toggle: true, notice: "connecting never deletes what others left in the cluster"},
	{name: "includeIps", to: "include-ips"},
	{name: "excludeIps", to: "exclude-ips"},
	{name: "ingressIp", use: refuse("culvert does not rewrite Ingress host names", "put those hosts in /etc/hosts with that address")},
	{name: "disableTunDevice", toggle: true, use: refuse("there is no mode without a TUN device", "`culvert doctor` says why none can be made here")},
	{name: "disableTunRoute", toggle: true, use: refuse("there is no mode without routes", "--exclude-ips leaves ranges out")},
	{name: "proxyPort", notice: "there is no SOCKS proxy: programs reach the cluster directly"},
	{name: "proxyAddr", notice: "there is no SOCKS proxy: programs reach the cluster directly"},
	{name: "dnsCacheTtl", notice: "answers keep the cluster's own TTL"},
	{name: "dnsPort", notice: "culvert chooses the port of its forwarder"},
	{name: "skipPortChecking", toggle: true, notice: "a local port that nothing listens at is told, and no reason to refuse"},
	{name: "recoverWaitTime", notice: "leaving waits until the pods are ready again"},
	{name: "routerImage", notice: "requests are told apart by culvert's own image; --image names another"},
	{name: "includeDomains", use: refuse("only the cluster's own names are asked of the cluster", "--cluster-domain names a domain other than cluster.local")},
}

// useForceUpdate is -f: kt-connect pulls the image even when the node has it.
func useForceUpdate(o *optionFlags, value string) (string, error) {
	if value != "true" {
		return "", nil
	}
	if o.pullPolicy != "" && !strings.EqualFold(o.pullPolicy, "Always") {
		return "", usageErrorf("use one of the two", "--forceUpdate contradicts --image-pull-policy %s", o.pullPolicy)
	}
	o.pullPolicy = "Always"
	return "--forceUpdate is --image-pull-policy Always here", nil
}

// useDNSMode maps the one mode that has a counterpart, and says of the others
// what they would do to the machine.
func useDNSMode(o *optionFlags, value string) (string, error) {
	mode, servers, _ := strings.Cut(value, ":")
	switch mode {
	case "localDNS":
		if o.dns == "" {
			o.dns = "auto"
		}
		if servers != "" {
			return "--dnsMode localDNS is --dns auto here, and its list is not needed: cluster names are asked of the cluster, all others of this machine's own resolvers", nil
		}
		return "--dnsMode localDNS is --dns auto here", nil
	case "podDNS":
		return "", usageErrorf("leave the flag out: --dns auto resolves all cluster names; --dns none changes nothing on this machine",
			"--dnsMode podDNS would send all of this machine's names to the cluster, which culvert does not do")
	case "hosts":
		return "", usageErrorf("leave the flag out: --dns auto resolves the names of all namespaces; --dns none changes nothing on this machine",
			"--dnsMode %s would write to /etc/hosts, which culvert does not do", value)
	default:
		return "", usageErrorf("--dns takes "+strings.Join(dnsModes, ", "), "--dnsMode %q is unknown", value)
	}
}

func refuse(why, hint string) func(*optionFlags, string) (string, error) {
	return func(_ *optionFlags, value string) (string, error) {
		if value == "false" {
			return "", nil
		}
		return "", &api.Error{Code: api.CodeUsage, Message: why, Hint: hint}
	}
}

// normaliseFlag lets every flag be spelled in camelCase, and under kt-connect's
// name where that is another one.
func normaliseFlag(_ *pflag.FlagSet, name string) pflag.NormalizedName {
	for _, k := range ktFlags {
		if k.to != "" && (name == k.name || name == kebab(k.name)) {
			return pflag.NormalizedName(k.to)
		}
	}
	return pflag.NormalizedName(kebab(name))
}

// kebab makes exclude-ips of excludeIps and excludeIPs.
func kebab(name string) string {
	var b strings.Builder
	var last rune
	for _, r := range name {
		if unicode.IsUpper(r) && (unicode.IsLower(last) || unicode.IsDigit(last)) {
			b.WriteByte('-')
		}
		b.WriteRune(unicode.ToLower(r))
		last = r
	}
	return b.String()
}

// ktValue is a hidden flag of kt-connect that needs more than another spelling.
// It remembers that it was given; optionFlags.applyKt acts on it when all flags
// are known.
type ktValue struct {
	flag  ktFlag
	value string
	given bool
}

func (v *ktValue) Set(s string) error {
	if v.flag.toggle && s != "true" && s != "false" {
		return fmt.Errorf("it is true or false")
	}
	v.value, v.given = s, true
	return nil
}

func (v *ktValue) String() string { return v.value }

func (v *ktValue) Type() string {
	if v.flag.toggle {
		return "bool"
	}
	return "string"
}

// addKt adds the hidden flags to f and returns what will hold their values.
func addKt(f *pflag.FlagSet) []*ktValue {
	var values []*ktValue
	for _, k := range ktFlags {
		if k.to != "" || f.Lookup(k.name) != nil {
			continue
		}
		v := &ktValue{flag: k}
		flag := f.VarPF(v, k.name, k.short, "as in kt-connect")
		flag.Hidden = true
		if k.toggle {
			flag.NoOptDefVal = "true"
		}
		values = append(values, v)
	}
	return values
}

// addKtSwitches adds kt-connect's switches that are no flags of ours, so that a
// parser knows that they take no value.
func addKtSwitches(f *pflag.FlagSet) {
	for _, k := range ktFlags {
		if k.to == "" && k.toggle {
			flag := f.VarPF(&ktValue{flag: k}, k.name, k.short, "as in kt-connect")
			flag.Hidden, flag.NoOptDefVal = true, "true"
		}
	}
}

// applyKt acts on kt-connect's flags that were given, and returns what to tell
// the user.
func (o *optionFlags) applyKt() (notices []string, err error) {
	for _, v := range o.kt {
		switch {
		case !v.given:
		case v.flag.use != nil:
			notice, err := v.flag.use(o, v.value)
			if err != nil {
				e := asError(err)
				if !strings.HasPrefix(e.Message, "--") {
					e.Message = "--" + v.flag.name + " cannot be used: " + e.Message
				}
				return nil, e
			}
			if notice != "" {
				notices = append(notices, notice)
			}
		default:
			notices = append(notices, "--"+v.flag.name+" is not needed: "+v.flag.notice)
		}
	}
	return notices, nil
}
