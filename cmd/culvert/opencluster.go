package main

import (
	"context"
	"path/filepath"
	"strings"

	"golang.org/x/term"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// openCluster is the cluster that --kubeconfig, --context and --namespace mean,
// for commands that need no daemon. One request was made, with the terminal for a
// credentials plugin.
func (a *app) openCluster(ctx context.Context) (*cluster.Cluster, error) {
	c, err := currentCaller(a.name)
	if err != nil {
		return nil, err
	}
	paths, err := kubeconfigPaths(a.kubeconfig, c.env, c.home)
	if err != nil {
		return nil, err
	}
	opts := api.Options{Kubeconfig: strings.Join(paths, string(filepath.ListSeparator)), Context: a.context, Namespace: a.namespace}
	t, err := newTarget(opts, c.env, c.home)
	if err != nil {
		return nil, err
	}
	if _, err := whoAmI(ctx, t, term.IsTerminal(int(a.in.Fd()))); err != nil {
		return nil, cancelled(err)
	}
	opts.Context, opts.Namespace = t.Context, t.Namespace
	return cluster.Open(opts)
}
