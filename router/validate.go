package router

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/net/publicsuffix"

	"github.com/culvert-dev/culvert/daemon/api"
)

// Bounds on what one session may ask for. A cluster of 5,000 nodes has 5,000
// podCIDRs, but they lie in few ranges, which the session merges; the kernel and
// systemd-resolved get slow on much more.
const (
	MaxRoutes   = 1024
	MaxExcluded = 4096
	MaxDomains  = 512
)

// Shortest prefixes without root's consent: a cluster is never larger, and a
// shorter one would capture much that is not the cluster's.
const (
	minBits4 = 8
	minBits6 = 16
)

// private are the ranges that are no place in the public internet.
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"),      // RFC 1918
	netip.MustParsePrefix("172.16.0.0/12"),   // RFC 1918
	netip.MustParsePrefix("192.168.0.0/16"),  // RFC 1918
	netip.MustParsePrefix("100.64.0.0/10"),   // RFC 6598, shared address space; EKS pods
	netip.MustParsePrefix("198.18.0.0/15"),   // RFC 2544, benchmarks
	netip.MustParsePrefix("192.0.0.0/24"),    // RFC 6890, protocol assignments
	netip.MustParsePrefix("192.0.2.0/24"),    // RFC 5737, documentation
	netip.MustParsePrefix("198.51.100.0/24"), // RFC 5737
	netip.MustParsePrefix("203.0.113.0/24"),  // RFC 5737
	netip.MustParsePrefix("240.0.0.0/4"),     // RFC 1112, reserved; GKE pods and Services
	netip.MustParsePrefix("34.118.224.0/20"), // Google's, but every GKE cluster's default Service range and nothing else
	netip.MustParsePrefix("fc00::/7"),        // RFC 4193
	netip.MustParsePrefix("2001:db8::/32"),   // RFC 3849, documentation
	netip.MustParsePrefix("3fff::/20"),       // RFC 9637, documentation
	netip.MustParsePrefix("64:ff9b:1::/48"),  // RFC 8215, local-use translation
}

// forbidden can be asked for by nobody. The broadcast address is in 240/4.
var forbidden = []struct {
	prefix netip.Prefix
	what   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},
	{netip.MustParsePrefix("::/127"), "loopback"},
	{netip.MustParsePrefix("::ffff:0:0/96"), "IPv4-mapped"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
}

// Policy is what root's configuration lets sessions ask for beyond the usual.
type Policy struct {
	// AllowPrefixes: a route inside one of them may be public or short. Default
	// routes, loopback, link-local and multicast are refused all the same.
	AllowPrefixes []netip.Prefix
	// AllowDomains are DNS domains that are accepted although they are public; "." never is.
	AllowDomains []string
	// Config names the file where root would allow more, for the errors' hints.
	Config string
}

// Validate checks what an untrusted session asks root for: the ranges to route
// and the DNS domains (routing and search) to take. The error is an *api.Error
// that names each refused entry, the first ones if they are many.
func Validate(plan []api.Route, domains []string, p Policy) error {
	if len(plan) > MaxRoutes {
		return denied(fmt.Sprintf("%d routes asked for, at most %d are allowed", len(plan), MaxRoutes),
			"--include-ips and --exclude-ips can give fewer, larger ranges.")
	}
	if len(domains) > MaxDomains {
		return denied(fmt.Sprintf("%d DNS domains asked for, at most %d are allowed", len(domains), MaxDomains), "")
	}
	var refused []string
	var hints []string
	for _, r := range plan {
		if err := p.prefix(r.Prefix); err != nil {
			from := ""
			if r.Source != "" {
				from = " (from " + r.Source + ")"
			}
			refused = append(refused, fmt.Sprintf("route %s%s: %v", r.Prefix, from, err))
			if errors.Is(err, errAllowable) {
				hints = append(hints, "allowPrefixes")
			}
		}
	}
	for _, d := range domains {
		if err := p.domain(d); err != nil {
			refused = append(refused, fmt.Sprintf("DNS domain %q: %v", d, err))
			if errors.Is(err, errAllowable) {
				hints = append(hints, "allowDomains")
			}
		}
	}
	if len(refused) == 0 {
		return nil
	}
	const shown = 5
	if more := len(refused) - shown; more > 0 {
		refused = append(refused[:shown], fmt.Sprintf("and %d more", more))
	}
	hint := ""
	if len(hints) > 0 {
		slices.Sort(hints)
		file := p.Config
		if file == "" {
			file = "culvertd's configuration"
		}
		hint = fmt.Sprintf("root can allow it: add it to %s in %s.", strings.Join(slices.Compact(hints), " or "), file)
	}
	return denied(strings.Join(refused, "; "), hint)
}

