package gate

import (
	"encoding/binary"
	"sync"
	"time"
)

// frames follows one side's frames of HTTP/2 (RFC 9113, 4.1), to know where
// another one may be put. It is fed from the first byte on, before it is known
// that the connection is one of HTTP/2: a server may speak first.
type frames struct {
	is      func(kind, flags byte, stream uint32) // each frame, at its head
	head    [frameHead]byte
	have    int  // bytes of head
	payload int  // bytes of the frame's payload to come
	block   bool // a header block goes on: only CONTINUATION may follow
	seen    bool // a whole frame has passed: the server's SETTINGS
}

const (
	frameHead = 9

	frameData         = 0
	frameHeaders      = 1
	frameReset        = 3
	framePushPromise  = 5
	frameContinuation = 9
	flagEndStream     = 1
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
			f.is(f.head[3], f.head[4], binary.BigEndian.Uint32(f.head[5:])&(1<<31-1))
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
	if c.goAway || !c.draining.Load() || c.proto.Load() != protoHTTP2 || !c.fromServer.between() {
		return nil
	}
	c.goAway = true
	_, err := c.client.Write(goAwayFrame)
	c.active.Store(time.Now().UnixNano())
	c.streams.leave()
	return err
}

// streams are those that are open: some clients keep a connection that they do
// not use any more, so that the gate has to know when it may close it.
type streams struct {
	mu      sync.Mutex
	open    map[uint32]byte // which sides have ended
	last    uint32          // the client's newest
	lost    bool            // there were too many to know
	leaving bool            // GOAWAY was sent
}

// Sides of a stream that have ended.
const (
	clientEnded = 1
	serverEnded = 2
)

// maxStreams bounds the streams that are known; servers allow some hundred.
const maxStreams = 1024

// leave notes that no new streams are to be expected.
func (s *streams) leave() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.leaving = true
}

// left: GOAWAY was sent, and all streams have ended.
func (s *streams) left() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leaving && !s.lost && len(s.open) == 0
}

// clientFrame and serverFrame follow the streams which the client opens.
func (s *streams) clientFrame(kind, flags byte, id uint32) { s.frame(kind, flags, id, clientEnded) }
func (s *streams) serverFrame(kind, flags byte, id uint32) { s.frame(kind, flags, id, serverEnded) }

func (s *streams) frame(kind, flags byte, id uint32, side byte) {
	if id%2 == 0 {
		return // the connection, or pushed
	}
	var ended byte
	switch {
	case kind == frameReset:
		ended = clientEnded | serverEnded
	case kind == frameHeaders || kind == frameData:
		ended = flags & flagEndStream * side
	default:
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	before, known := s.open[id]
	// The server's end of a stream may be seen before its begin: that is noted
	// after it was written.
	if !known && id <= s.last {
		return
	}
	if side == clientEnded {
		s.last = max(s.last, id)
	} else if !known && ended == 0 {
		return
	}
	after := before | ended
	if after == clientEnded|serverEnded && id <= s.last {
		delete(s.open, id)
		return
	}
	if s.open == nil {
		s.open = map[uint32]byte{}
	}
	if len(s.open) >= maxStreams && !known {
		s.lost = true
		return
	}
	s.open[id] = after
}
