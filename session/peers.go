package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/peer"
)

// peerTime bounds a question to the agent about peers, a port-forward of its own
// included.
const peerTime = 15 * time.Second

// maxKnownPeers bounds the peers that a session remembers, stale ones included;
// the oldest stale one gives way.
const maxKnownPeers = 32

// knownPeer is a peer that the session added: what is left of it when its agent
// is gone. Its private key is known to nobody here.
type knownPeer struct {
	Name      string       `json:"name"`
	PublicKey string       `json:"publicKey"`
	Addresses []netip.Addr `json:"addresses"`
	Added     time.Time    `json:"added"`
	Instance  string       `json:"instance"` // of the agent process
}

func (s *Session) handlePeers(ctx context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, peerTime)
	defer cancel()
	client, _, err := s.askAgent()
	if err != nil {
		return nil, nil, err
	}
	st, err := client.Get(ctx)
	if err != nil {
		return nil, nil, peerError(err)
	}
	return s.allPeers(st), nil, nil
}

// allPeers are the agent's and, after them, those that the session knows and
// this agent does not.
func (s *Session) allPeers(st peer.State) []api.Peer {
	all := make([]api.Peer, 0, len(st.Peers))
	for _, p := range st.Peers {
		all = append(all, api.Peer{Name: p.Name, PublicKey: p.PublicKey, Addresses: p.Addresses, Added: p.Added,
			LastHandshake: p.LastHandshake, From: p.From, Sent: p.Sent, Received: p.Received})
	}
	for _, k := range s.recall().Peers {
		if !slices.ContainsFunc(st.Peers, func(p peer.Peer) bool { return p.Name == k.Name }) {
			all = append(all, k.stale())
		}
	}
	return all
}

func (k knownPeer) stale() api.Peer {
	return api.Peer{Name: k.Name, PublicKey: k.PublicKey, Addresses: k.Addresses, Added: k.Added, Stale: true}
}

func (s *Session) handlePeerAdd(ctx context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
	var req api.PeerRequest
	if err := json.Unmarshal(in, &req); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, peerTime)
	defer cancel()
	c, err := s.addPeer(ctx, req)
	return c, nil, err
}

