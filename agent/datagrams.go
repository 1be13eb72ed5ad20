package agent

import (
	"net/netip"
	"slices"
	"sync"

	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/netstack"
)

// datagramDoor is the UDP port on the pod's own addresses, where the session's
// packets arrive if it reaches the pod, or a node port that leads here. It
// answers only who knows the secret that the session was given when it was
// introduced.
type datagramDoor struct {
	way *carrier.Datagrams

	mu     sync.Mutex
	secret []byte // of the session's present key
}

// openDatagrams opens the port if the session wants it; nil if not, or if it
// cannot be had: then the session goes on with its streams.
func (a *Agent) openDatagrams(h carrier.Hello) *datagramDoor {
	if a.cfg.UDPPort <= 0 || !slices.Contains(h.Features, carrier.FeatureUDP) || len(a.cfg.PodIPs) == 0 {
		return nil
	}
	at := netip.AddrPortFrom(netip.IPv6Unspecified(), uint16(a.cfg.UDPPort)) // IPv4 too
	if len(a.cfg.PodIPs) == 1 {
		at = netip.AddrPortFrom(a.cfg.PodIPs[0], uint16(a.cfg.UDPPort))
	}
	way, err := carrier.ListenDatagrams(true, at)
	if err != nil {
		a.log.Warn("listening for UDP", "error", err)
		return nil
	}
	return &datagramDoor{way: way}
}

// renew makes another secret: for every new key of the session, so that only the
// process with that key is answered.
func (d *datagramDoor) renew() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.secret = carrier.NewSecret()
	d.way.Answer(d.secret)
}

func (d *datagramDoor) current() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.secret
}

// run keeps the state of the way, and has the stack treat losses as what they
// are on it.
func (d *datagramDoor) run(n *node) {
	d.way.Run(n.ctx, func(up bool) {
		path := netstack.Stream
		if up {
			path = netstack.Datagrams
		}
		if err := netstack.Tune(n.stack, path); err != nil {
			n.agent.log.Warn("tuning TCP", "error", err)
		}
		st := d.way.State()
		n.agent.log.Info("UDP", "in use", up, "session", st.Addr.String(), "longest message", st.Size)
	})
}
