package carrier

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/culvert-dev/culvert/internal/version"
	"github.com/culvert-dev/culvert/wire/queue"
)

// introduceWithin bounds the introduction on top of the caller's context: two
// round trips even over a very bad link, and no connection that says nothing is
// held longer.
const introduceWithin = 15 * time.Second

// ProtocolError tells that the two ends speak different versions of the
// protocol, so one of them must be replaced.
type ProtocolError struct {
	Mine, Theirs            int
	MyVersion, TheirVersion string // of the programs
}

func (e *ProtocolError) Error() string {
	return fmt.Sprintf("the other end (version %s) speaks carrier protocol %d, this one (version %s) speaks %d",
		printable([]byte(e.TheirVersion)), e.Theirs, e.MyVersion, e.Mine)
}

// RefusedError is the agent's reason for refusing a session.
type RefusedError struct{ Reason string }

func (e *RefusedError) Error() string { return "the agent refused the session: " + e.Reason }

// Dial introduces the session h to the agent at the other end of c, of which it
// takes ownership. The Protocol and Version of h are filled in when unset. Errors
// are *ProtocolError, *RefusedError, the context's, or those of c.
func Dial(ctx context.Context, c net.Conn, h Hello) (*Stream, Welcome, error) {
	if h.Protocol == 0 {
		h.Protocol = Protocol
	}
	if h.Version == "" {
		h.Version = version.Version
	}
	s := newStream(c)
	s.lane = h.Lane
	var w Welcome
	err := s.introduce(ctx, func() error {
		if err := s.say(frameHello, h); err != nil {
			return fmt.Errorf("writing hello: %w", err)
		}
		if err := s.hear(frameWelcome, &w); err != nil {
			return fmt.Errorf("reading welcome: %w", err)
		}
		if w.Protocol != h.Protocol {
			return &ProtocolError{Mine: h.Protocol, Theirs: w.Protocol, MyVersion: h.Version, TheirVersion: w.Version}
		}
		if w.Error != "" {
			return &RefusedError{Reason: printable([]byte(w.Error))}
		}
		return nil
	})
	if err != nil {
		return nil, w, err
	}
	return s, w, nil
}

// Accept is the agent's end of Dial. Answer decides: a Welcome with Error set
// refuses, and Accept returns it as a *RefusedError. It takes ownership of c.
func Accept(ctx context.Context, c net.Conn, answer func(Hello) Welcome) (*Stream, Hello, error) {
	s := newStream(c)
	var h Hello
	err := s.introduce(ctx, func() error {
		if err := s.hear(frameHello, &h); err != nil {
			return fmt.Errorf("reading hello: %w", err)
		}
		if h.Protocol != Protocol {
			err := &ProtocolError{Mine: Protocol, Theirs: h.Protocol, MyVersion: version.Version, TheirVersion: h.Version}
			// The other end tells its user; that it may not hear is its own loss.
			_ = s.say(frameWelcome, Welcome{Protocol: Protocol, Version: version.Version,
				Error: fmt.Sprintf("protocol %d is not mine (%d)", h.Protocol, Protocol)})
			return err
		}
		if s.lane = h.Lane; s.lane >= queue.Lanes {
			return fmt.Errorf("there is no lane %d", h.Lane)
		}
		w := answer(h)
		if w.Protocol == 0 {
			w.Protocol = Protocol
		}
		if w.Version == "" {
			w.Version = version.Version
		}
		if err := s.say(frameWelcome, w); err != nil {
			return fmt.Errorf("writing welcome: %w", err)
		}
		if w.Error != "" {
			return &RefusedError{Reason: w.Error}
		}
		return nil
	})
	if err != nil {
		return nil, h, err
	}
	return s, h, nil
}

// introduce runs f, whose I/O on s ends with ctx, and starts s if f succeeds;
// otherwise it closes the connection.
func (s *Stream) introduce(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeoutCause(ctx, introduceWithin,
		fmt.Errorf("no introduction within %v: %w", introduceWithin, context.DeadlineExceeded))
	defer cancel()
	// No deadlines: on an SPDY stream they hit the whole connection.
	stop := context.AfterFunc(ctx, func() { s.c.Close() })
	err := f()
	if !stop() { // ctx ended first, and the connection is closed
		return context.Cause(ctx)
	}
	if err != nil {
		_ = s.c.Close()
		return err
	}
	s.start()
	return nil
}

// say writes one introduction.
func (s *Stream) say(typ byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	if len(b) > maxIntroduction {
		return fmt.Errorf("introduction has %d bytes, at most %d are allowed", len(b), maxIntroduction)
	}
	s.wmu.Lock()
	defer s.wmu.Unlock()
	n, err := s.c.Write(appendFrame(nil, typ, b))
	s.sent.Add(uint64(n))
	return err
}

// hear reads one introduction, which must be the first frame.
func (s *Stream) hear(want byte, v any) error {
	for size := 4 << 10; ; { // most fit; memory for a long one only as it arrives
		typ, body, ok, err := s.in.next()
		switch {
		case err != nil:
			return err
		case ok && typ == frameClose:
			return &ClosedError{Reason: printable(body)}
		case ok && typ != want:
			return fmt.Errorf("frame of type %d instead of an introduction", typ)
		case ok:
			return json.Unmarshal(body, v)
		case s.in.skip > 0:
			return errors.New("the other end does not speak culvert's carrier protocol")
		}
		if s.in.w == len(s.in.buf) && s.in.w > 0 {
			size = min(2*len(s.in.buf), headerLen+maxIntroduction)
		}
		before := s.in.w - s.in.r
		if err := s.in.fill(max(size, len(s.in.buf))); err != nil {
			return err
		}
		s.rcvd.Add(uint64(s.in.w - s.in.r - before))
	}
}