// ValidateExcluded bounds what a session excludes. Any prefix may be: it only
// makes the machine's own routes apply.
func ValidateExcluded(excluded []api.Route) error {
	if len(excluded) > MaxExcluded {
		return denied(fmt.Sprintf("%d excluded prefixes asked for, at most %d are allowed", len(excluded), MaxExcluded), "")
	}
	for _, r := range excluded {
		if !r.Prefix.IsValid() {
			return denied(fmt.Sprintf("excluded prefix %s (from %s) is none", r.Prefix, r.Source), "")
		}
	}
	return nil
}

func denied(message, hint string) error {
	return &api.Error{Code: api.CodeDenied, Message: message, Hint: hint}
}

// errAllowable marks a refusal that root's configuration can lift.
var errAllowable = errors.New("allowable")

type allowable string

func (e allowable) Error() string        { return string(e) }
func (e allowable) Is(target error) bool { return target == errAllowable }

func (p Policy) prefix(q netip.Prefix) error {
	if !q.IsValid() {
		return errors.New("is no prefix")
	}
	q = q.Masked()
	if q.Bits() == 0 {
		return errors.New("a default route is never allowed")
	}
	for _, f := range forbidden {
		if contains(f.prefix, q) {
			return fmt.Errorf("%s addresses are never allowed", f.what)
		}
	}
	if within(q, p.AllowPrefixes) {
		return nil
	}
	short := minBits4
	if q.Addr().Is6() {
		short = minBits6
	}
	if q.Bits() < short {
		return allowable(fmt.Sprintf("is larger than a /%d", short))
	}
	if !within(q, private) {
		return allowable("is a public range")
	}
	return nil
}

func (p Policy) domain(d string) error {
	name := strings.ToLower(strings.TrimSuffix(d, "."))
	if name == "" {
		return errors.New("the root of all names is never allowed")
	}
	if err := syntax(name); err != nil {
		return err
	}
	switch name {
	case "local":
		return errors.New("is multicast DNS's (RFC 6762)")
	case "localhost":
		return errors.New("is this machine's (RFC 6761)")
	}
	if slices.ContainsFunc(p.AllowDomains, func(a string) bool {
		return strings.EqualFold(strings.Trim(a, "."), name)
	}) {
		return nil
	}
	// The list's private section (github.io, ...) is a matter of cookies, not of
	// who owns the names below. A name on no list is its own suffix, but not ICANN's.
	if suffix, icann := publicsuffix.PublicSuffix(name); icann && suffix == name {
		return allowable("is a public suffix")
	}
	return nil
}

// syntax checks a host name as RFC 1123 section 2.1 has it, with the underscore of SRV names.
func syntax(name string) error {
	if len(name) > 253 {
		return errors.New("is longer than 253 characters")
	}
	for label := range strings.SplitSeq(name, ".") {
		if len(label) == 0 || len(label) > 63 {
			return errors.New("has a label of no or over 63 characters")
		}
		for _, c := range label {
			if c != '-' && c != '_' && (c < 'a' || c > 'z') && (c < '0' || c > '9') {
				return fmt.Errorf("has the character %q", c)
			}
		}
	}
	return nil
}
