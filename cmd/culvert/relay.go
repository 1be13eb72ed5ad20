package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"net"
	"sync"

	"github.com/culvert-dev/culvert/cluster"
)

// maxKept bounds, in bytes, what is kept of a client's words in case another pod
// has to hear them.
const maxKept = 64 << 10

type dialFunc func(context.Context) (net.Conn, error)

// ways are what may serve a connection, best first; an error says why there is
// nothing more.
type ways = iter.Seq2[dialFunc, error]

// relay serves a client by the first way that answers, and returns when both
// directions have ended: an end of one is passed on, and so is a reset. It
// returns an error if nothing served the client, who is reset then. A way whose
// dial succeeded counts as failed too when it says before anything else that it
// did not reach the port: a port-forward knows no earlier. The client's words
// are said again to the next one.
func relay(ctx context.Context, client *net.TCPConn, ways ways) error {
	defer client.Close()
	stop := context.AfterFunc(ctx, func() { reset(client) })
	defer stop()
	var failed error
	s := &sender{client: client, over: make(chan struct{})}
	var pump sync.WaitGroup
	pumping := false
	defer pump.Wait()
	defer client.Close() // before waiting for the pump, which reads from it
	for dial, err := range ways {
		if err != nil {
			failed = errors.Join(err, failed)
			break
		}
		server, lost, err := s.connect(ctx, dial)
		if err != nil {
			failed = err
			if s.isDone() {
				return nil // nobody waits any more
			}
			continue
		}
		if !pumping {
			pumping = true
			pump.Go(s.pump)
		}
		stop := context.AfterFunc(ctx, func() { server.Close() })
		again, err := s.receive(server, lost)
		stop()
		s.lost()
		if !again {
			if err != nil {
				reset(client)
			}
			return nil
		}
		failed = err
	}
	reset(client)
	if failed == nil {
		failed = errors.New("nothing can serve it")
	}
	return failed
}

// reset ends a connection with RST where it can, so that the other end knows that
// this was no regular end.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	c.Close()
}

func closeWrite(c net.Conn) error {
	if half, ok := c.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// sender carries what a client says to the server of the moment, and can say it
// again to another one as long as none has answered.
type sender struct {
	client *net.TCPConn
	over   chan struct{} // closed when the client has said all, or is gone

	// mu guards what follows. It is not held while something is said to a server:
	// that may wait until the server's own words are read. What is kept, and to
	// whom it is said, change together, so that each server hears all of it once.
	mu      sync.Mutex
	server  net.Conn
	lost    context.CancelFunc // to be called when the server takes no more
	kept    []byte
	heard   bool // the server answered, or more was said than can be kept
	ended   bool // the client said all
	aborted bool // the client is gone
}

// connect dials a server and tells it what the client has said so far. The client
// waits meanwhile. lost ends when the server takes no more.
func (s *sender) connect(ctx context.Context, dial dialFunc) (server net.Conn, lost context.Context, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.aborted {
		return nil, nil, net.ErrClosed
	}
	if server, err = dial(ctx); err != nil {
		return nil, nil, err
	}
	if len(s.kept) > 0 {
		_, err = server.Write(s.kept)
	}
	if err == nil && s.ended {
		err = closeWrite(server)
	}
	if err != nil {
		server.Close()
		return nil, nil, fmt.Errorf("sending: %w", err)
	}
	s.server = server
	lost, s.lost = context.WithCancel(ctx)
	return server, lost, nil
}

func (s *sender) isDone() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.aborted
}

// pump reads from the client until it ends.
func (s *sender) pump() {
	defer close(s.over)
	buf := make([]byte, 32<<10)
	for {
		n, err := s.client.Read(buf)
		if n > 0 && !s.say(buf[:n]) {
			return
		}
		if err != nil {
			s.end(err)
			return
		}
	}
}

// say sends p. It is false when the connection is at its end.
func (s *sender) say(p []byte) bool {
	s.mu.Lock()
	if !s.heard {
		if s.heard = len(s.kept)+len(p) > maxKept; s.heard {
			s.kept = nil
		} else {
			s.kept = append(s.kept, p...)
		}
	}
	server, lost, heard := s.server, s.lost, s.heard
	s.mu.Unlock()
	_, err := server.Write(p)
	if err == nil {
		return true
	}
	// Before an answer, the reason may come in the place of the answer.
	lost()
	if heard {
		server.Close()
	}
	return !heard
}

// end is the client's: io.EOF, or it is gone.
func (s *sender) end(err error) {
	s.mu.Lock()
	s.ended, s.aborted = err == io.EOF, err != io.EOF
	server, lost := s.server, s.lost
	s.mu.Unlock()
	if err != io.EOF {
		reset(server)
	} else if closeWrite(server) != nil {
		lost()
	}
}

// receive passes on what the server says, and returns when both have ended. again
// says that it said nothing, because of err, and that another may be tried. An
// err without again is for the client, as a reset.
func (s *sender) receive(server net.Conn, lost context.Context) (again bool, err error) {
	defer server.Close()
	buf := make([]byte, 32<<10)
	n, err := server.Read(buf)
	if n == 0 && cluster.NotDialled(err) && s.again(server) {
		return true, err
	}
	s.mu.Lock()
	s.heard, s.kept = true, nil
	s.mu.Unlock()
	for {
		if n > 0 {
			if _, err := s.client.Write(buf[:n]); err != nil {
				reset(server)
				return false, err
			}
		}
		if err != nil {
			break
		}
		n, err = server.Read(buf)
	}
	if err != io.EOF {
		return false, err
	}
	// A reset that the writer was told of is an end for the reader.
	wasReset := errors.New("the connection was reset")
	if lost.Err() != nil {
		return false, wasReset
	}
	if s.client.CloseWrite() != nil {
		return false, nil
	}
	select {
	case <-s.over:
	case <-lost.Done():
	}
	if lost.Err() != nil {
		return false, wasReset
	}
	return false, nil
}

// again says whether what was said can be said to another server. The old one is
// closed, so that the client does not wait for it.
func (s *sender) again(server net.Conn) bool {
	server.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.heard && !s.aborted
}
