package carrier

import (
	"context"
	"errors"
	"net"
	"time"
)

// Stream is one introduced byte stream between a session and its agent.
type Stream struct{}

// Done is closed when the stream has ended; Err says why.
func (s *Stream) Done() <-chan struct{} { return nil }

// Err is why the stream ended, nil while it lives.
func (s *Stream) Err() error { return nil }

// Close ends the stream. It is idempotent.
func (s *Stream) Close() {}

// RTT is the last in-band round trip; 0 before the first.
func (s *Stream) RTT() time.Duration { return 0 }

// Dial introduces the session h to the agent at the other end of c.
func Dial(ctx context.Context, c net.Conn, h Hello) (*Stream, Welcome, error) {
	return nil, Welcome{}, errors.New("carrier: not built yet")
}

// Accept is the agent's end of Dial.
func Accept(ctx context.Context, c net.Conn, answer func(Hello) Welcome) (*Stream, Hello, error) {
	return nil, Hello{}, errors.New("carrier: not built yet")
}

// Dialer is one way to the agent.
type Dialer interface {
	// Name is what status shows, e.g. "port-forward (WebSocket)".
	Name() string
	Dial(ctx context.Context) (net.Conn, error)
}
