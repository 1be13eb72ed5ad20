// Package ask is how a session asks its agent: HTTP with JSON on loopback of the
// agent's pod, where only a port-forward leads. Whoever asks shows the session's
// secret.
package ask

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

// maxAnswer bounds what is read of an answer, in bytes: the longest list takes 16
// KiB.
const maxAnswer = 64 << 10

// Refusal is why the agent did not do it.
type Refusal struct {
	Status int    `json:"-"` // of HTTP: 400 bad input, 401 wrong secret, 404 no such thing, 409 taken or full
	Reason string `json:"reason"`
}

func (r *Refusal) Error() string { return r.Reason }

// Client asks an agent. Each call dials a connection of its own. Its errors are
// *Refusal, or those of the way to the agent.
type Client struct {
	Dial   func(context.Context) (net.Conn, error)
	Secret string // of the session
}

// Do sends in, unless it is nil, to a path and reads the answer into out.
func (c *Client) Do(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encoding the request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, body)
	if err != nil {
		return fmt.Errorf("making the request: %w", err)
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
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("reading the agent's answer: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		r := &Refusal{Status: resp.StatusCode}
		if json.Unmarshal(text, r) != nil || r.Reason == "" {
			r.Reason = "the agent answered " + resp.Status
		}
		return r
	}
	if err := json.Unmarshal(text, out); err != nil {
		return fmt.Errorf("reading the agent's answer: %w", err)
	}
	return nil
}
