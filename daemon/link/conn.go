package link

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
)

const (
	// MaxMessage bounds one message, in bytes: room for a status with several
	// thousand routes. A longer one ends the connection.
	MaxMessage = 1 << 20

	// maxServing bounds the requests of the peer that are served at once; more
	// are refused with an error. A well-behaved peer has two or three.
	maxServing = 32

	// maxNotices bounds the notifications that wait for their handler. When it
	// is reached, reading stops until the handler is done.
	maxNotices = 64

	// writeTimeout is how long a peer may leave its socket buffer full before it
	// counts as dead: the daemon must never hang on a stopped session.
	writeTimeout = 10 * time.Second
)

// ErrClosed is the reason of calls that could not be answered because the
// connection ended.
var ErrClosed = errors.New("link closed")

// Handler serves one method. It owns the files it is given. The files it
// returns are sent along with the result and stay its own. For a notification
// the result goes nowhere. The context ends with the connection.
type Handler func(ctx context.Context, params json.RawMessage, files []*os.File) (any, []*os.File, error)

// Conn is one end of the link. Both ends call methods of the other; any number
// of goroutines may call at once. Requests are served concurrently,
// notifications one at a time in the order in which they came.
type Conn struct {
	sock     *net.UnixConn
	maxFiles int // descriptors accepted per message
	handlers map[string]Handler

	writeMu sync.Mutex // held while one message is written

	mu      sync.Mutex
	pending map[uint64]chan response
	lastID  uint64
	closed  bool

	done    chan struct{} // closed by Close
	serving chan struct{} // one token per request being served
	notices chan message
	wg      sync.WaitGroup
}

