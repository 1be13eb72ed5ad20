package main

import (
	"context"
	"os"
	"strings"

	"golang.org/x/term"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// openCluster opens the cluster of the kubeconfig's context, after one request
// with the terminal attached: a credentials plugin may ask the user something.
func (a *app) openCluster(ctx context.Context) (*cluster.Cluster, error) {
	if os.Getuid() == 0 && os.Getenv("SUDO_UID") != "" {
		return nil, &api.Error{
			Code:    api.CodeDenied,
			Message: "this command needs no root, and the kubeconfig and its plugins are not root's to run",
			Hint:    "run it without sudo",
		}
	}
	env, home := environment(os.Environ()), os.Getenv("HOME")
	paths, err := kubeconfigPaths(a.kubeconfig, env, home)
	if err != nil {
		return nil, err
	}
	o := api.Options{Kubeconfig: strings.Join(paths, string(os.PathListSeparator)), Context: a.context, Namespace: a.namespace}
	t, err := newTarget(o, env, home)
	if err != nil {
		return nil, err
	}
	if _, err := whoAmI(ctx, t, term.IsTerminal(int(a.in.Fd()))); err != nil {
		return nil, cancelled(err)
	}
	o.Context, o.Namespace = t.Context, t.Namespace
	a.context, a.namespace = t.Context, t.Namespace
	return cluster.Open(o)
}
