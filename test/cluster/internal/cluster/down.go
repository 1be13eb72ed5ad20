package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/network"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Down takes a cluster down, and what is shared when no other cluster needs it.
func (s *Site) Down(c *plan.Cluster) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.downCluster(c); err != nil {
		return err
	}
	if others := s.present(); len(others) > 0 {
		return s.refilter(others)
	}
	return s.downAll()
}

// DownAll takes everything down.
func (s *Site) DownAll() error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return s.downAll()
}

// downAll works from names, not from recorded state: it also cleans up after a
// run that was killed half-way.
func (s *Site) downAll() error {
	for _, c := range plan.All() {
		if err := s.downCluster(c); err != nil {
			return err
		}
	}
	for _, name := range []string{plan.Wan, plan.Laptop, plan.LAN} {
		if err := s.downMachine("", name); err != nil {
			return err
		}
	}
	if err := removeState(s.SharedDir()); err != nil {
		return err
	}
	os.Remove("/run/netns") // stays if someone else uses it
	if left, err := os.ReadDir(s.State); err == nil && len(left) == 1 && left[0].Name() == "lock" {
		os.Remove(filepath.Join(s.State, "lock"))
		os.Remove(s.State)
	}
	return nil
}

func (s *Site) downCluster(c *plan.Cluster) error {
	for _, m := range c.Machines() {
		if err := s.downMachine(c.Name, m.Name); err != nil {
			return err
		}
	}
	if err := network.DetachCluster(s.Site, c); err != nil {
		return err
	}
	return removeState(s.ClusterDir(c.Name))
}

// downMachine ends a machine's processes and removes its groups and its network namespace.
func (s *Site) downMachine(cluster, name string) error {
	if err := machine.Kill(s.Namespace(cluster, name)); err != nil {
		return err
	}
	return network.Remove(s.Netns(cluster, name))
}

// removeState removes a state directory. Nothing should be mounted below it,
// but removing through a mount would destroy what is mounted.
func removeState(dir string) error {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("list mounts: %w", err)
	}
	for _, point := range slices.Backward(mountsBelow(string(b), dir)) {
		if err := unix.Unmount(point, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("unmount %s: %w", point, err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove the state: %w", err)
	}
	return nil
}

// mountsBelow returns the mount points at or below dir in the text of mountinfo.
func mountsBelow(mountinfo, dir string) []string {
	var points []string
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if len(f) > 4 && (f[4] == dir || strings.HasPrefix(f[4], dir+"/")) {
			points = append(points, f[4])
		}
	}
	return points
}
