// Package nonblock makes system calls on non-blocking descriptors without
// telling Go's scheduler. An ordinary system call may block, so the scheduler
// prepares to give its processor away and, in a process that idles between two
// packets, wakes its monitor thread for each: with that a third of a round
// trip's CPU time goes. A call on a non-blocking descriptor returns at once.
//
// It is for what happens once per packet; waiting is left to Go's poller.
package nonblock

import (
	"io"
	"os"
	"sync"
	"syscall"
	"unsafe"
)

// Read reads once; 0 without an error is the end. syscall.EAGAIN means that
// there is nothing yet.
func Read(fd uintptr, b []byte) (int, error) {
	return call(syscall.SYS_READ, fd, b)
}

// Write writes once, perhaps not all of b. syscall.EAGAIN means that there is no
// room now.
func Write(fd uintptr, b []byte) (int, error) {
	return call(syscall.SYS_WRITE, fd, b)
}

func call(trap, fd uintptr, b []byte) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall(trap, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		if errno == 0 {
			return int(n), nil
		}
		if errno != syscall.EINTR {
			return 0, errno
		}
	}
}

// Pending is how many bytes can be read from a TCP socket now, at most limit; 0
// without an error is the end, syscall.EAGAIN that there is nothing yet.
func Pending(fd uintptr, limit int) (int, error) {
	// With MSG_TRUNC the kernel does not copy what is there (tcp(7)), so it needs
	// no place to put it.
	return receive(fd, nil, limit, syscall.MSG_PEEK|syscall.MSG_TRUNC|syscall.MSG_DONTWAIT)
}

// Peek copies to b what can be read from a socket now, and leaves it there; 0
// without an error is the end, syscall.EAGAIN that there is nothing yet.
func Peek(fd uintptr, b []byte) (int, error) {
	return receive(fd, unsafe.Pointer(unsafe.SliceData(b)), len(b), syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
}

// Discard takes n bytes, or as many as there are, off a TCP socket's queue
// without a copy (tcp(7): MSG_TRUNC).
func Discard(fd uintptr, n int) (int, error) {
	return receive(fd, nil, n, syscall.MSG_TRUNC|syscall.MSG_DONTWAIT)
}

func receive(fd uintptr, b unsafe.Pointer, n, flags int) (int, error) {
	for {
		n, _, errno := syscall.RawSyscall6(syscall.SYS_RECVFROM, fd, uintptr(b), uintptr(n), uintptr(flags), 0, 0)
		if errno == 0 {
			return int(n), nil
		}
		if errno != syscall.EINTR {
			return 0, errno
		}
	}
}

// Reader reads a descriptor and waits for what is to come. It allocates nothing
// per call. Calls may be concurrent, and are made one after the other.
type Reader struct {
	raw  syscall.RawConn
	step func(fd uintptr) bool

	mu  sync.Mutex // guards the call under way
	b   []byte
	n   int
	err error
}

// NewReader reads raw's descriptor, which must be non-blocking and polled.
func NewReader(raw syscall.RawConn) *Reader {
	r := &Reader{raw: raw}
	r.step = func(fd uintptr) bool {
		r.n, r.err = Read(fd, r.b)
		return r.err != syscall.EAGAIN
	}
	return r
}

// Read implements io.Reader.
func (r *Reader) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.b = b
	err := r.raw.Read(r.step)
	r.b = nil
	switch {
	case err != nil:
		return 0, err // closed, or its deadline
	case r.err != nil:
		return 0, os.NewSyscallError("read", r.err)
	case r.n == 0:
		return 0, io.EOF
	}
	return r.n, nil
}

// Writer writes a descriptor and waits for room. It allocates nothing per call.
// Calls may be concurrent, and are made one after the other.
type Writer struct {
	raw  syscall.RawConn
	step func(fd uintptr) bool

	mu  sync.Mutex // guards the call under way
	b   []byte
	n   int
	err error
}

// NewWriter writes raw's descriptor, which must be non-blocking and polled.
func NewWriter(raw syscall.RawConn) *Writer {
	w := &Writer{raw: raw}
	w.step = func(fd uintptr) bool {
		for w.n < len(w.b) {
			var n int
			n, w.err = Write(fd, w.b[w.n:])
			if w.err != nil {
				return w.err != syscall.EAGAIN
			}
			w.n += n
		}
		return true
	}
	return w
}

// Write implements io.Writer.
func (w *Writer) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b, w.n, w.err = b, 0, nil
	err := w.raw.Write(w.step)
	w.b = nil
	if err == nil && w.err != nil {
		err = os.NewSyscallError("write", w.err)
	}
	return w.n, err
}
