package gate

import (
	"cmp"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// fields is what conditions look at. A request of HTTP/1 and one of HTTP/2 are such.
// Strings that it gives are good until find returns.
type fields interface {
	method() string
	// path is as it was sent, without the query.
	path() string
	// value is one of the header with this name, which is in lower case: the first
	// at or after index i, and where the next may be; ok is false after the last.
	// (A function called for each would be allocated for each request.)
	value(name string, i int) (value string, next int, ok bool)
}

// member is a developer, at one route.
type member struct {
	intercept.Member
	machine intercept.Machine
	watch   *watcher
	count   *memberCount
	tag     string // the line that tells whose machine answered
	tests   []test
	rank    [3]int // exact, prefix and regex conditions
	order   int    // in which they came
}

// memberCount are the counters of a member at one route. They outlive a state.
type memberCount struct {
	open                       atomic.Int64
	requests, toOrigin, failed atomic.Int64
}

// machineKey tells machines apart whatever the state says else: a member's session
// that came anew, or has another agent, is another.
type machineKey struct {
	watch *watcher
	id    string
}

func (m *member) key() machineKey { return machineKey{m.watch, m.machine.ID} }

// usable tells whether something new may go to the machine.
func (m *member) usable() bool { return m.watch.usable() }

// fails: requests that are his get an error while his machine does not answer.
func (m *member) fails() bool { return m.OnGone == intercept.GoneFails }

// name is for people.
func (m *member) name() string { return cmp.Or(m.Holder.User, m.Holder.Session) }

// test is a compiled condition.
type test struct {
	intercept.Condition
	key     string         // of a header: in lower case
	regex   *regexp.Regexp // of the whole value
	methods []string
}

// table is the members of one route. It is never changed.
type table struct {
	members []*member // in the order in which they came
	// closed: its entry is draining, so that the origin has all requests.
	closed bool
	// index has each member that has an exact condition on a header, a cookie or
	// baggage, by one such; whoever has none is in rest.
	index []indexed
	rest  []*member
}

type indexed struct {
	on, key string
	members map[string][]*member // by value
}

// newTable compiles members, whose conditions were checked. Of these it sets what is
// compiled, and their order.
func newTable(members []*member, closed bool) *table {
	t := &table{members: members, closed: closed}
	for i, m := range members {
		m.order = i
		m.tag = intercept.ServedByHeader + ": " + printable(m.name()) + "\r\n"
		m.tests, m.rank = nil, [3]int{}
		by := -1
		for _, c := range m.Match {
			m.tests = append(m.tests, compile(c))
			m.rank[slices.Index([]string{intercept.Exact, intercept.Prefix, intercept.Regex}, c.How)]++
			if by < 0 && c.How == intercept.Exact && c.On != intercept.OnPath && c.On != intercept.OnMethod {
				by = len(m.tests) - 1
			}
		}
		if m.Draining { // known for its counters alone
			continue
		}
		if by < 0 {
			t.rest = append(t.rest, m)
			continue
		}
		x := m.tests[by]
		at := slices.IndexFunc(t.index, func(i indexed) bool { return i.on == x.On && i.key == x.key })
		if at < 0 {
			at = len(t.index)
			t.index = append(t.index, indexed{x.On, x.key, map[string][]*member{}})
		}
		t.index[at].members[x.Value] = append(t.index[at].members[x.Value], m)
	}
	return t
}

// printable is s without what no header may hold.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, s)
}

func compile(c intercept.Condition) test {
	t := test{Condition: c, key: c.Key}
	if c.On == intercept.OnHeader {
		t.key = strings.ToLower(c.Key)
	}
	if c.On == intercept.OnMethod {
		t.methods = strings.Split(c.Value, ",")
	}
	if c.How == intercept.Regex {
		t.regex = regexp.MustCompile(`\A(?:` + c.Value + `)\z`) // Check compiled it
	}
	return t
}

// find is whose a request is; nil: the origin's. Of several whose conditions hold,
// the one with more exact conditions has it, then more prefixes, then more
// expressions, then who came first.
func (t *table) find(f fields) *member {
	if t.closed {
		return nil
	}
	var best *member
	try := func(m *member) {
		if (best == nil || m.before(best)) && m.matches(f) {
			best = m
		}
	}
	for i := range t.index {
		x := &t.index[i]
		each(f, x.on, x.key, func(value string) bool {
			for _, m := range x.members[value] {
				try(m)
			}
			return true
		})
	}
	for _, m := range t.rest {
		try(m)
	}
	return best
}

