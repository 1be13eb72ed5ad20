package cluster

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/spdystream/spdy"
)

const (
	frameHeader = 8
	// maxPayload is the data of one frame. 64 KiB is what a carrier writes at
	// once at most; more would make a small packet behind it wait.
	maxPayload = 64 << 10
	// readBuffer gathers small frames into one read of the socket.
	readBuffer = 64 << 10
	// maxErrorText bounds what the error stream may make us keep, in bytes.
	maxErrorText = 4 << 10
)

// SPDY/3.1 frames (draft-mbelshe-httpbis-spdy-00, section 2.2) and the ids of
// the two streams of a port-forward: a client's ids are odd.
const (
	controlBit = 0x80

	synReply  = 2
	rstStream = 3
	ping      = 6
	goAway    = 7

	flagFin = 0x01

	errorStream = 1
	dataStream  = 3
)

// stream is the data stream of a port-forward that is alone on its SPDY
// connection. It is written out here, instead of taken from a SPDY library,
// because on a connection of one stream everything that the library needs is
// overhead: goroutines, queues of 50 frames, an allocation for each frame, three
// writes for each frame. Kubernetes uses no flow control in SPDY, so none is
// here. Reads and writes may be concurrent with each other and with Close.
type stream struct {
	net.Conn // what holds the frames; its addresses and deadlines
	abort    func()

	r       *bufio.Reader
	left    int    // payload of the current data frame not read yet
	fin     bool   // it is the last one
	trouble []byte // what the error stream says
	said    bool   // the error stream has ended
	readErr error

	writeMu sync.Mutex
	buf     []byte // a frame in the making

	closeOnce sync.Once
}

// openStream opens error and data stream to port and waits until the server
// accepted the latter. abort must close the socket below conn without waiting.
func openStream(conn net.Conn, abort func(), port int) (*stream, error) {
	s := &stream{
		Conn:  conn,
		abort: abort,
		r:     bufio.NewReaderSize(conn, readBuffer),
		buf:   make([]byte, frameHeader+maxPayload),
	}
	var out bytes.Buffer
	framer, err := spdy.NewFramer(&out, nil)
	if err != nil {
		return nil, fmt.Errorf("opening the stream: %w", err)
	}
	open := func(id spdy.StreamId, kind string) error {
		return framer.WriteFrame(&spdy.SynStreamFrame{StreamId: id, Headers: http.Header{
			"streamType": {kind},
			"port":       {strconv.Itoa(port)},
			"requestID":  {"0"},
		}})
	}
	if err := open(errorStream, "error"); err != nil {
		return nil, fmt.Errorf("opening the error stream: %w", err)
	}
	// Nothing will be said on the error stream.
	if err := framer.WriteFrame(&spdy.DataFrame{StreamId: errorStream, Flags: spdy.DataFlagFin}); err != nil {
		return nil, fmt.Errorf("opening the error stream: %w", err)
	}
	if err := open(dataStream, "data"); err != nil {
		return nil, fmt.Errorf("opening the data stream: %w", err)
	}
	if _, err := conn.Write(out.Bytes()); err != nil {
		return nil, fmt.Errorf("opening the stream: %w", err)
	}
	// The streams are answered independently: data may come before the error
	// stream's reply, but not before its own.
	for accepted := uint32(0); accepted != dataStream; {
		h, err := s.readHeader()
		if err != nil {
			return nil, fmt.Errorf("opening the stream: %w", err)
		}
		if !h.control && h.stream == dataStream {
			return nil, errors.New("opening the stream: data before the reply")
		}
		if accepted, err = s.handle(h); err != nil {
			return nil, fmt.Errorf("opening the stream: %w", err)
		}
	}
	return s, nil
}

var errReset = errors.New("the server reset the stream")

type header struct {
	control bool
	kind    int    // of a control frame
	stream  uint32 // of a data frame
	flags   byte
	length  int
}

func (s *stream) readHeader() (h header, err error) {
	var b [frameHeader]byte
	if _, err := io.ReadFull(s.r, b[:]); err != nil {
		return h, err
	}
	h.flags = b[4]
	h.length = int(b[5])<<16 | int(b[6])<<8 | int(b[7])
	if h.control = b[0]&controlBit != 0; h.control {
		if version := int(b[0]&^controlBit)<<8 | int(b[1]); version != 3 {
			return h, fmt.Errorf("SPDY version %d", version)
		}
		h.kind = int(binary.BigEndian.Uint16(b[2:]))
		return h, nil
	}
	h.stream = binary.BigEndian.Uint32(b[:])
	return h, nil
}

// Read returns data as it comes. What the error stream said is the error that
// ends it.
func (s *stream) Read(p []byte) (int, error) {
	if s.readErr != nil {
		return 0, s.readErr
	}
	if len(p) == 0 {
		return 0, nil
	}
	n, err := s.read(p)
	if err != nil {
		s.listen()
		if text := strings.TrimSpace(string(s.trouble)); text != "" {
			err = fmt.Errorf("the kubelet says: %s", text)
		}
		s.readErr = err
	}
	return n, err
}

// lastWords is how long after the end of the data the reason may take.
const lastWords = time.Second

