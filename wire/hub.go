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

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

// HubConfig is what a Hub is made of. The Hub owns Device from NewHub on, also
// when NewHub fails.
type HubConfig struct {
	Device     wgtun.Device // takes ordinary packets only, no super-packets
	PrivateKey Key
	Port       uint16       // UDP, on all addresses; 0: any that is free
	Log        *slog.Logger // nil: none
}

// Hub is an ordinary WireGuard device at a UDP port, to which any number of
// standard peers connect. What a peer may send from, and is sent, is its own
// addresses only: WireGuard drops the rest. Its methods may be called from any
// goroutine.
type Hub struct {
	dev   *device.Device
	valve *valve
	own   Key // public
	port  uint16
	once  sync.Once

	mu    sync.Mutex
	peers map[Key][]netip.Addr
}

// HubPeer is what WireGuard knows of one peer of a Hub.
type HubPeer struct {
	LastHandshake  time.Time      // zero: never
	From           netip.AddrPort // where it was heard last; invalid: never
	Sent, Received uint64         // bytes, to and from it
}

// NewHub opens the port and starts WireGuard, without peers.
func NewHub(cfg HubConfig) (*Hub, error) {
	log := cfg.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	h := &Hub{own: cfg.PrivateKey.Public(), peers: map[Key][]netip.Addr{}}
	h.valve = newValve(h.own)
	lines := logger(log)
	lines.Errorf = lines.Verbosef // a peer whose network is gone has one for each packet
	h.dev = device.NewDevice(h.valve.device(cfg.Device), h.valve.bind(conn.NewStdNetBind()), lines)
	if err := h.dev.IpcSet(fmt.Sprintf("private_key=%s\nlisten_port=%d\n", hex.EncodeToString(cfg.PrivateKey[:]), cfg.Port)); err != nil {
		h.Close()
		return nil, fmt.Errorf("setting the WireGuard key and port %d: %w", cfg.Port, err)
	}
	if err := h.dev.Up(); err != nil {
		h.Close()
		return nil, fmt.Errorf("opening UDP port %d for WireGuard: %w", cfg.Port, err)
	}
	err := h.each(func(_ Key, field, value string) {
		if n, err := strconv.ParseUint(value, 10, 16); field == "listen_port" && err == nil {
			h.port = uint16(n)
		}
	})
	if err != nil {
		h.Close()
		return nil, err
	}
	return h, nil
}

// PublicKey is the Hub's own.
func (h *Hub) PublicKey() Key { return h.own }

// Port is the UDP port on which the Hub hears.
func (h *Hub) Port() uint16 { return h.port }

// Add lets the holder of pub connect, at these addresses. They and the key must
// be no other peer's.
func (h *Hub) Add(pub Key, addrs []netip.Addr) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if pub.IsZero() || pub == h.own {
		return errors.New("adding a WireGuard peer: its public key is missing or my own")
	}
	if _, twice := h.peers[pub]; twice {
		return errors.New("adding a WireGuard peer: its public key is another peer's")
	}
	var b strings.Builder
	fmt.Fprintf(&b, "public_key=%s\nreplace_allowed_ips=true\n", hex.EncodeToString(pub[:]))
	for _, a := range addrs {
		fmt.Fprintf(&b, "allowed_ip=%s\n", netip.PrefixFrom(a, a.BitLen()))
	}
	// Before WireGuard knows it: what it reads for the peer must find its place.
	h.valve.add(addrs)
	if err := h.dev.IpcSet(b.String()); err != nil {
		h.valve.remove(addrs)
		return fmt.Errorf("adding a WireGuard peer: %w", err)
	}
	h.peers[pub] = addrs
	return nil
}

// Remove forgets a peer: nothing more is taken from it or sent to it. It returns
// how many are left.
func (h *Hub) Remove(pub Key) (left int, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.dev.IpcSet(fmt.Sprintf("public_key=%s\nremove=true\n", hex.EncodeToString(pub[:]))); err != nil {
		return len(h.peers), fmt.Errorf("removing a WireGuard peer: %w", err)
	}
	h.valve.remove(h.peers[pub])
	delete(h.peers, pub)
	return len(h.peers), nil
}

// Peers is what WireGuard knows of its peers now.
func (h *Hub) Peers() (map[Key]HubPeer, error) {
	all := map[Key]HubPeer{}
	err := h.each(func(k Key, field, value string) {
		if k.IsZero() {
			return
		}
		p := all[k]
		n, _ := strconv.ParseUint(value, 10, 63) // the fields that are no numbers do not use it
		switch field {
		case "endpoint":
			p.From, _ = netip.ParseAddrPort(value)
		case "last_handshake_time_sec":
			if n > 0 {
				p.LastHandshake = time.Unix(int64(n), 0)
			}
		case "last_handshake_time_nsec":
			if n > 0 {
				p.LastHandshake = p.LastHandshake.Add(time.Duration(n))
			}
		case "tx_bytes":
			p.Sent = n
		case "rx_bytes":
			p.Received = n
		}
		all[k] = p
	})
	return all, err
}

// each gives every line of WireGuard's state with the key of the peer that it
// is of; zero: of the device.
func (h *Hub) each(line func(peer Key, field, value string)) error {
	state, err := h.dev.IpcGet()
	if err != nil {
		return fmt.Errorf("asking WireGuard for its state: %w", err)
	}
	var peer Key
	for l := range strings.Lines(state) {
		field, value, _ := strings.Cut(strings.TrimSpace(l), "=")
		if field == "public_key" {
			if _, err := hex.Decode(peer[:], []byte(value)); err != nil {
				return fmt.Errorf("reading WireGuard's state: %w", err)
			}
		}
		line(peer, field, value)
	}
	return nil
}

// Close ends the Hub, its port and its Device, and waits. It is idempotent.
func (h *Hub) Close() {
	h.once.Do(h.dev.Close)
	<-h.dev.Wait()
}
