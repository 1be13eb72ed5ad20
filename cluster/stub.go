// Package cluster is all that touches Kubernetes from a session, which runs as
// the calling user: the kubeconfig, the cluster's ranges and Services, the
// agent's Deployment and the port-forward to it. Errors for the user are
// *api.Error.
package cluster

import (
	"context"
	"errors"
	"net"
	"net/netip"

	"github.com/culvert-dev/culvert/daemon/api"
)

var errStub = errors.New("not written yet")

// Cluster is one context of a kubeconfig.
type Cluster struct{}

func Open(o api.Options) (*Cluster, error) { return nil, errStub }

func (c *Cluster) Context() string   { return "" }
func (c *Cluster) Server() string    { return "" }
func (c *Cluster) Namespace() string { return "" }
func (c *Cluster) Identity() string  { return "" }

func (c *Cluster) Addresses(ctx context.Context) ([]netip.Addr, error) { return nil, errStub }

func (c *Cluster) Preflight(ctx context.Context, spec AgentSpec) error { return errStub }

func (c *Cluster) Access(ctx context.Context) ([]Check, error) { return nil, errStub }

// Check is one verb on one resource that culvert uses.
type Check struct {
	Verb      string // "create"
	Resource  string // "deployments.apps", "pods/portforward"
	Namespace string // empty: cluster-wide
	Allowed   bool
	Needed    bool   // false: connect works without, with a note
	Why       string // what it is for, and what is lost without it
}

// Ranges is what of the cluster shall be routed, as far as the user may see it.
type Ranges struct {
	Routes []api.Route
	Notes  []string // what was not visible and what follows
}

func (c *Cluster) Ranges(ctx context.Context) (Ranges, error) { return Ranges{}, errStub }

// WatchRanges calls changed with every later state of Ranges until ctx is done.
// It also feeds Services.
func (c *Cluster) WatchRanges(ctx context.Context, changed func(Ranges)) error { return errStub }

// Names knows which Services exist; safe for concurrent use.
type Names struct{}

func (c *Cluster) Services() *Names { return nil }

func (n *Names) HasService(namespace, name string) bool { return false }
func (n *Names) Namespaces() []string                   { return nil }

// AgentSpec says how the agent's Deployment shall look.
type AgentSpec struct {
	Session        string // session id; Name is made of it when empty
	Name           string // empty: AgentName(Session)
	User           string // annotation culvert.dev/user
	Image          string
	PullPolicy     string // empty: IfNotPresent
	PullSecrets    []string
	NodeSelector   map[string]string
	Labels         map[string]string
	Annotations    map[string]string
	ServiceAccount string
	PodQuota       string // "0.5c,512m"
}

// AgentName is the name of the Deployment of a session.
func AgentName(session string) string { return "culvert-agent-" + session }

// Agent is the ready pod of an agent's Deployment.
type Agent struct {
	Namespace string
	Name      string // of the Deployment
	Pod       string
	UID       string // of the pod
	Node      string
	Image     string
	IPs       []netip.Addr
}

func (c *Cluster) EnsureAgent(ctx context.Context, spec AgentSpec, progress func(step string)) (*Agent, error) {
	return nil, errStub
}

func (c *Cluster) WaitAgent(ctx context.Context, name string, progress func(step string)) (*Agent, error) {
	return nil, errStub
}

func (c *Cluster) DeleteAgent(ctx context.Context, name string) error { return errStub }

// PortForward is a carrier.Dialer to a port of the agent's pod.
type PortForward struct{}

func (c *Cluster) PortForward(a *Agent, port int) *PortForward { return nil }

// Name is "port-forward (WebSocket)" or "port-forward (SPDY)": what the last
// Dial used.
func (p *PortForward) Name() string { return "" }

func (p *PortForward) Dial(ctx context.Context) (net.Conn, error) { return nil, errStub }

// Target is something to probe.
type Target struct {
	Name string // for people: "pod demo/echo-0", "service demo/echo"; empty for a bare IP
	Addr netip.Addr
	Port uint16 // TCP connect to this port; 0: ICMP echo
}

func (c *Cluster) Resolve(ctx context.Context, target, defaultNamespace string) ([]Target, error) {
	return nil, errStub
}

// ParseSelectors reads the values of --include-ips and --exclude-ips.
func ParseSelectors(values []string) (prefixes []netip.Prefix, hosts []string, err error) {
	return nil, nil, errStub
}
