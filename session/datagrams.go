package session

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/carrier"
)

// carrierUDP is the name of UDP in status.
const carrierUDP = "UDP"

// pinnedWait is how long --carrier udp waits for an answer when it connects.
const pinnedWait = 5 * time.Second

// wantsUDP tells what the options say.
func wantsUDP(o api.Options) bool {
	switch o.Carrier {
	case "", api.CarrierAuto, api.CarrierUDP:
		return o.UDP != api.UDPOff
	}
	return false
}

// openDatagrams opens the UDP socket, unless the options forbid it. Nothing is
// sent before an agent was met.
func (s *Session) openDatagrams(ctx context.Context) {
	switch {
	case s.options.UDP == api.UDPOff:
		s.udpReason = "--udp off was given"
		return
	case !wantsUDP(s.options):
		s.udpReason = "--carrier " + s.options.Carrier + " was given"
		return
	}
	d, err := carrier.ListenDatagrams(false, netip.AddrPort{})
	if err != nil {
		s.log.Warn("UDP is not tried", "err", err)
		s.udpReason = err.Error()
		return
	}
	if s.options.Carrier == api.CarrierUDP {
		d.Pin()
	}
	s.datagrams = d
	s.loops.Go(func() { d.Run(ctx, s.udpChanged) })
	if s.options.UDP == api.UDPNodePort {
		s.loops.Go(func() { s.nodePortLoop(ctx) })
	}
}

// features are what this end can do.
func (s *Session) features() []string {
	f := []string{carrier.FeatureGSO}
	if s.datagrams != nil {
		f = append(f, carrier.FeatureUDP)
	}
	return f
}

// split says how long packets for the agent may be: wire.LocalConfig.Split.
func (s *Session) split() int {
	if n := s.datagrams.MaxPacket(mtu); n > 0 {
		return n
	}
	if s.whole.Load() {
		return 0
	}
	return mtu
}

// nodePort is the NodePort Service of an agent.
type nodePort struct {
	agent   cluster.Agent
	port    int    // of the agent
	secret  []byte // of the agent
	targets []netip.AddrPort
}

// probeUDP has the agent that was just introduced tried by UDP. Its addresses
// leave the machine by its own routes from the next time that routes are set.
// With --carrier udp it waits for the answer.
func (s *Session) probeUDP(ctx context.Context, agent *cluster.Agent, w carrier.Welcome) error {
	d := s.datagrams
	if d == nil {
		return nil
	}
	var targets []netip.AddrPort
	reason := ""
	switch {
	case w.UDPPort <= 0 || w.UDPPort > 65535 || len(w.UDPSecret) != carrier.SecretLen:
		reason = "the agent does not listen for it"
	default:
		// Where to is what the API server says, and not the agent.
		for _, ip := range agent.IPs {
			targets = append(targets, netip.AddrPortFrom(ip, uint16(w.UDPPort)))
		}
	}
	s.mu.Lock()
	s.udpReason = reason
	if s.options.UDP == api.UDPNodePort && reason == "" {
		if s.nodePort.agent.UID == agent.UID { // it was introduced before
			targets = append(targets, s.nodePort.targets...)
		}
		s.nodePort = nodePort{agent: *agent, port: w.UDPPort, secret: w.UDPSecret, targets: targets[len(agent.IPs):]}
		wake(s.metUDP)
	}
	s.mu.Unlock()
	s.network.excludeAgent(addrs(targets))
	d.Probe(w.UDPSecret, targets)
	if s.options.Carrier != api.CarrierUDP {
		return nil
	}
	for end := time.Now().Add(pinnedWait); reason == ""; {
		if d.State().Up {
			return nil
		}
		if time.Now().After(end) {
			reason = noAnswer(d.State())
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(10 * time.Millisecond):
		}
	}
	return &api.Error{Code: api.CodeAgent, Message: "--carrier udp: " + reason,
		Hint: "--udp nodeport tries a NodePort Service too; --carrier auto uses the API server where UDP does not reach the agent"}
}

func addrs(targets []netip.AddrPort) []netip.Addr {
	var all []netip.Addr
	for _, t := range targets {
		all = append(all, t.Addr())
	}
	return all
}

