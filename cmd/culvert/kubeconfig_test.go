package main

import (
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/culvert-dev/culvert/daemon/api"
)

const oneContext = `apiVersion: v1
kind: Config
current-context: NAME
clusters: [{name: NAME, cluster: {server: "https://NAME:6443"}}]
users: [{name: NAME, user: {token: x}}]
contexts: [{name: NAME, context: {cluster: NAME, user: NAME}}, {name: NAME-ns, context: {cluster: NAME, user: NAME, namespace: own}}, {name: NAME-lost, context: {cluster: gone, user: NAME}}, {name: NAME-who, context: {cluster: NAME, user: gone}}]
`

func writeConfig(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(oneContext, "NAME", name)), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestKubeconfigPaths(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		flag, env, home string
		want            []string
	}{
		{"a", "/b", "/home/j", []string{wd + "/a"}},
		{"/a:../b", "", "", []string{"/a", filepath.Join(wd, "../b")}},
		{"", "/a::b", "/home/j", []string{"/a", wd + "/b"}},
		{"", "", "/home/j", []string{"/home/j/.kube/config"}},
		{"", ":", "/home/j", []string{"/home/j/.kube/config"}},
		{"", "", "", nil},
	} {
		got, err := kubeconfigPaths(c.flag, environment{"KUBECONFIG=" + c.env}, c.home)
		if err != nil || !reflect.DeepEqual(got, c.want) {
			t.Errorf("%q, %q, %q: %v, %v, want %v", c.flag, c.env, c.home, got, err, c.want)
		}
	}
}

func TestNewTarget(t *testing.T) {
	dir := t.TempDir()
	one, two := writeConfig(t, dir, "one"), writeConfig(t, dir, "two")
	for _, c := range []struct {
		o    api.Options
		want target
	}{
		{api.Options{Kubeconfig: one}, target{Kubeconfig: one, Context: "one", Namespace: "default", Server: "https://one:6443"}},
		{api.Options{Kubeconfig: one + ":" + two, Context: "two"}, target{Kubeconfig: one + ":" + two, Context: "two", Namespace: "default", Server: "https://two:6443"}},
		{api.Options{Kubeconfig: dir + "/absent:" + two}, target{Kubeconfig: dir + "/absent:" + two, Context: "two", Namespace: "default", Server: "https://two:6443"}},
		{api.Options{Kubeconfig: one, Context: "one-ns"}, target{Kubeconfig: one, Context: "one-ns", Namespace: "own", Server: "https://one:6443"}},
		{api.Options{Kubeconfig: one, Context: "one-ns", Namespace: "shop"}, target{Kubeconfig: one, Context: "one-ns", Namespace: "shop", Server: "https://one:6443"}},
	} {
		got, err := newTarget(c.o, nil, "")
		if err != nil {
			t.Errorf("%+v: %v", c.o, err)
			continue
		}
		got.config, got.auth = nil, nil
		if !reflect.DeepEqual(*got, c.want) {
			t.Errorf("%+v: %+v, want %+v", c.o, *got, c.want)
		}
	}
}

func TestNewTargetErrors(t *testing.T) {
	dir := t.TempDir()
	one := writeConfig(t, dir, "one")
	garbage, empty := filepath.Join(dir, "garbage"), filepath.Join(dir, "empty")
	os.WriteFile(garbage, []byte("{]"), 0o600)
	os.WriteFile(empty, nil, 0o600)
	for _, c := range []struct {
		o     api.Options
		words string
	}{
		{api.Options{Kubeconfig: dir + "/absent"}, dir + "/absent --kubeconfig"},
		{api.Options{Kubeconfig: garbage}, "garbage"},
		{api.Options{Kubeconfig: empty}, "current --context"},
		{api.Options{Kubeconfig: dir}, dir},
		{api.Options{Kubeconfig: one, Context: "prod"}, `"prod" one-ns`},
		{api.Options{Kubeconfig: one, Context: "one-lost"}, "gone cluster"},
		{api.Options{Kubeconfig: one, Context: "one-who"}, "gone user"},
		{api.Options{}, "HOME --kubeconfig"},
	} {
		_, err := newTarget(c.o, nil, "")
		var e *api.Error
		if !errors.As(err, &e) || e.Code != api.CodeKubeconfig {
			t.Errorf("%+v: %v", c.o, err)
			continue
		}
		for _, w := range strings.Fields(c.words) {
			if !strings.Contains(e.Error(), w) {
				t.Errorf("%+v: the error does not name %q: %v", c.o, w, e)
			}
		}
	}
}
