package cluster

import (
	"context"
	"crypto/tls"
	"fmt"
	"maps"
	"sync"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/intercept"
)

// tlsKeys are what the session's meshes end TLS with. They are told to gates with each
// push, and written nowhere.
type tlsKeys struct {
	mu    sync.Mutex
	known map[string]map[string]intercept.TLSKey // by namespace and the entry's key
}

func (k *tlsKeys) set(namespace, key string, secret intercept.TLSKey) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known == nil {
		k.known = map[string]map[string]intercept.TLSKey{}
	}
	if k.known[namespace] == nil {
		k.known[namespace] = map[string]intercept.TLSKey{}
	}
	k.known[namespace][key] = secret
}

func (k *tlsKeys) drop(namespace, key string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.known[namespace], key)
}

// with is s for a gate's pods, with the keys of the entries that it serves.
func (k *tlsKeys) with(s *intercept.State, namespace, gate string) *intercept.State {
	k.mu.Lock()
	known := maps.Clone(k.known[namespace])
	k.mu.Unlock()
	maps.DeleteFunc(known, func(key string, _ intercept.TLSKey) bool { return s.Entries[key].Gate != gate })
	if len(known) == 0 {
		return s
	}
	told := *s
	told.Keys = known
	return &told
}

// tlsKey reads a Secret of type kubernetes.io/tls. Errors are *api.Error.
func (c *Cluster) tlsKey(ctx context.Context, namespace, name string) (intercept.TLSKey, error) {
	what := fmt.Sprintf("reading Secret %s in namespace %q", name, namespace)
	s, err := c.client.Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsForbidden(err):
		return intercept.TLSKey{}, &api.Error{Code: api.CodeForbidden, Message: fmt.Sprintf("%s: %v", what, err), Hint: grantHint(Check{resource: "secrets", Namespace: namespace})}
	case err != nil:
		return intercept.TLSKey{}, translate(what, err)
	}
	k := intercept.TLSKey{Certificate: string(s.Data[corev1.TLSCertKey]), Key: string(s.Data[corev1.TLSPrivateKeyKey]), Authority: string(s.Data["ca.crt"])}
	if _, err := tls.X509KeyPair([]byte(k.Certificate), []byte(k.Key)); err != nil {
		return k, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("Secret %s in namespace %q has no certificate and key that go together in %s and %s: %v", name, namespace, corev1.TLSCertKey, corev1.TLSPrivateKeyKey, err),
			Hint: "--tls-secret takes a Secret of type kubernetes.io/tls with what the Service's pods show"}
	}
	return k, nil
}

// overTLS tells whether a Service calls a port TLS that carries HTTP.
func overTLS(p PlanPort) bool {
	switch protocolWord(p) {
	case "https", "tls", "wss", "kubernetes.io/wss":
		return true
	}
	return false
}
