package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"regexp"
	"strings"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/culvert-dev/culvert/cluster"
)

// Formats of `culvert env`.
const (
	formatDotenv = "dotenv"
	formatExport = "export"
	formatJSON   = "json"
	formatYAML   = "yaml"
)

var envFormats = []string{formatDotenv, formatExport, formatJSON, formatYAML}

func (a *app) envCommand() *cobra.Command {
	var container, mounts, format, advertised string
	cmd := &cobra.Command{
		Use:   "env KIND/NAME",
		Short: "Print the environment of a workload's container",
		Long: `Env prints the variables that a container of the workload has: ConfigMaps,
Secrets and fields of its pod resolved, as the kubelet does it. With --mounts the
ConfigMaps and Secrets that it mounts are written as files, for this user only.
It needs no session, and the right to read what is asked for.

With --advertise it prints, without a workload, the variables by which a program
tells a registry the address of "culvert expose": docs/registries.md.`,
		Example: examples(a.name, `
culvert env deploy/web > .env
eval "$(culvert env deploy/web --format export)"
culvert env sts/db --container server --mounts ./mounts
culvert env --advertise nacos --format export`),
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer stop()
			format, err := oneOf("--format", format, envFormats)
			if err != nil {
				return err
			}
			if advertised != "" {
				if len(args) > 0 || container != "" || mounts != "" {
					return usageErrorf("leave one of them out", "--advertise is about this machine's exposed ports, and takes no workload, --container or --mounts")
				}
				return a.printAdvertised(ctx, advertised, format)
			}
			if len(args) == 0 {
				return usageErrorf(cmd.CommandPath()+" --help", "a workload is missing: deployment/NAME, statefulset/NAME, ...")
			}
			return a.env(ctx, args[0], container, mounts, format)
		},
	}
	cmd.Flags().StringVar(&container, "container", "", "the container that is meant (default: the only one, or the pod's default)")
	cmd.Flags().StringVar(&mounts, "mounts", "", "also write the mounted ConfigMaps and Secrets below this directory")
	cmd.Flags().StringVar(&format, "format", "", strings.Join(envFormats, ", ")+" (default dotenv)")
	cmd.Flags().StringVar(&advertised, "advertise", "", "print how to advertise this machine's exposed ports: "+strings.Join(registryNames(), ", ")+" or all")
	complete(cmd, "container", fixedCompletion())
	complete(cmd, "format", fixedCompletion(envFormats...))
	complete(cmd, "advertise", fixedCompletion(append(registryNames(), "all")...))
	return cmd
}

func (a *app) env(ctx context.Context, target, container, mounts, format string) error {
	c, err := a.openCluster(ctx)
	if err != nil {
		return err
	}
	e, err := c.Environ(ctx, a.namespace, target, container)
	if err != nil {
		return err
	}
	var written []string
	if mounts != "" {
		if written, err = e.WriteMounts(ctx, mounts); err != nil {
			return err
		}
	}
	if !a.json() {
		for _, n := range e.Notes {
			a.notice(n)
		}
		if err := a.printVars(e.Vars, format); err != nil {
			return err
		}
		if mounts != "" {
			a.notice(fmt.Sprintf("%d files written below %s", len(written), mounts))
		}
		return nil
	}
	return a.printIndented(struct {
		Namespace string        `json:"namespace"`
		Workload  string        `json:"workload"`
		Pod       string        `json:"pod,omitempty"`
		Container string        `json:"container"`
		Env       []cluster.Var `json:"env"`
		Mounts    []string      `json:"mounts,omitempty"`
		Notes     []string      `json:"notes,omitempty"`
	}{e.Namespace, e.Workload, e.Pod, e.Container, e.Vars, written, e.Notes})
}

// printVars writes the variables in one of envFormats.
func (a *app) printVars(vars []cluster.Var, format string) error {
	switch format {
	case formatJSON, formatYAML:
		values := map[string]string{}
		for _, v := range vars {
			values[v.Name] = v.Value
		}
		if format == formatJSON {
			return a.printIndented(values)
		}
		b, err := yaml.Marshal(values)
		if err != nil {
			return fmt.Errorf("writing the variables as YAML: %w", err)
		}
		_, err = a.out.Write(b)
		return err
	}
	var left []string
	for _, v := range vars {
		switch {
		case strings.ContainsRune(v.Value, 0), format == formatExport && !shellName.MatchString(v.Name), strings.ContainsAny(v.Name, "= \t\n#'\""):
			left = append(left, v.Name)
		case format == formatExport:
			fmt.Fprintf(a.out, "export %s=%s\n", v.Name, shellQuote(v.Value))
		default:
			fmt.Fprintf(a.out, "%s=%s\n", v.Name, dotenvQuote(v.Value))
		}
	}
	if len(left) > 0 {
		a.notice(fmt.Sprintf("left out, because this format cannot have them: %s (--format json can)", printable(strings.Join(left, ", "))))
	}
	return nil
}

var (
	shellName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)
	plain     = regexp.MustCompile(`^[A-Za-z0-9_./:@%+,-]*$`)
)

// shellQuote makes one word of POSIX sh that is s.
func shellQuote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// dotenvQuote quotes as little as possible: readers of such files agree on plain
// words and on single quotes, inside of which nothing is special. A value with a
// single quote needs double ones, with everything escaped that a shell or a
// reader of such files looks at there.
func dotenvQuote(s string) string {
	switch {
	case plain.MatchString(s):
		return s
	case !strings.Contains(s, "'"):
		return "'" + s + "'"
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, `$`, `\$`, "`", "\\`").Replace(s) + `"`
}
