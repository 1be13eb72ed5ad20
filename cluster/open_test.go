package cluster

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
)

const kubeconfigText = `apiVersion: v1
kind: Config
current-context: one
clusters:
- {name: one, cluster: {server: "https://10.1.1.1:6443"}}
- {name: same, cluster: {server: "https://10.1.1.1:6443/"}}
- {name: rancher-a, cluster: {server: "https://127.0.0.1/k8s/clusters/c-a", proxy-url: "http://127.0.0.7:3128"}}
- {name: rancher-b, cluster: {server: "https://127.0.0.1/k8s/clusters/c-b"}}
users:
- {name: u, user: {token: t}}
contexts:
- {name: one, context: {cluster: one, user: u, namespace: team}}
- {name: same, context: {cluster: same, user: u}}
- {name: a, context: {cluster: rancher-a, user: u}}
- {name: b, context: {cluster: rancher-b, user: u}}
- {name: broken, context: {cluster: nope, user: u}}
`

func writeKubeconfig(t *testing.T, text string) string {
	path := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOpen(t *testing.T) {
	path := writeKubeconfig(t, kubeconfigText)
	open := func(context, namespace string) *Cluster {
		c, err := Open(api.Options{Kubeconfig: path, Context: context, Namespace: namespace})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	one := open("", "")
	if one.Context() != "one" || one.Namespace() != "team" || one.Server() != "https://10.1.1.1:6443" {
		t.Errorf("%q %q %q", one.Context(), one.Namespace(), one.Server())
	}
	if ns := open("a", "").Namespace(); ns != "default" {
		t.Error(ns)
	}
	if ns := open("one", "mine").Namespace(); ns != "mine" {
		t.Error(ns)
	}
	if one.Identity() != open("same", "").Identity() {
		t.Error("a slash makes another cluster")
	}
	if open("a", "").Identity() == open("b", "").Identity() {
		t.Error("Rancher's paths are clusters of their own")
	}
	if identity([]byte("a"), one.server) == identity([]byte("b"), one.server) {
		t.Error("another certificate authority is another cluster")
	}
	// Several files are merged, missing ones are passed over.
	second := writeKubeconfig(t, strings.ReplaceAll(kubeconfigText, "name: one", "name: two"))
	c, err := Open(api.Options{Kubeconfig: strings.Join([]string{"/does/not/exist", path, second}, string(filepath.ListSeparator)), Context: "two"})
	if err != nil || c.Context() != "two" {
		t.Errorf("%v", err)
	}
}

func TestOpenErrors(t *testing.T) {
	path := writeKubeconfig(t, kubeconfigText)
	for _, test := range []struct {
		options api.Options
		says    string
	}{
		{api.Options{Kubeconfig: "/does/not/exist"}, "/does/not/exist"},
		{api.Options{Kubeconfig: path, Context: "typo"}, "a, b, broken, one, same"},
		{api.Options{Kubeconfig: path, Context: "broken"}, `"nope"`},
		{api.Options{Kubeconfig: writeKubeconfig(t, "no: [yaml")}, "kubeconfig"},
		{api.Options{Kubeconfig: writeKubeconfig(t, "")}, "empty"},
		{api.Options{Kubeconfig: writeKubeconfig(t, strings.Replace(kubeconfigText, "current-context: one", "", 1))}, "--context"},
	} {
		_, err := Open(test.options)
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeKubeconfig || !strings.Contains(e.Error(), test.says) {
			t.Errorf("%+v: %v, want %q", test.options, err, test.says)
		}
	}
	t.Setenv("KUBECONFIG", "")
	t.Setenv("HOME", t.TempDir())
	if _, err := Open(api.Options{}); err == nil {
		t.Error("no kubeconfig at all is no error")
	}
}

func TestAddresses(t *testing.T) {
	path := writeKubeconfig(t, kubeconfigText)
	of := func(context string) string {
		c, err := Open(api.Options{Kubeconfig: path, Context: context})
		if err != nil {
			t.Fatal(err)
		}
		addrs, err := c.Addresses(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprint(addrs)
	}
	if got := of("a"); got != "[127.0.0.1 127.0.0.7]" {
		t.Errorf("portless server with a path, and its proxy: %s", got)
	}
	if got := of("b"); got != "[127.0.0.1]" {
		t.Error(got)
	}
	c, err := Open(api.Options{Kubeconfig: path})
	if err != nil {
		t.Fatal(err)
	}
	// A name that only the proxy resolves.
	c.server = &url.URL{Scheme: "https", Host: "api.invalid"}
	c.access.Load().config.Proxy = func(*http.Request) (*url.URL, error) { return url.Parse("http://[::1]:3128") }
	if addrs, err := c.Addresses(t.Context()); err != nil || fmt.Sprint(addrs) != "[::1]" {
		t.Errorf("%v, %v", addrs, err)
	}
	c.access.Load().config.Proxy = func(*http.Request) (*url.URL, error) { return nil, nil }
	var e *api.Error
	if _, err := c.Addresses(t.Context()); !errors.As(err, &e) || e.Code != api.CodeUnreachable {
		t.Errorf("%v", err)
	}
}

// A plugin that wants the terminal has had it: the CLI runs it first.
func TestOpenLowersInteractiveMode(t *testing.T) {
	for _, mode := range []string{"Always", "IfAvailable", "Never"} {
		path := writeKubeconfig(t, strings.Replace(kubeconfigText, "{token: t}",
			"{exec: {apiVersion: client.authentication.k8s.io/v1, command: plugin, interactiveMode: "+mode+"}}", 1))
		c, err := Open(api.Options{Kubeconfig: path})
		if err != nil {
			t.Fatal(err)
		}
		want := mode
		if mode == "Always" {
			want = "IfAvailable"
		}
		if got := string(c.access.Load().config.ExecProvider.InteractiveMode); got != want {
			t.Errorf("interactiveMode %s became %s, want %s", mode, got, want)
		}
	}
}
