// Package wire is the encrypted tunnel between a session and its agent:
// WireGuard over whatever carrier is up, and the session's own end of it.
package wire

import (
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.zx2c4.com/wireguard/device"
	wgtun "golang.zx2c4.com/wireguard/tun"

	"github.com/culvert-dev/culvert/wire/carrier"
)

// keepalive makes WireGuard speak when nobody else does, so that keys are
// renewed while idle and the first packet after a pause needs no handshake. It
// is also what asks again for a handshake when the gate holds all packets back.
const keepalive = 25 * time.Second

// Config is what a Tunnel is made of. The Tunnel owns Device and Bind from New
// on, also when New fails.
type Config struct {
	Device     wgtun.Device
	PrivateKey Key
	Bind       *carrier.Bind
	// Passive leaves the handshakes to the peer: the agent's end. When both ends
	// begin at once, each discards the other's answer and WireGuard tries again
	// after five seconds.
	Passive bool
	Log     *slog.Logger // nil: none
}

// Tunnel is one WireGuard device with at most one peer. Its methods may be
// called from any goroutine.
type Tunnel struct {
	bind *carrier.Bind
	dev  *device.Device

	passive bool
	keep    time.Duration

	once sync.Once

	mu   sync.Mutex
	own  Key // public
	peer Key // zero: none
}

// New starts WireGuard on cfg.Device and cfg.Bind, without a peer.
func New(cfg Config) (*Tunnel, error) {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t := &Tunnel{bind: cfg.Bind, keep: keepalive}
	if cfg.Passive {
		t.keep = 0
	}
	t.dev = device.NewDevice(cfg.Bind.Gate(cfg.Device), cfg.Bind, logger(log))
	if err := t.SetKey(cfg.PrivateKey); err != nil {
		t.Close()
		return nil, err
	}
	if err := t.dev.Up(); err != nil {
		t.Close()
		return nil, fmt.Errorf("starting WireGuard: %w", err)
	}
	return t, nil
}

// SetKey makes another key the tunnel's own. What is sent from then on waits for
// a handshake, which a peer can answer that was told the new public key.
func (t *Tunnel) SetKey(private Key) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.dev.IpcSet("private_key=" + hex.EncodeToString(private[:]) + "\n"); err != nil {
		return fmt.Errorf("setting the WireGuard key: %w", err)
	}
	t.own = private.Public()
	return nil
}

// SetPeer replaces whatever peer there was by pub, which may send from and be
// sent to the allowed prefixes, and starts a handshake unless it is Passive. The same peer again
// keeps its keys. Attach a stream first: the handshake waits a second for one,
// and is repeated only after five.
func (t *Tunnel) SetPeer(pub Key, allowed []netip.Prefix) error {
	if pub.IsZero() {
		return errors.New("setting the WireGuard peer: no public key")
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if pub == t.own {
		return errors.New("setting the WireGuard peer: its public key is my own")
	}
	// One operation: WireGuard holds its configuration's lock over all of it.
	// Prefixes move to the new peer before the old one goes, so no packet that is
	// read in between finds none and is dropped.
	var b strings.Builder
	line := func(k, v string) { b.WriteString(k + "=" + v + "\n") }
	line("public_key", hex.EncodeToString(pub[:]))
	line("endpoint", carrier.Endpoint)
	line("replace_allowed_ips", "true")
	for _, p := range allowed {
		line("allowed_ip", p.Masked().String())
	}
	line("persistent_keepalive_interval", strconv.Itoa(int(t.keep/time.Second)))
	if !t.peer.IsZero() && t.peer != pub {
		line("public_key", hex.EncodeToString(t.peer[:]))
		line("remove", "true")
	}
	if err := t.dev.IpcSet(b.String()); err != nil {
		return fmt.Errorf("setting the WireGuard peer: %w", err)
	}
	t.peer = pub
	return nil
}

// LastHandshake is when the peer last completed a handshake; zero if never.
func (t *Tunnel) LastHandshake() time.Time {
	conf, err := t.dev.IpcGet()
	if err != nil {
		return time.Time{}
	}
	var sec, nsec int64
	for l := range strings.Lines(conf) {
		k, v, _ := strings.Cut(strings.TrimSpace(l), "=")
		switch k {
		case "last_handshake_time_sec":
			sec, _ = strconv.ParseInt(v, 10, 64)
		case "last_handshake_time_nsec":
			nsec, _ = strconv.ParseInt(v, 10, 64)
		}
	}
	if sec == 0 && nsec == 0 {
		return time.Time{}
	}
	return time.Unix(sec, nsec)
}

// Done is closed when the tunnel has ended, by Close or because the device's
// Read failed.
func (t *Tunnel) Done() <-chan struct{} { return t.dev.Wait() }

// Close ends the tunnel, its Bind with the attached stream, and its Device, and
// waits. It is idempotent.
func (t *Tunnel) Close() {
	// The Bind first: WireGuard calls Send under a lock that its Close needs.
	t.bind.Shutdown()
	t.once.Do(t.dev.Close)
	<-t.dev.Wait()
}

// logger turns WireGuard's lines into slog's, without those that tell of its
// goroutines.
func logger(log *slog.Logger) *device.Logger {
	say := func(f func(string, ...any), constant string) func(string, ...any) {
		return func(format string, args ...any) {
			if strings.Contains(format, "Routine:") || strings.Contains(format, "UAPI:") {
				return
			}
			f(constant, "event", fmt.Sprintf(format, args...))
		}
	}
	return &device.Logger{Verbosef: say(log.Debug, "wireguard"), Errorf: say(log.Warn, "wireguard trouble")}
}
