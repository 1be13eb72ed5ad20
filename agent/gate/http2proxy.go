package gate

import (
	"errors"
	"net"
)

// serveHTTP2 serves a client that speaks HTTP/2. Nothing was read from it.
func (c *meshConn) serveHTTP2(origin *net.TCPConn) error {
	if origin != nil {
		origin.Close()
	}
	return errors.New("HTTP/2 is not served")
}
