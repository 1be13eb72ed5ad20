package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/culvert-dev/culvert/test/cluster/internal/cable"
	"github.com/culvert-dev/culvert/test/cluster/internal/network"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

// Link is the state of the laptop's link to the world.
type Link struct {
	cable.Faults
	Pods bool // the laptop reaches pods and nodes directly
}

// String describes the link.
func (l Link) String() string {
	if l.Pods {
		return l.Faults.String() + "; pods and nodes are reachable"
	}
	return l.Faults.String() + "; only the API servers are reachable"
}

func (s *Site) podsFile() string { return filepath.Join(s.SharedDir(), "pods-reachable") }

// Link returns the state of the laptop's link.
func (s *Site) Link() (Link, error) {
	if !complete(s.SharedDir()) {
		return Link{}, errors.New("nothing is up")
	}
	f, err := cable.Current(s.MachineDir("", plan.Wan))
	_, missing := os.Stat(s.podsFile())
	return Link{f, missing == nil}, err
}

// SetLink changes the laptop's link while it is in use.
func (s *Site) SetLink(change func(*Link)) (Link, error) {
	unlock, err := s.lock()
	if err != nil {
		return Link{}, err
	}
	defer unlock()
	old, err := s.Link()
	if err != nil {
		return Link{}, err
	}
	l := old
	change(&l)
	if l.Faults != old.Faults {
		if err := s.setFaults(old.Faults, l.Faults); err != nil {
			return l, err
		}
	}
	if l.Pods != old.Pods {
		if l.Pods {
			err = os.WriteFile(s.podsFile(), nil, 0o644)
		} else {
			err = os.Remove(s.podsFile())
		}
		if err != nil {
			return l, fmt.Errorf("record that pods are reachable: %w", err)
		}
		if err := s.refilter(s.present()); err != nil {
			return l, err
		}
		if !l.Pods { // what was let in must not live on
			if err := network.ForgetConnections(s.Site); err != nil {
				return l, err
			}
		}
	}
	return l, nil
}

// setFaults changes the cable. The laptop must send real frames, with
// checksums, before the cable copies them, and until it no longer does.
func (s *Site) setFaults(old, faults cable.Faults) error {
	laptop, err := network.Open(s.Netns("", plan.Laptop))
	if err != nil {
		return err
	}
	defer laptop.Close()
	offload := func(on bool) error {
		return laptop.Do(func() error { return cable.Offload("eth0", on) })
	}
	if old.Perfect() {
		if err := offload(false); err != nil {
			return err
		}
	}
	if err := cable.Set(s.MachineDir("", plan.Wan), faults); err != nil {
		return err
	}
	if faults.Perfect() {
		return offload(true)
	}
	return nil
}

// refilter loads wan's packet filter and routes for the given clusters.
func (s *Site) refilter(clusters []*plan.Cluster) error {
	_, missing := os.Stat(s.podsFile())
	pods := missing == nil
	if err := network.Filter(s.Site, clusters, pods); err != nil {
		return err
	}
	for _, c := range clusters {
		if err := network.OpenPods(s.Site, c, pods); err != nil {
			return err
		}
	}
	return nil
}
