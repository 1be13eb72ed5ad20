package intercept

import (
	"net/netip"
	"time"
)

// State is all that the gates of a namespace know. It is kept in a ConfigMap,
// which they mount; whoever changes it also pushes it to those that run. A State
// with a larger Generation replaces one with a smaller.
type State struct {
	Generation int64            `json:"generation"`
	Entries    map[string]Entry `json:"entries"` // by the ConfigMap's key: see Key
	// Keys end TLS for a mesh's route of HTTPTLS, by the entry's key. They are pushed,
	// and kept in memory only: never in the ConfigMap or a file.
	Keys map[string]TLSKey `json:"keys,omitempty"`
}

// TLSKey is a server's certificate chain, its key, and the authority that signed it, which
// may be missing; all in PEM.
type TLSKey struct {
	Certificate string `json:"certificate"`
	Key         string `json:"key"`
	Authority   string `json:"authority,omitempty"`
}

// Kinds of intercepts.
const (
	Exchange = "exchange" // a Service's traffic comes to the machine, and fails open to its origin
	Preview  = "preview"  // a new Service, without origin
	Scale    = "scale"    // the pods of a workload are replaced; no origin
	Mesh     = "mesh"     // requests that match a member's conditions come to its machine, all others go to the origin
)

// Entry is one intercept.
type Entry struct {
	Kind    string `json:"kind"`
	Service string `json:"service"` // its name; of Scale: WORKLOADKIND/NAME
	// Gate is the name of the gates' Deployment that serves it: GateName, or one
	// of its own.
	Gate string `json:"gate"`
	// Mode of a Mesh says who tells requests apart before they come to the gates:
	// ModeIstio, ...; then its key is a Service of the one member's own, and Service the
	// one that is meshed. Empty: nobody does, and all of the Service's come.
	Mode   string  `json:"mode,omitempty"`
	Holder Holder  `json:"holder"`
	Routes []Route `json:"routes"`
	// Members are the developers of a Mesh, in the order in which they came; Holder
	// is then nobody's session but the id of the mesh itself, made anew whenever a
	// first one comes. A Mesh without members is about to end.
	Members []Member `json:"members,omitempty"`
	// Replicas are those that a replaced workload had.
	Replicas int32 `json:"replicas,omitempty"`
	// Draining: new connections go to the origin, open ones are asked to end.
	Draining bool `json:"draining,omitempty"`
	// Over: with Draining, the holder's session is dead; what is open to it has
	// nobody at its end and is reset.
	Over bool `json:"over,omitempty"`
}

// Entry.Mode of a Mesh.
const (
	ModeIstio   = "istio"   // a rule in a VirtualService
	ModeGateway = "gateway" // a rule in an HTTPRoute of Gateway API
	ModeManual  = "manual"  // a rule that the user makes
)

// GateName is the Deployment that serves a namespace; its ConfigMap has the same
// name.
const GateName = "culvert-gate"

// Holder is whose an intercept is.
type Holder struct {
	Session string    `json:"session"`          // its id
	User    string    `json:"user,omitempty"`   // for people
	Origin  string    `json:"origin,omitempty"` // of the user's daemon, see link.Start
	Since   time.Time `json:"since"`            // by the API server's clock
}

// Route is one port of a Service.
type Route struct {
	Listen   uint16 `json:"listen"`         // the gate's port
	Protocol string `json:"protocol"`       // TCP or UDP
	Port     int32  `json:"port"`           // of the Service
	Name     string `json:"name,omitempty"` // of the Service's port
	// Origin is HOST:PORT of what served the port before; empty: nobody. A HOST
	// that is a name is looked up for each connection.
	Origin string `json:"origin,omitempty"`
	// Backends are HOST:PORT of the pods behind Origin, and go before it. They are
	// there only until every gate's node knows Origin, whose Service is new when an
	// intercept starts: later an address may be another pod's.
	Backends []string `json:"backends,omitempty"`
	// Machine is where the port is exposed to; nil: the origin serves it.
	Machine *Machine `json:"machine,omitempty"`
	// HTTP is how a Mesh finds requests on the port: see HTTPSniff. UDP has none.
	HTTP string `json:"http,omitempty"`
}

// What Route.HTTP may be.
const (
	HTTPNever = ""      // bytes pass as they are, to the origin
	HTTPSniff = "sniff" // the first bytes tell; a server that speaks first speaks no HTTP
	HTTPTLS   = "tls"   // as HTTPSniff; and what is TLS is ended at gates that have the key
	HTTPKnown = "http"  // appProtocol or the port's name say HTTP/1.1, HTTP/2 or gRPC
)

// Member is one developer of a Mesh.
type Member struct {
	Holder Holder `json:"holder"`
	// Match are the conditions of the requests that are his: all of them must hold.
	Match []Condition `json:"match"`
	// OnGone says what becomes of them while his machine does not answer.
	OnGone string `json:"onGone,omitempty"`
	// TagResponses: answers of his machine say so, see ServedByHeader.
	TagResponses bool         `json:"tagResponses,omitempty"`
	Ports        []MemberPort `json:"ports"`
	// Draining: nothing new goes to his machine, what is under way may end.
	Draining bool `json:"draining,omitempty"`
}

