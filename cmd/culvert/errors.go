package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/nearest"
)

// exitCode ends the program with a code and says nothing: what there was to say
// is on the screen already, as after a ping without an answer.
type exitCode int

func (e exitCode) Error() string { return "exit code " + strconv.Itoa(int(e)) }

// codeOf is the exit code for an error.
func codeOf(err error) int {
	var e *api.Error
	if errors.As(err, &e) && e.Code == api.CodeUsage {
		return exitUsage
	}
	return exitFailed
}

// asError gives any error the form that users see.
func asError(err error) *api.Error {
	var e *api.Error
	if errors.As(err, &e) {
		return e
	}
	return &api.Error{Code: api.CodeInternal, Message: err.Error()}
}

// printError writes an error to stderr: the message and its hint on a line of
// its own, or one JSON object.
func (a *app) printError(err error) {
	e := asError(err)
	if a.json() {
		a.printJSONLine(a.err, map[string]*api.Error{"error": e})
		return
	}
	fmt.Fprintf(a.err, "culvert: %s\n", e.Message)
	if e.Hint != "" {
		fmt.Fprintln(a.err, e.Hint)
	}
}

// notice tells the user something that is neither result nor error.
func (a *app) notice(text string) {
	if a.json() {
		a.printJSONLine(a.err, map[string]string{"notice": text})
		return
	}
	fmt.Fprintf(a.err, "note: %s\n", text)
}

func (a *app) printJSONLine(w interface{ Write([]byte) (int, error) }, v any) {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	_ = enc.Encode(v) // a closed stdout or stderr leaves nobody to tell
}

// usageErrorf makes an error of bad input, exit code 2.
func usageErrorf(hint, format string, args ...any) error {
	return &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf(format, args...), Hint: hint}
}

// usageError makes one of what cobra and pflag say, with the nearest flag or
// command that exists.
func usageError(cmd *cobra.Command, err error) error {
	var e *api.Error
	if errors.As(err, &e) {
		return e
	}
	message, _, _ := strings.Cut(err.Error(), "\n") // cobra appends suggestions of its own
	hint := cmd.CommandPath() + " --help lists what there is"
	if near := nearestFlag(cmd, message); near != "" {
		hint = "did you mean " + near + "? " + hint
	} else if near := nearestCommand(cmd, message); near != "" {
		hint = "did you mean `" + cmd.Root().CommandPath() + " " + near + "`? " + hint
	}
	return &api.Error{Code: api.CodeUsage, Message: message, Hint: hint}
}

// nearestFlag finds the flag that an "unknown flag: --x" may have meant.
func nearestFlag(cmd *cobra.Command, message string) string {
	name, ok := strings.CutPrefix(message, "unknown flag: --")
	if !ok {
		return ""
	}
	var known []string
	for _, f := range flagNames(cmd) {
		known = append(known, f)
	}
	if near := nearest.Of(kebab(name), known); near != "" {
		return "--" + near
	}
	return ""
}

// nearestCommand finds the command that an `unknown command "x" for ...` may
// have meant.
func nearestCommand(cmd *cobra.Command, message string) string {
	rest, ok := strings.CutPrefix(message, `unknown command "`)
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, `"`)
	var known []string
	for _, c := range cmd.Root().Commands() {
		if !c.Hidden {
			known = append(known, c.Name())
		}
	}
	return nearest.Of(name, known)
}

// outputArg finds --output json in arguments that could not be parsed.
func outputArg(args []string) string {
	for i, arg := range args {
		switch {
		case arg == "--":
			return "text"
		case arg == "-ojson", arg == "-o=json", arg == "--output=json":
			return "json"
		case (arg == "-o" || arg == "--output") && i+1 < len(args) && args[i+1] == "json":
			return "json"
		}
	}
	return "text"
}
