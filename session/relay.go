package session

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/culvert-dev/culvert/wire"
)

const (
	// lullBytes is the buffer of a direction in which little moves: a request.
	lullBytes = 1 << 10
	// lullTime is how long a direction keeps the large buffer without need.
	lullTime = 100 * time.Millisecond
)

// buffers are of 64 KiB: a super-packet, and the longest datagram. A direction in
// which bytes move has one; an idle connection has none.
var buffers = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// relay joins a connection from the cluster to a local program and owns both. A
// FIN of one ends that direction; a RST, or the end of ctx, ends both with a RST.
func relay(ctx context.Context, c wire.Inbound, local *net.TCPConn) {
	stop := context.AfterFunc(ctx, func() { resetBoth(c, local) })
	defer stop()
	up := make(chan error, 1)
	go func() { up <- move(local, c, local.CloseWrite, func() { resetBoth(c, local) }) }()
	err := move(c, local, c.CloseWrite, func() { resetBoth(c, local) })
	if err = errors.Join(err, <-up); err == nil {
		c.Close()
		local.Close()
	}
}

// resetBoth ends both, so that the other ends know that something is missing.
func resetBoth(c wire.Inbound, local *net.TCPConn) {
	c.Abort()
	_ = local.SetLinger(0) // of a socket that is closed already there is nothing to reset
	local.Close()
}

// move copies until the end of src, and then calls finish, or fail if it was no
// good end. A read with a small buffer that fills it is followed by those with a
// large one, until nothing has come for a while.
func move(dst io.Writer, src net.Conn, finish func() error, fail func()) error {
	var small [lullBytes]byte
	for {
		n, err := src.Read(small[:])
		if n > 0 {
			if _, werr := dst.Write(small[:n]); werr != nil {
				fail()
				return werr
			}
		}
		if err == nil && n == len(small) {
			err = moveMore(dst, src)
		}
		switch {
		case err == nil:
		case err == io.EOF:
			_ = finish() // who has gone away says so when it is read
			return nil
		default:
			fail()
			return err
		}
	}
}

// moveMore is move with a large buffer, until a lull (nil) or an error.
func moveMore(dst io.Writer, src net.Conn) error {
	buf := buffers.Get().(*[64 << 10]byte)
	defer buffers.Put(buf)
	defer func() { _ = src.SetReadDeadline(time.Time{}) }()
	for {
		_ = src.SetReadDeadline(time.Now().Add(lullTime))
		n, err := src.Read(buf[:])
		if n > 0 {
			if _, werr := dst.Write(buf[:n]); werr != nil {
				return werr
			}
		}
		var ne net.Error
		if errors.As(err, &ne) && ne.Timeout() {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