// MemberPort is a port of the Service, TCP, and where a member's requests to it go.
type MemberPort struct {
	Port    int32   `json:"port"` // of the Service
	Machine Machine `json:"machine"`
}

// What Member.OnGone may be.
const (
	GoneToOrigin = "origin" // the default
	GoneFails    = "fail"   // 503
)

// ServedByHeader is on responses of a machine whose Member has TagResponses: the
// member's user.
const ServedByHeader = "X-Culvert-Served-By"

// What Machine.OnRefused may be.
const (
	RefusedToOrigin = "origin" // the default
	RefusedToClient = "refuse"
)

// Machine is a developer's machine, by way of its agent.
type Machine struct {
	Agents    []string `json:"agents"` // HOST:PORT, each family of the agent's pod; the first that answers
	ID        string   `json:"id"`     // of the intercept, for Header
	Token     string   `json:"token"`
	OnRefused string   `json:"onRefused,omitempty"` // when nothing listens at the local port
	Local     uint16   `json:"local"`               // the local port, for people
}

// GatePort is where a gate serves its control API, on loopback of its pod: HTTP
// with JSON, reached by a port-forward.
//
//	PUT  /v1/state   State                 -> GateStatus: after it, what it listens at
//	GET  /v1/state                         -> GateStatus
//	POST /v1/reach   ReachRequest          -> []Reached: dials origins, sends nothing
//	GET  /v1/requests?key=KEY&after=SEQ    -> []Request: of a Mesh, the newest last; see Request
const GatePort = 7541

// GateStatus is how a gate is. JSON of the control API.
type GateStatus struct {
	Generation int64         `json:"generation"` // of the State in force
	Failed     []string      `json:"failed,omitempty"`
	Skipped    []string      `json:"skipped,omitempty"` // members of meshes that cannot be served, and why
	Keys       []string      `json:"keys,omitempty"`    // entries whose TLS key it has
	Routes     []RouteStatus `json:"routes"`
}

// RouteStatus is how one Route is.
type RouteStatus struct {
	Key      string `json:"key"` // of the Entry
	Listen   uint16 `json:"listen"`
	Protocol string `json:"protocol"`
	Machine  string `json:"machine,omitempty"` // a Status in words: accepted, away, ...; empty: not known or none
	// Open connections, or flows, and all that there were.
	OpenToMachine  int   `json:"openToMachine"`
	OpenToOrigin   int   `json:"openToOrigin"`
	TotalToMachine int64 `json:"totalToMachine"`
	TotalToOrigin  int64 `json:"totalToOrigin"`
	Refused        int64 `json:"refused"` // neither served them
	// Of a Mesh: requests that went to the origin, and each member that exposes the
	// port. Connections of clients are then counted as ones to the origin.
	RequestsToOrigin int64          `json:"requestsToOrigin,omitempty"`
	Members          []MemberStatus `json:"members,omitempty"`
}

// MemberStatus is what became of one Member's requests at one Route.
type MemberStatus struct {
	Session  string `json:"session"`
	Machine  string `json:"machine,omitempty"` // a Status in words
	Open     int    `json:"open"`              // requests, and upgraded connections, that are under way
	Requests int64  `json:"requests"`          // that his machine answered, or is answering
	// ToOrigin are requests that match and went to the origin, since the machine did
	// not answer; Failed those that got an error for the same reason.
	ToOrigin int64 `json:"toOrigin"`
	Failed   int64 `json:"failed"`
}

// Request is one line of a Mesh's access log. A gate keeps the last few hundred
// requests that matched a member; those of the origin only while somebody has asked
// for the log within the last minute. Nothing of it is stored.
type Request struct {
	Seq      int64          `json:"seq"` // grows by gate
	Time     time.Time      `json:"time"`
	Port     int32          `json:"port"` // of the Service
	Client   netip.AddrPort `json:"client"`
	Method   string         `json:"method"`
	Path     string         `json:"path"`             // cut to 256 bytes
	Protocol string         `json:"protocol"`         // HTTP/1.1 or HTTP/2
	Status   int            `json:"status,omitempty"` // 0: there was no response
	// Duration is until the end of the response, in nanoseconds; of an upgrade until
	// the 101.
	Duration time.Duration `json:"duration"`
	// Session is the Member whose it was, empty for none, and Origin tells that the
	// origin served it all the same.
	Session string `json:"session,omitempty"`
	User    string `json:"user,omitempty"`
	Origin  bool   `json:"origin"`
	Error   string `json:"error,omitempty"`
}

// ReachRequest asks a gate to dial the origins of an Entry.
type ReachRequest struct {
	Key string `json:"key"`
	// OriginOnly: not by way of Backends.
	OriginOnly bool `json:"originOnly,omitempty"`
	// TLS is a key that is about to be used: what speaks TLS has to show its
	// certificate, or one that its authority signed.
	TLS *TLSKey `json:"tls,omitempty"`
}

// Reached is what came of a dial to an origin, TCP only.
type Reached struct {
	Port   int32  `json:"port"`
	Origin string `json:"origin"`
	// Error is empty, "refused" (something answered for it), or what else is
	// wrong: most often that nothing answers at all.
	Error string `json:"error,omitempty"`
}
