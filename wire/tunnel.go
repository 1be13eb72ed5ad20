// Package wire is the encrypted tunnel between a session and its agent:
// WireGuard over whatever carrier is up, and the session's own end of it.
package wire

import (
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/wire/carrier"
)

// Config is what a Tunnel is made of. The Tunnel owns Device and Bind from New on.
type Config struct {
	Device     tun.Device
	PrivateKey Key
	Bind       *carrier.Bind
	Log        *slog.Logger
}

// Tunnel is one WireGuard device with one peer.
type Tunnel struct{}

// New starts WireGuard on cfg.Device and cfg.Bind, without a peer.
func New(cfg Config) (*Tunnel, error) { return nil, errors.New("wire: not built yet") }

// SetPeer replaces whatever peer there was and starts a handshake.
func (t *Tunnel) SetPeer(pub Key, allowed []netip.Prefix) error { return nil }

// LastHandshake is when the peer last completed a handshake; zero if never.
func (t *Tunnel) LastHandshake() time.Time { return time.Time{} }

// Close ends the tunnel, its Bind and its Device, and waits. It is idempotent.
func (t *Tunnel) Close() {}
