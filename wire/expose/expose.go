// Package expose is what a session and its agent say to each other about ports of
// the agent's pod that lead to the developer's machine. See package ask for the
// way.
package expose

import (
	"context"
	"net"
	"net/http"
	"net/netip"

	"github.com/culvert-dev/culvert/wire/ask"
)

// Path is where the agent serves: GET it for a State, PUT a []Port for another.
const Path = "/v1/exposed"

// Max is how many ports an agent exposes at most: a range, or the ports of a few
// programs.
const Max = 64

// Protocols of a Port.
const (
	TCP = "TCP"
	UDP = "UDP"
)

// Port is a port of the pod's addresses.
type Port struct {
	Port     uint16 `json:"port"`
	Protocol string `json:"protocol"`
	// ID and Token are what the agent says of a connection to the session, as in
	// intercept.Header.
	ID    string `json:"id"`
	Token string `json:"token"`
}

// State is what is exposed.
type State struct {
	Instance string       `json:"instance"` // of the agent process, as in carrier.Welcome
	PodIPs   []netip.Addr `json:"podIPs"`
	Ports    []PortState  `json:"ports"` // in the order in which they were asked for
}

// PortState is how a port is that was asked for.
type PortState struct {
	Port      uint16 `json:"port"`
	Protocol  string `json:"protocol"`
	Listening bool   `json:"listening"`       // at one of the PodIPs at least
	Error     string `json:"error,omitempty"` // why not, or at which not
}

// Client asks an agent. Its errors are *ask.Refusal, or those of the way to the
// agent.
type Client struct{ ask.Client }

// Get returns what is exposed.
func (c *Client) Get(ctx context.Context) (s State, err error) {
	err = c.Do(ctx, http.MethodGet, Path, nil, &s)
	return s, err
}

// Set exposes these ports and no others. A port that cannot be is told in the
// State and is no error. Open connections stay, also of ports that are gone.
func (c *Client) Set(ctx context.Context, ports []Port) (s State, err error) {
	if ports == nil {
		ports = []Port{} // null would be no list
	}
	err = c.Do(ctx, http.MethodPut, Path, ports, &s)
	return s, err
}

// NewClient makes a Client that dials its agent by dial.
func NewClient(dial func(context.Context) (net.Conn, error), secret string) *Client {
	return &Client{ask.Client{Dial: dial, Secret: secret}}
}
