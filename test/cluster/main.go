// Command testcluster runs real upstream Kubernetes clusters on one machine,
// with no Docker, no registry and no internet. See README.md.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/test/cluster/internal/cluster"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

func main() {
	if err := rootCommand().Execute(); err != nil {
		fmt.Fprintln(os.Stderr, "testcluster:", err)
		os.Exit(1)
	}
}

// options are the flags of all commands.
type options struct {
	state, bin, images, rbac, prefix string
	name, proxyMode                  string
}

// site finds everything relative to the executable, where no flag says otherwise.
func (o *options) site() (*cluster.Site, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find my own executable: %w", err)
	}
	s := &plan.Site{Prefix: o.prefix, Self: self, ProxyMode: o.proxyMode}
	dir := filepath.Dir(self)
	for _, p := range []struct {
		to         *string
		flag, path string
	}{
		{&s.State, o.state, ""},
		{&s.Bin, o.bin, filepath.Join(dir, "../test/cluster/bin")},
		{&s.Images, o.images, filepath.Join(dir, "../test/cluster/images")},
		{&s.RBAC, o.rbac, filepath.Join(dir, "../deploy/rbac")},
	} {
		if p.flag == "" {
			p.flag = p.path
		}
		if *p.to, err = filepath.Abs(p.flag); err != nil {
			return nil, fmt.Errorf("resolve %s: %w", p.flag, err)
		}
	}
	return cluster.New(s, os.Stdout), nil
}

// run makes a command's function from one that works on a site and a cluster.
func (o *options) run(f func(s *cluster.Site, c *plan.Cluster, args []string) error) func(*cobra.Command, []string) error {
	return func(_ *cobra.Command, args []string) error {
		s, err := o.site()
		if err != nil {
			return err
		}
		c, err := plan.Find(o.name)
		if err != nil {
			return err
		}
		return f(s, c, args)
	}
}

func rootCommand() *cobra.Command {
	o := &options{}
	root := &cobra.Command{
		Use:           "testcluster",
		Short:         "Run real Kubernetes clusters on one machine, without Docker, registry or internet",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&o.state, "state", "/var/lib/culvert-testcluster", "directory of all state")
	flags.StringVar(&o.prefix, "prefix", "culvert", "prefix of the names of namespaces and control groups")
	flags.StringVar(&o.bin, "bin", "", "directory of the components (default ../test/cluster/bin beside this program)")
	flags.StringVar(&o.images, "images", "", "directory of the images (default ../test/cluster/images beside this program)")
	flags.StringVar(&o.rbac, "rbac", "", "directory of the project's RBAC manifests (default ../deploy/rbac beside this program)")
	flags.StringVar(&o.name, "name", "a", "the cluster: a, with two nodes, or b, with one")
	root.AddCommand(upCommand(o), downCommand(o), statusCommand(o), kubeconfigCommand(o), loadCommand(o),
		execCommand(o), linkCommand(o), imageCommand(o), machineCommand())
	return root
}
