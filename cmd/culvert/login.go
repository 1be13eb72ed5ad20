package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
)

// requestTimeout bounds one request to the API server. It does not bound a
// credentials plugin, which may wait for the user to finish a login elsewhere.
const requestTimeout = 10 * time.Second

// login finds the target of options and makes one authenticated request to its
// API server, with the terminal attached: a plugin that wants to ask the user
// something does it now, and its cached answer serves the session, which has no
// terminal. It changes nothing.
func (a *app) login(ctx context.Context, c *caller, o api.Options) (*target, error) {
	if c.sudo {
		return a.loginAs(ctx, c, o)
	}
	t, err := newTarget(o, c.env, c.home)
	if err != nil {
		return nil, err
	}
	t.User, err = whoAmI(ctx, t, term.IsTerminal(int(a.in.Fd())))
	return t, err
}

// loginAs does the same in a process of the user behind sudo: neither kubeconfig
// nor plugin is touched by root.
func (a *app) loginAs(ctx context.Context, c *caller, o api.Options) (*target, error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "login", "--output=json",
		"--kubeconfig="+o.Kubeconfig, "--context="+o.Context, "--namespace="+o.Namespace)
	cmd.Args[0] = os.Args[0]
	cmd.Env = c.env
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(c.uid), Gid: uint32(c.gid), Groups: c.groups}}
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.in, &out, a.err
	err := cmd.Run()
	var answer struct {
		Target *target    `json:"target"`
		Error  *api.Error `json:"error"`
	}
	if e := json.Unmarshal(out.Bytes(), &answer); e != nil {
		return nil, fmt.Errorf("reading the kubeconfig as user %d: %w", c.uid, errors.Join(err, e))
	}
	if answer.Error != nil {
		return nil, answer.Error
	}
	return answer.Target, nil
}

// loginCommand is the process that loginAs starts. Its answer is on stdout,
// errors too: stderr belongs to the credentials plugin.
func (a *app) loginCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "login",
		Short:  "Make one authenticated request to the API server",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := currentCaller(a.name)
			var t *target
			if err == nil {
				t, err = a.login(cmd.Context(), c, api.Options{Kubeconfig: a.kubeconfig, Context: a.context, Namespace: a.namespace})
			}
			if !a.json() {
				if err == nil {
					fmt.Fprintf(a.out, "Logged in to %s as %s.\n", t.Server, t.User)
				}
				return err
			}
			if err != nil {
				a.printJSONLine(a.out, map[string]any{"error": asError(err)})
				return exitCode(codeOf(err))
			}
			a.printJSONLine(a.out, map[string]any{"target": t})
			return nil
		},
	}
}

// whoAmI asks the API server for the caller's name with a SelfSubjectReview,
// which every authenticated user may create (Kubernetes 1.28 and later); older
// servers are asked for their version, which needs valid credentials too as soon
// as some are sent.
func whoAmI(ctx context.Context, t *target, terminal bool) (string, error) {
	if needsTerminal(t.auth) && !terminal {
		return "", &api.Error{
			Code:    api.CodeCredentials,
			Message: fmt.Sprintf("the credentials plugin %q of context %q always needs a terminal (interactiveMode: Always), and standard input is none", t.auth.Exec.Command, t.Context),
			Hint:    "run the command in a terminal, or set interactiveMode: IfAvailable in the kubeconfig",
		}
	}
	client, err := t.client()
	if err != nil {
		return "", err
	}
	review, err := client.SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	switch {
	case err == nil:
		if name := review.Status.UserInfo.Username; name != "system:anonymous" {
			return name, nil
		}
		return "", &api.Error{
			Code:    api.CodeCredentials,
			Message: fmt.Sprintf("the API server %s takes context %q for nobody (system:anonymous): it sends no credentials that the server knows", t.Server, t.Context),
			Hint:    "log in as for kubectl; `kubectl auth whoami` shows who you are",
		}
	case apierrors.IsNotFound(err), apierrors.IsForbidden(err), apierrors.IsMethodNotSupported(err):
		err = client.Version(ctx)
		if err == nil || apierrors.IsForbidden(err) {
			return "", nil
		}
	}
	return "", t.explain(err)
}

