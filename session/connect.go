package session

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// connect walks every step of a first connect. What can be checked is checked
// before anything changes, first on the machine, then in the cluster; on an
// error the caller removes the agent and the daemon undoes the machine's part.
func (s *Session) connect(ctx context.Context) error {
	if err := s.open(ctx); err != nil {
		return err
	}
	if err := s.network.resolveHosts(ctx); err != nil {
		return err
	}
	if err := s.excludeServer(ctx); err != nil {
		return err
	}
	spec := s.agentSpec()

	if s.options.InterceptOnly {
		if err := s.preflight(ctx, spec); err != nil {
			return err
		}
		return s.connectAgent(ctx, spec)
	}

	// The ranges are looked for meanwhile: in a big cluster that takes a while.
	s.status.step("asking the API server")
	looking, cancel := context.WithCancel(ctx)
	defer cancel()
	type found struct {
		ranges cluster.Ranges
		err    error
	}
	ended := make(chan found, 1)
	go func() {
		ranges, err := s.cluster.Ranges(looking)
		ended <- found{ranges, err}
	}()
	if err := s.preflight(ctx, spec); err != nil {
		return err
	}
	s.status.step("finding the cluster's ranges")
	f := <-ended
	if f.err != nil {
		return f.err
	}
	s.network.setRanges(f.ranges)
	if err := s.connectAgent(ctx, spec); err != nil {
		return err
	}

	s.status.step("setting routes and names")
	s.network.activate()
	if err := s.network.apply(ctx, true); err != nil {
		return err
	}

	s.status.step("sending a packet and waiting for the answer")
	if err := s.probe(ctx); err != nil {
		return err
	}
	s.setConnected()
	return nil
}

// connectAgent starts the agent and opens the tunnel to it. The machine's network
// stays as it is, but for a device.
func (s *Session) connectAgent(ctx context.Context, spec cluster.AgentSpec) error {
	s.status.step("preparing the network")
	if err := s.network.apply(ctx, false); err != nil {
		return err
	}

	s.status.step("starting the agent")
	// Who may not write Leases connects without: then nobody can tell a living
	// agent from one that a crash left, and `culvert clean` leaves it alone.
	beats := s.heartbeat(ctx, s.cluster.Namespace()) == nil
	if err := s.remember(ctx, func(r *remembered) {
		r.Secret, r.Agent, r.Heartbeat = newSecret(), cluster.AgentName(s.id), beats
	}); err != nil {
		return err
	}
	spec.Heartbeat = beats
	agent, err := s.cluster.EnsureAgent(ctx, spec, func(step string) { s.status.step("starting the agent: " + step) })
	if err != nil {
		return err
	}

	s.status.step("opening the tunnel")
	if err := s.openTunnel(); err != nil {
		return err
	}
	if err := s.dialAgent(ctx, agent); err != nil {
		return err
	}
	if s.options.InterceptOnly {
		if _, err := s.ping(ctx, s.network.agentAddr(), 10*time.Second); err != nil {
			return silentAgent(err)
		}
		s.setConnected()
	}
	return nil
}

// silentAgent: the carrier is up, and nothing comes through it.
func silentAgent(err error) error {
	return &api.Error{Code: api.CodeAgent,
		Message: fmt.Sprintf("the tunnel is up but the agent does not answer through it: %v", err),
		Hint:    "`culvert logs` and `kubectl logs` of the agent pod say more"}
}

// resume makes the tunnel anew in a process that replaces a dead one. Nothing
// here needs the network, which may be down: carrierLoop goes on trying, and
// names in selectors keep the addresses that they had.
func (s *Session) resume(ctx context.Context) error {
	if err := s.open(ctx); err != nil {
		return err
	}
	s.network.resume(s.start.Network, s.start.Granted)
	if err := s.network.apply(ctx, !s.options.InterceptOnly); err != nil {
		return err
	}
	return s.openTunnel()
}

// open reads the kubeconfig and the selectors; no network.
func (s *Session) open(ctx context.Context) error {
	c, err := cluster.Open(s.options)
	if err != nil {
		return err
	}
	s.cluster = c
	s.status.update(func(st *api.Session) {
		st.Context, st.Server, st.Namespace, st.Cluster = c.Context(), c.Server(), c.Namespace(), c.Identity()
	})
	return s.network.readSelectors(s.options)
}

// excludeServer asks the daemon to keep the API server (and a proxy in front of
// it) out of every session's routes. Names are resolved again at each redial.
func (s *Session) excludeServer(ctx context.Context) error {
	addrs, err := s.cluster.Addresses(ctx)
	if err != nil {
		return err
	}
	return s.network.excludeServer(ctx, addrs)
}

// probe makes "connected" mean that a packet came back: an echo through
// WireGuard to the agent, then a question to the cluster's DNS by the kernel's
// route, as every program's packets go.
func (s *Session) probe(ctx context.Context) error {
	agent := s.network.agentAddr()
	if _, err := s.ping(ctx, agent, 10*time.Second); err != nil {
		return silentAgent(err)
	}
	rtt, err := s.dialThroughTUN(ctx, netip.AddrPortFrom(agent, 53))
	if err != nil {
		return &api.Error{Code: api.CodeInternal,
			Message: fmt.Sprintf("the agent answers, but not by the machine's route to %s: %v", agent, err),
			Hint:    "a firewall or another VPN on this machine may drop it: `culvert doctor`, `ip route get " + agent.String() + "`"}
	}
	s.log.Info("probe answered", "rtt", rtt)
	return nil
}

// dialThroughTUN measures a TCP connect that takes the kernel's route.
func (s *Session) dialThroughTUN(ctx context.Context, to netip.AddrPort) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	begun := time.Now()
	c, err := new(net.Dialer).DialContext(ctx, "tcp", to.String())
	if err != nil {
		return 0, err
	}
	c.Close()
	return time.Since(begun), nil
}

func (s *Session) setConnected() {
	c := s.carrierStatus()
	s.status.update(func(st *api.Session) {
		st.State, st.Step, st.Cause = api.Connected, "", ""
		st.Carrier = c
	})
}
