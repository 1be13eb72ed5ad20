package session

import (
	"context"
	"crypto/subtle"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/wire"
	"github.com/culvert-dev/culvert/wire/intercept"
)

const (
	// headerTime is for a connection from the agent to introduce itself.
	headerTime = 5 * time.Second
	// localTime bounds the dial of a local program: it answers at once, or its
	// backlog is full. The agent waits a little longer.
	localTime = 1500 * time.Millisecond
	// statusTime bounds the writing of one byte to the agent.
	statusTime = 10 * time.Second
)

// target is where connections of an intercept end: a port of this machine's
// loopback addresses.
type target struct {
	Token         string // of the intercept: who does not show it gets nothing
	Network       string // intercept.TCP or intercept.UDP
	Local         uint16 // port
	ProxyProtocol bool   // TCP: version 2 of it precedes the client's bytes
}

// inbound serves connections from the cluster: it joins each to a local program,
// dialled as the user that runs this process.
type inbound struct {
	log *slog.Logger

	mu      sync.Mutex
	local   *wire.Local // nil until there is a tunnel
	targets map[string]target
	open    map[string]map[wire.Inbound]struct{} // joined to a program, by intercept
}

func newInbound(log *slog.Logger) *inbound {
	return &inbound{log: log, targets: map[string]target{}, open: map[string]map[wire.Inbound]struct{}{}}
}

// attach gives it the tunnel's end. Before there is a target the port is closed.
func (in *inbound) attach(l *wire.Local) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.local = l
	return in.listen()
}

// listen opens the port or closes it. in.mu is held.
func (in *inbound) listen() error {
	if in.local == nil {
		return nil
	}
	handler := in.serve
	if len(in.targets) == 0 {
		handler = nil
	}
	if err := in.local.SetInbound(handler); err != nil {
		return fmt.Errorf("opening the port for connections from the cluster: %w", err)
	}
	return nil
}

// Set says where connections of an intercept lead from now on; those that are open
// stay.
func (in *inbound) Set(id string, t target) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.targets[id] = t
	return in.listen()
}

// Remove ends what Set began: new connections are refused with intercept.Unknown,
// and those that are open stay. It may be called repeatedly.
func (in *inbound) Remove(id string) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	delete(in.targets, id)
	return in.listen()
}

// Open is the number of an intercept's connections, and UDP flows.
func (in *inbound) Open(id string) int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.open[id])
}

// Reset ends an intercept's connections with a RST.
func (in *inbound) Reset(id string) {
	in.mu.Lock()
	var all []wire.Inbound
	for c := range in.open[id] {
		all = append(all, c)
	}
	in.mu.Unlock()
	for _, c := range all {
		c.Abort() // whoever reads it does the rest
	}
}

// find is the target that h may have; a watch fits one of any network.
func (in *inbound) find(h intercept.Header) (target, bool) {
	in.mu.Lock()
	t, ok := in.targets[h.ID]
	in.mu.Unlock()
	same := subtle.ConstantTimeCompare([]byte(h.Token), []byte(t.Token)) == 1
	return t, ok && same && t.Token != "" && (h.Network == t.Network || h.Network == intercept.Watch)
}

// serve is the handler of the tunnel's end.
func (in *inbound) serve(c wire.Inbound) {
	ctx, cancel := context.WithCancel(context.Background())
	c.OnReset(cancel)
	run := in.meet(ctx, c)
	if run == nil {
		cancel()
		return
	}
	go func() { // this goroutine's stack has grown, and a connection may be open for days
		defer cancel()
		run()
	}()
}

// meet has a connection say what it is for and answers it. What is left to do is
// what it returns, nil if nothing is.
func (in *inbound) meet(ctx context.Context, c wire.Inbound) (run func()) {
	_ = c.SetReadDeadline(time.Now().Add(headerTime))
	h, err := intercept.ReadHeader(c)
	if err != nil {
		in.log.Debug("connection from the cluster without a header", "err", err)
		c.Abort()
		return nil
	}
	_ = c.SetReadDeadline(time.Time{})
	c.Introduced()
	t, ok := in.find(h)
	own := h.Network == intercept.Watch && h.ID == "" && h.Token == "" // the agent's, no gate behind it
	if !ok && !own {
		in.answer(c, h, intercept.Unknown, nil)
		return nil
	}
	if h.Network == intercept.Watch {
		return func() { beat(ctx, c) }
	}
	if t.Network == intercept.UDP {
		return in.meetUDP(ctx, c, h, t)
	}
	return in.meetTCP(ctx, c, h, t)
}

// answer sends a status that ends the connection.
func (in *inbound) answer(c wire.Inbound, h intercept.Header, s intercept.Status, why error) {
	in.log.Debug("connection from the cluster", "intercept", h.ID, "client", h.Client, "status", s, "err", why)
	_ = c.SetWriteDeadline(time.Now().Add(statusTime))
	_ = intercept.WriteStatus(c, s) // who does not hear it waits for no connection
	c.Close()
}

// accept sends the status after which the program's bytes follow.
func accept(c wire.Inbound) error {
	_ = c.SetWriteDeadline(time.Now().Add(statusTime))
	defer func() { _ = c.SetWriteDeadline(time.Time{}) }()
	return intercept.WriteStatus(c, intercept.Accepted)
}

// beat tells the agent that this machine is here, until the connection ends.
func beat(ctx context.Context, c wire.Inbound) {
	defer c.Abort()
	t := time.NewTicker(intercept.BeatEvery)
	defer t.Stop()
	for accept(c) == nil {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// enter counts c, and leave does no more.
func (in *inbound) enter(id string, c wire.Inbound) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.open[id] == nil {
		in.open[id] = map[wire.Inbound]struct{}{}
	}
	in.open[id][c] = struct{}{}
}

func (in *inbound) leave(id string, c wire.Inbound) {
	in.mu.Lock()
	defer in.mu.Unlock()
	delete(in.open[id], c)
	if len(in.open[id]) == 0 {
		delete(in.open, id)
	}
}

func (in *inbound) meetTCP(ctx context.Context, c wire.Inbound, h intercept.Header, t target) (run func()) {
	local, err := dialLocal(ctx, t.Local)
	if err != nil {
		in.answer(c, h, intercept.Refused, err)
		return nil
	}
	in.enter(h.ID, c)
	err = accept(c)
	if err == nil && t.ProxyProtocol {
		_, err = local.Write(proxyHeader(h.Client, h.Server))
	}
	if err != nil {
		resetBoth(c, local)
		in.leave(h.ID, c)
		return nil
	}
	return func() {
		defer in.leave(h.ID, c)
		relay(ctx, c, local)
	}
}

// dialLocal connects to a program on this machine, by IPv4 or IPv6.
func dialLocal(ctx context.Context, port uint16) (*net.TCPConn, error) {
	ctx, cancel := context.WithTimeout(ctx, localTime)
	defer cancel()
	d := net.Dialer{KeepAlive: -1} // it is on this machine
	c, err := d.DialContext(ctx, "tcp4", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		var err6 error
		if c, err6 = d.DialContext(ctx, "tcp6", fmt.Sprintf("[::1]:%d", port)); err6 != nil {
			return nil, fmt.Errorf("dialling the local port %d: %w", port, err)
		}
	}
	return c.(*net.TCPConn), nil
}
