package gate

import (
	"errors"
	"net"
)

// serveHTTP1 serves a client that speaks HTTP/1. Nothing was read from it.
func (c *meshConn) serveHTTP1(origin *net.TCPConn) error {
	return errors.New("HTTP/1 is not served")
}
