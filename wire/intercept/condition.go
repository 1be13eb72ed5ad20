package intercept

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
	"unicode"
)

// Condition is one that a request may fulfil. Its text is what people type:
//
//	header:VERSION=alice     exactly; a header's name in any case, its value as it is
//	header:VERSION=al*       begins with (a last * that is meant is \*); * alone: there is one
//	header:VERSION~al.*[0-9] the whole value matches (RE2 syntax)
//	cookie:version=alice     one cookie of the request
//	baggage:version=alice    one entry of W3C Baggage, which many services pass on
//	path:/api/*              the path without the query, as it was sent
//	path~/v[0-9]+/.*
//	method:GET,HEAD
type Condition struct {
	On    string `json:"on"`            // OnHeader, ...
	Key   string `json:"key,omitempty"` // of OnHeader, OnCookie and OnBaggage
	How   string `json:"how"`           // Exact, Prefix or Regex
	Value string `json:"value"`
}

// What a Condition may be on.
const (
	OnHeader  = "header"
	OnCookie  = "cookie"
	OnBaggage = "baggage"
	OnPath    = "path"
	OnMethod  = "method" // Exact, and Value a list with commas
)

// How a Condition compares.
const (
	Exact  = "exact"
	Prefix = "prefix" // an empty Value: whatever it is
	Regex  = "regex"
)

// maxCondition bounds the text of one, in bytes: a header of HTTP has to hold the
// value, and a ConfigMap hundreds of them.
const maxCondition = 1 << 10

// ParseCondition reads the text of one. Errors say what is wrong with it.
func ParseCondition(text string) (c Condition, err error) {
	bad := func(format string, args ...any) (Condition, error) {
		return Condition{}, fmt.Errorf("%q is no condition: %s", text, fmt.Sprintf(format, args...))
	}
	if len(text) > maxCondition {
		return bad("it has %d bytes, where %d are possible", len(text), maxCondition)
	}
	end := strings.IndexAny(text, ":~")
	if end < 0 {
		return bad("it looks like header:NAME=VALUE, cookie:NAME=VALUE, baggage:NAME=VALUE, path:/PREFIX/* or method:GET")
	}
	c.On = strings.ToLower(strings.TrimSpace(text[:end]))
	rest := text[end+1:]
	switch c.On {
	case OnHeader, OnCookie, OnBaggage:
		if text[end] != ':' {
			return bad("after %s comes a colon", c.On)
		}
		sep := strings.IndexAny(rest, "=~")
		if sep < 0 {
			return bad("after the name of the %s comes =VALUE, =PREFIX* or ~REGEX", c.On)
		}
		c.Key = strings.TrimSpace(rest[:sep])
		c.How, c.Value = compares(rest[sep] == '~', rest[sep+1:])
	case OnPath:
		c.How, c.Value = compares(text[end] == '~', rest)
	case OnMethod:
		if text[end] != ':' {
			return bad("after method comes a colon")
		}
		c.How, c.Value = Exact, strings.ToUpper(strings.ReplaceAll(rest, " ", ""))
	default:
		return bad("%q is none of header, cookie, baggage, path and method", c.On)
	}
	if err := c.Check(); err != nil {
		return bad("%v", err)
	}
	return c, nil
}

// compares reads what comes after = or ~.
func compares(regex bool, value string) (how, text string) {
	switch {
	case regex:
		return Regex, value
	case strings.HasSuffix(value, `\*`):
		return Exact, strings.TrimSuffix(value, `\*`) + "*"
	case strings.HasSuffix(value, "*"):
		return Prefix, strings.TrimSuffix(value, "*")
	}
	return Exact, value
}

// Check tells why no request could fulfil c, or why it is no condition at all.
func (c Condition) Check() error {
	switch c.On {
	case OnHeader, OnCookie, OnBaggage:
		if !IsToken(c.Key) {
			return fmt.Errorf("the name of the %s is %q, which HTTP does not allow (RFC 9110, 5.6.2)", c.On, c.Key)
		}
		if c.On == OnHeader && hopByHop[strings.ToLower(c.Key)] {
			return fmt.Errorf("header %s is about one connection and does not reach the service", c.Key)
		}
		if c.How != Prefix && c.Value == "" {
			return errors.New("the value is empty")
		}
	case OnPath:
		if c.How != Regex && !strings.HasPrefix(c.Value, "/") {
			return fmt.Errorf("the path %q does not begin with /", c.Value)
		}
		if strings.ContainsAny(c.Value, "?#") && c.How != Regex {
			return errors.New("a path has no query")
		}
	case OnMethod:
		for m := range strings.SplitSeq(c.Value, ",") {
			if !IsToken(m) || c.How != Exact {
				return fmt.Errorf("%q is no method", m)
			}
		}
	default:
		return fmt.Errorf("%q is none of header, cookie, baggage, path and method", c.On)
	}
	switch c.How {
	case Exact, Prefix:
		// What a header cannot hold (RFC 9110, 5.5); around a value there is no space.
		if strings.ContainsFunc(c.Value, func(r rune) bool { return unicode.IsControl(r) }) || strings.TrimSpace(c.Value) != c.Value {
			return fmt.Errorf("the value %q has control characters, or space around it", c.Value)
		}
		if (c.On == OnCookie || c.On == OnBaggage) && strings.ContainsAny(c.Value, ";,\" \\") {
			return fmt.Errorf("a %s cannot hold the value %q", c.On, c.Value)
		}
	case Regex:
		if _, err := regexp.Compile(c.Value); err != nil {
			return fmt.Errorf("the expression %q: %w", c.Value, err)
		}
	default:
		return fmt.Errorf("%q is none of exact, prefix and regex", c.How)
	}
	return nil
}

// String is what ParseCondition reads.
func (c Condition) String() string {
	value := c.Value
	switch {
	case c.How == Prefix:
		value += "*"
	case c.How == Exact && strings.HasSuffix(value, "*"):
		value = strings.TrimSuffix(value, "*") + `\*`
	}
	switch c.On {
	case OnHeader, OnCookie, OnBaggage:
		sep := "="
		if c.How == Regex {
			sep = "~"
		}
		return c.On + ":" + c.Key + sep + value
	}
	if c.How == Regex {
		return c.On + "~" + value
	}
	return c.On + ":" + value
}

// Same tells whether a request fulfils all of a exactly when it fulfils all of b,
// as far as their texts tell.
func Same(a, b []Condition) bool {
	within := func(a, b []Condition) bool {
		for _, c := range a {
			found := false
			for _, d := range b {
				key := c.Key == d.Key || c.On == OnHeader && strings.EqualFold(c.Key, d.Key)
				found = found || key && c.On == d.On && c.How == d.How && c.Value == d.Value
			}
			if !found {
				return false
			}
		}
		return true
	}
	return within(a, b) && within(b, a)
}

// IsToken tells whether s may be a header's name or a method (RFC 9110, 5.6.2).
func IsToken(s string) bool {
	if s == "" {
		return false
	}
	for i := range len(s) {
		b := s[i]
		switch {
		case b >= '0' && b <= '9', b >= 'a' && b <= 'z', b >= 'A' && b <= 'Z', strings.IndexByte("!#$%&'*+-.^_`|~", b) >= 0:
		default:
			return false
		}
	}
	return true
}

// hopByHop are headers about one connection (RFC 9110, 7.6.1, and those of HTTP/1.1
// before it).
var hopByHop = map[string]bool{
	"connection": true, "keep-alive": true, "proxy-connection": true, "te": true, "trailer": true, "transfer-encoding": true, "upgrade": true,
	"content-length": true, "host": true,
}
