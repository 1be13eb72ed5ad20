// Package carrier moves encrypted packets between a session and its agent: the
// frames, the introduction of the two ends to each other, and the conn.Bind
// that lets WireGuard use whatever stream is up.
package carrier

import (
	"net/netip"

	"github.com/culvert-dev/culvert/wire/queue"
)

// Protocol is the version of the frames and of the introduction. Two ends that
// differ refuse each other and say which versions they have.
const Protocol = 2

// ControlPort is the TCP port on which the agent accepts streams, on 127.0.0.1
// of its pod only: who may port-forward to the pod may introduce a peer.
const ControlPort = 7531

// MetricsPort is the agent's HTTP port for metrics and health, on 127.0.0.1 of
// its pod only.
const MetricsPort = 7532

// Hello is the first frame on every new stream, from the session.
type Hello struct {
	Protocol int    `json:"protocol"`
	Version  string `json:"version"`
	Session  string `json:"session"` // session id; an agent serves the first one it meets
	// Secret proves that a later stream or a restarted session process is the
	// same session: 32 random bytes, base64, compared in constant time.
	Secret    string       `json:"secret"`
	PublicKey string       `json:"publicKey"` // WireGuard, base64; fresh in every session process
	Tunnel    []netip.Addr `json:"tunnel"`    // the session's addresses
	Agent     []netip.Addr `json:"agent"`     // the agent's own: its DNS relay answers there
	Inbound   []netip.Addr `json:"inbound"`   // where the session's netstack answers the cluster
	MTU       int          `json:"mtu"`       // of inner packets
	Features  []string     `json:"features,omitempty"`
	// Lane is what the stream is for. The bulk lane's comes second and may be
	// missing.
	Lane queue.Lane `json:"lane,omitempty"`
}

// FeatureGSO: TCP super-packets of up to 64 KiB with partial checksums may be
// sent as one message.
const FeatureGSO = "gso"

// FeatureUDP: the session would like to send WireGuard messages by UDP.
const FeatureUDP = "udp"

// Welcome is the agent's answer.
type Welcome struct {
	Protocol  int    `json:"protocol"`
	Version   string `json:"version"`
	PublicKey string `json:"publicKey"` // WireGuard, base64; fresh in every agent process
	// Instance is random per agent process: when it changes, the connections
	// that lived in the old agent are gone.
	Instance   string       `json:"instance"`
	ResolvConf string       `json:"resolvConf"` // the pod's /etc/resolv.conf
	PodIPs     []netip.Addr `json:"podIPs,omitempty"`
	Features   []string     `json:"features,omitempty"`
	// ProxySecret and ProxyPort are what the session proves at the agent's second
	// listener, see Prove; without them there is none. The secret lasts as long as
	// the session's PublicKey.
	ProxySecret []byte `json:"proxySecret,omitempty"`
	ProxyPort   int    `json:"proxyPort,omitempty"`
	// UDPSecret and UDPPort are for Datagrams.Probe; without them the agent takes no
	// UDP. The secret lasts as long as the session's PublicKey.
	UDPSecret []byte `json:"udpSecret,omitempty"`
	UDPPort   int    `json:"udpPort,omitempty"`
	// Error refuses the session, e.g. "protocol 2 is not mine (1)"; then the
	// other fields but Protocol and Version are empty.
	Error string `json:"error,omitempty"`
}
