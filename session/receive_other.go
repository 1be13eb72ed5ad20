//go:build !unix

package session

import "net"

// receive gives each datagram of a connected socket to got, until an error of
// either.
func receive(socket *net.UDPConn, got func([]byte) error) error {
	buf := make([]byte, 64<<10)
	for {
		n, err := socket.Read(buf)
		if err == nil {
			err = got(buf[:n])
		}
		if err != nil {
			return err
		}
	}
}
