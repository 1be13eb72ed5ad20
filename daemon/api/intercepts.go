package api

import (
	"context"
	"net/http"
	"time"
)

// InterceptRequest asks a session to lead cluster traffic to this machine. It
// names the session (ID, or Context, or neither for the caller's only one).
type InterceptRequest struct {
	ID      string `json:"id,omitempty"`
	Context string `json:"context,omitempty"`

	Kind      string   `json:"kind"`                // KindExchange, KindMesh, KindPreview or KindExpose
	Target    string   `json:"target,omitempty"`    // as typed: SVC, service/x, deployment/x, ...; not of KindExpose
	Namespace string   `json:"namespace,omitempty"` // empty: the session's
	Expose    []string `json:"expose,omitempty"`    // as typed: LOCAL[:REMOTE][/PROTOCOL]
	Mode      string   `json:"mode,omitempty"`      // of exchange: ModeSelector (default) or ModeScale; of mesh: ModeAuto (default), ModeRouter, ...

	OnLocalRefused string `json:"onLocalRefused,omitempty"` // origin (default) or refuse
	OnConflict     string `json:"onConflict,omitempty"`     // reapply (default) or leave
	// Of mesh. Match are conditions as typed (intercept.ParseCondition), all of which
	// a request must fulfil to come here, never empty.
	Match        []string `json:"match,omitempty"`
	OnGone       string   `json:"onGone,omitempty"`       // OnGoneOrigin (default) or OnGoneFail
	TagResponses bool     `json:"tagResponses,omitempty"` // answers say who served them
	TLSSecret    string   `json:"tlsSecret,omitempty"`    // of the Service's namespace: its key and certificate

	ProxyProtocol bool          `json:"proxyProtocol,omitempty"` // version 2, before each connection's first byte
	Force         bool          `json:"force,omitempty"`
	Wait          time.Duration `json:"wait,omitempty"`  // for another's intercept of the Service to end; 0: do not
	Drain         time.Duration `json:"drain,omitempty"` // at the end, for open connections; 0: 30 s

	External     bool   `json:"external,omitempty"`     // preview: type LoadBalancer, or with Host an Ingress
	Host         string `json:"host,omitempty"`         // preview: of the Ingress
	IngressClass string `json:"ingressClass,omitempty"` // preview: of the Ingress
}

// Kinds and modes of intercepts.
const (
	KindExchange = "exchange"
	KindPreview  = "preview"
	KindExpose   = "expose"

	KindMesh = "mesh"

	ModeSelector = "selector"
	ModeScale    = "scale"

	ModeAuto    = "auto"
	ModeRouter  = "router"
	ModeIstio   = "istio"
	ModeGateway = "gateway"
	ModeManual  = "manual"
)

// What InterceptRequest.OnLocalRefused and OnConflict may be.
const (
	OnRefusedOrigin  = "origin"
	OnRefusedRefuse  = "refuse"
	OnConflictReplay = "reapply"
	OnConflictLeave  = "leave"
	OnGoneOrigin     = "origin"
	OnGoneFail       = "fail"
)

// Intercept is cluster traffic that comes to this machine.
type Intercept struct {
	Session   string          `json:"session"`
	Context   string          `json:"context,omitempty"`
	Kind      string          `json:"kind"`
	Mode      string          `json:"mode,omitempty"`
	Namespace string          `json:"namespace"`
	Service   string          `json:"service,omitempty"` // name; with mode scale KIND/NAME; empty: KindExpose
	Ports     []InterceptPort `json:"ports"`
	Since     time.Time       `json:"since"`
	State     string          `json:"state"` // InterceptActive, ...
	Cause     string          `json:"cause,omitempty"`
	// Addresses lead to it: of expose the pod's, of preview --external those that
	// the cluster gave.
	Addresses []string `json:"addresses,omitempty"`
	// Match are the conditions of the requests that come, of mesh only.
	Match []string `json:"match,omitempty"`
	Notes []string `json:"notes,omitempty"`
}

// States of an intercept.
const (
	InterceptStarting = "starting"
	InterceptActive   = "active"
	InterceptStopping = "stopping"
	// InterceptLost: somebody else changed the Service, and theirs stays.
	InterceptLost = "lost"
)

// InterceptPort is one exposed port.
type InterceptPort struct {
	Local      int    `json:"local"`
	Listening  bool   `json:"listening"` // something listens at Local, when it was looked at last
	Port       int    `json:"port"`      // of the Service, or of the agent's pod
	Name       string `json:"name,omitempty"`
	Protocol   string `json:"protocol"` // TCP or UDP
	TargetPort string `json:"targetPort,omitempty"`
}

// LeaveRequest ends intercepts of the caller's sessions: one by Service, or all.
type LeaveRequest struct {
	ID        string        `json:"id,omitempty"`
	Context   string        `json:"context,omitempty"`
	Namespace string        `json:"namespace,omitempty"`
	Service   string        `json:"service,omitempty"` // as Intercept.Service; of expose PORT
	All       bool          `json:"all,omitempty"`
	Drain     time.Duration `json:"drain,omitempty"` // 0: as when it was started
}

// Paths of the API about intercepts. The first two answer with a stream of Lines,
// whose Step says what is done and whose Intercept is the result.
const (
	PathIntercept  = "/v1/intercepts/start" // POST InterceptRequest
	PathLeave      = "/v1/intercepts/leave" // POST LeaveRequest
	PathIntercepts = "/v1/intercepts"       // GET: []Intercept of all the caller's sessions
)

// Intercept starts one and returns it when traffic comes; each step is given to
// step (which may be nil). When ctx ends first, it is undone.
func (c *Client) Intercept(ctx context.Context, req InterceptRequest, step func(string)) (i Intercept, err error) {
	err = c.stream(ctx, http.MethodPost, PathIntercept, req, func(l Line) error {
		if l.Step != "" && step != nil {
			step(l.Step)
		}
		if l.Intercept != nil {
			i = *l.Intercept
		}
		return nil
	})
	return i, err
}

// Leave ends intercepts, and returns those that ended, as they were.
func (c *Client) Leave(ctx context.Context, req LeaveRequest, step func(string)) (ended []Intercept, err error) {
	err = c.stream(ctx, http.MethodPost, PathLeave, req, func(l Line) error {
		if l.Step != "" && step != nil {
			step(l.Step)
		}
		if l.Intercept != nil {
			ended = append(ended, *l.Intercept)
		}
		return nil
	})
	return ended, err
}

// Intercepts lists those of the caller's sessions.
func (c *Client) Intercepts(ctx context.Context) (all []Intercept, err error) {
	return all, c.call(ctx, http.MethodGet, PathIntercepts, nil, &all)
}