func needsTerminal(auth *clientcmdapi.AuthInfo) bool {
	return auth != nil && auth.Exec != nil && auth.Exec.InteractiveMode == clientcmdapi.AlwaysExecInteractiveMode
}

// client is a client of the target's API server that gives up on a request
// after requestTimeout.
func (t *target) client() (*cluster.Client, error) {
	config, err := t.config.ClientConfig()
	if err != nil {
		return nil, &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("context %q of the kubeconfig cannot be used: %v", t.Context, err), Hint: "`kubectl config view` shows it"}
	}
	config.UserAgent = "culvert/" + version.Version
	// Innermost: the time that a credentials plugin takes is not counted.
	config.Wrap(func(rt http.RoundTripper) http.RoundTripper { return timeLimited{rt} })
	client, err := cluster.NewClient(config)
	if err != nil {
		return nil, &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("context %q of the kubeconfig cannot be used: %v", t.Context, err), Hint: "`kubectl config view` shows it"}
	}
	return client, nil
}

// timeLimited gives a response requestTimeout to begin.
type timeLimited struct{ http.RoundTripper }

func (rt timeLimited) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(r.Context())
	timer := time.AfterFunc(requestTimeout, func() { cancel(errSlow) })
	resp, err := rt.RoundTripper.RoundTrip(r.WithContext(ctx))
	if !timer.Stop() && err != nil {
		return nil, errSlow
	}
	return resp, err // the context ends with the command
}

// WrappedRoundTripper lets client-go find the transport below.
func (rt timeLimited) WrappedRoundTripper() http.RoundTripper { return rt.RoundTripper }

var errSlow = fmt.Errorf("no answer within %v", requestTimeout)

// explain says what an error of the first request means.
func (t *target) explain(err error) error {
	var network net.Error
	switch {
	case errors.Is(err, context.Canceled):
		return &api.Error{Code: api.CodeCanceled, Message: "cancelled"}
	case apierrors.IsUnauthorized(err):
		return &api.Error{
			Code:    api.CodeCredentials,
			Message: fmt.Sprintf("the API server %s refuses the credentials of context %q (401): they have expired or are wrong", t.Server, t.Context),
			Hint:    "log in as for kubectl; `kubectl auth whoami` shows when it works",
		}
	case strings.Contains(err.Error(), "getting credentials"):
		hint := "run `kubectl auth whoami`, which runs the same plugin"
		if t.auth != nil && t.auth.Exec != nil && t.auth.Exec.InstallHint != "" {
			hint = strings.TrimSpace(t.auth.Exec.InstallHint)
		}
		_, reason, _ := strings.Cut(err.Error(), "getting credentials: ")
		reason, _, _ = strings.Cut(reason, "\n") // client-go appends the install hint
		return &api.Error{
			Code:    api.CodeCredentials,
			Message: fmt.Sprintf("the credentials plugin of context %q gave none: %s", t.Context, reason),
			Hint:    hint,
		}
	case strings.Contains(err.Error(), "x509:"), strings.Contains(err.Error(), "tls:"):
		return &api.Error{
			Code:    api.CodeUnreachable,
			Message: fmt.Sprintf("the API server %s of context %q shows a certificate that the kubeconfig does not trust: %v", t.Server, t.Context, innermost(err)),
			Hint:    "compare certificate-authority of the kubeconfig; something on the way may be answering in its place",
		}
	case errors.As(err, &network), errors.Is(err, errSlow), strings.Contains(err.Error(), "connection refused"):
		return &api.Error{
			Code:    api.CodeUnreachable,
			Message: fmt.Sprintf("the API server %s of context %q cannot be reached: %v", t.Server, t.Context, innermost(err)),
			Hint:    "does `kubectl version` answer? A VPN or HTTPS_PROXY may be missing",
		}
	default:
		return &api.Error{Code: api.CodeUnreachable, Message: fmt.Sprintf("asking the API server %s of context %q who we are: %v", t.Server, t.Context, err), Hint: "does `kubectl version` answer?"}
	}
}

// innermost is the error without what client-go and net/http wrap around it.
func innermost(err error) error {
	for {
		next := errors.Unwrap(err)
		if op := (*net.OpError)(nil); next == nil || errors.As(err, &op) && err == error(op) {
			return err
		}
		err = next
	}
}
