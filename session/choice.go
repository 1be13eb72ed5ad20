package session

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/queue"
)

const (
	// proxyTime bounds one attempt at pods/proxy, the proof included.
	proxyTime = 8 * time.Second
	// The pause between attempts doubles between these two: traffic flows by the
	// port-forward meanwhile, and what keeps pods/proxy away (RBAC, a
	// NetworkPolicy) seldom changes.
	firstProxyPause, lastProxyPause = 2 * time.Second, 5 * time.Minute
	// provenAfter is how long a stream has to live for its break to be no sign
	// against its carrier: longer than a load balancer's idle cut.
	provenAfter = 2 * time.Minute
)

// introduction is what the last port-forward brought: the way to add a stream
// of another carrier to the same agent process.
type introduction struct {
	agent    cluster.Agent
	stream   *carrier.Stream // the port-forward's
	instance string          // of the agent process
	secret   []byte
	port     int // 0: the agent offers no other way
}

// errNoOffer: an agent that does not listen for pods/proxy.
var errNoOffer = errors.New("the agent does not listen for it")

// proxyStream opens a stream by pods/proxy to the agent that was introduced.
func (s *Session) proxyStream(ctx context.Context, i introduction, lane queue.Lane) (*carrier.Stream, error) {
	if i.port == 0 || len(i.secret) == 0 {
		return nil, errNoOffer
	}
	ctx, cancel := context.WithTimeout(ctx, proxyTime)
	defer cancel()
	conn, err := s.cluster.PodProxy(&i.agent, i.port).Dial(ctx)
	if err != nil {
		return nil, err
	}
	stream, err := carrier.Prove(ctx, conn, i.secret, lane)
	if err != nil {
		return nil, fmt.Errorf("proving this session to the agent: %w", err)
	}
	return stream, nil
}

// useProxy moves the session from i's port-forward to pods/proxy. What is under
// way in the old stream still arrives.
func (s *Session) useProxy(ctx context.Context, i introduction) (*carrier.Stream, error) {
	stream, err := s.proxyStream(ctx, i, queue.Sparse)
	if err != nil {
		s.mu.Lock()
		s.proxyReason = reason(err)
		s.mu.Unlock()
		return nil, err
	}
	s.mu.Lock()
	if s.stream != i.stream || i.stream.Err() != nil {
		s.mu.Unlock()
		stream.Close()
		return nil, errors.New("the port-forward broke meanwhile")
	}
	s.stream, s.carrier, s.proxyReason = stream, carrierProxy, ""
	s.bind.Move(stream)
	s.mu.Unlock()
	wake(s.switched)
	wake(s.lanes)
	s.log.Info("carrier up", "carrier", carrierProxy, "pod", i.agent.Pod)
	return stream, nil
}

// betterLoop moves the session to pods/proxy whenever it runs over a
// port-forward: at once, and later with growing pauses.
func (s *Session) betterLoop(ctx context.Context) {
	if s.options.Carrier != "" && s.options.Carrier != api.CarrierAuto {
		return
	}
	failures, next := 0, time.Time{}
	for ctx.Err() == nil {
		s.mu.Lock()
		i := s.introduced
		idle := i.stream == nil || s.stream != i.stream || i.stream.Err() != nil
		s.mu.Unlock()
		if idle {
			select {
			case <-ctx.Done():
			case <-s.met:
			}
			continue
		}
		if !time.Now().After(next) {
			select {
			case <-ctx.Done():
			case <-i.stream.Done():
			case <-time.After(time.Until(next)):
			}
			continue
		}
		begun := time.Now()
		stream, err := s.tryProxy(ctx, i)
		if err == nil {
			s.showCarrier()
			select {
			case <-ctx.Done():
				return
			case <-stream.Done():
			}
			lived := time.Since(begun)
			if lived > provenAfter {
				failures = 0
			}
			s.mu.Lock()
			s.proxyReason = fmt.Sprintf("it broke after %v: %s", lived.Round(time.Second), cause(stream.Err()))
			s.mu.Unlock()
		}
		failures++
		pause := proxyPause(failures)
		next = time.Now().Add(pause)
		if err != nil && ctx.Err() == nil {
			s.log.Info("staying on the port-forward", "err", err, "next try in", pause)
			wake(s.lanes)
			s.showCarrier()
		}
	}
}

func (s *Session) tryProxy(ctx context.Context, i introduction) (*carrier.Stream, error) {
	// The API server's name may lead elsewhere by now.
	if err := s.excludeServer(ctx); err != nil {
		return nil, err
	}
	return s.useProxy(ctx, i)
}

func proxyPause(failures int) time.Duration {
	return min(firstProxyPause<<min(failures-1, 16), lastProxyPause)
}

// Names of carriers in status; the port-forward's own says how it is done.
const (
	carrierProxy       = "pods/proxy"
	carrierPortForward = "port-forward"
)

// otherCarriers says why each carrier that is not in use is not; s.mu is held.
func (s *Session) otherCarriers() []api.OtherCarrier {
	forwarding := strings.HasPrefix(s.carrier, carrierPortForward)
	pinned := func(name string) string { return "--carrier " + name + " was given" }
	switch {
	case s.options.Carrier == api.CarrierPortForward:
		return []api.OtherCarrier{{Name: carrierProxy, Reason: pinned(api.CarrierPortForward)}}
	case s.options.Carrier == api.CarrierPodsProxy && !forwarding:
		return []api.OtherCarrier{{Name: carrierPortForward, Reason: pinned(api.CarrierPodsProxy)}}
	case !forwarding:
		return []api.OtherCarrier{{Name: carrierPortForward, Reason: "pods/proxy is faster; it takes over when that breaks"}}
	case s.proxyReason == "":
		return []api.OtherCarrier{{Name: carrierProxy, Reason: "being tried"}}
	}
	return []api.OtherCarrier{{Name: carrierProxy, Reason: s.proxyReason}}
}

// showCarrier reports the carrier in use.
func (s *Session) showCarrier() {
	c := s.carrierStatus()
	s.status.update(func(st *api.Session) {
		c.SentRate, c.ReceivedRate = st.Carrier.SentRate, st.Carrier.ReceivedRate
		st.Carrier = c
	})
}

// reason is an error in one line of status.
func reason(err error) string {
	var e *api.Error
	if errors.As(err, &e) {
		return e.Message
	}
	return err.Error()
}

// pinnedError is why a session cannot do with the carrier that was asked for.
func pinnedError(err error) error {
	e := &api.Error{Code: api.CodeAgent, Message: "--carrier pods-proxy: " + reason(err), Hint: "--carrier auto uses the port-forward where pods/proxy cannot be had"}
	var known *api.Error
	if errors.As(err, &known) {
		e.Code = known.Code
	}
	return e
}

// wake tells a loop to look again.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
