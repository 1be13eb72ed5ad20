package main

import (
	"context"
	"errors"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// completionTimeout is how long a Tab press may wait for the API server.
const completionTimeout = 2 * time.Second

type completion = func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective)

// complete registers how the values of a flag are completed. The flag exists:
// anything else is a mistake in this program.
func complete(cmd *cobra.Command, flag string, f completion) {
	if err := cmd.RegisterFlagCompletionFunc(flag, f); err != nil {
		panic(err)
	}
}

// fixedCompletion offers the same words always; without words, no file names.
func fixedCompletion(words ...string) completion {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return words, cobra.ShellCompDirectiveNoFileComp
	}
}

func (a *app) completeContexts(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	config, _, err := loadKubeconfig(a.kubeconfig, os.Environ(), os.Getenv("HOME"))
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	return contextNames(config), cobra.ShellCompDirectiveNoFileComp
}

// completeNamespaces asks the cluster. A credentials plugin that wants the
// terminal is left alone: the shell has it.
func (a *app) completeNamespaces(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	t, err := newTarget(api.Options{Kubeconfig: a.kubeconfig, Context: a.context}, os.Environ(), os.Getenv("HOME"))
	if err != nil || needsTerminal(t.auth) || os.Geteuid() == 0 && os.Getenv("SUDO_UID") != "" {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	client, err := t.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	list, err := client.Namespaces().List(ctx, metav1.ListOptions{Limit: 500})
	if err != nil {
		return []string{t.Namespace}, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, ns := range list.Items {
		names = append(names, ns.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeSessions offers the contexts that are connected.
func (a *app) completeSessions(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	sessions, err := api.New(a.socket).Sessions(ctx)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, s := range sessions {
		names = append(names, s.Context)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completionCluster is the cluster that completion asks, unless its credentials want
// the terminal.
func (a *app) completionCluster() (*target, error) {
	t, err := newTarget(api.Options{Kubeconfig: a.kubeconfig, Context: a.context, Namespace: a.namespace}, os.Environ(), os.Getenv("HOME"))
	if err == nil && (needsTerminal(t.auth) || os.Geteuid() == 0 && os.Getenv("SUDO_UID") != "") {
		err = errors.New("the shell has the terminal")
	}
	return t, err
}

// completeServices offers the Services of the namespace but culvert's own.
func (a *app) completeServices(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	t, err := a.completionCluster()
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	client, err := t.client()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	list, err := client.Services(t.Namespace).List(ctx, metav1.ListOptions{Limit: 500, LabelSelector: cluster.LabelManagedBy + "!=culvert"})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, s := range list.Items {
		names = append(names, s.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}

// completeMeshed offers the meshed Services of the namespace.
func (a *app) completeMeshed(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.completeIntercepted(cmd, func(e intercept.Entry) bool { return e.Kind == intercept.Mesh })
}

// completeIntercepted offers what is intercepted in the namespace, by anybody.
func (a *app) completeIntercepted(cmd *cobra.Command, wanted func(intercept.Entry) bool) ([]string, cobra.ShellCompDirective) {
	t, err := a.completionCluster()
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	c, err := cluster.Open(api.Options{Kubeconfig: t.Kubeconfig, Context: t.Context, Namespace: t.Namespace})
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionTimeout)
	defer cancel()
	state, err := c.GateState(ctx, t.Namespace)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	var names []string
	for _, e := range state.Entries {
		if wanted(e) {
			names = append(names, e.Service)
		}
	}
	slices.Sort(names)
	return slices.Compact(names), cobra.ShellCompDirectiveNoFileComp
}