// message is what travels: a request (ID and Method), a notification (Method
// alone) or a response (ID alone).
type message struct {
	ID     uint64          `json:"id,omitempty"`
	Method string          `json:"method,omitempty"`
	Params json.RawMessage `json:"params,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  *api.Error      `json:"error,omitempty"`

	files []*os.File
}

type response struct {
	message
	err error
}

// errNotStarted is what `culvert session` says when a person starts it.
var errNotStarted = &api.Error{
	Code:    api.CodeUsage,
	Message: "a session process is started by culvertd and not by hand: descriptor 3 is not its socket",
	Hint:    "culvert connect",
}

// New makes a connection of a connected Unix stream socket, which it owns from
// now on. A message with more than maxFiles descriptors ends the connection; an
// end that wants none (the daemon) says 0, and the kernel drops what is sent.
func New(sock *net.UnixConn, maxFiles int) *Conn {
	return &Conn{
		sock:     sock,
		maxFiles: maxFiles,
		handlers: make(map[string]Handler),
		pending:  make(map[uint64]chan response),
		done:     make(chan struct{}),
		serving:  make(chan struct{}, maxServing),
		notices:  make(chan message, maxNotices),
	}
}

// Handle serves method with h. It must be called before Run.
func (c *Conn) Handle(method string, h Handler) { c.handlers[method] = h }

// Run reads from the peer and serves its requests until the connection ends or
// ctx does, and then closes it and waits for the handlers. The error is nil
// when the peer closed its end between two messages, or when Close was called.
func (c *Conn) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()

	c.wg.Add(1)
	go c.serveNotices(ctx)
	err := c.read(ctx)
	close(c.notices) // those that came are still served: a last word counts
	c.Close()
	c.wg.Wait()
	return err
}

// Close ends the connection: calls under way return ErrClosed, and Run returns.
// It does not wait and may be called more than once.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	close(c.done)
	for id, ch := range c.pending {
		ch <- response{err: ErrClosed}
		delete(c.pending, id)
	}
	return c.sock.Close()
}

// Done is closed when the connection has ended.
func (c *Conn) Done() <-chan struct{} { return c.done }

// Call asks the peer for method with in as its parameters and decodes the
// answer into out (nil: not wanted). The files that came with the answer are
// the caller's. An error of the peer's handler is an *api.Error; ErrClosed says
// that the connection ended first.
func (c *Conn) Call(ctx context.Context, method string, in, out any) ([]*os.File, error) {
	params, err := json.Marshal(in)
	if err != nil {
		return nil, fmt.Errorf("encoding parameters of %s: %w", method, err)
	}
	ch := make(chan response, 1)
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, fmt.Errorf("calling %s: %w", method, ErrClosed)
	}
	c.lastID++
	id := c.lastID
	c.pending[id] = ch
	c.mu.Unlock()

	if err := c.write(message{ID: id, Method: method, Params: params}); err != nil {
		c.forget(id, ch)
		return nil, fmt.Errorf("calling %s: %w", method, err)
	}
	select {
	case r := <-ch:
		return r.decode(method, out)
	case <-ctx.Done():
		c.forget(id, ch)
		return nil, fmt.Errorf("calling %s: %w", method, ctx.Err())
	}
}

// Notify tells the peer something and does not wait for an answer.
func (c *Conn) Notify(method string, in any) error {
	params, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encoding parameters of %s: %w", method, err)
	}
	if err := c.write(message{Method: method, Params: params}); err != nil {
		return fmt.Errorf("notifying %s: %w", method, err)
	}
	return nil
}

func (r response) decode(method string, out any) ([]*os.File, error) {
	switch {
	case r.err != nil:
		return nil, fmt.Errorf("calling %s: %w", method, r.err)
	case r.Error != nil:
		closeFiles(r.files)
		return nil, r.Error
	case out == nil || len(r.Result) == 0:
		return r.files, nil
	}
	if err := json.Unmarshal(r.Result, out); err != nil {
		closeFiles(r.files)
		return nil, fmt.Errorf("decoding the answer to %s: %w", method, err)
	}
	return r.files, nil
}

// forget gives up on a call; an answer that came meanwhile loses its files.
func (c *Conn) forget(id uint64, ch chan response) {
	c.mu.Lock()
	delete(c.pending, id)
	c.mu.Unlock()
	select {
	case r := <-ch:
		closeFiles(r.files)
	default:
	}
}

// read takes messages off the socket until it ends.
func (c *Conn) read(ctx context.Context) error {
	for {
		m, err := c.readMessage()
		if err != nil {
			select {
			case <-c.done:
				return nil
			default:
			}
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		switch {
		case m.Method == "":
			c.answered(m)
		case m.ID == 0:
			select {
			case c.notices <- m:
			case <-c.done:
				closeFiles(m.files)
			}
		default:
			select {
			case c.serving <- struct{}{}:
				c.wg.Add(1)
				go c.serve(ctx, m)
			default:
				closeFiles(m.files)
				c.write(message{ID: m.ID, Error: &api.Error{Code: api.CodeInternal, Message: "too many requests at once on the link"}})
			}
		}
	}
}

// answered hands a response to the call that waits for it. The channel has room
// for one and is taken out of pending here, so this never blocks.
func (c *Conn) answered(m message) {
	c.mu.Lock()
	ch := c.pending[m.ID]
	delete(c.pending, m.ID)
	if ch != nil {
		ch <- response{message: m} // under mu, so that forget sees it
	}
	c.mu.Unlock()
	if ch == nil {
		closeFiles(m.files)
	}
}

func (c *Conn) serve(ctx context.Context, m message) {
	defer c.wg.Done()
	defer func() { <-c.serving }()
	result, files, err := c.handle(ctx, m)
	answer := message{ID: m.ID, files: files}
	if err == nil {
		answer.Result, err = json.Marshal(result)
	}
	if err != nil {
		answer.files, answer.Result = nil, nil
		answer.Error = asAPI(err)
	}
	if err := c.write(answer); errors.Is(err, errTooLong) {
		c.write(message{ID: m.ID, Error: asAPI(fmt.Errorf("answering %.64s: %w", m.Method, err))})
	}
}

func (c *Conn) serveNotices(ctx context.Context) {
	defer c.wg.Done()
	for m := range c.notices {
		c.handle(ctx, m)
	}
}

func (c *Conn) handle(ctx context.Context, m message) (any, []*os.File, error) {
	h := c.handlers[m.Method]
	if h == nil {
		closeFiles(m.files)
		return nil, nil, &api.Error{Code: api.CodeNotFound, Message: fmt.Sprintf("the link has no method %.64q", m.Method)}
	}
	return h(ctx, m.Params, m.files)
}

// asAPI keeps an error's code and hint if it has them.
func asAPI(err error) *api.Error {
	var e *api.Error
	if errors.As(err, &e) {
		return e
	}
	return &api.Error{Code: api.CodeInternal, Message: err.Error()}
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}
