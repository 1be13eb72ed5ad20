// Package agent is the far end of a session inside the cluster: it accepts the
// session's WireGuard packets and gives each flow a real socket of its pod.
package agent

import (
	"context"
	"errors"
	"log/slog"
	"net"
)

// Config of an Agent.
type Config struct {
	ControlAddr string
	MetricsAddr string
	ResolvConf  string
	MaxTCP      int
	MaxUDP      int
	Log         *slog.Logger
}

// Agent serves one session.
type Agent struct{ cfg Config }

// New makes an Agent without side effects.
func New(c Config) *Agent { return &Agent{cfg: c} }

// Run serves until ctx ends.
func (a *Agent) Run(ctx context.Context) error { <-ctx.Done(); return nil }

// Close stops Run and waits for it.
func (a *Agent) Close() error { return nil }

// DialSession connects to the session's inbound address.
func (a *Agent) DialSession(ctx context.Context, port uint16) (net.Conn, error) {
	return nil, errors.New("no session")
}
