package peer

import (
	"context"
	"net"
	"net/http"
	"net/url"

	"github.com/culvert-dev/culvert/wire/ask"
)

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

func (c *Client) do(ctx context.Context, method, name string, in any) (s State, err error) {
	path := Path
	if name != "" {
		path += "/" + url.PathEscape(name)
	}
	agent := ask.Client{Dial: c.Dial, Secret: c.Secret}
	err = agent.Do(ctx, method, path, in, &s)
	return s, err
}
