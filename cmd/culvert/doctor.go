package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
)

// verdict is how a check of the doctor came out.
type verdict string

const (
	good verdict = "ok"
	warn verdict = "warn" // connect works, with less
	bad  verdict = "fail" // connect does not work
	skip verdict = "skip" // could not be checked because of an earlier failure
)

// finding is the outcome of one check; with -o json a list of them is printed.
type finding struct {
	Check   string  `json:"check"`
	Verdict verdict `json:"verdict"`
	Message string  `json:"message"`
	Fix     string  `json:"fix,omitempty"` // the command or flag that mends it
}

func (a *app) doctorCommand() *cobra.Command {
	var o optionFlags
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Find out what keeps this machine from a cluster",
		Long: `Doctor checks what connect needs, on this machine and in the cluster, and says
for each thing that is wrong the command that mends it. It takes connect's flags
and changes nothing. It exits 1 when connect would not work.`,
		Example: examples(a.name, `
culvert doctor
culvert doctor --context staging -n shop
culvert doctor --exclude-ips 10.96.7.0/24 -o json`),
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			opts, err := a.options(&o)
			if err != nil {
				return err
			}
			ctx, stop := signal.NotifyContext(cmd.Context(), os.Interrupt)
			defer stop()
			c, err := currentCaller(a.name)
			if err == nil && c.sudo {
				return a.doctorAs(ctx, c)
			}
			return a.doctor(ctx, c, opts)
		},
	}
	o.add(cmd)
	return cmd
}

// doctorAs runs the same command as the user behind sudo: what is to be checked
// is what that user may do.
func (a *app) doctorAs(ctx context.Context, c *caller) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = c.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.gid), Groups: c.groups}}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.in, a.out, a.err
	err := cmd.Run()
	if cmd.ProcessState != nil && cmd.ProcessState.Exited() {
		if code := cmd.ProcessState.ExitCode(); code != 0 {
			return exitCode(code)
		}
		return nil
	}
	return err
}

// doctor runs all checks. c is nil for root alone, which is a finding itself.
func (a *app) doctor(ctx context.Context, c *caller, opts api.Options) error {
	e := &examination{app: a, client: api.New(a.socket), caller: c, opts: opts, report: a.findingPrinter()}
	e.machine(ctx)
	if c != nil {
		e.cluster(ctx)
	}
	e.network(ctx)
	return e.conclude()
}

// findingPrinter shows findings as they come; JSON is printed as a whole at the
// end.
func (a *app) findingPrinter() func(finding) {
	if a.json() {
		return func(finding) {}
	}
	return func(f finding) { printFinding(a.out, f) }
}

func printFinding(w io.Writer, f finding) {
	fmt.Fprintf(w, "%-4s  %-12s  %s\n", f.Verdict, f.Check, printable(f.Message))
	if f.Fix != "" && f.Verdict != good {
		fmt.Fprintf(w, "      %-12s  -> %s\n", "", printable(f.Fix))
	}
}

// examination is one run of the doctor: the checks append to findings, in order.
type examination struct {
	app    *app
	client *api.Client
	caller *caller
	opts   api.Options
	report func(finding)

	findings []finding
	facts    *api.Facts   // nil: the daemon does not answer
	session  *api.Session // the caller's session of the target, if connected
	plan     []api.Route  // what connect would route; nil: not known
	target   *target      // nil: no usable kubeconfig
}

func (e *examination) add(check string, v verdict, fix, format string, args ...any) {
	f := finding{Check: check, Verdict: v, Message: fmt.Sprintf(format, args...), Fix: fix}
	e.findings = append(e.findings, f)
	e.report(f)
}

// addError reports an error; its hint is the fix.
func (e *examination) addError(check string, v verdict, err error) {
	ae := asError(err)
	e.add(check, v, ae.Hint, "%s", ae.Message)
}

// conclude prints the sum and chooses the exit code.
func (e *examination) conclude() error {
	count := map[verdict]int{}
	for _, f := range e.findings {
		count[f.Verdict]++
	}
	if e.app.json() {
		e.app.printJSONLine(e.app.out, map[string]any{"ok": count[bad] == 0, "findings": e.findings})
	} else {
		parts := []string{fmt.Sprintf("%d ok", count[good])}
		for _, v := range []verdict{warn, bad, skip} {
			if count[v] > 0 {
				parts = append(parts, fmt.Sprintf("%d %s", count[v], v))
			}
		}
		fmt.Fprintln(e.app.out, strings.Join(parts, ", "))
	}
	if count[bad] > 0 {
		return exitCode(exitFailed)
	}
	return nil
}
