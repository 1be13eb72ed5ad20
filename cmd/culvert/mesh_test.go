package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

func TestMark(t *testing.T) {
	random := regexp.MustCompile(`^[a-km-z2-9]{5}$`)
	for mark, want := range map[string]string{
		"alice": "VERSION: alice", "0.0.1": "VERSION: 0.0.1", "Feature/X": "VERSION: Feature/X", "X-Dev:alice": "X-Dev: alice", "X-Dev: a:b ": "X-Dev: a:b",
		"": "VERSION: *", "X-Dev:": "X-Dev: *", "a*": "VERSION: a*",
	} {
		c, err := markOf(mark)
		key, value, _ := strings.Cut(want, ": ")
		if err != nil || c.On != intercept.OnHeader || c.How != intercept.Exact || c.Key != key || c.Value != value && !(value == "*" && random.MatchString(c.Value)) {
			t.Errorf("%q is %+v, %v; want %s", mark, c, err, want)
		}
	}
	a, _ := markOf("")
	b, _ := markOf("")
	if a == b {
		t.Errorf("twice the same random mark: %v", a)
	}
	for _, mark := range []string{"a b:c", ":c", "X:a\nb", "Host:a", "Connection:close"} {
		if c, err := markOf(mark); err == nil || !strings.Contains(err.Error(), "version-mark") {
			t.Errorf("%q is %+v, %v", mark, c, err)
		}
	}
}

func TestCheckMesh(t *testing.T) {
	flags := func(change func(*api.InterceptRequest)) *interceptFlags {
		f := &interceptFlags{req: api.InterceptRequest{Kind: api.KindMesh, Target: "shop", Mode: api.ModeAuto, OnGone: api.OnGoneOrigin, OnLocalRefused: api.OnRefusedOrigin,
			OnConflict: api.OnConflictReplay, Expose: []string{"8080"}}}
		if change != nil {
			change(&f.req)
		}
		return f
	}
	for name, c := range map[string]struct {
		mark   string
		change func(*api.InterceptRequest)
		match  string
	}{
		"mark":              {"alice", nil, "header:VERSION=alice"},
		"match alone":       {"", func(r *api.InterceptRequest) { r.Match = []string{"cookie:a=b"} }, "cookie:a=b"},
		"mark and match":    {"alice", func(r *api.InterceptRequest) { r.Match = []string{"path:/api/*"} }, "header:VERSION=alice path:/api/*"},
		"mode router":       {"alice", func(r *api.InterceptRequest) { r.Mode = api.ModeRouter }, "header:VERSION=alice"},
		"a star that is":    {"a*", nil, `header:VERSION=a\*`},
		"fail when it goes": {"alice", func(r *api.InterceptRequest) { r.OnGone = api.OnGoneFail }, "header:VERSION=alice"},
	} {
		f := flags(c.change)
		if err := f.checkMesh("culvert", c.mark); err != nil || strings.Join(f.req.Match, " ") != c.match {
			t.Errorf("%s: %q, %v; want %s", name, f.req.Match, err, c.match)
		}
	}
	for words, change := range map[string]func(*api.InterceptRequest){
		`"fast"`:         func(r *api.InterceptRequest) { r.Mode = "fast" },
		`"never"`:        func(r *api.InterceptRequest) { r.OnGone = "never" },
		"no --expose":    func(r *api.InterceptRequest) { r.Expose = nil },
		"heder":          func(r *api.InterceptRequest) { r.Match = []string{"heder:a=b"} },
		"local-refused":  func(r *api.InterceptRequest) { r.OnLocalRefused = "x" },
		"cannot be nega": func(r *api.InterceptRequest) { r.Drain = -time.Second },
	} {
		if err := flags(change).checkMesh("culvert", "alice"); err == nil || !strings.Contains(err.Error(), words) {
			t.Errorf("want %q: %v", words, err)
		}
	}
}

func TestCurl(t *testing.T) {
	for want, texts := range map[string][]string{
		"curl -H 'VERSION: alice' 'http://shop.demo/'":        {"header:VERSION=alice"},
		`curl -H 'V: it'\''s' 'http://shop.demo/'`:            {"header:V=it's"},
		"curl -b 'dev=alice' 'http://shop.demo/api/'":         {"cookie:dev=alice", "path:/api/*"},
		"curl -H 'baggage: v=a' -X 'PUT' 'http://shop.demo/'": {"baggage:v=a", "method:PUT,POST"},
		"curl -H 'V: ...' 'http://shop.demo/'":                {"header:V~a.*"},
		"curl 'http://shop.demo/...'":                         {"path~/a/.*"},
		"curl 'http://shop.demo/a/b'":                         {"path:/a/b", "path~/a/.*"},
		"curl 'http://shop.demo/a/b/'":                        {"path:/a/*", "path:/a/b/*"},
		"curl -b 'a=1; b=2' 'http://shop.demo/'":              {"cookie:a=1", "cookie:b=2"},
		"curl -H 'baggage: a=1,b=50%25' 'http://shop.demo/'":  {"baggage:a=1", "baggage:b=50%"},
		"curl -I 'http://shop.demo/'":                         {"method:HEAD"},
		"curl -H 'V: x' 'http://shop.demo/'":                  {"header:V=*"},
		"curl -g 'http://shop.demo/a[1]'":                     {"path:/a[1]"},
		"curl --path-as-is 'http://shop.demo/a/../b'":         {"path:/a/../b"},
	} {
		match, err := cluster.ParseMatch(texts)
		if err != nil {
			t.Fatal(err)
		}
		if got := curlFor(match, "shop", "demo", 80); got != want {
			t.Errorf("%v: %s; want %s", texts, got, want)
		}
	}
	if got := curlFor(nil, "shop", "demo", 8080); got != "curl 'http://shop.demo:8080/'" {
		t.Error(got)
	}
}

