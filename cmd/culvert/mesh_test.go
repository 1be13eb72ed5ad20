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
		"not built":      func(r *api.InterceptRequest) { r.Mode = api.ModeIstio },
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
		"curl -H 'baggage: v=a' -X 'PUT' 'http://shop.demo/'": {"baggage:v=a", "method:PUT,GET"},
		"curl -H 'V: ...' 'http://shop.demo/'":                {"header:V~a.*"},
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
	a.showIntercept(api.Intercept{Kind: api.KindMesh, Service: "shop", Namespace: "demo", Match: []string{"header:VERSION=alice"},
		Ports: []api.InterceptPort{{Local: 3000, Port: 80, Protocol: "TCP"}}}, time.Second)
	for _, words := range []string{"Meshed shop", "VERSION: alice", "curl -H 'VERSION: alice' 'http://shop.demo/'", "nothing listens at localhost:3000", "go to its own pods", "culvert leave shop"} {
		if !strings.Contains(out.String(), words) {
			t.Errorf("no %q in\n%s", words, out.String())
		}
	}
	out.Reset()
	a.meshTable(&cluster.MeshStatus{Service: "shop", Gates: 2,
		Members: []cluster.MemberState{{User: "alice", Session: "s1", Match: []string{"header:VERSION=alice"}, Ports: []string{"80/TCP -> alice:3000"}, Alive: true}, {Session: "s2"}},
		Routes: []intercept.RouteStatus{{RequestsToOrigin: 7, OpenToOrigin: 3, Members: []intercept.MemberStatus{{Session: "s1", Machine: "accepted", Requests: 5, Open: 1, ToOrigin: 2}}},
			{RequestsToOrigin: 1, Members: []intercept.MemberStatus{{Session: "s1", Requests: 4}}}}})
	for _, words := range []string{"alice  header:VERSION=alice", "alive", " 9 ", "All others: 8 requests to the pods of shop by 2 gates; 3 connections", "s2"} {
		if !strings.Contains(strings.ReplaceAll(out.String(), "   ", "  "), words) {
			t.Errorf("no %q in\n%s", words, out.String())
		}
	}
	line := requestLine(intercept.Request{Port: 80, Method: "GET", Path: "/x", Protocol: "HTTP/2", Status: 200, User: "alice", Session: "s1", Origin: true, Error: "cut"})
	if !strings.Contains(line, "port 80 GET /x HTTP/2 200") || !strings.HasSuffix(line, "-> origin, for alice (cut)") {
		t.Error(line)
	}
}
