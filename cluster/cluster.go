// Package cluster is all that touches Kubernetes from a session, which runs as
// the calling user: the kubeconfig, the cluster's ranges and Services, the
// agent's Deployment and the port-forward to it. Errors for the user are
// *api.Error.
package cluster

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	_ "k8s.io/client-go/plugin/pkg/client/auth" // OIDC and the messages of removed providers, as in kubectl
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/culvert-dev/culvert/daemon/api"
)

// requestTimeout bounds every request but watches and port-forwards. A list
// page of 500 pods through a slow VPN takes seconds, never this long.
const requestTimeout = 20 * time.Second

// Cluster is one context of a kubeconfig. Its methods are safe for concurrent
// use.
type Cluster struct {
	context   string
	namespace string
	server    *url.URL
	identity  string

	client *Client // requests, bounded by requestTimeout
	watch  *Client // watches, bounded by their contexts only
	rules  *clientcmd.ClientConfigLoadingRules
	access atomic.Pointer[access]
	clock  clock // the API server's
	keys   tlsKeys

	// mu guards reading the kubeconfig again.
	mu   sync.Mutex
	seen string // the kubeconfig's stamp when it was read

	sources *sources
	names   *Names
}

// Open reads the kubeconfig that o names, with kubectl's rules: a list of files
// is merged, KUBECONFIG and then ~/.kube/config are the default. It opens no
// connection and runs no exec plugin. Errors are *api.Error with
// CodeKubeconfig.
func Open(o api.Options) (*Cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	if o.Kubeconfig != "" {
		// Precedence does not complain about missing files, as with KUBECONFIG;
		// a single named file must be there.
		rules.Precedence = filepath.SplitList(o.Kubeconfig)
		if len(rules.Precedence) == 1 {
			rules.ExplicitPath = o.Kubeconfig
		}
	}
	where := strings.Join(rules.Precedence, ", ")
	raw, err := rules.Load()
	if err != nil {
		return nil, kubeconfigError(where, err)
	}
	if len(raw.Contexts) == 0 && len(raw.Clusters) == 0 {
		return nil, &api.Error{
			Code:    api.CodeKubeconfig,
			Message: fmt.Sprintf("no kubeconfig: %s does not exist or is empty", where),
			Hint:    "set KUBECONFIG or use --kubeconfig FILE; `kubectl config view` shows what kubectl uses",
		}
	}
	name := o.Context
	if name == "" {
		name = raw.CurrentContext
	}
	context, err := findContext(raw, name)
	if err != nil {
		return nil, err
	}
	c := &Cluster{context: name, rules: rules, namespace: firstOf(o.Namespace, context.Namespace, "default")}
	c.seen = c.stamp()
	a, err := c.load()
	if err != nil {
		return nil, kubeconfigError(where, err)
	}
	c.access.Store(a)
	if c.server, err = parseServer(a.config.Host); err != nil {
		return nil, kubeconfigError(where, err)
	}
	c.identity = a.identity
	c.client = &Client{rest: func() *rest.RESTClient { return c.current().client }}
	c.watch = &Client{rest: func() *rest.RESTClient { return c.current().watch }}
	c.sources = c.newSources()
	c.names = &Names{services: c.sources.services}
	return c, nil
}

// findContext names the contexts that exist when the wanted one does not.
func findContext(raw *clientcmdapi.Config, name string) (*clientcmdapi.Context, error) {
	known := make([]string, 0, len(raw.Contexts))
	for k := range raw.Contexts {
		known = append(known, k)
	}
	slices.Sort(known)
	if name == "" {
		return nil, &api.Error{
			Code:    api.CodeKubeconfig,
			Message: "the kubeconfig has no current context; it has " + list(known),
			Hint:    "use --context NAME or `kubectl config use-context NAME`",
		}
	}
	context, ok := raw.Contexts[name]
	if !ok {
		return nil, &api.Error{
			Code:    api.CodeKubeconfig,
			Message: fmt.Sprintf("no context %q in the kubeconfig; it has %s", name, list(known)),
			Hint:    "use --context with one of these",
		}
	}
	if _, ok := raw.Clusters[context.Cluster]; !ok {
		return nil, &api.Error{
			Code:    api.CodeKubeconfig,
			Message: fmt.Sprintf("context %q names cluster %q, which the kubeconfig does not have", name, context.Cluster),
		}
	}
	return context, nil
}

func kubeconfigError(where string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return &api.Error{
			Code:    api.CodeKubeconfig,
			Message: fmt.Sprintf("no kubeconfig: %v", err),
			Hint:    "set KUBECONFIG or use --kubeconfig FILE",
		}
	}
	return &api.Error{Code: api.CodeKubeconfig, Message: fmt.Sprintf("kubeconfig %s: %v", where, err)}
}

// parseServer reads the URL of an API server as client-go does: a missing
// scheme is https.
func parseServer(host string) (*url.URL, error) {
	if !strings.Contains(host, "://") {
		host = "https://" + host
	}
	u, err := url.Parse(host)
	if err != nil {
		return nil, fmt.Errorf("server: %w", err)
	}
	if u.Hostname() == "" {
		return nil, fmt.Errorf("server %q has no host", host)
	}
	return u, nil
}

// hostPort is the address that a URL is dialled at; a missing port is the
// scheme's.
func hostPort(u *url.URL) string {
	port := u.Port()
	if port == "" {
		switch u.Scheme {
		case "http":
			port = "80"
		case "socks5", "socks5h":
			port = "1080"
		default:
			port = "443"
		}
	}
	return net.JoinHostPort(strings.ToLower(u.Hostname()), port)
}

// identity tells clusters apart. The path belongs to it: Rancher serves many
// clusters below one host.
func identity(ca []byte, server *url.URL) string {
	h := sha256.New()
	fmt.Fprintf(h, "%x\n%s\n%s", sha256.Sum256(ca), hostPort(server), strings.TrimRight(server.Path, "/"))
	return hex.EncodeToString(h.Sum(nil)[:12])
}

// Context is the name of the kubeconfig's context.
func (c *Cluster) Context() string { return c.context }

// Server is the API server's URL, as the kubeconfig has it.
func (c *Cluster) Server() string { return c.access.Load().config.Host }

// Namespace is the chosen namespace, else the context's own, else "default".
func (c *Cluster) Namespace() string { return c.namespace }

// Identity is the same for two contexts of the same cluster: a hash of the
// certificate authority and the API server's host, port and path.
func (c *Cluster) Identity() string { return c.identity }

// proxyFor says through which HTTP or SOCKS proxy the API server is reached,
// nil for none.
func (c *Cluster) proxyFor(u *url.URL) (*url.URL, error) {
	return c.proxy()(&http.Request{URL: u})
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}

func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}
