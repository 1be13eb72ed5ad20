package agent

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"

	"github.com/culvert-dev/culvert/internal/nonblock"
)

// relay joins a connection of the stack (the client) to a socket (the backend),
// whichever of the two was there first.
//
// Neither direction has a buffer: up, the stack's queue is written to the
// socket where it lies; down, the socket is read into the packets that the
// stack sends. So an idle or a stuck connection holds no memory but its queues,
// and each byte is copied once less.
//
// Nor does an idle one hold the stacks that moving bytes takes, 8 to 16 KB in
// each direction: when nothing has come for a while up's goroutine ends until
// the stack calls, and down's makes room for a new one, with a stack of 2 KB. A
// connection in use keeps both: growing a stack for each packet takes time.
type relay struct {
	forwarder *tcpForwarder
	ep        tcpip.Endpoint
	wq        *waiter.Queue
	backend   *net.TCPConn
	resetOnce sync.Once
	running   atomic.Int32 // directions
	onEnd     func()       // called when both sides are closed; may be nil
	event     waiter.Entry // calls wake, until up has ended

	mu   sync.Mutex
	more chan struct{} // tells up's goroutine to look again; nil while up sleeps
	calm bool          // the stack has not called since the last tick
	tick *time.Timer   // nil while up has no goroutine
}

// downChunk is read from a socket at once: it makes one super-packet with room
// for the headers, and a whole number of 1,368-byte segments (MTU 1420).
const downChunk = 47 * 1368

func newRelay(f *tcpForwarder, ep tcpip.Endpoint, wq *waiter.Queue, backend *net.TCPConn) *relay {
	return &relay{forwarder: f, ep: ep, wq: wq, backend: backend}
}

// start runs the two directions, not in the goroutine that dialled, whose stack
// has grown.
func (r *relay) start() {
	const events = waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr
	r.running.Store(2)
	r.event = waiter.NewFunctionEntry(events, r.wake)
	r.wq.EventRegister(&r.event)
	if before := r.ep.Readiness(events); before != 0 {
		r.wake(before)
	}
	go r.direction(r.down)
}

// errAsleep: a goroutine ends, and its direction does not.
var errAsleep = errors.New("asleep")

// direction runs one of the two; the last to end closes both sides.
func (r *relay) direction(run func() error) {
	err := run()
	if err == errAsleep {
		return
	}
	if err != nil {
		r.reset()
	}
	if r.running.Add(-1) == 0 {
		r.ep.Close()
		r.backend.Close()
		r.forwarder.ended(r)
		if r.onEnd != nil {
			r.onEnd()
		}
	}
}

// reset ends both sides with a RST, whichever of them still stands. The other
// direction then finds its socket closed.
func (r *relay) reset() {
	r.resetOnce.Do(func() {
		reset(r.backend)
		r.ep.Abort()
	})
}

var errClientReset = errors.New("the client reset the connection")

// wake has up look at what the stack has. It is called by the stack, with locks
// held: no waiting here.
func (r *relay) wake(events waiter.EventMask) {
	if events&(waiter.EventHUp|waiter.EventErr) != 0 && tcp.EndpointState(r.ep.State()) == tcp.StateError {
		// The client has reset the connection, and up may wait for the backend.
		_ = r.backend.SetWriteDeadline(time.Unix(1, 0)) // fails when it is closed, and then nobody waits
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calm = false
	if r.more != nil {
		r.look()
		return
	}
	r.more = make(chan struct{}, 1)
	r.tick = time.AfterFunc(r.forwarder.node.agent.times.lull, r.ticked)
	go r.direction(r.up)
}

// look has up's goroutine look again. r.mu is held.
func (r *relay) look() {
	select {
	case r.more <- struct{}{}:
	default:
	}
}

// ticked has up's goroutine find that it may sleep. A timer of its own, since to
// wait with a time-out costs two changes of Go's timers for each packet.
func (r *relay) ticked() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.tick == nil {
		return
	}
	if r.calm {
		r.look()
	}
	r.calm = true
	r.tick.Reset(r.forwarder.node.agent.times.lull)
}

// sleep tells up's goroutine that it may end: not when the stack has called of
// late, nor since it looked.
func (r *relay) sleep() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.calm || len(r.more) > 0 {
		return false
	}
	r.more = nil
	r.stopTick()
	return true
}

// stopTick ends the ticks. r.mu is held.
func (r *relay) stopTick() {
	r.tick.Stop()
	r.tick = nil
}

