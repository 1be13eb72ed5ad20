package peer

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
)

// maxAnswer bounds what is read of an answer, in bytes: Max peers take 4 KiB.
const maxAnswer = 64 << 10

// Client asks an agent. Each call dials a connection of its own. Its errors are
// *Refusal, or those of the way to the agent.
type Client struct {
	Dial   func(context.Context) (net.Conn, error)
	Secret string // of the session
}

// Get returns the peers that there are.
func (c *Client) Get(ctx context.Context) (State, error) {
	return c.do(ctx, http.MethodGet, "", nil)
}

// Add makes a peer and returns all.
func (c *Client) Add(ctx context.Context, name string, a Ask) (State, error) {
	return c.do(ctx, http.MethodPut, name, a)
}

// Remove ends a peer and its connections, and returns the others.
func (c *Client) Remove(ctx context.Context, name string) (State, error) {
	return c.do(ctx, http.MethodDelete, name, nil)
}

func (c *Client) do(ctx context.Context, method, name string, in any) (State, error) {
	var s State
	path := Path
	if name != "" {
		path += "/" + url.PathEscape(name)
	}
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return s, fmt.Errorf("encoding the request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return s, fmt.Errorf("making the request: %w", err)
	}
	req.Header.Set("Authorization", "Bearer "+c.Secret)
	h := http.Client{Transport: &http.Transport{ // no proxy from the environment
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dial(ctx) },
		DisableKeepAlives: true,
	}}
	resp, err := h.Do(req)
	if err != nil {
		if e, ok := err.(*url.Error); ok {
			err = e.Err // the URL means nothing to anybody
		}
		return s, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return s, fmt.Errorf("reading the agent's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		r := &Refusal{Status: resp.StatusCode}
		if json.Unmarshal(text, r) != nil || r.Reason == "" {
			r.Reason = "the agent answered " + resp.Status
		}
		return s, r
	}
	if err := json.Unmarshal(text, &s); err != nil {
		return s, fmt.Errorf("reading the agent's answer: %w", err)
	}
	return s, nil
}
