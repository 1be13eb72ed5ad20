package nonblock

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// pair is a TCP connection over loopback, the first end wrapped.
func pair(t testing.TB) (wrapped net.Conn, plain *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close(); b.Close() })
	w := Wrap(a)
	if _, ok := w.(*Conn); !ok {
		t.Fatalf("wrapped: %T", w)
	}
	return w, b.(*net.TCPConn)
}

// TestConnMovesEverything: more than the sockets hold, so both directions wait.
func TestConnMovesEverything(t *testing.T) {
	c, other := pair(t)
	go func() {
		_, _ = io.Copy(struct{ io.Writer }{other}, struct{ io.Reader }{other})
		other.CloseWrite()
	}()
	sent := make([]byte, 32<<20)
	_, _ = rand.Read(sent)
	go func() {
		if n, err := c.Write(sent); n != len(sent) || err != nil {
			t.Errorf("Write: %d, %v", n, err)
		}
		_ = c.(*Conn).CloseWrite()
	}()
	// io.Copy and not WriteTo, which is the connection's own.
	var got bytes.Buffer
	if _, err := io.Copy(&got, struct{ io.Reader }{c}); err != nil || !bytes.Equal(got.Bytes(), sent) {
		t.Fatalf("%d of %d bytes came back: %v", got.Len(), len(sent), err)
	}
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("Read after the end: %d, %v", n, err)
	}
}

func TestConnDeadlinesAndClose(t *testing.T) {
	c, _ := pair(t)
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read past its deadline: %v", err)
	}
	_ = c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
	n, err := c.Write(make([]byte, 64<<20)) // nobody reads
	if !errors.Is(err, os.ErrDeadlineExceeded) || n == 0 || n == 64<<20 {
		t.Errorf("Write past its deadline: %d, %v", n, err)
	}
	_ = c.SetDeadline(time.Time{})
	ended := make(chan error, 2)
	go func() { _, err := c.Read(make([]byte, 1)); ended <- err }()
	go func() { _, err := c.Write(make([]byte, 64<<20)); ended <- err }()
	time.Sleep(20 * time.Millisecond)
	c.Close()
	for range 2 {
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Errorf("released by Close: %v", err)
		}
	}
}

func TestConnReset(t *testing.T) {
	c, other := pair(t)
	_ = other.SetLinger(0)
	other.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("Read: %v", err)
	}
	if _, err := c.Write([]byte{1}); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("Write: %v", err)
	}
}

func TestPending(t *testing.T) {
	c, other := pair(t)
	raw, err := c.(*Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	pending := func(limit int) (n int, err error) {
		_ = raw.Control(func(fd uintptr) { n, err = Pending(fd, limit) })
		return n, err
	}
	if _, err := pending(10); err != syscall.EAGAIN {
		t.Errorf("nothing yet: %v", err)
	}
	// Two segments, so that more than the first one's bytes are counted.
	_, _ = other.Write(make([]byte, 5000))
	time.Sleep(10 * time.Millisecond)
	_, _ = other.Write(make([]byte, 5000))
	other.CloseWrite()
	time.Sleep(10 * time.Millisecond)
	for _, limit := range []int{1, 7000, 1 << 20} {
		if n, err := pending(limit); n != min(limit, 10000) || err != nil {
			t.Errorf("of at most %d bytes: %d, %v", limit, n, err)
		}
	}
	if _, err := io.ReadFull(c, make([]byte, 10000)); err != nil {
		t.Fatal(err)
	}
	if n, err := pending(10); n != 0 || err != nil {
		t.Errorf("at the end: %d, %v", n, err)
	}
}

func TestNothingAllocated(t *testing.T) {
	c, other := pair(t)
	b, o := make([]byte, 100), make([]byte, 100)
	if n := testing.AllocsPerRun(100, func() {
		_, _ = c.Write(b)
		_, _ = io.ReadFull(other, o)
		_, _ = other.Write(o)
		_, _ = io.ReadFull(c, b)
	}); n > 0 {
		t.Errorf("%v allocations per round trip", n)
	}
}

func TestWrapLeavesOthers(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	if Wrap(a) != a {
		t.Error("a pipe was wrapped")
	}
}

// TestPeekAndDiscard: what is looked at stays, and what is discarded is gone.
func TestPeekAndDiscard(t *testing.T) {
	c, other := pair(t)
	raw, err := c.(*Conn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 16)
	peek := func() (n int, err error) {
		cerr := raw.Control(func(fd uintptr) { n, err = Peek(fd, b) })
		return n, errors.Join(err, cerr)
	}
	if _, err := peek(); !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("of an empty queue: %v", err)
	}
	if _, err := other.Write([]byte("abcdef")); err != nil {
		t.Fatal(err)
	}
	other.CloseWrite()
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if n, _ := peek(); n == 6 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("nothing comes")
		}
	}
	for _, step := range []struct {
		discard int
		left    string
	}{{2, "cdef"}, {0, "cdef"}, {1, "def"}, {3, ""}} {
		var n int
		var err error
		if step.discard > 0 {
			_ = raw.Control(func(fd uintptr) { n, err = Discard(fd, step.discard) })
		}
		if n != step.discard || err != nil {
			t.Errorf("discarding %d: %d, %v", step.discard, n, err)
		}
		if n, err := peek(); err != nil || string(b[:n]) != step.left {
			t.Errorf("left: %q, %v", b[:n], err)
		}
	}
}
