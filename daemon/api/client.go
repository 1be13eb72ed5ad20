package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"
)

// DefaultSocket is where culvertd listens.
const DefaultSocket = "/run/culvert/culvert.sock"

// SocketEnv is the environment variable that names another socket.
const SocketEnv = "CULVERT_SOCKET"

// Host is the only name by which the daemon answers HTTP requests. A browser
// that was talked into asking sends another one.
const Host = "culvert"

// HeaderVersion is on every answer of the daemon, so that a client can tell
// that it is of another version.
const HeaderVersion = "Culvert-Version"

// Group is the group whose members may use the daemon, unless root names
// another.
const Group = "culvert"

// Paths of the API. Streams are newline-delimited JSON, one Line each.
const (
	PathVersion    = "/v1/version"    // GET: Version
	PathSessions   = "/v1/sessions"   // GET: []Session
	PathWatch      = "/v1/watch"      // GET: stream of Event
	PathConnect    = "/v1/connect"    // POST ConnectRequest: stream of Event
	PathDisconnect = "/v1/disconnect" // POST DisconnectRequest: stream of Event
	PathPing       = "/v1/ping"       // POST PingRequest: stream of PingReply
	PathLogs       = "/v1/logs"       // GET ?id=ID&follow=BOOL: text
	PathFacts      = "/v1/facts"      // POST FactsRequest: Facts
)

// startWait is how long a client waits for a daemon that may just be starting:
// longer than a unit's restart takes, short enough for a person.
const startWait = 2 * time.Second

// maxAnswer bounds what a client reads as one answer or one line, in bytes.
const maxAnswer = 8 << 20

// Client talks to the daemon. It holds no connection between calls and may be
// used by any number of goroutines. Its errors are *Error wherever a user could
// do something about them.
type Client struct {
	socket string
	http   *http.Client
}

// New makes a client for the daemon at socketPath; empty means $CULVERT_SOCKET,
// then DefaultSocket.
func New(socketPath string) *Client {
	if socketPath == "" {
		socketPath = os.Getenv(SocketEnv)
	}
	if socketPath == "" {
		socketPath = DefaultSocket
	}
	c := &Client{socket: socketPath}
	c.http = &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		DisableKeepAlives: true,
	}}
	return c
}

// Version asks the daemon for its version.
func (c *Client) Version(ctx context.Context) (v Version, err error) {
	return v, c.call(ctx, http.MethodGet, PathVersion, nil, &v)
}

// Sessions lists the caller's sessions (root: everybody's), oldest first.
func (c *Client) Sessions(ctx context.Context) (s []Session, err error) {
	return s, c.call(ctx, http.MethodGet, PathSessions, nil, &s)
}

// Facts asks what the daemon can tell of the machine, with the conflicts that
// plan would have. Nothing is changed.
func (c *Client) Facts(ctx context.Context, plan []Route) (f Facts, err error) {
	return f, c.call(ctx, http.MethodPost, PathFacts, FactsRequest{Plan: plan}, &f)
}

// Connect starts a session and returns it when it is connected. Each change on
// the way is given to event (which may be nil). When ctx ends first, the
// session is cancelled and undone.
func (c *Client) Connect(ctx context.Context, req ConnectRequest, event func(Event)) (Session, error) {
	var last Session
	err := c.stream(ctx, http.MethodPost, PathConnect, req, func(l Line) error {
		if l.Event == nil {
			return nil
		}
		last = l.Event.Session
		if event != nil {
			event(*l.Event)
		}
		return nil
	})
	return last, err
}

// Watch gives event the present state of each of the caller's sessions, and
// from then on each change, until ctx ends (nil) or the daemon goes away.
func (c *Client) Watch(ctx context.Context, event func(Event)) error {
	err := c.stream(ctx, http.MethodGet, PathWatch, nil, func(l Line) error {
		if l.Event != nil {
			event(*l.Event)
		}
		return nil
	})
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// Disconnect ends sessions and returns when nothing of them is left. Each
// change on the way is given to event (which may be nil).
func (c *Client) Disconnect(ctx context.Context, req DisconnectRequest, event func(Event)) error {
	return c.stream(ctx, http.MethodPost, PathDisconnect, req, func(l Line) error {
		if l.Event != nil && event != nil {
			event(*l.Event)
		}
		return nil
	})
}

// Ping measures the way to a target in the cluster; each reply is given to
// reply as it comes.
func (c *Client) Ping(ctx context.Context, req PingRequest, reply func(PingReply)) error {
	return c.stream(ctx, http.MethodPost, PathPing, req, func(l Line) error {
		if l.Ping != nil {
			reply(*l.Ping)
		}
		return nil
	})
}

// Logs copies what the session process printed to w: what the daemon still has
// and, with follow, what comes from now on until the session or ctx ends. An
// empty id is the caller's only session, or the last one that ended.
func (c *Client) Logs(ctx context.Context, id string, follow bool, w io.Writer) error {
	query := url.Values{"id": {id}, "follow": {strconv.FormatBool(follow)}}
	resp, err := c.do(ctx, http.MethodGet, PathLogs+"?"+query.Encode(), nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(w, resp.Body); err != nil && ctx.Err() == nil {
		return fmt.Errorf("reading the log: %w", err)
	}
	return nil
}

// call asks for one answer.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	resp, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return fmt.Errorf("reading the daemon's answer: %w", err)
	}
	return nil
}

// stream asks for a stream and gives its lines to line up to the last one.
func (c *Client) stream(ctx context.Context, method, path string, in any, line func(Line) error) error {
	resp, err := c.do(ctx, method, path, in)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	lines := newLineReader(resp.Body)
	for {
		l, err := lines.next()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF):
			return &Error{Code: CodeDaemon, Message: "the daemon went away before it was done", Hint: "sudo journalctl -u culvertd -n 50"}
		case err != nil:
			return fmt.Errorf("reading the daemon's answer: %w", err)
		case l.Error != nil:
			return l.Error
		case l.End:
			return nil
		}
		if err := line(l); err != nil {
			return err
		}
	}
}

// do sends a request; an answer that is not 200 is returned as its error.
func (c *Client) do(ctx context.Context, method, path string, in any) (*http.Response, error) {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return nil, fmt.Errorf("encoding the request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://"+Host+path, body)
	if err != nil {
		return nil, fmt.Errorf("making a request for %s: %w", path, err)
	}
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var e *Error
		switch {
		case errors.As(err, &e):
			return nil, e
		case ctx.Err() != nil:
			return nil, ctx.Err()
		}
		return nil, &Error{Code: CodeDaemon, Message: fmt.Sprintf("asking culvertd at %s: %v", c.socket, errors.Unwrap(err)), Hint: "sudo journalctl -u culvertd -n 50"}
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	e := &Error{}
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if json.Unmarshal(text, e) != nil || e.Code == "" {
		e = &Error{Code: CodeInternal, Message: fmt.Sprintf("culvertd answered %s: %s", resp.Status, bytes.TrimSpace(text))}
	}
	return nil, e
}
