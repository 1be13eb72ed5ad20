package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/test/cluster/internal/cable"
	"github.com/culvert-dev/culvert/test/cluster/internal/cluster"
	"github.com/culvert-dev/culvert/test/cluster/internal/image"
	"github.com/culvert-dev/culvert/test/cluster/internal/machine"
	"github.com/culvert-dev/culvert/test/cluster/internal/plan"
)

func upCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{
		Use: "up", Short: "Bring a cluster up; harmless when it is up", Args: cobra.NoArgs,
		RunE: o.run(func(s *cluster.Site, c *plan.Cluster, _ []string) error {
			if err := s.Up(c); err != nil {
				return err
			}
			fmt.Fprintf(s.Out, "export KUBECONFIG=%s\n", s.Kubeconfig(c.Name, "admin"))
			return nil
		}),
	}
	cmd.Flags().StringVar(&o.proxyMode, "proxy-mode", "iptables", "kube-proxy's mode: iptables or nftables")
	return cmd
}

func downCommand(o *options) *cobra.Command {
	all := false
	cmd := &cobra.Command{
		Use: "down", Short: "Take a cluster down and leave nothing of it", Args: cobra.NoArgs,
		RunE: o.run(func(s *cluster.Site, c *plan.Cluster, _ []string) error {
			if all {
				return s.DownAll()
			}
			return s.Down(c)
		}),
	}
	cmd.Flags().BoolVar(&all, "all", false, "take every cluster down")
	return cmd
}

func statusCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "status", Short: "Tell what runs", Args: cobra.NoArgs,
		RunE: o.run(func(s *cluster.Site, _ *plan.Cluster, _ []string) error { return s.Status() }),
	}
}

func kubeconfigCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use:   "kubeconfig [" + strings.Join(cluster.Users, "|") + "]",
		Short: "Print the path of a user's kubeconfig (default admin)", Args: cobra.MaximumNArgs(1),
		RunE: o.run(func(s *cluster.Site, c *plan.Cluster, args []string) error {
			user := "admin"
			if len(args) > 0 {
				user = args[0]
			}
			if !slices.Contains(cluster.Users, user) {
				return fmt.Errorf("there is no user %q: there are %s", user, strings.Join(cluster.Users, ", "))
			}
			fmt.Fprintln(s.Out, s.Kubeconfig(c.Name, user))
			return nil
		}),
	}
}

func loadCommand(o *options) *cobra.Command {
	return &cobra.Command{
		Use: "load IMAGE.tar...", Short: "Import images into every node of a cluster", Args: cobra.MinimumNArgs(1),
		RunE: o.run(func(s *cluster.Site, c *plan.Cluster, args []string) error { return s.Load(c, args) }),
	}
}

func execCommand(o *options) *cobra.Command {
	inside := false
	cmd := &cobra.Command{
		Use: "exec MACHINE -- COMMAND...", Args: cobra.MinimumNArgs(2),
		Short: "Run a command in the network of laptop, lan, wan, cp, node1 or node2",
		Long: `Run a command in a machine's network namespace, with the machine's own
/etc/resolv.conf and the cluster's binaries first in PATH. With --inside (not
for laptop and lan) it runs in all of the machine's namespaces, as ctr needs.`,
		RunE: o.run(func(s *cluster.Site, c *plan.Cluster, args []string) error {
			command := args[1:]
			if command[0] == "--" {
				command = command[1:]
			}
			if len(command) == 0 {
				return errors.New("no command given")
			}
			return s.Exec(c, args[0], inside, command)
		}),
	}
	cmd.Flags().SetInterspersed(false)
	cmd.Flags().BoolVar(&inside, "inside", false, "enter all of the machine's namespaces")
	return cmd
}

func imageCommand(o *options) *cobra.Command {
	cmd := &cobra.Command{Use: "image", Short: "Build container images without a registry"}
	var i image.Image
	var out string
	build := &cobra.Command{
		Use: "build --name NAME -o FILE.tar HOST=/IN/IMAGE...", Args: cobra.MinimumNArgs(1),
		Short: `Build an image of files; "->TARGET=/IN/IMAGE" is a symbolic link`,
		RunE: func(_ *cobra.Command, args []string) error {
			i.Files = args
			return i.Write(out)
		},
	}
	f := build.Flags()
	f.StringVarP(&out, "output", "o", "", "tar file to write")
	f.StringVar(&i.Name, "name", "", "full name, registry/path:tag")
	f.StringSliceVar(&i.Entrypoint, "entrypoint", nil, "entry point, separated by commas")
	f.StringSliceVar(&i.Command, "cmd", nil, "default arguments, separated by commas")
	f.StringVar(&i.User, "user", "", "uid[:gid] to run as")
	build.MarkFlagRequired("output")
	// The persistent flag --name means the cluster; here it is shadowed by the image's name.
	standard := &cobra.Command{
		Use: "standard", Short: "Build the images that every node holds", Args: cobra.NoArgs,
		RunE: o.run(func(s *cluster.Site, _ *plan.Cluster, _ []string) error { return image.Standard(s.Bin, s.Images) }),
	}
	cmd.AddCommand(build, standard)
	return cmd
}

// machineCommand holds the steps that testcluster runs itself in processes of their own.
func machineCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "machine", Hidden: true}
	onSpec := func(f func(s *machine.Spec, args []string) error) func(*cobra.Command, []string) error {
		return func(_ *cobra.Command, args []string) error {
			s, err := machine.Load(args[0])
			if err != nil {
				return err
			}
			return f(s, args[1:])
		}
	}
	cmd.AddCommand(
		&cobra.Command{Use: "start SPEC", Args: cobra.ExactArgs(1), RunE: onSpec(func(s *machine.Spec, _ []string) error {
			self, err := filepath.EvalSymlinks("/proc/self/exe")
			if err != nil {
				return fmt.Errorf("find my own executable: %w", err)
			}
			return machine.Start(self, s)
		})},
		&cobra.Command{Use: "inside SPEC", Args: cobra.ExactArgs(1), RunE: onSpec(func(s *machine.Spec, _ []string) error {
			return machine.Inside(s)
		})},
		&cobra.Command{Use: "exec SPEC -- COMMAND...", Args: cobra.MinimumNArgs(2), RunE: onSpec(machine.EnterInside)},
		&cobra.Command{Use: "cable DIR", Args: cobra.ExactArgs(1), RunE: func(_ *cobra.Command, args []string) error {
			return cable.Run(args[0])
		}},
	)
	return cmd
}
