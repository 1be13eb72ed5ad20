package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"time"
)

// dial connects to the socket. A daemon that is just starting, or being
// restarted, is waited for; what else can be wrong is explained.
func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	deadline := time.Now().Add(startWait)
	for {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", c.socket)
		if err == nil {
			return conn, nil
		}
		absent := errors.Is(err, fs.ErrNotExist) || refused(err)
		if !absent || ctx.Err() != nil || time.Now().After(deadline) {
			return nil, c.explain(err)
		}
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// explain says what a failed connection to the socket means and what helps.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), refused(err):
		return &Error{
			Code:    CodeDaemon,
			Message: fmt.Sprintf("culvertd is not running (nobody answers at %s)", c.socket),
			Hint:    "sudo systemctl start culvertd   (without systemd: sudo culvertd)",
		}
	case errors.Is(err, fs.ErrPermission):
		return &Error{
			Code:    CodeDenied,
			Message: fmt.Sprintf("you may not use %s: you are not in the group %s, or this login is older than your membership", c.socket, Group),
			Hint:    fmt.Sprintf("sudo usermod -aG %s $USER   and then log in again", Group),
		}
	}
	return &Error{Code: CodeDaemon, Message: fmt.Sprintf("connecting to culvertd at %s: %v", c.socket, err), Hint: "culvert doctor"}
}