// has tells whether a machine is a member's who does not drain.
func (t *table) has(k machineKey) bool {
	return slices.ContainsFunc(t.members, func(m *member) bool { return m.key() == k && !m.Draining })
}

func (m *member) before(other *member) bool {
	if c := slices.Compare(other.rank[:], m.rank[:]); c != 0 {
		return c < 0
	}
	return m.order < other.order
}

func (m *member) matches(f fields) bool {
	for i := range m.tests {
		if !m.tests[i].holds(f) {
			return false
		}
	}
	return true
}

// holds tells whether any value fulfils the condition.
func (t *test) holds(f fields) (holds bool) {
	switch t.On {
	case intercept.OnPath:
		return t.fits(f.path())
	case intercept.OnMethod:
		return slices.Contains(t.methods, f.method())
	}
	each(f, t.On, t.key, func(value string) bool {
		holds = t.fits(value)
		return !holds
	})
	return holds
}

func (t *test) fits(value string) bool {
	switch t.How {
	case intercept.Exact:
		return value == t.Value
	case intercept.Prefix:
		return strings.HasPrefix(value, t.Value)
	}
	return t.regex.MatchString(value)
}

// each calls do for each value of a header, a cookie or an entry of baggage.
func each(f fields, on, key string, do func(value string) bool) {
	switch on {
	case intercept.OnHeader:
		for v, i, ok := f.value(key, 0); ok && do(v); v, i, ok = f.value(key, i) {
		}
	case intercept.OnCookie:
		for v, i, ok := f.value("cookie", 0); ok && cookies(v, key, do); v, i, ok = f.value("cookie", i) {
		}
	case intercept.OnBaggage:
		for v, i, ok := f.value("baggage", 0); ok && baggage(v, key, do); v, i, ok = f.value("baggage", i) {
		}
	}
}

// cookies finds those called name in a Cookie header (RFC 6265, 4.2.1).
func cookies(line, name string, do func(value string) bool) bool {
	for pair := range strings.SplitSeq(line, ";") {
		n, value, is := strings.Cut(pair, "=")
		if !is || trim(n) != name {
			continue
		}
		value = trim(value)
		if len(value) >= 2 && value[0] == '"' && value[len(value)-1] == '"' {
			value = value[1 : len(value)-1]
		}
		if !do(value) {
			return false
		}
	}
	return true
}

// baggage finds the entries with a key in a baggage header (W3C Baggage, 3.3): their
// values without properties, percent-decoded.
func baggage(line, key string, do func(value string) bool) bool {
	for entry := range strings.SplitSeq(line, ",") {
		entry, _, _ = strings.Cut(entry, ";")
		k, value, is := strings.Cut(entry, "=")
		if !is || trim(k) != key {
			continue
		}
		value = trim(value)
		if strings.IndexByte(value, '%') >= 0 {
			if decoded, err := url.PathUnescape(value); err == nil {
				value = decoded
			}
		}
		if !do(value) {
			return false
		}
	}
	return true
}

// trim takes off the space that HTTP allows around a value.
func trim(s string) string { return strings.Trim(s, " \t") }

// checkMember tells why a member cannot be served, if it cannot.
func checkMember(m intercept.Member) error {
	if len(m.Match) == 0 {
		return fmt.Errorf("it has no condition")
	}
	for _, c := range m.Match {
		if err := c.Check(); err != nil {
			return err
		}
		if c.How == intercept.Regex {
			if _, err := regexp.Compile(`\A(?:` + c.Value + `)\z`); err != nil {
				return fmt.Errorf("the expression %q: %w", c.Value, err)
			}
		}
	}
	for _, p := range m.Ports {
		if err := checkMachine(p.Machine); err != nil {
			return fmt.Errorf("port %d: %w", p.Port, err)
		}
	}
	return nil
}

func checkMachine(m intercept.Machine) error {
	if len(m.Agents) == 0 {
		return fmt.Errorf("a machine without the address of its agent")
	}
	for _, a := range m.Agents {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return fmt.Errorf("agent %q: %w", a, err)
		}
	}
	return nil
}

// status of a member, for the control API.
func (m *member) status() intercept.MemberStatus {
	s := intercept.MemberStatus{
		Session: m.Holder.Session, Open: int(m.count.open.Load()), Requests: m.count.requests.Load(),
		ToOrigin: m.count.toOrigin.Load(), Failed: m.count.failed.Load(),
	}
	if now := m.watch.status(); now != 0 {
		s.Machine = now.String()
	}
	return s
}
