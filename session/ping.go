package session

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"
	"time"

	"github.com/culvert-dev/culvert/cluster"
	"github.com/culvert-dev/culvert/daemon/api"
)

// pingSize is the payload of an echo in bytes, as ping(8) has it.
const pingSize = 56

// ping sends echoes through WireGuard, past the kernel, until one is answered
// or the time is over: the first may be lost with a handshake under way.
func (s *Session) ping(ctx context.Context, addr netip.Addr, timeout time.Duration) (time.Duration, error) {
	s.mu.Lock()
	local := s.local
	s.mu.Unlock()
	if local == nil {
		return 0, errors.New("there is no tunnel yet")
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for {
		once, cancel := context.WithTimeout(ctx, time.Second)
		rtt, err := local.Ping(once, addr, pingSize)
		cancel()
		if err == nil || ctx.Err() != nil {
			return rtt, err
		}
	}
}

// handlePing answers `culvert ping`: one probe of every target a call; the
// daemon repeats the call for a stream.
func (s *Session) handlePing(ctx context.Context, in json.RawMessage, _ []*os.File) (any, []*os.File, error) {
	var req api.PingRequest
	if err := json.Unmarshal(in, &req); err != nil {
		return nil, nil, err
	}
	timeout := req.Timeout
	if timeout <= 0 {
		timeout = 3 * time.Second
	}
	if st := s.status.get(); st.State == api.Connecting || s.cluster == nil {
		return nil, nil, &api.Error{Code: api.CodeNotFound, Message: "the session is not connected yet", Hint: "`culvert status` shows what it waits for"}
	}
	targets, err := s.cluster.Resolve(ctx, req.Target, s.cluster.Namespace())
	if err != nil {
		return nil, nil, err
	}
	replies := make([]api.PingReply, 0, len(targets))
	for i, t := range targets {
		replies = append(replies, s.probeTarget(ctx, t, timeout))
		replies[i].Seq = i
	}
	return replies, nil, nil
}

func (s *Session) probeTarget(ctx context.Context, t cluster.Target, timeout time.Duration) api.PingReply {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	where, how := t.Addr.String(), "ICMP"
	if t.Port != 0 {
		where, how = netip.AddrPortFrom(t.Addr, t.Port).String(), "TCP connect"
	}
	reply := api.PingReply{Target: where + ", " + how}
	if t.Name != "" {
		reply.Target = fmt.Sprintf("%s (%s), %s", where, t.Name, how)
	}
	begun := time.Now()
	var err error
	if t.Port == 0 {
		s.mu.Lock()
		local := s.local
		s.mu.Unlock()
		reply.RTT, err = local.Ping(ctx, t.Addr, pingSize)
	} else {
		var c net.Conn
		if c, err = new(net.Dialer).DialContext(ctx, "tcp", where); err == nil {
			reply.RTT = time.Since(begun)
			c.Close()
		}
	}
	switch {
	case err == nil:
	case ctx.Err() != nil:
		reply.Error = fmt.Sprintf("no answer within %v", timeout)
	case errors.Is(err, syscall.ECONNREFUSED):
		reply.Error = "connection refused"
	default:
		reply.Error = err.Error()
	}
	return reply
}
