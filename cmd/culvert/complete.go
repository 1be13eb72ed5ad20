package main

import (
	"context"
	"os"
	"time"

	"github.com/spf13/cobra"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
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
