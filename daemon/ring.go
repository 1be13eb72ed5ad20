package daemon

import (
	"bytes"
	"context"
	"io"
	"sync"
)

// ringSize bounds what is kept of one session's output, in bytes: hours of a
// healthy session, and eight sessions stay below what the daemon itself uses.
const ringSize = 1 << 20

// ring keeps the last ringSize bytes written to it, for any number of readers
// that each go at their own pace; one that falls behind loses the oldest.
type ring struct {
	mu     sync.Mutex
	buf    []byte // at most ringSize
	start  int64  // offset in the whole output of buf[0]
	closed bool
	more   chan struct{} // closed and replaced at each write
}

func newRing() *ring { return &ring{more: make(chan struct{})} }

// Write never fails and never blocks. It leaves out control characters but tab
// and newline: the output ends on somebody's terminal, perhaps root's.
func (r *ring) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range p {
		switch last := len(r.buf) - 1; {
		case c < ' ' && c != '\n' && c != '\t', c == 0x7f:
		case c >= 0x80 && c < 0xa0 && last >= 0 && r.buf[last] == 0xc2: // U+0080 to U+009F
			r.buf[last] = '?'
		default:
			r.buf = append(r.buf, c)
		}
	}
	if cut := len(r.buf) - ringSize; cut > 0 {
		// Move only now and then: at half as much again.
		if len(r.buf) > ringSize+ringSize/2 || len(p) > ringSize/2 {
			r.buf = append(make([]byte, 0, ringSize), r.buf[cut:]...)
			r.start += int64(cut)
		}
	}
	close(r.more)
	r.more = make(chan struct{})
	return len(p), nil
}

// close ends those who follow.
func (r *ring) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.closed = true
		close(r.more)
		r.more = make(chan struct{})
	}
}

// copyTo writes what is kept to w and, with follow, what comes until the ring
// or ctx is closed.
func (r *ring) copyTo(ctx context.Context, w io.Writer, follow bool) error {
	var at int64
	for {
		r.mu.Lock()
		at = max(at, r.start)
		chunk := bytes.Clone(r.buf[at-r.start:])
		more, closed := r.more, r.closed
		r.mu.Unlock()
		if len(chunk) > 0 {
			if _, err := w.Write(chunk); err != nil {
				return err
			}
			at += int64(len(chunk))
		}
		if !follow || closed {
			return nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return nil
		}
	}
}

// lastLine returns the last line that is not empty, cut to a readable length.
func (r *ring) lastLine() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	tail := bytes.TrimSpace(r.buf[max(0, len(r.buf)-4<<10):])
	if i := bytes.LastIndexByte(tail, '\n'); i >= 0 {
		tail = tail[i+1:]
	}
	return cleanText(string(tail[:min(len(tail), 400)]))
}