// up moves bytes from the client to the backend until the client's FIN, or until
// none have come for a while.
func (r *relay) up() (err error) {
	defer func() {
		if err != errAsleep {
			r.wq.EventUnregister(&r.event)
			r.mu.Lock()
			r.stopTick() // and more stays: nothing wakes up again
			r.mu.Unlock()
		}
	}()
	r.mu.Lock()
	more := r.more
	r.mu.Unlock()
	raw, err := r.backend.SyscallConn()
	if err != nil {
		return err
	}
	var w socketWriter
	var n int
	var terr tcpip.Error
	step := func(fd uintptr) bool {
		w.fd, w.err = fd, nil
		var res tcpip.ReadResult
		res, terr = r.ep.Read(&w, tcpip.ReadOptions{})
		n = res.Count
		return n > 0 || w.err != syscall.EAGAIN
	}
	total := r.forwarder.node.agent.metrics.tcpUp
	for {
		if err := raw.Write(step); err != nil {
			return err
		}
		if n > 0 {
			r.ep.ModerateRecvBuf(n)
			total.Add(float64(n))
			continue
		}
		switch terr.(type) {
		case nil: // nothing moved: the next call says why
		case *tcpip.ErrWouldBlock:
			if r.sleep() {
				return errAsleep
			}
			<-more
		case *tcpip.ErrClosedForReceive:
			if tcp.EndpointState(r.ep.State()) == tcp.StateError {
				return errClientReset
			}
			return r.backend.CloseWrite()
		case *tcpip.ErrBadBuffer:
			return os.NewSyscallError("write", w.err)
		default:
			return errClientReset
		}
	}
}

// socketWriter writes to a socket without waiting. It is handed to the stack,
// which holds the connection's lock meanwhile and keeps what was not taken.
type socketWriter struct {
	fd  uintptr
	err error // of the last Write
}

func (w *socketWriter) Write(b []byte) (int, error) {
	done := 0
	for done < len(b) {
		n, err := nonblock.Write(w.fd, b[done:])
		if err != nil {
			w.err = err
			return done, err
		}
		done += n
	}
	return done, nil
}

// down moves bytes from the backend to the client until the backend's FIN, or
// until none have come for a while.
func (r *relay) down() error {
	writable, notify := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	r.wq.EventRegister(&writable)
	defer r.wq.EventUnregister(&writable)

	raw, err := r.backend.SyscallConn()
	if err != nil {
		return err
	}
	var p socketPayload
	var n int64
	var terr tcpip.Error
	var sockErr error
	step := func(fd uintptr) bool {
		n, terr = 0, nil
		p.fd = fd
		p.left, sockErr = nonblock.Pending(fd, downChunk)
		switch {
		case sockErr == syscall.EAGAIN:
			return false
		case sockErr == nil && p.left == 0:
			sockErr = io.EOF
		case sockErr == nil:
			n, terr = r.ep.Write(&p, tcpip.WriteOptions{})
		}
		return true
	}
	total := r.forwarder.node.agent.metrics.tcpDown
	// The read deadline is the end of a lull, once something has come.
	lull := r.forwarder.node.agent.times.lull
	var used, idle bool
	for {
		switch err := raw.Read(step); {
		case errors.Is(err, os.ErrDeadlineExceeded):
			if idle {
				_ = r.backend.SetReadDeadline(time.Time{})
				go r.direction(r.down)
				return errAsleep
			}
			idle = true
			_ = r.backend.SetReadDeadline(time.Now().Add(lull))
			continue
		case err != nil:
			return err
		}
		switch {
		case sockErr == io.EOF:
			if terr := r.ep.Shutdown(tcpip.ShutdownWrite); terr != nil && tcp.EndpointState(r.ep.State()) == tcp.StateError {
				return errClientReset
			}
			return nil
		case sockErr != nil:
			return os.NewSyscallError("read", sockErr)
		}
		total.Add(float64(n))
		idle = false
		if !used {
			used = true
			_ = r.backend.SetReadDeadline(time.Now().Add(lull))
		}
		switch terr.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			<-notify
		default:
			return errClientReset
		}
	}
}

// socketPayload lets the stack read exactly left bytes from a socket. The stack
// takes a reader that ends before its Len for one that will go on, so they must
// be there.
type socketPayload struct {
	fd   uintptr
	left int
}

func (p *socketPayload) Len() int { return p.left }

func (p *socketPayload) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := nonblock.Read(p.fd, b[:min(len(b), p.left)])
	if err == nil && n == 0 {
		err = syscall.EPIPE // not io.EOF: see above
	}
	p.left -= n
	return n, err
}
