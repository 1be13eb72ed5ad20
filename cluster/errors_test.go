package cluster

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"syscall"
	"testing"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/culvert-dev/culvert/daemon/api"
)

func TestTranslate(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	refused := &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
	get := func(err error) error {
		return &url.Error{Op: "Get", URL: "https://x:6443/version?timeout=20s", Err: err}
	}
	status := func(code int32, reason metav1.StatusReason, text string) error {
		return &apierrors.StatusError{ErrStatus: metav1.Status{Code: code, Reason: reason, Message: text}}
	}
	for _, test := range []struct {
		name string
		err  error
		code string
		says string
	}{
		{"401", apierrors.NewUnauthorized("token expired"), api.CodeCredentials, "token expired"},
		{"403 by RBAC", apierrors.NewForbidden(pods, "", errors.New(`User "x" cannot list resource "pods"`)), api.CodeForbidden, "deploy/rbac"},
		{"403 by quota", apierrors.NewForbidden(pods, "a", errors.New("exceeded quota: q, requested: pods=1")), api.CodeNamespace, "--pod-quota"},
		{"403 by PodSecurity", apierrors.NewForbidden(pods, "a", errors.New(`violates PodSecurity "restricted:latest": x`)), api.CodeNamespace, "violates PodSecurity"},
		{"403 by webhook", status(403, metav1.StatusReasonForbidden, `admission webhook "p.example" denied the request: no`), api.CodeNamespace, "p.example"},
		{"404 of a namespace", apierrors.NewNotFound(schema.GroupResource{Resource: "namespaces"}, "nope"), api.CodeNamespace, "--namespace"},
		{"terminating", status(403, metav1.StatusReasonForbidden, "unable to create new content in namespace x because it is being terminated"), api.CodeNamespace, "terminated"},
		{"503", apierrors.NewServiceUnavailable("etcd"), api.CodeUnreachable, "etcd"},
		{"refused", get(refused), api.CodeUnreachable, "connection refused"},
		{"timeout", get(context.DeadlineExceeded), api.CodeUnreachable, "deadline"},
		{"canceled", get(context.Canceled), api.CodeCanceled, "canceled"},
		{"DNS", get(&net.DNSError{Err: "no such host", Name: "api.nope"}), api.CodeUnreachable, "api.nope"},
		{"x509", get(x509.UnknownAuthorityError{}), api.CodeUnreachable, "certificate-authority"},
		{"exec plugin", get(errors.New("getting credentials: exec: executable aws not found")), api.CodeCredentials, "executable aws"},
		{"else", errors.New("surprise"), api.CodeInternal, "surprise"},
		{"known", fmt.Errorf("x: %w", &api.Error{Code: api.CodeImage, Message: "m"}), api.CodeImage, "m"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var e *api.Error
			if err := translate("listing pods", test.err); !errors.As(err, &e) {
				t.Fatalf("%T", err)
			}
			if e.Code != test.code || !strings.Contains(e.Error(), test.says) {
				t.Errorf("code %q, want %q; %q, want %q", e.Code, test.code, e.Error(), test.says)
			}
			if strings.Contains(e.Message, "timeout=20s") {
				t.Errorf("the request's URL is noise: %q", e.Message)
			}
		})
	}
	if translate("x", nil) != nil {
		t.Error("nil became an error")
	}
}

func TestMissingRightIsNotAdmission(t *testing.T) {
	pods := schema.GroupResource{Resource: "pods"}
	if !isMissingRight(apierrors.NewForbidden(pods, "", errors.New(`User "x" cannot create resource "pods" in API group "" in the namespace "demo"`))) {
		t.Error("RBAC's refusal")
	}
	if isMissingRight(apierrors.NewForbidden(pods, "a", errors.New("exceeded quota: q"))) {
		t.Error("a quota is no missing right")
	}
}

func TestRefusedPod(t *testing.T) {
	wantError(t, refusedPod("gate", "shop", `pods "x" is forbidden: exceeded quota: q, requested: pods=1`), api.CodeNamespace, `the gate's pod in namespace "shop"`, "exceeded quota", "--pod-quota")
	wantError(t, refusedPod("agent", "shop", "what nobody knows"), api.CodeNamespace, `the agent's pod in namespace "shop": what nobody knows`)
}
