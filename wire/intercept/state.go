package intercept

import "time"

// State is all that the gates of a namespace know. It is kept in a ConfigMap,
// which they mount; whoever changes it also pushes it to those that run. A State
// with a larger Generation replaces one with a smaller.
type State struct {
	Generation int64            `json:"generation"`
	Entries    map[string]Entry `json:"entries"` // by the ConfigMap's key: see Key
}

// Kinds of intercepts.
const (
	Exchange = "exchange" // a Service's traffic comes to the machine, and fails open to its origin
	Preview  = "preview"  // a new Service, without origin
	Scale    = "scale"    // the pods of a workload are replaced; no origin
)

// Entry is one intercept.
type Entry struct {
	Kind    string `json:"kind"`
	Service string `json:"service"` // its name; of Scale: WORKLOADKIND/NAME
	// Gate is the name of the gates' Deployment that serves it: GateName, or one
	// of its own.
	Gate   string  `json:"gate"`
	Holder Holder  `json:"holder"`
	Routes []Route `json:"routes"`
	// Replicas are those that a replaced workload had.
	Replicas int32 `json:"replicas,omitempty"`
	// Draining: new connections go to the origin, open ones are asked to end.
	Draining bool `json:"draining,omitempty"`
	// Over: with Draining, the holder's session is dead; what is open to it has
	// nobody at its end and is reset.
	Over bool `json:"over,omitempty"`
}

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
}

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
const GatePort = 7541

// GateStatus is how a gate is. JSON of the control API.
type GateStatus struct {
	Generation int64         `json:"generation"` // of the State in force
	Failed     []string      `json:"failed,omitempty"`
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
}

// ReachRequest asks a gate to dial the origins of an Entry.
type ReachRequest struct {
	Key string `json:"key"`
	// OriginOnly: not by way of Backends.
	OriginOnly bool `json:"originOnly,omitempty"`
}

// Reached is what came of a dial to an origin, TCP only.
type Reached struct {
	Port   int32  `json:"port"`
	Origin string `json:"origin"`
	// Error is empty, "refused" (something answered for it), or what else is
	// wrong: most often that nothing answers at all.
	Error string `json:"error,omitempty"`
}
