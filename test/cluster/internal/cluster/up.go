package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/network"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
	"github.com/culvert-dev/culvert/test/cluster/internal/render"
)

// Up brings a cluster up, and what is shared before it. A cluster that is up
// stays; one that is half dead is taken down first.
func (s *Site) Up(c *plan.Cluster) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := s.check(); err != nil {
		return err
	}
	if err := raiseInotify(); err != nil {
		return err
	}
	if err := s.upShared(); err != nil {
		return err
	}
	if s.healthy(c) {
		if err := s.applyRBAC(c); err != nil {
			return err
		}
		s.say("cluster %s is up", c.Name)
		return nil
	}
	if _, err := os.Stat(s.ClusterDir(c.Name)); err == nil {
		s.say("cluster %s is half up: taking it down first", c.Name)
		if err := s.downCluster(c); err != nil {
			return err
		}
	}
	return s.upCluster(c)
}

// check finds missing programs before anything is changed.
func (s *Site) check() error {
	if os.Getuid() != 0 {
		return errors.New("only root can bring up a cluster")
	}
	for _, f := range []string{
		filepath.Join(s.Bin, "kube-apiserver"), filepath.Join(s.Bin, "coredns"), filepath.Join(s.Bin, "testapp"),
		filepath.Join(s.Images, "pause.tar"),
	} {
		if _, err := os.Stat(f); err != nil {
			return fmt.Errorf("not built yet (make -C test/cluster build): %w", err)
		}
	}
	for _, f := range []string{"/usr/bin/containerd", "/usr/sbin/runc", "/usr/lib/cni/bridge", "/usr/sbin/nft", "/usr/sbin/iptables"} {
		if _, err := os.Stat(f); err != nil {
			return fmt.Errorf("a package is missing (make -C test/cluster packages): %w", err)
		}
	}
	return nil
}

// raiseInotify makes room for several kubelets and containerds: the default of
// 128 instances is too few.
func raiseInotify() error {
	const file, want = "/proc/sys/fs/inotify/max_user_instances", 1024
	b, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("read the inotify limit: %w", err)
	}
	if n, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && n >= want {
		return nil
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(want)), 0o644); err != nil {
		return fmt.Errorf("raise the inotify limit: %w", err)
	}
	return nil
}

// upShared brings up wan, laptop and lan.
func (s *Site) upShared() error {
	if complete(s.SharedDir()) {
		if s.alive("", plan.Wan) {
			return nil
		}
		s.say("wan is dead: starting it again")
		if err := machine.Kill(s.Namespace("", plan.Wan)); err != nil {
			return err
		}
		return s.launchWan()
	}
	if err := s.downAll(); err != nil { // what an interrupted run left
		return err
	}
	if err := os.MkdirAll(s.SharedDir(), 0o755); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	if err := network.BuildShared(s.Site); err != nil {
		return err
	}
	for _, name := range []string{plan.Laptop, plan.LAN, plan.Wan} {
		if err := s.writeResolv("", name, plan.HomeRouter); err != nil {
			return err
		}
	}
	if err := network.Filter(s.Site, nil, false); err != nil {
		return err
	}
	if err := s.launchWan(); err != nil {
		return err
	}
	s.say("wan and laptop")
	return setComplete(s.SharedDir())
}

func (s *Site) launchWan() error {
	m, err := render.Wan(s.Site)
	if err != nil {
		return err
	}
	if err := m.Save(); err != nil {
		return err
	}
	return machine.Launch(s.Self, m)
}

// writeResolv writes the resolv.conf that "exec" shows in a machine's network namespace.
func (s *Site) writeResolv(cluster, name string, router plan.Addrs) error {
	dir := s.MachineDir(cluster, name)
	err := os.MkdirAll(dir, 0o755)
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "resolv.conf"), []byte(render.Resolv(router)), 0o644)
	}
	if err != nil {
		return fmt.Errorf("write the resolv.conf of %s: %w", name, err)
	}
	return nil
}

// healthy says whether a cluster is up and answers.
func (s *Site) healthy(c *plan.Cluster) bool {
	if !complete(s.ClusterDir(c.Name)) {
		return false
	}
	for _, m := range c.Machines() {
		if !s.alive(c.Name, m.Name) {
			return false
		}
	}
	return retry("ready", 15*time.Second, func() error {
		_, err := s.kubectl(c, "", "get", "--raw", "/readyz")
		return err
	}) == nil
}

func (s *Site) upCluster(c *plan.Cluster) error {
	if err := os.MkdirAll(s.ClusterDir(c.Name), 0o755); err != nil {
		return fmt.Errorf("make the state directory: %w", err)
	}
	if err := s.writeKeys(c); err != nil {
		return err
	}
	if err := network.BuildCluster(s.Site, c); err != nil {
		return err
	}
	if err := s.refilter(append(s.present(), c)); err != nil {
		return err
	}
	s.say("keys and network")
	specs := []*machine.Spec{render.ControlPlane(s.Site, c)}
	for _, n := range c.Nodes {
		m, err := render.Node(s.Site, c, n)
		if err != nil {
			return err
		}
		specs = append(specs, m)
	}
	for _, m := range specs {
		if err := s.writeResolv(c.Name, m.Name, c.Gateway); err != nil {
			return err
		}
		if err := m.Save(); err != nil {
			return err
		}
		if err := machine.Launch(s.Self, m); err != nil {
			return err
		}
	}
	s.say("machines started")
	var imports sync.WaitGroup
	failed := make([]error, len(specs))
	for i, m := range specs[1:] { // while the API server starts
		imports.Go(func() { failed[i] = s.loadStandard(m) })
	}
	if err := retry("wait for the API server", 2*time.Minute, func() error {
		_, err := s.kubectl(c, "", "get", "--raw", "/readyz")
		return err
	}); err != nil {
		return err
	}
	s.say("API server ready")
	if err := retry("make the nodes", time.Minute, func() error { return s.apply(c, "nodes.yaml") }); err != nil {
		return err
	}
	if err := s.apply(c, "base.yaml", "demo.yaml"); err != nil {
		return err
	}
	if err := s.applyRBAC(c); err != nil {
		return err
	}
	imports.Wait()
	if err := errors.Join(failed...); err != nil {
		return err
	}
	s.say("images loaded")
	if _, err := s.kubectl(c, "", "wait", "--for=condition=Ready", "nodes", "--all", "--timeout=120s"); err != nil {
		return err
	}
	s.say("nodes ready")
	if err := s.awaitWorkloads(c); err != nil {
		return err
	}
	s.say("all pods ready")
	return setComplete(s.ClusterDir(c.Name))
}