func TestShowMesh(t *testing.T) {
	var out bytes.Buffer
	a := &app{name: "culvert", out: &out}
	alice := api.Intercept{Kind: api.KindMesh, Service: "shop", Namespace: "demo", Match: []string{"header:VERSION=alice"},
		Ports: []api.InterceptPort{{Local: 3000, Port: 80, Protocol: "TCP"}}}
	for _, c := range []struct {
		req   api.InterceptRequest
		only  bool
		mode  string
		words []string
	}{
		{words: []string{"Meshed shop", "VERSION: alice", "Try it:", "curl -H 'VERSION: alice' 'http://shop.demo/'", "nothing listens at localhost:3000",
			"something does, those requests go to its own pods", "does not answer, its requests go to the Service's own pods", "culvert leave shop"}},
		{req: api.InterceptRequest{OnGone: api.OnGoneFail}, only: true,
			words: []string{"Try it, from a pod of the cluster or after `culvert connect`:", "something does, those requests are answered with 503", "its requests get status 503"}},
		{req: api.InterceptRequest{OnLocalRefused: api.OnRefusedRefuse}, words: []string{"something does, those requests are answered with 502"}},
		{mode: api.ModeIstio, words: []string{"from a pod that the rule holds for", "curl -H"}},
	} {
		out.Reset()
		alice.Mode = c.mode
		a.showIntercept(alice, c.req, c.only, time.Second)
		for _, words := range c.words {
			if !strings.Contains(out.String(), words) {
				t.Errorf("no %q in\n%s", words, out.String())
			}
		}
	}
	out.Reset()
	a.meshTable(&cluster.MeshStatus{Service: "shop", Gates: 2,
		Members: []cluster.MemberState{{User: "alice", Session: "s1", Mode: "router", Match: []string{"header:VERSION=alice"}, Ports: []string{"80/TCP -> alice:3000", "81/TCP -> alice:3001"}, Alive: true},
			{Session: "s2", Ports: []string{"80/TCP -> s2:3000"}}},
		Routes: []cluster.MeshRoute{{Port: 80, Mode: "router", RouteStatus: intercept.RouteStatus{Listen: 20001, Protocol: "TCP", RequestsToOrigin: 7, OpenToOrigin: 3, Members: []intercept.MemberStatus{{Session: "s1", Machine: "accepted", Requests: 5, Open: 1, ToOrigin: 2}}}},
			{Port: 81, Mode: "router", RouteStatus: intercept.RouteStatus{Listen: 20002, Protocol: "TCP", RequestsToOrigin: 1, Refused: 4, Members: []intercept.MemberStatus{{Session: "s1", Requests: 9}}}}}})
	for _, words := range []string{"alice  router  header:VERSION=alice", "alive", "accepted  5 ", " 9 ", "All others: 8 requests to the pods of shop by 2 gates; 3 connections", "s2",
		"  81/TCP: 1 requests, 0 connections open", "4 times neither"} {
		if !strings.Contains(strings.ReplaceAll(out.String(), "   ", "  "), words) {
			t.Errorf("no %q in\n%s", words, out.String())
		}
	}
	line := requestLine(intercept.Request{Port: 80, Method: "GET", Path: "/x", Protocol: "HTTP/2", Status: 200, User: "alice", Session: "s1", Origin: true, Error: "cut"})
	if esc := requestLine(intercept.Request{Method: "GET", Path: "/\x1b[2J\x07"}); strings.ContainsAny(esc, "\x1b\x07") {
		t.Errorf("a request's path reaches the terminal as it is: %q", esc)
	}
	if !strings.Contains(line, "port 80 GET /x HTTP/2 200") || !strings.HasSuffix(line, "-> origin, for alice (cut)") {
		t.Error(line)
	}
}

// The access log goes on when the API server or the gates were away for a moment.
func TestPrintRequests(t *testing.T) {
	var out, errs bytes.Buffer
	a := &app{name: "culvert", out: &out, err: &errs}
	away := &api.Error{Code: api.CodeUnreachable, Message: "the API server does not answer"}
	gone := &api.Error{Code: api.CodeNotFound, Message: "nobody meshes shop"}
	answers := []error{nil, away, away, nil, gone}
	asked := 0
	ask := func() ([]intercept.Request, error) {
		err := answers[asked]
		asked++
		if err != nil {
			return nil, err
		}
		return []intercept.Request{{Method: "GET", Path: "/marked", Session: "s1", User: "alice"}, {Method: "GET", Path: "/other"}}, nil
	}
	err := a.printRequests(t.Context(), routerLog{service: "shop", follow: true}, 0, ask)
	if err != gone || asked != len(answers) || strings.Count(out.String(), "/marked") != 2 || strings.Contains(out.String(), "/other") ||
		strings.Count(errs.String(), "trying again") != 1 {
		t.Errorf("%v after %d: %q, %q", err, asked, out.String(), errs.String())
	}
	out.Reset()
	if err := a.printRequests(t.Context(), routerLog{service: "shop", all: true}, 0, func() ([]intercept.Request, error) { asked = 0; return ask() }); err != nil || !strings.Contains(out.String(), "/other") {
		t.Errorf("%v: %q", err, out.String())
	}
}
