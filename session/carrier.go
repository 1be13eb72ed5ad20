package session

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
	"github.com/culvert-dev/culvert/tun"
	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/queue"
)

const (
	// dialTime bounds one attempt at a stream: a dead API server must not hold
	// the loop longer than a user would wait.
	dialTime = 10 * time.Second
	// holdTime is how long the machine's packets wait for a carrier that broke.
	holdTime = 2 * time.Minute
	// helloTime bounds the introduction, a round trip on a connection that works.
	helloTime = 5 * time.Second
	// The pause between attempts doubles between these two. The first is short
	// because most breaks are an API server's restart or a proxy's idle cut.
	firstPause, lastPause = 200 * time.Millisecond, 5 * time.Second
)

// openTunnel makes WireGuard with fresh keys on the TUN device that the daemon
// handed over. It has no peer until an agent was met.
func (s *Session) openTunnel() error {
	granted := s.network.granted()
	file := s.network.takeTUN()
	if file == nil {
		return errors.New("the daemon handed over no TUN device")
	}
	device, err := tun.Open(file)
	if err != nil {
		return fmt.Errorf("opening the TUN device %s: %w", granted.Device, err)
	}
	key := wire.NewPrivateKey()
	local := wire.NewLocal(wire.LocalConfig{
		TUN: device, Tunnel: granted.Tunnel, Agent: granted.Agent, Inbound: granted.Inbound,
		MTU: mtu, Split: s.split, Log: s.log,
	})
	bind := carrier.NewBind(carrier.BindConfig{Hold: holdTime, Datagrams: s.datagrams})
	tunnel, err := wire.New(wire.Config{Device: local, PrivateKey: key, Bind: bind, Log: s.log})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.tunnel, s.local, s.bind, s.key = tunnel, local, bind, key
	s.mu.Unlock()
	return s.inbound.attach(local)
}

// dialAgent opens a stream to the agent's pod and adopts it.
func (s *Session) dialAgent(ctx context.Context, agent *cluster.Agent) error {
	s.setAgent(agent)
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	a := s.try(ctx, agent)
	if a.err != nil {
		return a.err
	}
	return s.adopt(ctx, a)
}

// adopt introduces us on a connection to the agent and gives the stream to
// WireGuard.
func (s *Session) adopt(ctx context.Context, a attempt) error {
	agent, conn := a.agent, a.conn
	dialCtx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	s.mu.Lock()
	s.introducing = cancel
	s.mu.Unlock()
	known := s.recall()
	hello := s.hello(queue.Sparse)
	key, renewed := s.keyNow()
	hello.PublicKey = key.Public().String()
	stream, welcome, err := carrier.Dial(dialCtx, conn, hello)
	if err != nil {
		conn.Close()
		return agentError(agent, err)
	}
	peer, err := wire.ParseKey(welcome.PublicKey)
	if err != nil {
		stream.Close()
		return fmt.Errorf("reading the agent's public key: %w", err)
	}

	s.mu.Lock()
	if s.stream != nil {
		s.redials++
	}
	s.stream, s.carrier = stream, a.name
	if renewed { // from here on the bulk lane is introduced with it
		s.key, s.staleKey = key, false
	}
	s.introduced = introduction{agent: *agent, stream: stream, instance: welcome.Instance,
		secret: welcome.ProxySecret, port: welcome.ProxyPort}
	met := s.introduced
	newPeer := s.peer != welcome.PublicKey
	s.whole.Store(slices.Contains(welcome.Features, carrier.FeatureGSO))
	tunnel, bind := s.tunnel, s.bind
	s.mu.Unlock()
	bind.Attach(stream)
	if renewed {
		if err := tunnel.SetKey(key); err != nil {
			stream.Close()
			return err
		}
	}
	if err := s.probeUDP(ctx, agent, welcome); err != nil {
		stream.Close()
		return err
	}
	if newPeer {
		// The agent may send from every address of the cluster.
		if err := tunnel.SetPeer(peer, []netip.Prefix{
			netip.MustParsePrefix("0.0.0.0/0"), netip.MustParsePrefix("::/0"),
		}); err != nil {
			return fmt.Errorf("giving WireGuard its peer: %w", err)
		}
		s.mu.Lock()
		s.peer = welcome.PublicKey // not before: an attempt that ends above is repeated
		s.mu.Unlock()
	}
	if known.Instance != "" && known.Instance != welcome.Instance {
		s.log.Info("another agent answers; connections through the old one end", "pod", agent.Pod)
		s.mu.Lock()
		s.orphaned = true
		s.mu.Unlock()
	}
	domain := s.names.agentSays(welcome.ResolvConf, s.options.ClusterDomain)
	if err := s.remember(ctx, func(r *remembered) { r.Instance, r.Domain = welcome.Instance, domain }); err != nil {
		return err
	}
	s.log.Info("carrier up", "carrier", a.name, "pod", agent.Pod, "agent version", welcome.Version)
	if s.options.Carrier == api.CarrierPodsProxy {
		if _, err := s.useProxy(ctx, met); err != nil {
			stream.Close()
			return pinnedError(err)
		}
	}
	wake(s.met)
	wake(s.lanes)
	s.intercepts.agentIs()
	s.status.update(func(st *api.Session) {
		st.Agent = api.AgentStatus{Namespace: agent.Namespace, Pod: agent.Pod, Node: agent.Node, Image: agent.Image, Version: welcome.Version}
	})
	return nil
}

