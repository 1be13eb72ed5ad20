package cluster

import (
	"fmt"
	"path/filepath"
	"slices"

	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Exec replaces this process by a command on a machine. It returns only on an error.
func (s *Site) Exec(c *plan.Cluster, name string, inside bool, command []string) error {
	known := slices.ContainsFunc(c.Machines(), func(m plan.Machine) bool { return m.Name == name })
	if !known && !plan.Shared(name) {
		return fmt.Errorf("cluster %s has no machine %q", c.Name, name)
	}
	if inside {
		m, err := s.spec(c.Name, name)
		if err != nil {
			return fmt.Errorf("%s has no namespaces but its network's, or is not up: %w", name, err)
		}
		return machine.EnterInside(m, command)
	}
	resolv := filepath.Join(s.MachineDir(c.Name, name), "resolv.conf")
	return machine.Enter(s.Netns(c.Name, name), s.Namespace(c.Name, name), resolv, s.Bin, command)
}
