package session

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"os/user"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/daemon/link"
	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
)

// mtu of inner packets: WireGuard's usual one, so that a UDP carrier can take
// over without a change. Between our two ends TCP travels in super-packets
// anyway, see docs/architecture.md.
const mtu = 1420

// defaultTimeout is how long connect may take when the user did not say.
const defaultTimeout = 60 * time.Second

// Session owns everything of one connected cluster in this process.
type Session struct {
	conn       *link.Conn
	log        *slog.Logger
	status     *status
	disconnect chan struct{} // closed when the daemon asks
	hurry      chan struct{} // one token: a redial under way shall not wait
	once       sync.Once     // closes disconnect

	id      string
	options api.Options
	start   link.Start
	cluster *cluster.Cluster
	network network
	names   names
	inbound *inbound // connections from the cluster

	intercepts *intercepts

	// mu guards what the loops replace while the session lives.
	mu         sync.Mutex
	remembered remembered
	tunnel     *wire.Tunnel
	local      *wire.Local
	bind       *carrier.Bind
	datagrams  *carrier.Datagrams // the UDP way, or nil; set once
	key        wire.Key
	staleKey   bool            // the next introduction is with another key
	stream     *carrier.Stream // the first one, or nil
	bulk       *carrier.Stream // the bulk lane's, or nil; may have ended
	carrier    string          // the dialer's name of stream
	redials    int
	peer       string         // the agent's public key that the tunnel has
	orphaned   bool           // connections may live that the agent does not know
	agent      *cluster.Agent // as last found, or nil

	introducing context.CancelFunc // ends the last introduction, which may be over

	introduced  introduction // by the last port-forward
	proxyReason string       // why pods/proxy is not in use; empty: not known yet
	nodePort    nodePort     // where --udp nodeport leads
	udpReason   string       // why UDP is not even tried; empty: it is
	whole       atomic.Bool  // the agent takes super-packets

	met      chan struct{} // capacity 1: introduced was set
	metUDP   chan struct{} // capacity 1: nodePort was set
	switched chan struct{} // capacity 1: stream was replaced while it lived
	lanes    chan struct{} // capacity 1: stream is another one, or has made its choice

	loops sync.WaitGroup
}

// remembered is what the daemon keeps in memory for the next process of this
// session.
type remembered struct {
	Secret   string      `json:"secret"`   // proves to the agent that we are the same session
	Agent    string      `json:"agent"`    // name of its Deployment; empty: not made yet
	Instance string      `json:"instance"` // of the agent process that we last talked to
	Domain   string      `json:"domain"`   // cluster domain
	Peers    []knownPeer `json:"peers,omitempty"`
	// Heartbeat: a Lease in the agent's namespace tells that the session lives.
	Heartbeat  bool    `json:"heartbeat,omitempty"`
	Intercepts []saved `json:"intercepts,omitempty"`
}

func newSession(conn *link.Conn) *Session {
	s := &Session{conn: conn, log: slog.Default(), disconnect: make(chan struct{}), hurry: make(chan struct{}, 1),
		met: make(chan struct{}, 1), metUDP: make(chan struct{}, 1), switched: make(chan struct{}, 1), lanes: make(chan struct{}, 1)}
	s.status = &status{conn: conn}
	s.inbound = newInbound(s.log)
	s.network.session = s
	s.names.session = s
	s.intercepts = newIntercepts(s)
	return s
}

// run connects (or resumes) and keeps the connection until ctx is done.
func (s *Session) run(ctx context.Context, start link.Start) error {
	s.id, s.options, s.start = start.ID, start.Options, start
	s.status.update(func(st *api.Session) {
		st.ID = s.id
		st.State, st.Step = api.Connecting, "reading the kubeconfig"
		if start.Network != nil && start.Network.Active {
			st.State, st.Cause = api.Reconnecting, "the session process was restarted"
		}
	})
	if start.Remembered != nil {
		if err := json.Unmarshal(start.Remembered, &s.remembered); err != nil {
			return fmt.Errorf("reading what the last process remembered: %w", err)
		}
	}
	s.openDatagrams(ctx)
	resume := start.Network != nil && start.Granted != nil && (start.Network.Active || start.Restart > 0 && s.options.InterceptOnly)
	if resume {
		if err := s.resume(ctx); err != nil {
			return err
		}
	} else {
		timeout := s.options.Timeout
		if timeout <= 0 {
			timeout = defaultTimeout
		}
		c, cancel := context.WithTimeout(ctx, timeout)
		err := s.connect(c)
		cancel()
		if err != nil {
			return err
		}
	}

	failed := make(chan error, 1)
	s.loops.Go(func() {
		if err := s.carrierLoop(ctx); err != nil {
			failed <- err
		}
	})
	s.loops.Go(func() { s.doubtLoop(ctx) })
	s.loops.Go(func() { s.betterLoop(ctx) })
	s.loops.Go(func() { s.bulkLoop(ctx) })
	if !s.options.InterceptOnly {
		s.loops.Go(func() { s.rangesLoop(ctx) })
	}
	s.intercepts.resume(s.recall().Intercepts)
	s.loops.Go(func() { s.intercepts.exposedLoop(ctx) })
	s.loops.Go(func() { s.heartbeatLoop(ctx) })
	s.loops.Go(func() { s.removeStale(ctx) })
	s.loops.Go(func() { s.network.loop(ctx) })
	s.loops.Go(func() { s.statusLoop(ctx) })
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case err := <-failed:
		return err
	}
}

