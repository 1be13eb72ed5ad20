package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/culvert-dev/culvert/wire/ask"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/expose"
	"github.com/culvert-dev/culvert/wire/intercept"
	"github.com/culvert-dev/culvert/wire/peer"
)

// exposed are the ports of the pod's addresses that lead to the session, beside
// the one for gates.
type exposed struct {
	node *node

	queued atomic.Int64 // bytes of datagrams that wait for the session

	mu     sync.Mutex // also held while ports come and go
	ports  map[exposedKey]*exposedPort
	state  []expose.PortState // as last asked for
	closed bool
}

type exposedKey struct {
	port     uint16
	protocol string
}

// exposedPort is open at one address of the pod at least.
type exposedPort struct {
	all     *exposed
	key     exposedKey
	open    []interface{ Close() error }
	trouble string // where it is not open
	// id and token may change while it is open; guarded by all.mu.
	id, token string
}

// handleExposed serves expose.Path to whoever shows the session's secret.
func (a *Agent) handleExposed(mux *http.ServeMux) {
	mux.HandleFunc("GET "+expose.Path, a.guard(func(n *node, _ *http.Request) (any, error) {
		return n.exposed.show(), nil
	}))
	mux.HandleFunc("PUT "+expose.Path, a.guard(func(n *node, r *http.Request) (any, error) {
		var ports []expose.Port
		if err := json.NewDecoder(r.Body).Decode(&ports); err != nil {
			return nil, unreadable(err)
		}
		if err := n.exposed.set(ports); err != nil {
			return nil, err
		}
		return n.exposed.show(), nil
	}))
}

// show is what the session is told.
func (x *exposed) show() expose.State {
	x.mu.Lock()
	defer x.mu.Unlock()
	return expose.State{Instance: x.node.agent.instance, PodIPs: x.node.agent.cfg.PodIPs, Ports: slices.Clone(x.state)}
}

// set opens these ports and closes all others. What is wrong with one of them is
// in the state.
func (x *exposed) set(ports []expose.Port) error {
	if len(ports) > expose.Max {
		return &ask.Refusal{Status: http.StatusBadRequest, Reason: fmt.Sprintf("%d ports, where %d are possible", len(ports), expose.Max)}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.closed {
		return &ask.Refusal{Status: http.StatusConflict, Reason: "this agent is about to end"}
	}
	want := map[exposedKey]bool{}
	for _, p := range ports {
		want[exposedKey{p.Port, p.Protocol}] = true
	}
	for key, p := range x.ports { // first, since a new one may take the place
		if !want[key] {
			x.shut(p)
		}
	}
	x.state = nil
	seen := map[exposedKey]bool{}
	for _, p := range ports {
		key := exposedKey{p.Port, p.Protocol}
		st := expose.PortState{Port: p.Port, Protocol: p.Protocol}
		err := x.check(p)
		if err == nil && seen[key] {
			err = errors.New("it is in the list twice")
		}
		if err == nil {
			seen[key] = true
			err = x.open(key, p)
		}
		if err != nil {
			st.Error = err.Error()
		} else {
			st.Listening, st.Error = true, x.ports[key].trouble
		}
		x.state = append(x.state, st)
	}
	return nil
}

// check refuses a port that cannot be exposed.
func (x *exposed) check(p expose.Port) error {
	switch {
	case p.Port == 0:
		return errors.New("there is no port 0")
	case p.Protocol != expose.TCP && p.Protocol != expose.UDP:
		return fmt.Errorf("protocol %q is neither TCP nor UDP", p.Protocol)
	case p.ID == "" || p.Token == "":
		return errors.New("id or token is missing")
	case slices.Contains(x.node.targets.podPorts, p.Port), p.Port >= carrier.ControlPort && p.Port <= intercept.GatePort, p.Port == peer.Port:
		return errors.New("culvert's agent uses it itself")
	}
	return nil
}

// open has a port lead to the session. x.mu is held.
func (x *exposed) open(key exposedKey, asked expose.Port) error {
	if p := x.ports[key]; p != nil {
		p.id, p.token = asked.ID, asked.Token
		return nil
	}
	p := &exposedPort{all: x, key: key, id: asked.ID, token: asked.Token}
	var failed []error
	for _, ip := range x.node.agent.cfg.PodIPs {
		if err := p.listen(netip.AddrPortFrom(ip, key.port)); err != nil {
			failed = append(failed, err)
		}
	}
	err := errors.Join(failed...)
	switch {
	case err == nil && len(p.open) == 0:
		return errors.New("the agent knows no address of its pod")
	case len(p.open) == 0:
		return err
	case err != nil:
		p.trouble = err.Error()
	}
	if x.ports == nil {
		x.ports = map[exposedKey]*exposedPort{}
	}
	x.ports[key] = p
	x.node.door.machine.need()
	x.node.agent.log.Info("port exposed", "port", key.port, "protocol", key.protocol)
	return nil
}

// shut is the opposite of open. x.mu is held.
func (x *exposed) shut(p *exposedPort) {
	for _, c := range p.open {
		c.Close()
	}
	delete(x.ports, p.key)
	x.node.door.machine.release()
	x.node.agent.log.Info("port exposed no longer", "port", p.key.port, "protocol", p.key.protocol)
}

// close ends all ports for good.
func (x *exposed) close() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.closed = true
	for _, p := range x.ports {
		x.shut(p)
	}
}

// listen opens the port at one address.
func (p *exposedPort) listen(at netip.AddrPort) error {
	n := p.all.node
	if p.key.protocol == expose.UDP {
		c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
		if err != nil {
			return err
		}
		s := &exposedSocket{port: p, conn: c, at: at, flows: map[netip.AddrPort]*exposedFlow{}}
		p.open = append(p.open, s)
		n.spawn(s.serve)
		return nil
	}
	l, err := net.Listen("tcp", at.String())
	if err != nil {
		return err
	}
	p.open = append(p.open, l)
	n.spawn(func() { n.acceptFrom(l, "an exposed port", p.met) })
	return nil
}

// header introduces a connection to the session.
func (p *exposedPort) header(network string, client, server netip.AddrPort) intercept.Header {
	p.all.mu.Lock()
	defer p.all.mu.Unlock()
	return intercept.Header{Network: network, ID: p.id, Token: p.token, Client: client, Server: server}
}

// most is how many connections from the cluster there may be when one more comes by
// an exposed port, where anybody may open them: the last quarter is for gates.
func (x *exposed) most() int {
	n := x.node.agent.cfg.MaxInbound
	return n - n/4
}

// met leads one connection to the session. Its client has it already: all that can
// be told about a session that does not take it is a reset.
func (p *exposedPort) met(c *net.TCPConn) {
	n := p.all.node
	n.spawn(func() {
		n.door.lead(p.header(intercept.TCP, remoteOf(c), localOf(c)), p.all.most(), c, func(s intercept.Status) error {
			if s != intercept.Accepted {
				reset(c)
			}
			return nil
		})
	})
}
