package cluster

import (
	"fmt"
	"os"

	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Status tells what runs.
func (s *Site) Status() error {
	l, err := s.Link()
	if err != nil {
		fmt.Fprintln(s.Out, "nothing is up")
		return nil
	}
	fmt.Fprintf(s.Out, "laptop's link: %s\n%s\n", l, s.describe("", plan.Wan))
	for _, c := range plan.All() {
		if _, err := os.Stat(s.ClusterDir(c.Name)); err != nil {
			continue
		}
		state := "up"
		if !complete(s.ClusterDir(c.Name)) {
			state = "not complete"
		}
		fmt.Fprintf(s.Out, "\ncluster %s: %s, %s, pods %s, Services %s, domain %s\n", c.Name, state, c.Server(), c.Pods, c.Services, c.Domain)
		for _, m := range c.Machines() {
			fmt.Fprintln(s.Out, s.describe(c.Name, m.Name))
		}
		if out, err := s.kubectl(c, "", "get", "nodes,pods", "-A", "-o", "wide"); err != nil {
			fmt.Fprintln(s.Out, err)
		} else {
			fmt.Fprint(s.Out, out)
		}
	}
	return nil
}

func (s *Site) describe(cluster, name string) string {
	m, err := s.spec(cluster, name)
	if err != nil || machine.Alive(m) == 0 {
		return fmt.Sprintf("  %-6s down", name)
	}
	return fmt.Sprintf("  %-6s pid %d, %d processes, logs in %s", name, machine.Alive(m), len(machine.Members(m.Group)), m.LogDir())
}