// waitLoops waits until the loops have ended, whose context is done, or for the
// limit.
func (s *Session) waitLoops(limit time.Duration) {
	ended := make(chan struct{})
	go func() { s.loops.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(limit):
		s.log.Warn("loops are still running", "after", limit)
	}
}

// close stops answering names and ends the tunnel.
func (s *Session) close() {
	s.mu.Lock()
	tunnel, streams := s.tunnel, []*carrier.Stream{s.stream, s.bulk}
	s.mu.Unlock()
	s.names.close()
	if s.datagrams != nil {
		s.datagrams.Close()
	}
	for _, stream := range streams {
		if stream != nil {
			stream.Close()
		}
	}
	if tunnel != nil {
		tunnel.Close()
	}
}

// remember gives the daemon what a next process needs.
func (s *Session) remember(ctx context.Context, change func(*remembered)) error {
	s.mu.Lock()
	change(&s.remembered)
	r := s.remembered
	s.mu.Unlock()
	if _, err := s.conn.Call(ctx, link.MethodRemember, r, nil); err != nil {
		return fmt.Errorf("leaving a note with the daemon: %w", err)
	}
	return nil
}

func (s *Session) recall() remembered {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.remembered
}

// removeAgent deletes what the session made in the cluster, if it made anything.
func (s *Session) removeAgent(ctx context.Context) error {
	name := s.recall().Agent
	if name == "" {
		return nil
	}
	if s.cluster == nil { // asked to end before it had begun: a process before it made the agent
		c, err := cluster.Open(s.options)
		if err != nil {
			return err
		}
		s.cluster = c
	}
	return s.cluster.DeleteAgent(ctx, name)
}

func (s *Session) handleDisconnect(ctx context.Context, _ json.RawMessage, _ []*os.File) (any, []*os.File, error) {
	s.once.Do(func() { close(s.disconnect) })
	return nil, nil, nil
}

func (s *Session) handleSiblings(ctx context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
	var siblings []link.Sibling
	if err := json.Unmarshal(in, &siblings); err != nil {
		return nil, nil, err
	}
	s.names.setSiblings(siblings)
	return nil, nil, nil
}

func (s *Session) handleMachineDNS(ctx context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
	var servers []netip.AddrPort
	if err := json.Unmarshal(in, &servers); err != nil {
		return nil, nil, err
	}
	s.names.setMachine(servers)
	return nil, nil, nil
}

// agentSpec is the Deployment that the user's options describe.
func (s *Session) agentSpec() cluster.AgentSpec {
	o := s.options
	spec := cluster.AgentSpec{
		Session: s.id, Origin: s.start.Origin, Image: o.Image, PullPolicy: o.ImagePullPolicy, PullSecrets: o.ImagePullSecrets,
		NodeSelector: o.NodeSelector, Labels: o.Labels, Annotations: o.Annotations,
		ServiceAccount: o.ServiceAccount, PodQuota: o.PodQuota,
		Heartbeat: s.recall().Heartbeat,
	}
	spec.User = strconv.Itoa(os.Getuid())
	if u, err := user.Current(); err == nil {
		spec.User = u.Username
	}
	return spec
}

// newSecret makes the proof of being the same session: 32 random bytes, base64.
func newSecret() string {
	var b [32]byte
	rand.Read(b[:])
	return base64.StdEncoding.EncodeToString(b[:])
}

// contextDone tells an error that only says that we are ending.
func contextDone(ctx context.Context, err error) bool {
	return ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, context.Cause(ctx)))
}
