package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/culvert-dev/culvert/daemon/api"
)

const (
	hintLogin = "log in again (`kubectl get namespaces` shows whether kubectl may)"
	hintRBAC  = "an administrator can grant it: deploy/rbac/culvert.yaml has the roles; `culvert doctor` lists what is missing"
)

// translate makes what client-go and the network say into an *api.Error. doing
// says what was attempted ("listing nodes"). An *api.Error in err is returned
// as it is, nil stays nil.
func translate(doing string, err error) error {
	if err == nil {
		return nil
	}
	var known *api.Error
	if errors.As(err, &known) {
		return known
	}
	say := func(code, hint string) error {
		return &api.Error{Code: code, Message: doing + ": " + trim(err), Hint: hint}
	}
	var status apierrors.APIStatus
	if errors.As(err, &status) {
		return translateStatus(doing, err)
	}
	var (
		dns      *net.DNSError
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		invalid  x509.CertificateInvalidError
		record   tls.RecordHeaderError
		alert    tls.AlertError
		netErr   net.Error
		text     = err.Error()
	)
	switch {
	case strings.Contains(text, "getting credentials:") || strings.Contains(text, "exec plugin"):
		return say(api.CodeCredentials, "run the kubeconfig's exec plugin in a terminal, e.g. by `kubectl get namespaces`, then try again")
	case strings.Contains(text, "oauth2:") || strings.Contains(text, "No valid id-token"):
		return say(api.CodeCredentials, hintLogin)
	case errors.As(err, &dns):
		return say(api.CodeUnreachable, "check the server's name in the kubeconfig, and this machine's DNS or VPN")
	case errors.As(err, &unknown), errors.As(err, &hostname), errors.As(err, &invalid):
		return say(api.CodeUnreachable, "the certificate does not fit the kubeconfig's certificate-authority or server: is it the right cluster?")
	case errors.As(err, &alert):
		return say(api.CodeCredentials, "the server refused the client certificate; "+hintLogin)
	case errors.As(err, &record):
		return say(api.CodeUnreachable, "something that does not speak TLS answers at the kubeconfig's server address")
	case errors.Is(err, context.Canceled):
		return say(api.CodeCanceled, "")
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH),
		errors.Is(err, syscall.ECONNRESET), errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded),
		errors.As(err, &netErr), strings.Contains(text, "proxyconnect"):
		return say(api.CodeUnreachable, "check the network, VPN or proxy between this machine and the API server")
	}
	return say(api.CodeInternal, "")
}

// translateStatus maps what the API server answered.
func translateStatus(doing string, err error) error {
	text := trim(err)
	say := func(code, message, hint string) error {
		return &api.Error{Code: code, Message: doing + ": " + message, Hint: hint}
	}
	if apierrors.IsUnauthorized(err) {
		return say(api.CodeCredentials, "the API server does not accept the credentials ("+text+")", hintLogin)
	}
	if e := translateStatusText(doing, text); e.Code != api.CodeInternal {
		return e
	}
	switch {
	case apierrors.IsForbidden(err):
		return say(api.CodeForbidden, text, hintRBAC)
	case apierrors.IsInvalid(err), apierrors.IsBadRequest(err):
		return say(api.CodeUsage, text, "")
	case apierrors.IsServerTimeout(err), apierrors.IsTimeout(err), apierrors.IsServiceUnavailable(err),
		apierrors.IsTooManyRequests(err), apierrors.IsInternalError(err):
		return say(api.CodeUnreachable, text, "the API server is busy or restarting: try again")
	}
	return say(api.CodeInternal, text, "")
}

// translateStatusText knows the refusals of admission plugins, which come as
// text only: as an answer, or second-hand in a Deployment's conditions. What it
// does not know has CodeInternal.
func translateStatusText(doing, text string) *api.Error {
	has := func(parts ...string) bool {
		for _, part := range parts {
			if strings.Contains(text, part) {
				return true
			}
		}
		return false
	}
	e := &api.Error{Code: api.CodeNamespace, Message: doing + ": " + text}
	switch {
	case has("violates PodSecurity"):
		e.Hint = "the agent passes PodSecurity \"restricted\": is another policy at work? Else use another --namespace"
	case has("exceeded quota", "failed quota"):
		e.Hint = "use --pod-quota (e.g. 0.1c,128m) or another --namespace, or have the quota raised"
	case has("usage per Pod", "usage per Container", "limit to request ratio"):
		e.Hint = "a LimitRange of the namespace refuses the agent: use --pod-quota (e.g. 0.1c,128m) or another --namespace"
	case has("being terminated"):
		e.Hint = "use another --namespace"
	case has("admission webhook", "denied the request", "ValidatingAdmissionPolicy"):
		e.Hint = "a policy of the cluster refuses the agent: --labels, --annotations, --image or another --namespace may satisfy it"
	case has("error looking up service account"):
		e.Hint = "use --service-account NAME with one that exists"
	case has("namespaces \"") && has("not found"):
		e.Hint = "use --namespace with one that exists"
	default:
		e.Code = api.CodeInternal
	}
	return e
}

// trim makes client-go's nested messages short: "Get \"https://…?timeout=20s\": "
// says nothing that the caller's words do not.
func trim(err error) string {
	text := err.Error()
	for _, verb := range []string{"Get", "Post", "Put", "Patch", "Delete"} {
		if rest, ok := strings.CutPrefix(text, verb+` "`); ok {
			if _, after, ok := strings.Cut(rest, `": `); ok {
				text = after
			}
		}
	}
	const limit = 2000 // an HTML error page of a proxy is no message
	if len(text) > limit {
		text = text[:limit] + " …"
	}
	return text
}

// forbidden is the error for a verb that an access review denied.
func forbidden(c Check, user string) error {
	scope := "in the whole cluster"
	if c.Namespace != "" {
		scope = fmt.Sprintf("in namespace %q", c.Namespace)
	}
	who := "you"
	if user != "" {
		who = fmt.Sprintf("user %q", user)
	}
	return &api.Error{
		Code:    api.CodeForbidden,
		Message: fmt.Sprintf("%s may not %s %s %s", who, c.Verb, c.Resource, scope),
		Hint:    hintRBAC,
	}
}

// isMissingRight tells RBAC's refusal from an admission plugin's: both are 403.
func isMissingRight(err error) bool {
	if !apierrors.IsForbidden(err) {
		return false
	}
	// "pods is forbidden: User \"x\" cannot create resource \"pods\" in API group …"
	text := err.Error()
	return strings.Contains(text, "cannot ") && strings.Contains(text, "resource ")
}
