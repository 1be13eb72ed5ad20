package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// mountsEnv tells a command where the workload's files are.
const mountsEnv = "CULVERT_MOUNTS"

// temporaryMounts is --mounts without a directory.
const temporaryMounts = "-"

// Exit codes of env(1) and shells for a command that does not run.
const (
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignalled     = 128 // and the signal's number
)

type runOptions struct {
	from, container, mounts string
	env                     []string // NAME=value
	all                     bool
}

func (a *app) runCommand() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run --env-from KIND/NAME -- COMMAND [ARGUMENTS]",
		Short: "Run a command with a workload's environment",
		Long: `Run runs a command on this machine with the environment of a workload's
container laid over the caller's. What belongs to this machine (PATH, HOME and the
like) stays the caller's unless --all is given. With --mounts the ConfigMaps and
Secrets that the container mounts are files below the directory that
$CULVERT_MOUNTS names, which is removed at the end if culvert made it. Signals go
to the command, and its exit code is culvert's.`,
		Example: examples(a.name, `
culvert run --env-from deploy/web -- ./server
culvert run --env-from deploy/web --mounts -- sh -c 'cat $CULVERT_MOUNTS/etc/app/app.conf'
culvert run --env-from sts/db --container server --env LOG=debug -- go test ./...`),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			command, err := o.command(args, cmd.ArgsLenAtDash())
			if err != nil {
				return err
			}
			return a.runWith(cmd.Context(), o, command)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.from, "env-from", "", "the workload whose environment it is: deployment/NAME, statefulset/NAME, ...")
	f.StringVar(&o.container, "container", "", "the container that is meant (default: the only one, or the pod's default)")
	f.StringVar(&o.mounts, "mounts", "", "write the mounted ConfigMaps and Secrets below this directory (default: a temporary one)")
	f.Lookup("mounts").NoOptDefVal = temporaryMounts
	f.StringArrayVar(&o.env, "env", nil, "a further variable, NAME=VALUE; repeated")
	f.BoolVar(&o.all, "all", false, "take PATH, HOME and the like from the workload too")
	for _, free := range []string{"env-from", "container", "env"} {
		complete(cmd, free, fixedCompletion())
	}
	return cmd
}

// command checks the arguments, dash of which stand before "--" (-1: there is
// none), and returns those of the command. pflag takes the DIR of "--mounts DIR"
// for an argument, because --mounts may stand alone.
func (o *runOptions) command(args []string, dash int) ([]string, error) {
	const form = "culvert run --env-from deploy/web -- COMMAND ARGUMENTS"
	if o.from == "" {
		return nil, usageErrorf(form, "--env-from is missing")
	}
	if dash < 0 {
		return nil, usageErrorf("put -- before the command: "+form, "there is no command after --")
	}
	before, command := args[:dash], args[dash:]
	if o.mounts == temporaryMounts && len(before) == 1 {
		o.mounts, before = before[0], nil
	}
	switch {
	case len(before) > 0:
		return nil, usageErrorf(form, "%q stands before --", before[0])
	case len(command) == 0:
		return nil, usageErrorf(form, "there is no command after --")
	}
	for _, kv := range o.env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" || strings.ContainsRune(kv, 0) {
			return nil, usageErrorf("variables are NAME=VALUE, as in LOG=debug", "--env %q is no variable", kv)
		}
	}
	return command, nil
}

