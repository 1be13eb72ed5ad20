package session

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/internal/version"
	"github.com/culvert-dev/culvert/wire/carrier"
	"github.com/culvert-dev/culvert/wire/queue"
)

const (
	// The pause between attempts at the bulk lane's stream doubles between these
	// two. Without it everything goes by the first stream, only less smoothly.
	firstBulkPause, lastBulkPause = 500 * time.Millisecond, time.Minute
	// choiceTime is how long the bulk lane waits for the first stream to find its
	// carrier, rather than move with it.
	choiceTime = 3 * time.Second
)

// hello introduces this session's stream for a lane.
func (s *Session) hello(lane queue.Lane) carrier.Hello {
	granted, known := s.network.granted(), s.recall()
	s.mu.Lock()
	key := s.key
	s.mu.Unlock()
	return carrier.Hello{
		Protocol: carrier.Protocol, Version: version.Version,
		Session: s.id, Secret: known.Secret, PublicKey: key.Public().String(),
		Tunnel: granted.Tunnel, Agent: granted.Agent, Inbound: granted.Inbound,
		MTU: mtu, Features: s.features(), Lane: lane,
	}
}

// bulkLoop keeps a second stream to the agent, for bulk, by the carrier that the
// first one has. On one connection a prompt would wait behind a dump, for as
// long as the connection takes to repeat a lost packet.
func (s *Session) bulkLoop(ctx context.Context) {
	var bulk *carrier.Stream
	var over string // the carrier that bulk uses
	pause, since := firstBulkPause, time.Now()
	for ctx.Err() == nil {
		s.mu.Lock()
		first, name, met := s.stream, s.carrier, s.introduced
		choosing := s.choosing()
		s.mu.Unlock()
		up := first != nil && first.Err() == nil
		switch {
		case !up || choosing && time.Since(since) < choiceTime:
			if !up {
				since = time.Now()
			}
			s.waitBulk(ctx, nil, firstBulkPause)
			continue
		case bulk != nil && bulk.Err() == nil && over == name:
			s.waitBulk(ctx, bulk.Done(), 0)
			continue
		}
		begun := time.Now()
		stream, err := s.bulkStream(ctx, name, met)
		if err != nil {
			if ctx.Err() == nil {
				s.log.Info("bulk shares the first stream", "err", err, "next try in", pause)
			}
			s.waitBulk(ctx, nil, pause)
			pause = min(2*pause, lastBulkPause)
			continue
		}
		if bulk != nil && bulk.Err() == nil {
			s.bind.Move(stream)
		} else {
			s.bind.Attach(stream)
		}
		s.log.Debug("bulk lane up", "carrier", name, "took", time.Since(begun))
		s.mu.Lock()
		s.bulk = stream
		s.mu.Unlock()
		bulk, over, pause = stream, name, firstBulkPause
	}
}

// waitBulk waits until the first stream has changed, done is closed, or for d
// (0: without limit).
func (s *Session) waitBulk(ctx context.Context, done <-chan struct{}, d time.Duration) {
	var limit <-chan time.Time
	if d > 0 {
		t := time.NewTimer(d)
		defer t.Stop()
		limit = t.C
	}
	select {
	case <-ctx.Done():
	case <-s.lanes:
	case <-done:
	case <-limit:
	}
}

// choosing tells whether the first stream may move soon; s.mu is held.
func (s *Session) choosing() bool {
	auto := s.options.Carrier == "" || s.options.Carrier == api.CarrierAuto
	return auto && s.proxyReason == "" && strings.HasPrefix(s.carrier, carrierPortForward)
}

// bulkStream opens a stream for bulk by the named carrier to the agent process
// that was met.
func (s *Session) bulkStream(ctx context.Context, name string, met introduction) (*carrier.Stream, error) {
	if name == carrierProxy {
		return s.proxyStream(ctx, met, queue.Bulk)
	}
	ctx, cancel := context.WithTimeout(ctx, dialTime)
	defer cancel()
	a := s.try(ctx, &met.agent)
	if a.err != nil {
		return nil, a.err
	}
	stream, welcome, err := carrier.Dial(ctx, a.conn, s.hello(queue.Bulk))
	if err != nil {
		a.conn.Close()
		return nil, agentError(&met.agent, err)
	}
	if welcome.Instance != met.instance {
		stream.Close()
		return nil, fmt.Errorf("introducing the bulk lane: %w", errAnotherAgent)
	}
	return stream, nil
}

// errAnotherAgent: a pod's agent process was replaced, and the first stream does
// not know it yet.
var errAnotherAgent = errors.New("another agent answers")
