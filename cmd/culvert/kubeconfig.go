package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/culvert-dev/culvert/daemon/api"
)

// target is what of a kubeconfig a connect uses. `culvert login` prints it.
type target struct {
	Kubeconfig string `json:"kubeconfig"` // absolute paths, in KUBECONFIG's syntax
	Context    string `json:"context"`
	Namespace  string `json:"namespace"`
	Server     string `json:"server"`
	User       string `json:"user,omitempty"` // who the API server says this is

	config clientcmd.ClientConfig
	auth   *clientcmdapi.AuthInfo
}

// kubeconfigPaths are the files to read, absolute: those of the flag, else of
// KUBECONFIG, else ~/.kube/config. The session has another working directory
// than the caller, and after a boot no KUBECONFIG.
func kubeconfigPaths(flag string, env environment, home string) ([]string, error) {
	list := flag
	if list == "" {
		list = env.get("KUBECONFIG")
	}
	var paths []string
	for _, p := range filepath.SplitList(list) {
		if p == "" {
			continue
		}
		abs, err := filepath.Abs(p)
		if err != nil {
			return nil, fmt.Errorf("making the kubeconfig's path %s absolute: %w", p, err)
		}
		paths = append(paths, abs)
	}
	if len(paths) == 0 && home != "" {
		paths = []string{filepath.Join(home, ".kube", "config")}
	}
	return paths, nil
}

// loadKubeconfig merges the files as kubectl does: the first one to set a value
// wins. Files that do not exist are passed over as long as one does.
func loadKubeconfig(flag string, env environment, home string) (*clientcmdapi.Config, []string, error) {
	paths, err := kubeconfigPaths(flag, env, home)
	if err != nil {
		return nil, nil, err
	}
	const hint = "name the file with --kubeconfig PATH or KUBECONFIG"
	found := false
	for _, p := range paths {
		f, err := os.Open(p)
		switch {
		case err == nil:
			f.Close()
			found = true
		case !errors.Is(err, fs.ErrNotExist):
			return nil, nil, &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("kubeconfig %s cannot be read: %v", p, errors.Unwrap(err)), Hint: hint}
		}
	}
	if !found {
		where := strings.Join(paths, " nor ")
		if where == "" {
			where = "HOME is not set, so ~/.kube/config"
		}
		return nil, nil, &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("there is no kubeconfig: %s does not exist", where), Hint: hint}
	}
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: paths}
	config, err := rules.Load()
	if err != nil {
		return nil, nil, &api.Error{Code: api.CodeKubeconfig, Message: "the kubeconfig cannot be understood: " + err.Error(), Hint: "`kubectl config view` reads the same files"}
	}
	return config, paths, nil
}

// newTarget chooses context and namespace as kubectl does.
func newTarget(o api.Options, env environment, home string) (*target, error) {
	config, paths, err := loadKubeconfig(o.Kubeconfig, env, home)
	if err != nil {
		return nil, err
	}
	list := strings.Join(paths, string(filepath.ListSeparator))
	name := o.Context
	if name == "" {
		name = config.CurrentContext
	}
	have := "contexts: " + strings.Join(contextNames(config), ", ")
	if len(config.Contexts) == 0 {
		have = "it has none; `kubectl config set-context` makes one"
	}
	if name == "" {
		return nil, &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("the kubeconfig %s has no current context", list), Hint: "name one with --context; " + have}
	}
	kubeContext, ok := config.Contexts[name]
	if !ok {
		return nil, &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("the kubeconfig %s has no context %q", list, name), Hint: have}
	}
	cluster, ok := config.Clusters[kubeContext.Cluster]
	if !ok {
		return nil, &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("context %q names the cluster %q, which the kubeconfig %s does not have", name, kubeContext.Cluster, list), Hint: "`kubectl config get-clusters` lists those it has"}
	}
	auth, ok := config.AuthInfos[kubeContext.AuthInfo]
	if !ok && kubeContext.AuthInfo != "" {
		return nil, &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("context %q names the user %q, which the kubeconfig %s does not have", name, kubeContext.AuthInfo, list), Hint: "`kubectl config get-users` lists those it has"}
	}
	t := &target{Kubeconfig: list, Context: name, Namespace: o.Namespace, Server: cluster.Server, auth: auth}
	if t.Namespace == "" {
		t.Namespace = kubeContext.Namespace
	}
	if t.Namespace == "" {
		t.Namespace = "default"
	}
	t.config = clientcmd.NewNonInteractiveClientConfig(*config, name, &clientcmd.ConfigOverrides{}, nil)
	return t, nil
}

func contextNames(config *clientcmdapi.Config) []string {
	var names []string
	for name := range config.Contexts {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}
