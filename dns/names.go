package dns

import (
	"encoding/hex"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/miekg/dns"
	"golang.org/x/net/publicsuffix"
)

// ownTop is the top-level name under which every cluster is reachable whatever
// its own domain is: SVC.NS.svc.CONTEXT.culvert. It is not delegated.
const ownTop = "culvert"

// place is where a question is answered.
type place int

const (
	toMachine place = iota // the machine's own resolvers
	toCluster              // the agent
	toSibling              // another session's forwarder
	nowhere                // here: the name is ours by form, and there is none
	noData                 // here: the name exists and has no records
	refused                // here: not ours, and no resolver to ask
)

// route is what is done with a question. It depends on the name only.
type route struct {
	to place
	// name is what the cluster is asked in place of the question's name, in full
	// and without the final dot. Empty: the question as it is.
	name string
	// fallback: the top label is a public one (a Service go in a namespace dev is
	// also go.dev), so what the cluster does not know is asked of the machine.
	fallback bool
	sibling  *upstream
}

// route finds the place of a name, given in lower case without the final dot.
// A question that a sibling sent is never sent to a sibling again.
func (s *settings) route(name string, fromSibling bool) route {
	if name == "" {
		return s.elsewhere(name)
	}
	if rest, ok := under(name, ownTop); ok {
		return s.routeContext(rest, fromSibling)
	}
	if !fromSibling {
		if r, ok := coveredBy(s.before, name); ok {
			return r
		}
	}
	if r, ok := s.ours(name); ok {
		return r
	}
	if !fromSibling {
		if r, ok := coveredBy(s.after, name); ok {
			return r
		}
	}
	return s.elsewhere(name)
}

// routeContext finds the place of REST.culvert.
func (s *settings) routeContext(rest string, fromSibling bool) route {
	if rest == "" {
		return route{to: noData}
	}
	name, label := "", rest
	if i := strings.LastIndexByte(rest, '.'); i >= 0 {
		name, label = rest[:i], rest[i+1:]
	}
	if label != s.label {
		for _, sib := range slices.Concat(s.before, s.after) {
			if sib.label == label && !fromSibling {
				return route{to: toSibling, sibling: sib.upstream}
			}
		}
		return route{to: nowhere}
	}
	if name == "" {
		return route{to: noData}
	}
	r, ok := s.ours(name)
	if !ok {
		return route{to: nowhere}
	}
	if r.name == "" {
		r.name = name
	}
	r.fallback = false
	return r
}

// ours tells whether the cluster answers name, and under which name.
func (s *settings) ours(name string) (route, bool) {
	if _, ok := under(name, s.domain); ok {
		return route{to: toCluster}, true
	}
	if p, ok := parseReverse(name); ok {
		for _, r := range s.ranges() {
			if r.Bits() <= p.Bits() && r.Contains(p.Addr()) {
				return route{to: toCluster}, true
			}
		}
		return route{}, false
	}
	relative := s.expand(name)
	if relative == "" {
		return route{}, false
	}
	full := relative + "." + s.domain
	if _, ok := dns.IsDomainName(full); !ok {
		return route{}, false
	}
	return route{to: toCluster, name: full, fallback: publicTop(name)}, true
}

