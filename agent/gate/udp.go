package gate

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/culvert-dev/culvert/wire/intercept"
)

const (
	// flowQueue is how many datagrams of one flow wait for a dial, or for the agent.
	flowQueue = 32
	// queuedBytes bounds the datagrams of all flows that wait.
	queuedBytes = 4 << 20
	// datagramBuffers is how many answers are read at one time.
	datagramBuffers = 64
	// datagramWait is how long an agent may take over one datagram.
	datagramWait = 2 * time.Second
	// A flow whose datagrams the machine did not take goes to the origin for so
	// long: after an answer, and after none.
	avoidAfterAnswer  = time.Second
	avoidAfterSilence = 5 * time.Second
)

// flows are the UDP flows of all routes. A flow is what one client sends to one
// port; which socket serves it may change with each datagram.
type flows struct {
	gate    *Gate
	queued  atomic.Int64 // bytes
	buffers chan struct{}
	evicted atomic.Int64

	mu     sync.Mutex
	table  map[flowKey]*flow
	closed bool
}

type flowKey struct {
	port   uint16
	client netip.AddrPort
}

func newFlows(g *Gate) *flows {
	return &flows{gate: g, buffers: make(chan struct{}, datagramBuffers), table: map[flowKey]*flow{}}
}

// flow is one client's. Its goroutine owns way, and only that sends upwards.
type flow struct {
	flows  *flows
	route  *route
	key    flowKey
	socket *net.UDPConn
	queue  chan []byte
	last   atomic.Int64 // datagram in either direction, Unix time in ns
	end    sync.Once
	done   chan struct{}

	way      *way      // nil: to be chosen
	avoid    time.Time // the machine, until then
	refusing bool      // until then, and not even the origin shall serve it
}

// way is what serves a flow now: a stream to the agent, or a socket.
type way struct {
	conn    net.Conn
	machine bool
	to      string // compares
	dead    atomic.Bool
	ended   func()
}

// serve takes the datagrams of a route until its socket is closed.
func (f *flows) serve(r *route, socket *net.UDPConn) {
	buf := make([]byte, intercept.MaxDatagram+1)
	for {
		n, client, err := socket.ReadFromUDPAddrPort(buf)
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err != nil:
			continue // of an earlier answer: its client is gone
		}
		r.count.up.Add(int64(n))
		f.put(r, socket, client, buf[:n])
	}
}

// put queues a datagram for its flow, unless too much waits already.
func (f *flows) put(r *route, socket *net.UDPConn, client netip.AddrPort, p []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.queued.Load()+int64(len(p)) > queuedBytes {
		return
	}
	fl := f.getLocked(r, socket, client)
	fl.last.Store(time.Now().UnixNano())
	select {
	case fl.queue <- slices.Clone(p):
		f.queued.Add(int64(len(p)))
	default:
	}
}

// getLocked is the client's flow. f.mu is held.
func (f *flows) getLocked(r *route, socket *net.UDPConn, client netip.AddrPort) *flow {
	key := flowKey{r.at.port, client}
	if fl := f.table[key]; fl != nil && fl.route == r {
		return fl
	}
	if len(f.table) >= f.gate.cfg.maxFlows() {
		var oldest *flow
		for _, other := range f.table {
			if oldest == nil || other.last.Load() < oldest.last.Load() {
				oldest = other
			}
		}
		f.endLocked(oldest)
		f.evicted.Add(1)
	}
	fl := &flow{flows: f, route: r, key: key, socket: socket, queue: make(chan []byte, flowQueue), done: make(chan struct{})}
	f.table[key] = fl
	f.gate.wg.Go(fl.run)
	return fl
}

func (f *flows) endLocked(fl *flow) {
	if f.table[fl.key] == fl {
		delete(f.table, fl.key)
	}
	fl.end.Do(func() { close(fl.done) })
}

// leave ends the flows of a route.
func (f *flows) leave(r *route) {
	f.endIf(func(fl *flow) bool { return fl.route == r })
}

// sweep ends flows that are idle.
func (f *flows) sweep() {
	before := time.Now().Add(-f.gate.times.udpIdle).UnixNano()
	f.endIf(func(fl *flow) bool { return fl.last.Load() < before })
}

func (f *flows) endIf(is func(*flow) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, fl := range f.table {
		if is(fl) {
			f.endLocked(fl)
		}
	}
}

// close ends all flows; Run waits for them.
func (f *flows) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.endIf(func(*flow) bool { return true })
}

func (f *flows) count() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return len(f.table)
}