// addPeer has the agent make a peer and returns its configuration, which is kept
// nowhere.
func (s *Session) addPeer(ctx context.Context, req api.PeerRequest) (*api.PeerConfig, error) {
	if err := peer.CheckName(req.Name); err != nil {
		return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("peer name %q: %v", req.Name, err), Hint: "culvert peer add phone"}
	}
	endpoint, err := parseEndpoint(req.Endpoint)
	if err != nil {
		return nil, err
	}
	c := &api.PeerConfig{Name: req.Name, PublicKey: req.PublicKey}
	if c.PublicKey == "" {
		key := wire.NewPrivateKey()
		c.PrivateKey, c.PublicKey = key.String(), key.Public().String()
	} else if key, err := wire.ParseKey(c.PublicKey); err != nil || key.IsZero() {
		return nil, &api.Error{Code: api.CodeUsage,
			Message: fmt.Sprintf("--public-key %q is not a WireGuard public key: 32 bytes in base64", c.PublicKey), Hint: "wg genkey | tee private.key | wg pubkey"}
	}
	client, agent, err := s.askAgent()
	if err != nil {
		return nil, err
	}
	if req.NodePort {
		if endpoint.port != "" {
			return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("--nodeport and the port in --endpoint %s exclude each other", req.Endpoint), Hint: "give the host alone, or leave --nodeport out"}
		}
		// Before the peer: nobody gets an endpoint that is not there.
		at, err := s.cluster.NodePort(ctx, agent, agent.Name+"-peers", peer.Port)
		if err != nil {
			return nil, err
		}
		if err := endpoint.atNode(at); err != nil {
			return nil, err
		}
	}
	ranges, err := pickPeerRanges(s.network.busy())
	if err != nil {
		return nil, err
	}
	st, err := client.Add(ctx, req.Name, peer.Ask{PublicKey: c.PublicKey, Ranges: ranges})
	if err != nil {
		return nil, peerError(err)
	}
	i := slices.IndexFunc(st.Peers, func(p peer.Peer) bool { return p.Name == req.Name })
	if i < 0 || len(st.PodIPs) == 0 {
		return nil, &api.Error{Code: api.CodeAgent, Message: "the agent made the peer and does not list it, or does not know its own address", Hint: "culvert logs"}
	}
	made := st.Peers[i]
	if err := s.remember(ctx, func(r *remembered) {
		r.Peers = slices.DeleteFunc(slices.Clone(r.Peers), func(k knownPeer) bool { return k.Name == made.Name })
		r.Peers = append(r.Peers, knownPeer{Name: made.Name, PublicKey: made.PublicKey, Addresses: made.Addresses, Added: made.Added, Instance: st.Instance})
		r.Peers = forgetOldest(r.Peers, st.Instance)
	}); err != nil {
		return nil, err
	}
	c.Context, c.Agent = s.cluster.Context(), agent.Namespace+"/"+agent.Pod
	c.Addresses, c.DNS, c.MTU, c.ServerKey = made.Addresses, st.DNS, st.MTU, st.PublicKey
	c.Endpoint = endpoint.text(st)
	c.Search = s.names.search()
	plan, holes := s.network.routed()
	if at, err := netip.ParseAddrPort(c.Endpoint); err == nil {
		// wg-quick would lead WireGuard's own packets into the tunnel.
		holes = append(holes, netip.PrefixFrom(at.Addr(), at.Addr().BitLen()))
	}
	for _, a := range c.DNS {
		plan = append(plan, netip.PrefixFrom(a, a.BitLen()))
	}
	c.AllowedIPs = cut(plan, holes)
	s.log.Info("peer added", "name", made.Name, "addresses", made.Addresses, "endpoint", c.Endpoint)
	return c, nil
}

// forgetOldest keeps the list bounded; peers of the agent that runs now stay.
func forgetOldest(list []knownPeer, instance string) []knownPeer {
	for len(list) > maxKnownPeers {
		i := slices.IndexFunc(list, func(k knownPeer) bool { return k.Instance != instance })
		i = max(i, 0)
		list = slices.Delete(list, i, i+1)
	}
	return list
}

func (s *Session) handlePeerRemove(ctx context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
	var req api.PeerRequest
	if err := json.Unmarshal(in, &req); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, peerTime)
	defer cancel()
	client, _, err := s.askAgent()
	if err != nil {
		return nil, nil, err
	}
	st, err := client.Get(ctx)
	if err != nil {
		return nil, nil, peerError(err)
	}
	all := s.allPeers(st)
	i := slices.IndexFunc(all, func(p api.Peer) bool { return p.Name == req.Name })
	if i < 0 {
		return nil, nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("there is no peer %q", req.Name), Hint: "culvert peer list"}
	}
	if !all[i].Stale {
		if _, err := client.Remove(ctx, req.Name); err != nil {
			return nil, nil, peerError(err)
		}
	}
	err = s.remember(ctx, func(r *remembered) {
		r.Peers = slices.DeleteFunc(slices.Clone(r.Peers), func(k knownPeer) bool { return k.Name == req.Name })
	})
	s.log.Info("peer removed", "name", req.Name, "stale", all[i].Stale)
	return all[i], nil, err
}

// askAgent is the way to ask the agent about peers: its HTTP port, by a
// port-forward of its own.
func (s *Session) askAgent() (*peer.Client, *cluster.Agent, error) {
	dial, agent, err := s.agentDialer()
	if err != nil {
		return nil, nil, err
	}
	return &peer.Client{Secret: s.recall().Secret, Dial: dial}, agent, nil
}

