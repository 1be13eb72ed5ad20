package main

import (
	"crypto/rand"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// defaultMark is the header that marks requests where nobody says another.
const defaultMark = "VERSION"

func (a *app) meshCommand() *cobra.Command {
	f := interceptFlags{req: api.InterceptRequest{Kind: api.KindMesh}}
	var wait time.Duration
	var mark string
	var show bool
	cmd := &cobra.Command{
		Use:   "mesh SERVICE --expose LOCAL[:REMOTE]",
		Short: "Have only requests with a mark come to a local port",
		Long: `Mesh leads those HTTP requests of a Service to this machine that carry a mark, a header that
nobody else's have, and all others to the pods that serve them now. Many developers
can mesh one Service at once, each with a mark of his own. HTTP/1.1, HTTP/2 and
gRPC; each request counts by itself, also on one connection.

The mark is --version-mark, VERSION: and a random value without it. --match says more
exactly which requests come; given repeatedly, all must hold:
  header:NAME=VALUE    header:NAME=PREFIX*    header:NAME~REGEX
  cookie:NAME=VALUE    baggage:NAME=VALUE     (and * and ~ as above)
  path:/exactly        path:/prefix/*         path~REGEX
  method:GET,HEAD
Of two developers whose conditions hold for one request, the one with more exact
conditions gets it, then who came first.

While this machine does not answer, its requests go to the pods, too, unless --on-gone fail.

Where Istio governs the Service (a VirtualService names it, or its pods have Istio's proxy), or
Gateway API does (the Service is the parent of an HTTPRoute), a rule there leads marked requests
to a Service of your own before the gates, and no others come by them: --mode auto finds out.`,
		Example: examples(a.name, `
culvert mesh tomcat --expose 8080
culvert mesh tomcat --expose 8080 --version-mark alice
culvert mesh shop --expose 3000:80 --version-mark X-Dev:Feature/X
culvert mesh shop --expose 3000:80 --match cookie:dev=alice --match 'path:/api/*'
culvert mesh shop --expose 3000:80 --mode istio
culvert mesh shop --expose 8443:443 --tls-secret shop-tls
culvert mesh --show shop`),
		Args: exactlyOne("a Service", "tomcat --expose 8080"),
		ValidArgsFunction: func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
			if show && len(args) == 0 {
				return a.completeMeshed(cmd, args, word)
			}
			return a.completeServices(cmd, args, word)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if show {
				return a.showMesh(cmd.Context(), args[0])
			}
			f.req.Target, f.req.Wait = args[0], wait
			if err := f.checkMesh(a.name, mark); err != nil {
				return err
			}
			return f.run(cmd.Context(), a)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&mark, "version-mark", "", "the mark: `KEY:VALUE`, VALUE (of "+defaultMark+") or KEY: (a random value)")
	flags.StringArrayVar(&f.req.Match, "match", nil, "a `CONDITION` that requests must fulfil (see above); repeated: all of them")
	flags.StringVar(&f.req.Mode, "mode", api.ModeAuto, "who tells requests apart: router (culvert's own gates), istio (a rule in a VirtualService), gateway (in an HTTPRoute), manual (a rule of your own), or auto (see above)")
	flags.StringVar(&f.req.OnGone, "on-gone", api.OnGoneOrigin, "who answers your requests while this machine does not: origin, or fail (503)")
	flags.BoolVar(&f.req.TagResponses, "tag-responses", false, "add the header "+intercept.ServedByHeader+" to what this machine answers")
	flags.StringVar(&f.req.TLSSecret, "tls-secret", "", "a `SECRET` (kubernetes.io/tls) with what the Service's pods show: gates end TLS with it, and begin it again")
	flags.BoolVar(&show, "show", false, "show who meshes SERVICE, and what came to whom")
	flags.StringVar(&f.req.OnLocalRefused, "on-local-refused", api.OnRefusedOrigin, "who answers while nothing listens at LOCAL: origin, or refuse")
	flags.StringVar(&f.req.OnConflict, "on-conflict", api.OnConflictReplay, "when somebody else changes the Service meanwhile: reapply (3 times in 10 min at most), or leave it to them")
	flags.DurationVar(&wait, "wait", 0, "when somebody else has the mark: wait so long for its end")
	flags.DurationVar(&f.req.Drain, "drain", 0, "at the end: how long open requests have to end (default 30s)")
	f.add(cmd, true)
	complete(cmd, "mode", fixedCompletion(api.ModeAuto, api.ModeRouter, api.ModeIstio, api.ModeGateway, api.ModeManual))
	complete(cmd, "on-gone", fixedCompletion(api.OnGoneOrigin, api.OnGoneFail))
	complete(cmd, "on-local-refused", fixedCompletion(api.OnRefusedOrigin, api.OnRefusedRefuse))
	complete(cmd, "on-conflict", fixedCompletion(api.OnConflictReplay, api.OnConflictLeave))
	return cmd
}

// checkMesh refuses what can be seen to be wrong without a cluster, and adds the mark
// to the conditions.
func (f *interceptFlags) checkMesh(name, mark string) error {
	switch f.req.Mode {
	case api.ModeAuto, api.ModeRouter, api.ModeIstio, api.ModeGateway, api.ModeManual:
	default:
		return usageErrorf("auto, router, istio, gateway or manual", "--mode %q is unknown", f.req.Mode)
	}
	if g := f.req.OnGone; g != api.OnGoneOrigin && g != api.OnGoneFail {
		return usageErrorf("origin or fail", "--on-gone %q is unknown", g)
	}
	selector := *f
	selector.req.Mode = api.ModeSelector // what follows is as with exchange
	if len(f.req.Expose) == 0 {
		return usageErrorf(name+" mesh "+f.req.Target+" --expose 8080", "no --expose: which local port shall the requests come to?")
	}
	if err := selector.checkExchange(name); err != nil {
		return err
	}
	if mark != "" || len(f.req.Match) == 0 {
		c, err := markOf(mark)
		if err != nil {
			return err
		}
		f.req.Match = append([]string{c.String()}, f.req.Match...)
	}
	_, err := cluster.ParseMatch(f.req.Match)
	return err
}

// markOf reads --version-mark, as kt-connect has it: VALUE, KEY: or KEY:VALUE.
func markOf(mark string) (intercept.Condition, error) {
	key, value, both := strings.Cut(mark, ":")
	if !both {
		key, value = defaultMark, mark
	}
	key, value = strings.TrimSpace(key), strings.TrimSpace(value)
	if value == "" {
		value = randomMark()
	}
	c := intercept.Condition{On: intercept.OnHeader, Key: key, How: intercept.Exact, Value: value}
	if err := c.Check(); err != nil {
		return c, usageErrorf("--version-mark takes VALUE, KEY: or KEY:VALUE, such as "+defaultMark+":alice", "--version-mark %q: %v", mark, err)
	}
	return c, nil
}

// markLetters are easy to read and to type.
const markLetters = "abcdefghijkmnpqrstuvwxyz23456789"

// randomMark is a value that nobody else's requests have.
func randomMark() string {
	b := make([]byte, 5)
	_, _ = rand.Read(b) // never fails (crypto/rand, Go 1.24)
	for i := range b {
		b[i] = markLetters[int(b[i])%len(markLetters)]
	}
	return string(b)
}

// showMeshed tells what marks the requests that come here, how to make one, and what
// becomes of them without this machine.
func (a *app) showMeshed(i api.Intercept, onGone string, only bool) {
	match, err := cluster.ParseMatch(i.Match)
	if err != nil || len(match) == 0 {
		return // the session has read them
	}
	fmt.Fprintln(a.out, "Requests that come here have")
	header, expression := false, false
	for _, c := range match {
		text := c.String()
		if c.On == intercept.OnHeader && c.How == intercept.Exact {
			text = fmt.Sprintf("the header  %s: %s", c.Key, c.Value)
		}
		header = header || c.On == intercept.OnHeader || c.On == intercept.OnBaggage
		expression = expression || c.How == intercept.Regex
		fmt.Fprintln(a.out, "  "+text)
	}
	if len(i.Ports) > 0 && i.Mode != api.ModeManual {
		try := "Try it:"
		switch {
		case i.Mode == api.ModeIstio, i.Mode == api.ModeGateway:
			try = "Try it, from a pod that the rule holds for, such as one with Istio's proxy (it does not for this machine's own requests):"
		case only:
			try = "Try it, from a pod of the cluster or after `" + a.name + " connect`:"
		}
		if expression {
			try = strings.TrimSuffix(try, ":") + ", with what the expression matches for the dots:"
		}
		fmt.Fprintln(a.out, try)
		fmt.Fprintln(a.out, "  "+curlFor(match, i.Service, i.Namespace, i.Ports[0].Port))
	}
	if header {
		fmt.Fprintln(a.out, "In a browser an extension that sets request headers does it (ModHeader and others), or --match cookie:NAME=VALUE without one.")
	}
	for _, c := range match {
		if c.On == intercept.OnCookie && c.How != intercept.Regex {
			fmt.Fprintf(a.out, "In a browser's console on that site:  document.cookie = %q\n", c.Key+"="+sample(c)+"; path=/")
		}
	}
	fmt.Fprintln(a.out, "All others are served as before. New connections take the new way, within a second or so; open ones stay where they are until they close.")
	if onGone == api.OnGoneFail {
		fmt.Fprintln(a.out, "While this machine does not answer, its requests get status 503.")
	} else {
		fmt.Fprintln(a.out, "While this machine does not answer, its requests go to the Service's own pods, too.")
	}
}

// sample is a value that fulfils c; of an expression whoever wrote it knows one.
func sample(c intercept.Condition) string {
	switch {
	case c.How == intercept.Regex:
		return "..."
	case c.Value == "":
		return "x" // curl leaves out a header without a value
	}
	return c.Value
}

// curlFor is a command whose request fulfils exact conditions and prefixes.
func curlFor(match []intercept.Condition, service, namespace string, port int) string {
	args, path := []string{"curl"}, "/"
	var cookies, baggage, methods []string
	exactly := false
	for _, c := range match {
		switch c.On {
		case intercept.OnHeader:
			args = append(args, "-H", shellQuote(c.Key+": "+sample(c)))
		case intercept.OnCookie:
			cookies = append(cookies, c.Key+"="+sample(c))
		case intercept.OnBaggage: // percent-encoded (W3C Baggage, 3.3)
			baggage = append(baggage, c.Key+"="+strings.ReplaceAll(sample(c), "%", "%25"))
		case intercept.OnPath:
			switch {
			case exactly: // no other path fulfils it
			case c.How == intercept.Regex:
				if path == "/" {
					path = "/..."
				}
			case c.How == intercept.Exact || path == "/..." || len(c.Value) > len(path):
				path, exactly = c.Value, c.How == intercept.Exact
			}
		case intercept.OnMethod:
			these := strings.Split(c.Value, ",")
			if methods != nil {
				these = slices.DeleteFunc(these, func(m string) bool { return !slices.Contains(methods, m) })
			}
			methods = these
		}
	}
	if len(cookies) > 0 {
		args = append(args, "-b", shellQuote(strings.Join(cookies, "; ")))
	}
	if len(baggage) > 0 {
		args = append(args, "-H", shellQuote("baggage: "+strings.Join(baggage, ",")))
	}
	switch {
	case len(methods) == 0 || slices.Contains(methods, "GET"):
	case methods[0] == "HEAD":
		args = append(args, "-I") // with -X it would wait for a body
	default:
		args = append(args, "-X", shellQuote(methods[0]))
	}
	// What curl would do to a path of its own accord.
	if strings.ContainsAny(path, "[]{}") {
		args = append(args, "-g")
	}
	if strings.Contains(path+"/", "/./") || strings.Contains(path+"/", "/../") {
		args = append(args, "--path-as-is")
	}
	host := service + "." + namespace
	if port != 80 {
		host = net.JoinHostPort(host, strconv.Itoa(port))
	}
	return strings.Join(append(args, shellQuote("http://"+host+path)), " ")
}
