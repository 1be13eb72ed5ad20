package gate

import "encoding/binary"

// frames follows an HTTP/2 server's frames (RFC 9113, 4.1), to know where another
// one may be put. It is fed from the first byte on, before it is known that the
// connection is one of HTTP/2: a server may speak first.
type frames struct {
	head    [frameHead]byte
	have    int  // bytes of head
	payload int  // bytes of the frame's payload to come
	block   bool // a header block goes on: only CONTINUATION may follow
	seen    bool // a whole frame has passed: the server's SETTINGS
}

const (
	frameHead = 9

	frameHeaders      = 1
	framePushPromise  = 5
	frameContinuation = 9
	flagEndHeaders    = 4
)

// feed follows what was written to the client.
func (f *frames) feed(b []byte) {
	for len(b) > 0 {
		if f.payload > 0 {
			n := min(f.payload, len(b))
			f.payload -= n
			b = b[n:]
			continue
		}
		f.have %= frameHead
		n := copy(f.head[f.have:], b)
		f.have += n
		b = b[n:]
		if f.have == frameHead {
			f.payload = int(binary.BigEndian.Uint32(f.head[:]) >> 8)
			switch f.head[3] {
			case frameHeaders, framePushPromise, frameContinuation:
				f.block = f.head[4]&flagEndHeaders == 0
			}
			f.seen = true
		}
	}
}

// between: a frame may be written now.
func (f *frames) between() bool { return f.rest() == frameHead && f.seen && !f.block }

// rest is how many bytes are surely before the next place between two frames, at
// least 1.
func (f *frames) rest() int {
	if f.payload > 0 {
		return f.payload
	}
	return frameHead - f.have%frameHead
}

// goAwayFrame asks the client to open no more streams here: NO_ERROR, and the
// last stream 2^31-1 so that those which are on their way are served (RFC 9113,
// 6.8).
var goAwayFrame = []byte{0, 0, 8, 7, 0, 0, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0}

// sayGoAway asks an HTTP/2 client to leave, when it is time. It is called before
// down waits.
func (c *conn) sayGoAway() error {
	if c.goAway || !c.draining.Load() || c.proto.Load() != protoHTTP2 || !c.frames.between() {
		return nil
	}
	c.goAway = true
	_, err := c.client.Write(goAwayFrame)
	return err
}
