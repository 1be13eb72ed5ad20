package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/test/cluster/internal/network"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
	"github.com/culvert-dev/culvert/test/cluster/internal/render"
)

// kubectl runs kubectl as the cluster's administrator on its control plane.
func (s *Site) kubectl(c *plan.Cluster, stdin string, args ...string) (string, error) {
	cp, err := network.Open(s.Netns(c.Name, c.CP.Name))
	if err != nil {
		return "", err
	}
	defer cp.Close()
	command := append([]string{filepath.Join(s.Bin, "kubectl"), "--kubeconfig", s.Kubeconfig(c.Name, "admin")}, args...)
	return cp.Run(stdin, command...)
}

// retry calls f until it succeeds or the time is over.
func retry(what string, limit time.Duration, f func() error) error {
	deadline := time.Now().Add(limit)
	for {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s: not within %s: %w", what, limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// apply applies one of the rendered manifests.
func (s *Site) apply(c *plan.Cluster, manifests ...string) error {
	var all []string
	for _, m := range manifests {
		text, err := render.Manifest(s.Site, c, m)
		if err != nil {
			return err
		}
		all = append(all, text)
	}
	_, err := s.kubectl(c, strings.Join(all, "\n---\n"), "apply", "--server-side", "--force-conflicts", "-f", "-")
	return err
}

// applyRBAC applies the project's own roles, if there are any, and the bindings of the test users.
func (s *Site) applyRBAC(c *plan.Cluster) error {
	files, err := filepath.Glob(filepath.Join(s.RBAC, "*.yaml"))
	if err != nil {
		return fmt.Errorf("list the manifests in %s: %w", s.RBAC, err)
	}
	slices.Sort(files)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return fmt.Errorf("read a manifest: %w", err)
		}
		// The cluster is of use without them, too: tell and go on.
		if _, err := s.kubectl(c, string(b), "apply", "--server-side", "--force-conflicts", "-f", "-"); err != nil {
			s.say("warning: %s: %v", f, err)
		}
	}
	return s.apply(c, "rbac.yaml")
}

// awaitWorkloads waits until every pod that was asked for is ready.
func (s *Site) awaitWorkloads(c *plan.Cluster) error {
	workloads := []string{"kube-system deployment/coredns", "demo deployment/echo"}
	if !c.Small {
		workloads = append(workloads, "demo statefulset/web", "dev deployment/echo")
	}
	for _, w := range workloads {
		namespace, object, _ := strings.Cut(w, " ")
		if _, err := s.kubectl(c, "", "-n", namespace, "rollout", "status", object, "--timeout=120s"); err != nil {
			return fmt.Errorf("wait for %s: %w", w, err)
		}
	}
	return nil
}