// run sends what the client sends, until the flow's end.
func (fl *flow) run() {
	defer fl.drop()
	defer func() {
		for {
			select {
			case p := <-fl.queue:
				fl.flows.queued.Add(-int64(len(p)))
			default:
				return
			}
		}
	}()
	buf := []byte(nil)
	for {
		select {
		case <-fl.done:
			return
		case p := <-fl.queue:
			fl.flows.queued.Add(-int64(len(p)))
			if !fl.choose() {
				fl.route.count.refused.Add(1)
				continue
			}
			if !fl.way.machine {
				_, _ = fl.way.conn.Write(p) // a datagram may be lost
				continue
			}
			if cap(buf) < len(p)+2 {
				buf = make([]byte, len(p)+2)
			}
			_ = fl.way.conn.SetWriteDeadline(time.Now().Add(datagramWait)) // fails when it is closed, and so does the write
			if err := intercept.WriteDatagram(fl.way.conn, p, buf); err != nil {
				fl.way.dead.Store(true) // half of it may have been written
			}
			if cap(buf) > 4<<10 {
				buf = nil // flows that sent one large datagram must not keep it
			}
		}
	}
}

// choose makes way what serves the next datagram; false: nobody does.
func (fl *flow) choose() bool {
	sp := fl.route.spec.Load()
	if sp.machineNow() {
		if time.Now().After(fl.avoid) && fl.chooseMachine(sp) {
			return true
		}
		if fl.refusing {
			return false
		}
	}
	if sp.Origin == "" {
		fl.drop()
		return false
	}
	if fl.is(false, sp.Origin) {
		return true
	}
	fl.drop()
	d := net.Dialer{Timeout: fl.flows.gate.times.dialOrigin}
	c, err := d.DialContext(fl.flows.gate.life, "udp", originOf(sp.Route))
	if err != nil {
		return false
	}
	fl.take(c, false, sp.Origin)
	return true
}

// chooseMachine makes way a stream to the machine, or tells how long it is to be
// avoided.
func (fl *flow) chooseMachine(sp *spec) bool {
	to := fmt.Sprint(sp.Machine.ID, " ", sp.Machine.Agents)
	if fl.is(true, to) {
		return true
	}
	fl.drop()
	c, err := fl.flows.gate.dialMachine(fl.flows.gate.life, sp.watch, sp.Machine, intercept.Header{
		Network: intercept.UDP,
		Client:  netip.AddrPortFrom(fl.key.client.Addr().Unmap(), fl.key.client.Port()),
		Server:  addrPort(fl.socket.LocalAddr()),
	})
	fl.refusing = errors.Is(err, errRefused)
	var answered statusError
	switch {
	case err == nil:
		fl.take(c, true, to)
		return true
	case fl.refusing, errors.As(err, &answered):
		fl.avoid = time.Now().Add(avoidAfterAnswer)
	default:
		fl.avoid = time.Now().Add(avoidAfterSilence)
	}
	fl.flows.gate.log.Debug("the machine does not serve a flow", "port", fl.key.port, "error", err)
	return false
}

// is tells whether way is such a one, and of use.
func (fl *flow) is(machine bool, to string) bool {
	return fl.way != nil && !fl.way.dead.Load() && fl.way.machine == machine && fl.way.to == to
}

// take makes c the way, and reads its answers.
func (fl *flow) take(c net.Conn, machine bool, to string) {
	w := &way{conn: c, machine: machine, to: to, ended: fl.route.count.opened(machine)}
	fl.way = w
	fl.flows.gate.wg.Go(func() { fl.answers(w) })
}

// drop ends the way.
func (fl *flow) drop() {
	if fl.way == nil {
		return
	}
	fl.way.conn.Close()
	fl.way.ended()
	fl.way = nil
}

// answers sends the client what comes by w, until w is closed. Who waits holds no
// buffer.
func (fl *flow) answers(w *way) {
	defer w.dead.Store(true)
	raw, err := w.conn.(syscall.Conn).SyscallConn()
	if err != nil {
		return
	}
	comes := func(fd uintptr) bool { return polled(fd, unix.POLLIN) }
	for {
		if err := raw.Read(comes); err != nil {
			return
		}
		if err := fl.answer(w); err != nil {
			return
		}
	}
}

func (fl *flow) answer(w *way) (err error) {
	fl.flows.buffers <- struct{}{}
	b := chunks.Get().(*[chunk]byte)
	defer func() {
		chunks.Put(b)
		<-fl.flows.buffers
	}()
	var n int
	_ = w.conn.SetReadDeadline(time.Now().Add(datagramWait)) // fails when it is closed, and so does the read
	if w.machine {
		n, err = intercept.ReadDatagram(w.conn, b[:])
	} else {
		n, err = w.conn.Read(b[:])
	}
	if cerr := w.conn.SetReadDeadline(time.Time{}); cerr != nil {
		return cerr
	}
	switch {
	case err == nil:
	case !w.machine && (errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrDeadlineExceeded)):
		return nil // nobody is there yet; or what came had a wrong checksum
	default:
		return err
	}
	fl.last.Store(time.Now().UnixNano())
	fl.route.count.down.Add(int64(n))
	_, err = fl.socket.WriteToUDPAddrPort(b[:n], fl.key.client)
	if errors.Is(err, net.ErrClosed) {
		return io.EOF
	}
	return nil // an answer may be lost
}