// listen takes what the error stream says after the data stream has ended:
// either may be the first, depending on the container runtime.
func (s *stream) listen() {
	if !s.fin || s.said {
		return
	}
	_ = s.SetReadDeadline(time.Now().Add(lastWords))
	for !s.said {
		h, err := s.readHeader()
		if err != nil {
			return
		}
		if _, err := s.handle(h); err != nil {
			return
		}
	}
}

func (s *stream) read(p []byte) (int, error) {
	for s.left == 0 {
		if s.fin {
			return 0, io.EOF
		}
		h, err := s.readHeader()
		if err != nil {
			return 0, err
		}
		if !h.control && h.stream == dataStream {
			s.left, s.fin = h.length, h.flags&flagFin != 0
			continue
		}
		if _, err := s.handle(h); err != nil {
			return 0, err
		}
	}
	// Whole frames that are here already are returned together.
	n := 0
	for {
		m, err := s.r.Read(p[n:min(len(p), n+s.left)])
		n += m
		s.left -= m
		if err != nil || n == len(p) || s.left > 0 || s.fin || !s.dataBuffered() {
			return n, err
		}
		h, err := s.readHeader()
		if err != nil {
			return n, err
		}
		s.left = h.length
	}
}

// dataBuffered says whether the next bytes are here and are a data frame of this
// stream with data in it and no end.
func (s *stream) dataBuffered() bool {
	if s.r.Buffered() <= frameHeader {
		return false
	}
	b, _ := s.r.Peek(frameHeader)
	return binary.BigEndian.Uint32(b) == dataStream && b[4] == 0 && (b[5]|b[6]|b[7]) != 0
}

// handle takes a frame that is not this stream's data. It returns the stream
// that the frame accepts, if it does.
func (s *stream) handle(h header) (accepted uint32, err error) {
	if !h.control {
		if h.stream != errorStream {
			return 0, s.skip(h.length)
		}
		text := make([]byte, min(h.length, maxErrorText-len(s.trouble)))
		if _, err := io.ReadFull(s.r, text); err != nil {
			return 0, err
		}
		s.trouble = append(s.trouble, text...)
		if err := s.skip(h.length - len(text)); err != nil {
			return 0, err
		}
		s.said = s.said || h.flags&flagFin != 0
		if s.said && len(s.trouble) > 0 {
			return 0, io.ErrUnexpectedEOF // Read puts the text in its place
		}
		return 0, nil
	}
	switch h.kind {
	case synReply, rstStream, ping, goAway:
	default: // settings, headers, window updates say nothing to one stream
		return 0, s.skip(h.length)
	}
	var b [4]byte
	if h.length < len(b) {
		return 0, fmt.Errorf("SPDY frame %d of %d bytes", h.kind, h.length)
	}
	if _, err := io.ReadFull(s.r, b[:]); err != nil {
		return 0, err
	}
	if err := s.skip(h.length - len(b)); err != nil {
		return 0, err
	}
	id := binary.BigEndian.Uint32(b[:])
	switch h.kind {
	case synReply:
		return id, nil
	case ping:
		if id%2 == 0 { // the server's own, to be sent back
			return 0, s.writeFrame([]byte{controlBit, 3, 0, ping, 0, 0, 0, 4}, b[:])
		}
	case rstStream:
		if id == errorStream {
			s.said = true
		}
		if id == dataStream {
			s.fin = true
			return 0, errReset
		}
	}
	// goAway: the connection ends when the stream does.
	return 0, nil
}

func (s *stream) skip(n int) error {
	_, err := s.r.Discard(n)
	return err
}

// Write sends p in frames of at most maxPayload, each with one write below.
func (s *stream) Write(p []byte) (int, error) {
	done := 0
	for {
		part := p[done:min(len(p), done+maxPayload)]
		n := len(part)
		head := [frameHeader]byte{0, 0, 0, dataStream, 0, byte(n >> 16), byte(n >> 8), byte(n)}
		if err := s.writeFrame(head[:], part); err != nil {
			return done, err
		}
		if done += n; done == len(p) {
			return done, nil
		}
	}
}

// CloseWrite says that no more data will come; what the pod still has to say can
// be read.
func (s *stream) CloseWrite() error {
	return s.writeFrame([]byte{0, 0, 0, dataStream, flagFin, 0, 0, 0}, nil)
}

func (s *stream) writeFrame(head, payload []byte) error {
	s.writeMu.Lock()
	defer s.writeMu.Unlock()
	n := copy(s.buf, head)
	n += copy(s.buf[n:], payload)
	_, err := s.Conn.Write(s.buf[:n])
	return err
}

// NetConn is the connection below, for who wants to know its state.
func (s *stream) NetConn() net.Conn { return s.Conn }

// Close ends the connection and releases blocked reads and writes. It waits for
// nothing but a goodbye of at most 100 ms.
func (s *stream) Close() error {
	s.closeOnce.Do(func() {
		// A write that is stuck holds the locks that a goodbye needs.
		if s.writeMu.TryLock() {
			s.writeMu.Unlock()
			if ws, ok := s.Conn.(*webSocketConn); ok {
				ws.goodbye()
			}
		}
		s.abort()
		s.Conn.Close()
	})
	return nil
}
