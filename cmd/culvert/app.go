package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
)

// Exit codes, as the README lists them.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

// app is one invocation of the command line: how it was called, where it reads
// and writes, and the flags that every command has. Nothing in it is shared
// between goroutines but what says so.
type app struct {
	name string // how usage texts call the program: "culvert" or "kubectl culvert"
	in   *os.File
	out  io.Writer
	err  io.Writer

	// started says that arguments were understood and a command runs: an error
	// before that is one of usage.
	started bool

	socket     string
	output     string
	debug      bool
	context    string
	namespace  string
	kubeconfig string
}

func newApp(arg0 string, in *os.File, out, err io.Writer) *app {
	return &app{name: displayName(arg0), in: in, out: out, err: err}
}

// displayName is what users type to get here. kubectl finds its plugins by
// their file name, kubectl-NAME.
func displayName(arg0 string) string {
	base := strings.TrimSuffix(filepath.Base(arg0), ".exe")
	if plugin, ok := strings.CutPrefix(base, "kubectl-"); ok {
		return "kubectl " + plugin
	}
	return "culvert"
}

// run executes one command line and returns the exit code.
func (a *app) run(ctx context.Context, args []string) int {
	root := a.rootCommand()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	var code exitCode
	if errors.As(err, &code) {
		return int(code)
	}
	if !a.started {
		if a.output == "" || a.output == "text" {
			a.output = outputArg(args) // parsing stopped before it came to --output
		}
		err = usageError(cmd, err)
	}
	a.printError(err)
	return codeOf(err)
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   strings.ReplaceAll(a.name, " ", "-"),
		Short: "Put this machine on a Kubernetes cluster's network",
		Long: `Culvert puts your whole machine on a Kubernetes cluster's network: pod IPs,
Service IPs and cluster names work from every program, through an unprivileged
pod that is reached over nothing but the Kubernetes API server.`,
		Example: examples(a.name, `
# join the cluster of the kubeconfig's current context
culvert connect

# see what is connected, measure the way, leave again
culvert status
culvert ping my-service
culvert disconnect

# find out why something does not work
culvert doctor`),
		// Shown in cobra's own words: any template of ours would link
		// text/template, which calls methods by name, so that the linker keeps all
		// methods of all types: 6 MB.
		Version:       version.Version,
		SilenceErrors: true,
		SilenceUsage:  true,
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: a.name},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := a.checkOutput(cmd); err != nil {
				return err
			}
			a.started = true
			return nil
		},
	}
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.SetGlobalNormalizationFunc(normaliseFlag)

	f := root.PersistentFlags()
	f.StringVar(&a.context, "context", "", "context of the kubeconfig (default: its current one)")
	f.StringVarP(&a.namespace, "namespace", "n", "", "namespace of the agent and of short names (default: the context's own)")
	f.StringVarP(&a.kubeconfig, "kubeconfig", "c", "", "path of the kubeconfig, or several as in KUBECONFIG")
	f.StringVarP(&a.output, "output", "o", "text", "text or json")
	f.BoolVarP(&a.debug, "debug", "d", false, "show more: every event of the daemon, the session's debug log")
	f.StringVar(&a.socket, "socket", "", "the daemon's Unix socket (default $"+api.SocketEnv+", then "+api.DefaultSocket+")")
	// kt-connect's switches may stand before the command. cobra must know that
	// they take no value, or it would take the command for one.
	addKtSwitches(root.Flags())

	complete(root, "context", a.completeContexts)
	complete(root, "namespace", a.completeNamespaces)
	complete(root, "output", fixedCompletion("text", "json"))

	root.AddCommand(a.connectCommand(), a.disconnectCommand(), a.statusCommand(), a.pingCommand(), a.peerCommand(),
		a.exchangeCommand(), a.meshCommand(), a.previewCommand(), a.exposeCommand(), a.leaveCommand(), a.listCommand(), a.recoverCommand(), a.cleanCommand(),
		a.logsCommand(), a.doctorCommand(), a.versionCommand(), a.sessionCommand(), a.loginCommand())
	root.AddCommand(a.envCommand(), a.runCommand(), a.forwardCommand())
	return root
}

// checkOutput refuses an --output that the command does not have.
func (a *app) checkOutput(cmd *cobra.Command) error {
	formats := []string{"text", "json"}
	if cmd.Annotations[wideOutput] != "" {
		formats = append(formats, "wide")
	}
	for _, f := range formats {
		if a.output == f {
			return nil
		}
	}
	bad := a.output
	a.output = "text"
	return &api.Error{
		Code:    api.CodeUsage,
		Message: fmt.Sprintf("--output %q is none of %s", bad, strings.Join(formats, ", ")),
		Hint:    fmt.Sprintf("%s --help", cmd.CommandPath()),
	}
}

// wideOutput annotates commands that have --output wide.
const wideOutput = "culvert/wide"

func (a *app) json() bool { return a.output == "json" }

// terminal says whether the writer is one that understands cursor movement.
func terminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd())) && os.Getenv("TERM") != "dumb"
}

// examples fits examples to the name of the program and indents them.
func examples(name, text string) string {
	text = strings.TrimSpace(text)
	lines := strings.Split(text, "\n")
	for i, l := range lines {
		if l == "" {
			continue
		}
		if rest, ok := strings.CutPrefix(l, "culvert "); ok {
			l = name + " " + rest
		}
		l = strings.ReplaceAll(l, "sudo culvert ", "sudo "+name+" ")
		lines[i] = "  " + l
	}
	return strings.Join(lines, "\n")
}