func (a *app) runWith(ctx context.Context, o runOptions, command []string) error {
	path, err := exec.LookPath(command[0])
	if err != nil && !errors.Is(err, exec.ErrDot) {
		return a.notRun(command[0], err)
	}
	// Until the command has the signals, an interrupt ends what is asked of the
	// cluster, and the files are removed.
	waiting, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	c, err := a.openCluster(waiting)
	if err != nil {
		return err
	}
	e, err := c.Environ(waiting, a.namespace, o.from, o.container)
	if err != nil {
		return err
	}
	vars, kept := overlay(os.Environ(), e.Vars, o.all)
	if o.mounts != "" {
		dir := o.mounts
		if dir == temporaryMounts {
			if dir, err = temporaryDir(); err != nil {
				return err
			}
			defer os.RemoveAll(dir)
		}
		if _, err := e.WriteMounts(waiting, dir); err != nil {
			return err
		}
		vars = append(vars, mountsEnv+"="+dir)
	}
	for _, n := range e.Notes {
		a.notice(n)
	}
	if len(kept) > 0 {
		a.notice(fmt.Sprintf("kept as on this machine: %s (--all takes the workload's)", printable(strings.Join(kept, ", "))))
	}
	cmd := exec.Command(path, command[1:]...)
	cmd.Args[0] = command[0]
	cmd.Env = append(vars, o.env...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.in, a.out, a.err
	return a.attend(cmd)
}

// temporaryDir is where files of Secrets are least in the way: in memory, where
// the machine has such a directory for the user.
func temporaryDir() (string, error) {
	dir, err := os.MkdirTemp(os.Getenv("XDG_RUNTIME_DIR"), "culvert-mounts-")
	if err != nil {
		dir, err = os.MkdirTemp("", "culvert-mounts-")
	}
	if err != nil {
		return "", fmt.Errorf("making a directory for the mounted files: %w", err)
	}
	return dir, nil
}

// passed are the signals that the command gets. Not SIGTSTP and its like: a
// terminal's job control stops both of them together.
var passed = []os.Signal{syscall.SIGINT, syscall.SIGQUIT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGWINCH}

// attend runs the command with the signals passed on and returns its exit code.
func (a *app) attend(cmd *exec.Cmd) error {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, passed...)
	defer signal.Stop(signals)
	if err := cmd.Start(); err != nil {
		return a.notRun(cmd.Args[0], err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case s := <-signals:
			if !a.fromTerminal(s) {
				_ = cmd.Process.Signal(s) // it has ended: so will this
			}
		case err := <-ended:
			return codeOfCommand(err)
		}
	}
}

// fromTerminal says whether the terminal sends a signal to the command by itself,
// since it is in the foreground like this process. A second interrupt would make
// many a program give up at once.
func (a *app) fromTerminal(s os.Signal) bool {
	if s != syscall.SIGINT && s != syscall.SIGQUIT && s != syscall.SIGWINCH {
		return false
	}
	group, err := unix.IoctlGetInt(int(a.in.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// codeOfCommand is the exit code of a command that ended, as a shell has it.
func codeOfCommand(err error) error {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &exit):
		return fmt.Errorf("waiting for the command: %w", err)
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return exitCode(exitSignalled + int(status.Signal()))
	}
	return exitCode(exit.ExitCode())
}

// notRun says why a command did not start.
func (a *app) notRun(name string, err error) error {
	code := exitNotExecutable
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		code = exitNotFound
	}
	a.printError(&api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("%s cannot be run: %v", name, innermost(err))})
	return exitCode(code)
}

// machineVars belong to the machine and its user: a workload's own would lead to
// files and programs that are not here.
var machineVars = []string{
	"PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "HOSTNAME", "TERM", "TMPDIR", "KUBECONFIG",
	"DISPLAY", "WAYLAND_DISPLAY", "SSH_AUTH_SOCK", "DBUS_SESSION_BUS_ADDRESS", "XDG_RUNTIME_DIR", "LD_LIBRARY_PATH", "LD_PRELOAD",
}

// overlay lays the workload's variables over those of the machine, and says which
// of them it did not take. Those of the Service "kubernetes" are left out as well:
// by them client libraries decide that they are in a pod, and then miss its token.
func overlay(machine []string, vars []cluster.Var, all bool) (env, kept []string) {
	env = slices.Clone(machine)
	for _, v := range vars {
		switch {
		case !all && slices.Contains(machineVars, v.Name):
			kept = append(kept, v.Name)
		case !all && v.ServiceLink("kubernetes"):
		case v.Name == "" || strings.Contains(v.Name, "=") || strings.ContainsRune(v.Value, 0):
			kept = append(kept, v.Name)
		default:
			env = append(env, v.Name+"="+v.Value)
		}
	}
	return env, kept
}
