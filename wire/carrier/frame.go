package carrier

import (
	"encoding/binary"
	"fmt"
	"io"
)

// A frame is a header of 4 bytes (type, then the body's length as 24 bits,
// big endian) and the body. Types that a reader does not know are skipped by
// their length, so that later versions may add some.
const (
	frameData    = 1 // one WireGuard message
	frameHello   = 2 // JSON of Hello, the first frame of the session
	frameWelcome = 3 // JSON of Welcome, the first frame of the agent
	framePing    = 4 // 8 bytes that the pong repeats
	framePong    = 5
	frameClose   = 6 // the sender ends the stream; the body says why, for people
	frameAck     = 7 // 8 bytes: how many bytes of data frames have arrived, in all
	frameMoved   = 9 // the sender's last frame here: it goes on in another stream

	headerLen = 4
)

const (
	// maxIntroduction bounds Hello and Welcome, in bytes. A resolv.conf and a few
	// addresses take less than 4 KiB.
	maxIntroduction = 64 << 10
	// maxMessage bounds a WireGuard message: wireguard-go's buffers have 65,535
	// bytes, and the last tagLen belong to the gate. Longer ones are dropped.
	maxMessage = 65535 - tagLen
	// maxReason bounds the text of a close frame.
	maxReason = 512
	// maxKnown is the longest frame of a known type; a longer one ends the stream,
	// since it can only be an error or an attack.
	maxKnown = 64 << 10
)

func known(typ byte) bool { return typ >= frameData && typ <= frameAck || typ == frameMoved }

func appendHeader(b []byte, typ byte, n int) []byte {
	return append(b, typ, byte(n>>16), byte(n>>8), byte(n))
}

func appendFrame(b []byte, typ byte, body []byte) []byte {
	return append(appendHeader(b, typ, len(body)), body...)
}

// A frameReader cuts a byte stream into frames. It reads as much as its buffer
// takes at once: one system call (and one TLS record or WebSocket message, if
// they are large) brings many frames.
type frameReader struct {
	src  io.Reader
	buf  []byte
	r, w int // buf[r:w] is read and not yet cut
	skip int // bytes of an unknown frame still to throw away
}

// next returns the next complete frame in the buffer; ok is false when more
// bytes are needed. The body is valid until the next call of fill.
func (f *frameReader) next() (typ byte, body []byte, ok bool, err error) {
	for {
		if f.skip > 0 {
			n := min(f.skip, f.w-f.r)
			f.r += n
			f.skip -= n
			if f.skip > 0 {
				return 0, nil, false, nil
			}
		}
		if f.w-f.r < headerLen {
			return 0, nil, false, nil
		}
		h := binary.BigEndian.Uint32(f.buf[f.r:])
		typ, n := byte(h>>24), int(h&0xffffff)
		if !known(typ) {
			f.r += headerLen
			f.skip = n
			continue
		}
		if n > maxKnown {
			return 0, nil, false, fmt.Errorf("frame of type %d has %d bytes, at most %d are allowed", typ, n, maxKnown)
		}
		if f.w-f.r < headerLen+n {
			return 0, nil, false, nil
		}
		body = f.buf[f.r+headerLen : f.r+headerLen+n]
		f.r += headerLen + n
		return typ, body, true, nil
	}
}

// fill reads once, blocking, after making room for a frame of the longest known
// size when the buffer is (size bytes) large enough for that.
func (f *frameReader) fill(size int) error {
	if f.r == f.w {
		f.r, f.w = 0, 0
	}
	switch {
	case len(f.buf) < size:
		b := make([]byte, size)
		f.w = copy(b, f.buf[f.r:f.w])
		f.buf, f.r = b, 0
	case len(f.buf)-f.w < headerLen+maxKnown && f.r > 0:
		f.w = copy(f.buf, f.buf[f.r:f.w])
		f.r = 0
	}
	n, err := f.src.Read(f.buf[f.w:])
	f.w += n
	if n > 0 {
		return nil // an error with data comes again at the next read
	}
	if err == nil {
		err = io.ErrNoProgress
	}
	return err
}
