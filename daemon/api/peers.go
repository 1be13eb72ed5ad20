package api

import (
	"context"
	"net/http"
	"net/netip"
	"time"
)

// PeerRequest names a session, and with Name a peer of it: a standard WireGuard
// program on a phone or another machine, which connects to the session's agent.
type PeerRequest struct {
	ID      string `json:"id,omitempty"`      // empty: the caller's only session
	Context string `json:"context,omitempty"` // or by context
	Name    string `json:"name,omitempty"`    // letters, digits, - and _, at most 15

	// PublicKey is the peer's own; without it the session makes a key pair. For
	// PeerAdd only, as the rest.
	PublicKey string `json:"publicKey,omitempty"`
	// Endpoint is HOST or HOST:PORT at which the peer reaches the agent's UDP port;
	// empty: the address of its pod.
	Endpoint string `json:"endpoint,omitempty"`
	// NodePort has a Service of type NodePort made for the agent's UDP port. Its port
	// is the endpoint's, and the node's address, unless Endpoint names a host.
	NodePort bool `json:"nodePort,omitempty"`
}

// Peer is one that was added. It lives as long as the agent's pod.
type Peer struct {
	Name          string       `json:"name"`
	PublicKey     string       `json:"publicKey"`
	Addresses     []netip.Addr `json:"addresses"`
	Added         time.Time    `json:"added"`
	LastHandshake time.Time    `json:"lastHandshake,omitzero"` // zero: never
	From          string       `json:"from,omitempty"`         // address and port where it was heard last
	Sent          uint64       `json:"sent"`                   // bytes, to the peer
	Received      uint64       `json:"received"`               // bytes, from the peer
	// Stale: the agent that it was added to is gone, and its configuration of no
	// more use.
	Stale bool `json:"stale,omitempty"`
}

// PeerConfig is what a new peer has to know, in the words of wg-quick(8).
type PeerConfig struct {
	Name    string `json:"name"`
	Context string `json:"context"`
	Agent   string `json:"agent"` // namespace/pod
	// PrivateKey is nowhere else; empty if the peer has its own.
	PrivateKey string         `json:"privateKey,omitempty"`
	PublicKey  string         `json:"publicKey"`
	Addresses  []netip.Addr   `json:"addresses"`
	DNS        []netip.Addr   `json:"dns"`
	Search     []string       `json:"search,omitempty"`
	MTU        int            `json:"mtu"`
	ServerKey  string         `json:"serverKey"` // public key of the agent
	Endpoint   string         `json:"endpoint"`
	AllowedIPs []netip.Prefix `json:"allowedIPs"`
}

// Paths of the API about peers.
const (
	PathPeers      = "/v1/peers"        // POST PeerRequest: []Peer
	PathPeerAdd    = "/v1/peers/add"    // POST PeerRequest: PeerConfig
	PathPeerRemove = "/v1/peers/remove" // POST PeerRequest: Peer, which was removed
)

// Peers lists a session's peers, also those that went with an agent.
func (c *Client) Peers(ctx context.Context, req PeerRequest) (p []Peer, err error) {
	return p, c.call(ctx, http.MethodPost, PathPeers, req, &p)
}

// PeerAdd adds a peer to a session's agent.
func (c *Client) PeerAdd(ctx context.Context, req PeerRequest) (p PeerConfig, err error) {
	return p, c.call(ctx, http.MethodPost, PathPeerAdd, req, &p)
}

// PeerRemove removes a peer, or forgets a stale one.
func (c *Client) PeerRemove(ctx context.Context, req PeerRequest) (p Peer, err error) {
	return p, c.call(ctx, http.MethodPost, PathPeerRemove, req, &p)
}