// nodePortLoop makes the Service of --udp nodeport for each agent that was
// introduced, and has its node tried as well.
func (s *Session) nodePortLoop(ctx context.Context) {
	pause := firstPause
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.metUDP:
		}
		s.mu.Lock()
		n := s.nodePort
		s.mu.Unlock()
		more, err := s.cluster.NodePort(ctx, &n.agent, n.agent.Name, n.port)
		if err == nil {
			var targets []netip.AddrPort
			for _, ip := range n.agent.IPs {
				targets = append(targets, netip.AddrPortFrom(ip, uint16(n.port)))
			}
			targets = append(targets, more...)
			// First the routes: a probe that took the tunnel would come out at the node,
			// and UDP seem to work over itself.
			s.network.excludeAgent(addrs(targets))
			if err = s.network.applyActive(ctx); err == nil {
				s.mu.Lock()
				if s.nodePort.agent.UID == n.agent.UID {
					s.nodePort.targets, s.udpReason = more, ""
					s.datagrams.Probe(s.nodePort.secret, targets)
				}
				s.mu.Unlock()
				pause = firstPause
				continue
			}
		}
		if ctx.Err() != nil {
			return
		}
		s.log.Info("no node port for UDP", "err", err)
		s.mu.Lock()
		s.udpReason = "--udp nodeport: " + reason(err)
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, lastProxyPause)
		wake(s.metUDP)
	}
}

func (s *Session) udpUp() bool { return s.datagrams != nil && s.datagrams.State().Up }

// udpChanged is told when UDP begins or ceases to carry packets.
func (s *Session) udpChanged(up bool) {
	st := s.datagrams.State()
	s.log.Info("UDP", "in use", up, "agent", st.Addr.String(), "round trip", st.RTT, "longest message", st.Size)
	s.mu.Lock()
	alive := s.stream != nil && s.stream.Err() == nil
	s.mu.Unlock()
	pinned := s.options.Carrier == api.CarrierUDP
	c := s.carrierStatus()
	s.status.update(func(now *api.Session) {
		c.SentRate, c.ReceivedRate = now.Carrier.SentRate, now.Carrier.ReceivedRate
		now.Carrier = c
		switch {
		case !up && now.State == api.Connected && (pinned || !alive):
			now.State, now.Cause = api.Reconnecting, "UDP: "+noAnswer(st)
		case up && now.State == api.Reconnecting:
			now.State, now.Cause = api.Connected, ""
		}
	})
}

// noAnswer says who was asked in vain.
func noAnswer(st carrier.DatagramState) string {
	var asked []string
	for _, t := range st.Tried {
		asked = append(asked, t.String())
	}
	text := "no answer from " + strings.Join(asked, ", ")
	if !st.Dropped.IsZero() {
		text += fmt.Sprintf(" since %s", st.Dropped.Format(time.TimeOnly))
	}
	return text
}

// showDatagrams puts UDP into c, which describes the stream; s.mu is held.
func (s *Session) showDatagrams(c *api.CarrierStatus) {
	if s.datagrams == nil {
		if s.options.Carrier == "" || s.options.Carrier == api.CarrierAuto {
			c.Others = slices.Insert(c.Others, 0, api.OtherCarrier{Name: carrierUDP, Reason: s.udpReason})
		}
		return
	}
	st := s.datagrams.State()
	switch {
	case s.options.Carrier == api.CarrierUDP:
		c.Others = []api.OtherCarrier{{Name: c.Name, Reason: "--carrier udp was given"}}
		c.Name, c.RTT = carrierUDP, st.RTT
		return
	case st.Up:
		c.Others = slices.Insert(c.Others, 0, api.OtherCarrier{Name: c.Name, Reason: "UDP is faster; it takes over when that is silent"})
		c.Name, c.RTT = carrierUDP, st.RTT
		return
	}
	reason := s.udpReason
	switch {
	case reason != "":
	case st.Rounds < 2 && st.Dropped.IsZero():
		reason = "being tried"
	default:
		reason = noAnswer(st)
	}
	c.Others = slices.Insert(c.Others, 0, api.OtherCarrier{Name: carrierUDP, Reason: reason})
}
