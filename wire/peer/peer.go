// Package peer is what a session and its agent say to each other about standard
// WireGuard peers: phones and machines without culvert, which connect to the
// agent's own UDP port. See package ask for the way.
package peer

import (
	"fmt"
	"net/netip"
	"time"

	"github.com/culvert-dev/culvert/wire/ask"
)

// Port is the UDP port of the agent's pod at which peers connect, WireGuard's
// usual one. It is open while there is a peer.
const Port = 51820

// Path is where the agent serves: GET it for a State; PUT and DELETE a name below
// it. Every good answer is a State, every other a Refusal.
const Path = "/v1/peers"

// Max is how many peers an agent has at most: a few machines of one developer.
// Each may hold 8 MiB of packets in WireGuard.
const Max = 8

// MaxName is the longest name of a peer: wg-quick names a device after the file.
const MaxName = 15

// Ask is the body of a PUT: who the new peer is.
type Ask struct {
	PublicKey string `json:"publicKey"` // WireGuard, base64
	// Ranges are where addresses of peers may come from, one of each family at
	// most, free in the session's view. The agent uses those of the first peer as
	// long as there is one.
	Ranges []netip.Prefix `json:"ranges"`
}

// State is the agent's peers and how to reach it.
type State struct {
	Instance  string       `json:"instance"`            // of the agent process, as in carrier.Welcome
	PublicKey string       `json:"publicKey,omitempty"` // for peers; empty while there is none
	Port      int          `json:"port,omitempty"`
	PodIPs    []netip.Addr `json:"podIPs,omitempty"`
	DNS       []netip.Addr `json:"dns,omitempty"` // where the agent's DNS relay answers to peers
	MTU       int          `json:"mtu,omitempty"` // that a packet from here fits, in bytes
	Peers     []Peer       `json:"peers,omitempty"`
}

// Peer is one of them.
type Peer struct {
	Name          string       `json:"name"`
	PublicKey     string       `json:"publicKey"`
	Addresses     []netip.Addr `json:"addresses"`
	Added         time.Time    `json:"added"`
	LastHandshake time.Time    `json:"lastHandshake,omitzero"` // zero: never
	From          string       `json:"from,omitempty"`         // address and port where it was heard last
	Sent          uint64       `json:"sent"`                   // bytes, to the peer
	Received      uint64       `json:"received"`               // bytes, from the peer
}

// Refusal is why the agent did not do it.
type Refusal = ask.Refusal

// CheckName tells whether a peer may be called so: what wg-quick(8) takes for a
// device, and begins with a letter or digit.
func CheckName(name string) error {
	if name == "" || len(name) > MaxName {
		return fmt.Errorf("a name has 1 to %d characters", MaxName)
	}
	for i, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case i > 0 && (c == '-' || c == '_'):
		default:
			return fmt.Errorf("a name has letters, digits, - and _, and begins with a letter or digit")
		}
	}
	return nil
}