// expand completes a short form up to the cluster domain, or returns "" when
// the name is not one. A form that ends in a namespace's name, or in nothing at
// all, counts only if the Service is there: only then does a namespace called
// dev or app leave the public domain of that name alone.
func (s *settings) expand(name string) string {
	if strings.Contains(name, `\`) || name == "localhost" {
		return "" // no Kubernetes name needs an escape; localhost is RFC 6761's
	}
	labels := strings.Split(name, ".")
	service := labels // without the _port._protocol of an SRV question
	for len(service) > 0 && len(labels)-len(service) < 2 && strings.HasPrefix(service[0], "_") {
		service = service[1:]
	}
	n := len(service)
	if n == 0 || n > 4 {
		return ""
	}
	last := service[n-1]
	own := "." + s.namespace + ".svc"
	switch {
	case n == 1 && s.names.HasService(s.namespace, last):
		return name + own // svc
	case n == 2 && s.names.HasService(last, service[0]):
		return name + ".svc" // svc.ns
	case n == 2 && s.names.HasService(s.namespace, last) && !publicTop(last):
		return name + own // pod.svc; a Service called dev must not take all of .dev
	case n == 3 && s.names.HasService(last, service[1]):
		return name + ".svc" // pod.svc.ns
	case n >= 2 && last == "svc":
		return name // svc.ns.svc, pod.svc.ns.svc
	case n == 3 && last == "pod" && dashedAddr(service[0]):
		return name // 10-244-1-5.ns.pod
	}
	return ""
}

// elsewhere is the way of a name that is no cluster's.
func (s *settings) elsewhere(name string) route {
	if s.machine != nil {
		return route{to: toMachine}
	}
	// The OS sends us only what Domains listed, so the name is one of a form of
	// ours and does not exist; or it came by mistake, and REFUSED makes a
	// resolver ask its next server.
	top := name[strings.LastIndexByte(name, '.')+1:]
	if name != "" && (top == name || top == "svc" || top == "pod" || s.names.HasNamespace(top) && !publicTop(top)) {
		return route{to: nowhere}
	}
	if _, ok := parseReverse(name); ok {
		return route{to: nowhere}
	}
	return route{to: refused}
}

// coveredBy finds the first sibling that owns name. A single label is nobody's:
// resolvers complete it with the search list.
func coveredBy(siblings []sibling, name string) (route, bool) {
	if !strings.Contains(name, ".") {
		return route{}, false
	}
	for _, sib := range siblings {
		if sib.covers(name) {
			return route{to: toSibling, sibling: sib.upstream}, true
		}
	}
	return route{}, false
}

// under tells whether name is zone or below it, and returns the part below.
// Both are in lower case without the final dot.
func under(name, zone string) (string, bool) {
	if name == zone {
		return "", true
	}
	if !strings.HasSuffix(name, "."+zone) || !dns.IsSubDomain(zone+".", name+".") {
		return "", false // the second test is for escaped dots
	}
	return name[:len(name)-len(zone)-1], true
}

// reservedTops are top-level names that are in no public list and yet in use on
// many machines' networks, or reserved (RFC 6761, RFC 8375, ICANN's
// name-collision list: corp, home, mail; .internal). A namespace of such a name
// keeps its short forms to itself.
var reservedTops = []string{
	"local", "localhost", "localdomain", "internal", "intranet", "private", "corp",
	"home", "mail", "lan", "test", "example", "invalid", "onion", "alt", "arpa",
}

// publicTop tells whether the last label of name is a public or reserved
// top-level domain.
func publicTop(name string) bool {
	top := name[strings.LastIndexByte(name, '.')+1:]
	if slices.Contains(reservedTops, top) {
		return true
	}
	_, icann := publicsuffix.PublicSuffix(top)
	return icann
}

// dashedAddr tells whether label is an address in the form of a pod's name:
// 10-244-1-5 or fd00--1.
func dashedAddr(label string) bool {
	if a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ".")); err == nil {
		return a.Is4()
	}
	a, err := netip.ParseAddr(strings.ReplaceAll(label, "-", ":"))
	return err == nil && a.Is6()
}

// parseReverse reads a name below in-addr.arpa or ip6.arpa: a whole address or
// a prefix on a label boundary.
func parseReverse(name string) (netip.Prefix, bool) {
	if rest, ok := under(name, "in-addr.arpa"); ok {
		var a [4]byte
		n := 0
		for rest != "" {
			label := rest
			if i := strings.LastIndexByte(rest, '.'); i >= 0 {
				rest, label = rest[:i], rest[i+1:]
			} else {
				rest = ""
			}
			v, err := strconv.ParseUint(label, 10, 8)
			if err != nil || n == 4 || len(label) > 1 && label[0] == '0' {
				return netip.Prefix{}, false
			}
			a[n] = byte(v)
			n++
		}
		return netip.PrefixFrom(netip.AddrFrom4(a), 8*n), true
	}
	rest, ok := under(name, "ip6.arpa")
	if !ok {
		return netip.Prefix{}, false
	}
	digits := strings.Split(rest, ".")
	if rest == "" {
		digits = nil
	}
	slices.Reverse(digits)
	text := strings.Join(digits, "")
	if len(digits) > 32 || len(text) != len(digits) || slices.Contains(digits, "") {
		return netip.Prefix{}, false
	}
	b, err := hex.DecodeString(text + strings.Repeat("0", 32-len(text)))
	if err != nil {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(netip.AddrFrom16([16]byte(b)), 4*len(digits)), true
}