// agentError says what to do when the two ends do not fit.
func agentError(agent *cluster.Agent, err error) error {
	var mismatch *carrier.ProtocolError
	if errors.As(err, &mismatch) {
		return &api.Error{Code: api.CodeAgent,
			Message: fmt.Sprintf("the agent image %s does not fit this culvert %s: %v", agent.Image, version.Version, err),
			Hint:    "use the image of the same version with --image"}
	}
	return fmt.Errorf("introducing this session to the agent pod %s/%s: %w", agent.Namespace, agent.Pod, err)
}

// carrierLoop keeps a stream to the agent up until ctx is done. It returns an
// error only for what no retry can mend.
func (s *Session) carrierLoop(ctx context.Context) error {
	pause := firstPause
	for ctx.Err() == nil {
		down, tries := time.Now(), 0
		s.mu.Lock()
		stream := s.stream
		s.mu.Unlock()
		if stream != nil {
			select {
			case <-ctx.Done():
				return nil
			case <-s.switched:
				continue
			case <-stream.Done():
			}
			s.mu.Lock()
			replaced := s.stream != stream
			s.mu.Unlock()
			if replaced {
				continue
			}
			down = time.Now()
			s.log.Info("carrier down", "err", stream.Err())
			if !s.udpUp() {
				s.status.update(func(st *api.Session) {
					st.State, st.Cause = api.Reconnecting, "the carrier broke: "+cause(stream.Err())
				})
			}
		}
		for ctx.Err() == nil {
			begun := time.Now()
			err := s.reconnect(ctx, tries, time.Since(down))
			tries++
			if err == nil {
				pause = firstPause
				s.setConnected()
				break
			}
			if ctx.Err() != nil {
				return nil
			}
			s.log.Info("reconnecting", "err", err)
			s.explain(err)
			if fatal(err) {
				return err
			}
			if time.Since(begun) < pause {
				select {
				case <-ctx.Done():
					return nil
				case <-s.hurry:
				case <-time.After(pause):
				}
			}
			pause = min(2*pause, lastPause)
		}
	}
	return nil
}

// reconnect brings the tunnel up again through the agent that we know. When that
// was tried in vain before, or the API server does not know it any more, the
// agent is looked for as well, wherever it lives now: but asking takes the API
// client's own connection, which after a cut takes seconds to find that it is
// dead.
func (s *Session) reconnect(ctx context.Context, tries int, away time.Duration) error {
	every := pace(away)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if s.knownAgent() == nil {
		if err := s.findAgent(ctx); err != nil {
			return err
		}
	} else if tries > 0 {
		searched := make(chan struct{})
		defer func() { cancel(); <-searched }()
		go func() {
			defer close(searched)
			if err := s.findAgent(ctx); err != nil && ctx.Err() == nil {
				s.log.Debug("looking for the agent", "err", err)
			}
		}()
	}
	winner, err := s.race(ctx, every)
	if err != nil && answered(err) && ctx.Err() == nil {
		s.log.Info("looking for the agent", "because", err)
		if err := s.findAgent(ctx); err != nil {
			return err
		}
		winner, err = s.race(ctx, every)
	}
	if err != nil {
		return err
	}
	if err := s.adopt(ctx, winner); err != nil {
		return err
	}
	if _, err := s.ping(ctx, s.network.agentAddr(), 5*time.Second); err != nil {
		s.mu.Lock()
		s.stream.Close()
		s.mu.Unlock()
		return fmt.Errorf("the agent does not answer through the tunnel: %w", err)
	}
	s.mu.Lock()
	orphaned, local := s.orphaned, s.local
	s.orphaned = false
	s.mu.Unlock()
	if orphaned { // after the ping: before there are keys only a few packets may wait
		s.log.Info("connections through the old agent are told", "connections", local.Challenge())
		local.ResetInbound()
	}
	if s.options.InterceptOnly {
		return s.network.apply(ctx, false)
	}
	s.network.activate()
	return s.network.apply(ctx, true)
}

// explain shows why the session is not back yet.
func (s *Session) explain(err error) {
	var e *api.Error
	state, why := api.Reconnecting, cause(err)
	if errors.As(err, &e) {
		why = e.Message
		if e.Code == api.CodeCredentials {
			state = api.NeedsLogin
			if e.Hint != "" {
				why += "; " + e.Hint
			}
		}
	}
	s.status.update(func(st *api.Session) { st.State, st.Cause = state, why })
}

// fatal tells what no retry mends: two ends that do not fit.
func fatal(err error) bool {
	var mismatch *carrier.ProtocolError
	return errors.As(err, &mismatch)
}

func cause(err error) string {
	if err == nil {
		return "closed by the other end"
	}
	return err.Error()
}

func (s *Session) carrierStatus() api.CarrierStatus {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := api.CarrierStatus{Name: s.carrier, Redials: s.redials, Others: s.otherCarriers()}
	if s.stream != nil {
		c.RTT = s.stream.RTT()
	}
	s.showDatagrams(&c)
	for _, stream := range []*carrier.Stream{s.stream, s.bulk} {
		if stream != nil && stream.Err() == nil {
			c.Lanes++
		}
	}
	if s.bind != nil {
		moved := s.bind.Stats()
		c.Sent, c.Received = moved.Sent, moved.Received
	}
	return c
}
