package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Load imports image tars into every node of a cluster.
func (s *Site) Load(c *plan.Cluster, tars []string) error {
	failed := make([]error, len(c.Nodes))
	var all sync.WaitGroup
	for i, n := range c.Nodes {
		m, err := s.spec(c.Name, n.Name)
		if err != nil {
			return fmt.Errorf("cluster %s is not up: %w", c.Name, err)
		}
		all.Go(func() { failed[i] = s.load(m, tars) })
	}
	all.Wait()
	return errors.Join(failed...)
}

// loadStandard waits for a node's containerd and imports the images that every node holds.
func (s *Site) loadStandard(m *machine.Spec) error {
	tars, err := filepath.Glob(filepath.Join(s.Images, "*.tar"))
	if err != nil {
		return fmt.Errorf("list the images: %w", err)
	}
	err = retry("wait for containerd on "+m.Name, time.Minute, func() error {
		return machine.Command(s.Self, m, "ctr", "version").Run()
	})
	if err != nil {
		return err
	}
	return s.load(m, tars)
}

func (s *Site) load(m *machine.Spec, tars []string) error {
	for _, t := range tars {
		f, err := os.Open(t)
		if err != nil {
			return fmt.Errorf("open an image: %w", err)
		}
		cmd := machine.Command(s.Self, m, "ctr", "-n", "k8s.io", "images", "import", "-")
		cmd.Stdin = f
		out, err := cmd.CombinedOutput()
		f.Close()
		if err != nil {
			return fmt.Errorf("import %s on %s: %w: %s", t, m.Name, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}
