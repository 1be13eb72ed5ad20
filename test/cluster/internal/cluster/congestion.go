package cluster

import (
	"errors"
	"fmt"
	"os"

	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/network"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Congestion sets the congestion control of TCP on the laptop, on every machine of
// the clusters and in every pod that is there now; "" gives back the kernel's
// default. A pod that comes later has the default.
func (s *Site) Congestion(name string) error {
	if !complete(s.SharedDir()) {
		return errors.New("nothing is up")
	}
	paths := []string{s.Netns("", plan.Laptop), s.Netns("", plan.LAN), s.Netns("", plan.Wan)}
	for _, c := range s.present() {
		for _, m := range c.Machines() {
			paths = append(paths, s.Netns(c.Name, m.Name))
			for _, pid := range machine.Members(s.Namespace(c.Name, m.Name)) {
				paths = append(paths, fmt.Sprintf("/proc/%d/ns/net", pid))
			}
		}
	}
	seen := map[string]bool{}
	for _, path := range paths {
		if id, err := os.Readlink(path); err == nil { // of a process; it may have ended
			if seen[id] {
				continue
			}
			seen[id] = true
		}
		n, err := network.Open(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		err = n.Congestion(name)
		n.Close()
		if err != nil {
			return err
		}
	}
	return nil
}
