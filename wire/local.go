package wire

import (
	"context"
	"log/slog"
	"net/netip"
	"os"
	"time"

	wgtun "golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/tun"
)

// LocalConfig describes the session's end.
type LocalConfig struct {
	TUN     *tun.Device
	Tunnel  []netip.Addr // the session's addresses, on the TUN device
	Agent   []netip.Addr // the agent's addresses in the tunnel
	Inbound []netip.Addr // where the session's own netstack answers the cluster
	MTU     int
	GSO     bool // the peer takes super-packets (carrier.FeatureGSO)
	Log     *slog.Logger
}

// Local is the session's end of the tunnel.
type Local struct{}

// NewLocal makes the session's end.
func NewLocal(cfg LocalConfig) *Local { return &Local{} }

// SetTargets says which TCP ports at the Inbound addresses lead where.
func (l *Local) SetTargets(t map[uint16]netip.AddrPort) {}

// Ping sends one ICMP echo with size bytes of payload from the tunnel address.
func (l *Local) Ping(ctx context.Context, dst netip.Addr, size int) (time.Duration, error) {
	return 0, nil
}

func (l *Local) File() *os.File                                        { return nil }
func (l *Local) Read(bufs [][]byte, sizes []int, off int) (int, error) { return 0, os.ErrClosed }
func (l *Local) Write(bufs [][]byte, off int) (int, error)             { return 0, os.ErrClosed }
func (l *Local) MTU() (int, error)                                     { return 0, nil }
func (l *Local) Name() (string, error)                                 { return "", nil }
func (l *Local) Events() <-chan wgtun.Event                            { return nil }
func (l *Local) Close() error                                          { return nil }
func (l *Local) BatchSize() int                                        { return 128 }
