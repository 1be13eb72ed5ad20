package nonblock

import "net"

// Conn is a TCP connection that a Reader and a Writer read and write. All else,
// deadlines among it, is the connection's own.
type Conn struct {
	*net.TCPConn
	in  *Reader
	out *Writer
}

// Wrap makes a Conn of a TCP connection; any other comes back as it is.
func Wrap(c net.Conn) net.Conn {
	t, ok := c.(*net.TCPConn)
	if !ok {
		return c
	}
	raw, err := t.SyscallConn()
	if err != nil {
		return c
	}
	return &Conn{t, NewReader(raw), NewWriter(raw)}
}

// NetConn is the connection below, for who wants to know its state.
func (c *Conn) NetConn() net.Conn { return c.TCPConn }

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) { return c.in.Read(b) }

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) { return c.out.Write(b) }
