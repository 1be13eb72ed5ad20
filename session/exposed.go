package session

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/expose"
)

// exposeTime bounds a question to the agent about exposed ports, a port-forward of
// its own included.
const exposeTime = 15 * time.Second

// startExposed opens ports on the agent's pod.
func (x *intercepts) startExposed(ctx context.Context, req api.InterceptRequest, wanted []cluster.Expose, say func(string)) (*api.Intercept, error) {
	x.changing.Lock()
	defer x.changing.Unlock()
	s := x.session
	if _, err := s.ready(); err != nil {
		return nil, err
	}
	i := &intercepted{state: api.InterceptStarting, saved: saved{ID: randomHex(8), Token: randomHex(16), Request: req, Namespace: s.cluster.Namespace(), Since: time.Now().UTC()}}
	for _, e := range wanted {
		port := int(e.Local)
		if e.Remote != "" {
			n, err := strconv.ParseUint(e.Remote, 10, 16)
			if err != nil || n == 0 {
				return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("expose %s: %q is no port of the agent's pod: it has numbers only", e, e.Remote), Hint: "culvert expose 8080:9091"}
			}
			port = int(n)
		}
		p := api.InterceptPort{Local: int(e.Local), Port: port, Protocol: string(e.Protocol)}
		if p.Protocol == "" {
			p.Protocol = string(corev1.ProtocolTCP)
		}
		if slices.ContainsFunc(i.Ports, func(o api.InterceptPort) bool { return o.Port == p.Port && o.Protocol == p.Protocol }) {
			return nil, &api.Error{Code: api.CodeUsage, Message: fmt.Sprintf("port %d/%s of the agent's pod is given twice", p.Port, p.Protocol), Hint: "culvert expose 8080 9090:9091"}
		}
		p.Listening = listening(networkOf(p.Protocol), uint16(p.Local))
		i.Ports = append(i.Ports, p)
	}
	if err := x.exposedAlready(i); err != nil {
		return nil, err
	}
	say("opening ports on the agent's pod")
	if err := x.put(ctx, i, func() { i.Active, i.state = true, api.InterceptActive }); err != nil {
		return nil, err
	}
	err := x.serve(i)
	if err == nil {
		err = x.applyExposed(ctx)
	}
	if err != nil {
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), exposeTime)
		defer cancel()
		if e := errors.Join(x.drop(undo, i), x.applyExposed(undo)); e != nil {
			s.log.Warn("closing exposed ports again", "err", e)
		}
		return nil, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	view := x.viewLocked(i)
	return &view, nil
}

// exposedAlready refuses a port that leads to this machine already.
func (x *intercepts) exposedAlready(i *intercepted) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, other := range x.all {
		if other.Request.Kind != api.KindExpose {
			continue
		}
		for _, p := range other.Ports {
			if slices.ContainsFunc(i.Ports, func(o api.InterceptPort) bool { return o.Port == p.Port && o.Protocol == p.Protocol }) {
				return &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("port %d/%s of the agent's pod leads to localhost:%d already", p.Port, p.Protocol, p.Local), Hint: fmt.Sprintf("culvert leave %d", p.Port)}
			}
		}
	}
	return nil
}

// applyExposed tells the agent all ports that it has to listen at.
func (x *intercepts) applyExposed(ctx context.Context) error {
	x.exposing.Lock()
	defer x.exposing.Unlock()
	ctx, cancel := context.WithTimeout(ctx, exposeTime)
	defer cancel()
	x.mu.Lock()
	ports := []expose.Port{}
	var ours []*intercepted
	for _, i := range x.all {
		if i.Request.Kind != api.KindExpose {
			continue
		}
		ours = append(ours, i)
		for _, p := range i.Ports {
			ports = append(ports, expose.Port{Port: uint16(p.Port), Protocol: p.Protocol, ID: cluster.PortID(i.ID, p.Port, p.Protocol), Token: i.Token})
		}
	}
	x.mu.Unlock()
	if len(ports) == 0 && x.session.knownAgent() == nil {
		return nil // there is nobody to tell
	}
	dial, agent, err := x.session.agentDialer()
	if err != nil {
		return err
	}
	state, err := expose.NewClient(dial, x.session.recall().Secret).Set(ctx, ports)
	if err != nil {
		return &api.Error{Code: api.CodeAgent, Message: fmt.Sprintf("having the agent open ports: %v", err), Hint: "culvert logs"}
	}
	var failed error
	for _, p := range state.Ports {
		if p.Error != "" {
			failed = &api.Error{Code: api.CodeExists, Message: fmt.Sprintf("port %d/%s of the agent's pod cannot be opened: %s", p.Port, p.Protocol, p.Error), Hint: "choose another one: culvert expose 8080:18080"}
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, i := range ours {
		var at []string
		for _, p := range i.Ports {
			at = append(at, net.JoinHostPort(agent.IPs[0].String(), strconv.Itoa(p.Port)))
		}
		if len(i.at) > 0 && !slices.Equal(i.at, at) {
			i.notes = []string{fmt.Sprintf("the agent's pod was replaced: the address is %s now, it was %s; register it again", at[0], i.at[0])}
		}
		i.at = at
	}
	return failed
}

// exposedLoop has an agent that is new listen as the last one did.
func (x *intercepts) exposedLoop(ctx context.Context) {
	for pause := firstPause; ctx.Err() == nil; {
		select {
		case <-ctx.Done():
			return
		case <-x.changed:
		}
		if !x.exposes() {
			continue
		}
		if err := x.applyExposed(ctx); err != nil {
			x.session.log.Info("opening exposed ports", "err", err)
			select {
			case <-time.After(pause):
			case <-ctx.Done():
			}
			pause = min(2*pause, lastPause)
			wake(x.changed)
			continue
		}
		pause = firstPause
	}
}

func (x *intercepts) exposes() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, i := range x.all {
		if i.Request.Kind == api.KindExpose {
			return true
		}
	}
	return false
}

func randomHex(bytes int) string {
	b := make([]byte, bytes)
	_, _ = rand.Read(b) // never fails (crypto/rand, Go 1.24)
	return hex.EncodeToString(b)
}
