package gate

import (
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/wire/intercept"
)

// asked is a request as fields.
type asked struct {
	*http.Request
	target string
}

func (a asked) method() string { return a.Method }
func (a asked) path() string   { return a.target }
func (a asked) value(name string, i int) (string, int, bool) {
	if all := a.Header[http.CanonicalHeaderKey(name)]; i < len(all) {
		return all[i], i + 1, true
	}
	return "", i, false
}

func tableOf(t testing.TB, all ...[]string) *table {
	t.Helper()
	var members []*member
	for i, texts := range all {
		m := &member{}
		m.Holder.Session = fmt.Sprint(i)
		for _, text := range texts {
			c, err := intercept.ParseCondition(text)
			if err != nil {
				t.Fatal(err)
			}
			m.Match = append(m.Match, c)
		}
		members = append(members, m)
	}
	return newTable(members, false)
}

func TestFind(t *testing.T) {
	table := tableOf(t,
		[]string{"header:VERSION=a"},
		[]string{"header:VERSION=a", "path:/api/*"},
		[]string{"header:version=B*"},
		[]string{"header:VERSION~[0-9]+|x.*y"},
		[]string{"cookie:v=a"},
		[]string{"baggage:v=a"},
		[]string{"method:GET,POST", "path:/m"},
		[]string{"header:VERSION=a"},
		[]string{"header:Any=*"},
		[]string{"path~/r[0-9]"},
		[]string{"baggage:u=ü"},
	)
	for _, c := range []struct {
		method, path string
		header       string // lines with |
		want         string
	}{
		{"GET", "/", "", ""},
		{"GET", "/", "Version: a", "0"},
		{"GET", "/", "Version: A", ""},
		{"GET", "/", "Version: z|Version: a", "0"},
		{"GET", "/api/x", "Version: a", "1"},
		{"GET", "/api", "Version: a", "0"},
		{"GET", "/", "Version: Bx", "2"},
		{"GET", "/", "Version: bx", ""},
		{"GET", "/", "Version: 123", "3"},
		{"GET", "/", "Version: 123z", ""},
		{"GET", "/", "Version: z123", ""},
		{"GET", "/", "Version: x12y", "3"},
		{"GET", "/", "Version: x12yz", ""},
		{"GET", "/", "Cookie: w=a; v=a;x=y", "4"},
		{"GET", "/", `Cookie: v="a"`, "4"},
		{"GET", "/", "Cookie: V=a; vv=a; w=v=a", ""},
		{"GET", "/", "Cookie: x=y|Cookie: v=a", "4"},
		{"GET", "/", "Baggage: w=x,v = a ;p=1;q", "5"},
		{"GET", "/", "Baggage: w=x|Baggage: v=%61", "5"},
		{"GET", "/", "Baggage: v=b;v=a", ""},
		{"GET", "/", "Baggage: u=%C3%BC", "10"},
		{"POST", "/m", "", "6"},
		{"PUT", "/m", "", ""},
		{"POST", "/m", "Version: a", "6"},
		{"PUT", "/r1", "", "9"},
		{"PUT", "/r1/", "", ""},
		{"PUT", "/r1", "Any: ", "8"},
		{"PUT", "/r1", "Any: |Version: 1", "8"},
		{"PUT", "/", "Any: x|Version: a", "0"},
	} {
		r := asked{&http.Request{Method: c.method, Header: http.Header{}}, c.path}
		text := c.method + " " + c.path + "?q HTTP/1.1\r\nHost: x\r\n"
		for line := range strings.SplitSeq(c.header, "|") {
			if name, value, is := strings.Cut(line, ": "); is {
				r.Header.Add(name, value)
				text += line + "\r\n"
			}
		}
		h := new(head)
		if err := h.parseRequest([]byte(text + "\r\n")); err != nil {
			t.Fatal(err)
		}
		for _, f := range []fields{r, h} {
			got := ""
			if m := table.find(f); m != nil {
				got = m.Holder.Session
			}
			if got != c.want {
				t.Errorf("%T %s %s %q is %q's, want %q", f, c.method, c.path, c.header, got, c.want)
			}
		}
	}
	table.closed = true
	if m := table.find(asked{&http.Request{Header: http.Header{"Version": {"a"}}}, "/"}); m != nil {
		t.Errorf("a draining one has members: %v", m)
	}
}

// TestFindOf250 finds each of many, and allocates nothing.
func TestFindOf250(t *testing.T) {
	var all [][]string
	for i := range 250 {
		all = append(all, []string{fmt.Sprintf("header:VERSION=v%d", i)})
	}
	table := tableOf(t, all...)
	if len(table.rest) > 0 || len(table.index) != 1 {
		t.Errorf("%d are not indexed, by %d keys", len(table.rest), len(table.index))
	}
	for i := range 250 {
		h := new(head)
		_ = h.parseRequest(fmt.Appendf(nil, "GET / HTTP/1.1\r\nHost: x\r\nVersion: v%d\r\n\r\n", i))
		if m := table.find(h); m == nil || m.Holder.Session != fmt.Sprint(i) {
			t.Errorf("v%d is %+v's", i, m)
		}
		if n := testing.AllocsPerRun(10, func() { table.find(h) }); n > 6 {
			t.Errorf("finding allocates %v", n)
		}
	}
}

// TestDrainingMember: nothing new goes to it, and its counters stay.
func TestDrainingMember(t *testing.T) {
	m := tableOf(t, []string{"header:VERSION=alice"}).members[0]
	m.Draining = true
	tb := newTable([]*member{m}, false)
	r := asked{&http.Request{Header: http.Header{"Version": {"alice"}}}, "/"}
	if got := tb.find(r); got != nil {
		t.Errorf("a request goes to %v", got)
	}
	if len(tb.members) != 1 || tb.has(m.key()) {
		t.Errorf("it is forgotten, or still served: %v, %v", tb.members, tb.has(m.key()))
	}
}
