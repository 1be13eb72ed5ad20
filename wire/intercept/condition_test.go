package intercept

import (
	"strings"
	"testing"
)

func TestParseCondition(t *testing.T) {
	for text, want := range map[string]Condition{
		"header:VERSION=alice":         {OnHeader, "VERSION", Exact, "alice"},
		"header:VERSION=0.0.1":         {OnHeader, "VERSION", Exact, "0.0.1"},
		"header:VERSION=Feature/X":     {OnHeader, "VERSION", Exact, "Feature/X"},
		"header:VERSION=a=b~c:d":       {OnHeader, "VERSION", Exact, "a=b~c:d"},
		"header:X-V=al*":               {OnHeader, "X-V", Prefix, "al"},
		"header:X-V=*":                 {OnHeader, "X-V", Prefix, ""},
		`header:X-V=al\*`:              {OnHeader, "X-V", Exact, "al*"},
		"header:VERSION~al.*[0-9]=?":   {OnHeader, "VERSION", Regex, "al.*[0-9]=?"},
		"Header: VERSION =alice":       {OnHeader, "VERSION", Exact, "alice"},
		"cookie:v=x":                   {OnCookie, "v", Exact, "x"},
		"baggage:user.id=x":            {OnBaggage, "user.id", Exact, "x"},
		"path:/api/*":                  {OnPath, "", Prefix, "/api/"},
		"path:/api":                    {OnPath, "", Exact, "/api"},
		"path~/v[0-9]+/.*":             {OnPath, "", Regex, "/v[0-9]+/.*"},
		"method:get, HEAD":             {OnMethod, "", Exact, "GET,HEAD"},
		"header:VERSION=ein Wert, ü":   {OnHeader, "VERSION", Exact, "ein Wert, ü"},
		"header:sec-websocket-key=abc": {OnHeader, "sec-websocket-key", Exact, "abc"},
	} {
		got, err := ParseCondition(text)
		if err != nil || got != want {
			t.Errorf("%s is %+v, %v; want %+v", text, got, err, want)
			continue
		}
		if again, err := ParseCondition(got.String()); err != nil || again != got {
			t.Errorf("%s is written %s, which is %+v, %v", text, got, again, err)
		}
	}
	for text, why := range map[string]string{
		"":                                       "it looks like",
		"VERSION=alice":                          "it looks like",
		"host:a=b":                               "none of header",
		"header:a b=c":                           "RFC 9110",
		"header:=c":                              "RFC 9110",
		"header:VERSION":                         "=VALUE",
		"header:VERSION=":                        "empty",
		"header:VERSION~(":                       "expression",
		"header:VERSION=a\nb":                    "control",
		"header:VERSION= a":                      "space",
		"header:Connection=close":                "one connection",
		"header~x":                               "colon",
		"cookie:a=b;c":                           "cannot hold",
		"path:api":                               "begin with /",
		"path:/a?b=c":                            "query",
		"method:":                                "no method",
		"header:V=" + strings.Repeat("x", 1<<10): "bytes",
	} {
		if c, err := ParseCondition(text); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%q is %+v, %v; want an error with %q", text, c, err, why)
		}
	}
}

func TestSame(t *testing.T) {
	parse := func(texts ...string) (all []Condition) {
		for _, text := range texts {
			c, err := ParseCondition(text)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, c)
		}
		return all
	}
	a := parse("header:VERSION=a", "path:/x*")
	if !Same(a, parse("path:/x*", "header:version=a")) {
		t.Error("order and a header's case make a difference")
	}
	for _, other := range [][]Condition{parse("header:VERSION=a"), parse("header:VERSION=A", "path:/x*"), parse("cookie:VERSION=a", "path:/x*")} {
		if Same(a, other) {
			t.Errorf("%v is the same as %v", a, other)
		}
	}
}