// agentDialer dials the agent's HTTP port, by a port-forward of its own.
func (s *Session) agentDialer() (func(context.Context) (net.Conn, error), *cluster.Agent, error) {
	agent := s.knownAgent()
	if st := s.status.get(); agent == nil || st.State != api.Connected {
		return nil, nil, &api.Error{Code: api.CodeAgent, Message: fmt.Sprintf("the session is %s: its agent cannot be asked now", st.State), Hint: "culvert status"}
	}
	return func(ctx context.Context) (net.Conn, error) {
		if err := s.excludeServer(ctx); err != nil {
			return nil, err
		}
		return s.cluster.PortForward(agent, carrier.MetricsPort).Dial(ctx)
	}, agent, nil
}

// peerError makes of what the agent refused, or of the way to it, what users see.
func peerError(err error) error {
	var r *peer.Refusal
	if !errors.As(err, &r) {
		var e *api.Error
		if errors.As(err, &e) {
			return e
		}
		return &api.Error{Code: api.CodeAgent, Message: fmt.Sprintf("asking the agent about peers: %v", err), Hint: "culvert status"}
	}
	e := &api.Error{Code: api.CodeAgent, Message: r.Reason, Hint: "culvert logs"}
	switch r.Status {
	case http.StatusBadRequest:
		e.Code, e.Hint = api.CodeUsage, "culvert peer add --help"
	case http.StatusConflict:
		e.Code, e.Hint = api.CodeExists, "culvert peer list shows the peers that there are, culvert peer remove NAME ends one"
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		e.Message, e.Hint = "the agent's image knows nothing of peers: "+r.Reason, "connect with the image of the same version: --image"
	case http.StatusUnauthorized:
		e.Hint = "the agent was replaced just now: try again"
	}
	return e
}

// endpoint is what --endpoint says; the zero value is the pod's own address.
type endpoint struct {
	host string
	port string
}

// parseEndpoint reads HOST, HOST:PORT, [IPv6] and [IPv6]:PORT.
func parseEndpoint(text string) (endpoint, error) {
	bad := func(why string) (endpoint, error) {
		return endpoint{}, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("--endpoint %q: %s", text, why), Hint: "give HOST, HOST:PORT or [IPv6]:PORT"}
	}
	if text == "" {
		return endpoint{}, nil
	}
	e := endpoint{host: text}
	if a, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil {
		e.host = a.String()
	} else if strings.Contains(text, ":") {
		if e.host, e.port, err = net.SplitHostPort(text); err != nil {
			return bad("it is neither a host nor host and port")
		}
		if n, err := net.LookupPort("udp", e.port); err != nil || n == 0 {
			return bad("the port is not between 1 and 65535")
		}
	}
	if e.host == "" || len(e.host) > 253 || strings.Trim(e.host, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._:") != "" {
		return bad("the host is no name and no address")
	}
	return e, nil
}

// atNode takes the node port and, without a host of its own, the node's address:
// a public one if there is one, since a phone may be anywhere.
func (e *endpoint) atNode(at []netip.AddrPort) error {
	if len(at) == 0 {
		return &api.Error{Code: api.CodeAgent, Message: "the agent's node has no address that you may see", Hint: "name it with --endpoint HOST"}
	}
	best := at[0]
	if i := slices.IndexFunc(at, func(a netip.AddrPort) bool { return !a.Addr().IsPrivate() }); i >= 0 {
		best = at[i]
	}
	e.port = fmt.Sprint(best.Port())
	if e.host == "" {
		e.host = best.Addr().String()
	}
	return nil
}

// text is how wg-quick wants it.
func (e endpoint) text(st peer.State) string {
	host, port := e.host, e.port
	if host == "" {
		host = st.PodIPs[0].String()
		for _, ip := range st.PodIPs { // where a machine has one family only it is this one
			if ip.Is4() {
				host = ip.String()
				break
			}
		}
	}
	if port == "" {
		port = fmt.Sprint(st.Port)
	}
	return net.JoinHostPort(host, port)
}
