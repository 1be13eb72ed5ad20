package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/miekg/dns"
)

const (
	// maxAsking bounds the questions under way to the cluster and, separately,
	// to the machine's resolvers and siblings. Each holds a socket, a goroutine
	// and maxRead octets per attempt; beyond it the answer is SERVFAIL, at once.
	maxAsking = 1024
	// maxConns bounds TCP connections from programs on the machine, each of
	// which may hold a message of 64 KiB: 8 MiB. One more is closed at once.
	maxConns = 128
	// maxPipelined bounds the questions under way on one connection; the
	// connection is not read meanwhile (RFC 7766, 6.2.1.1).
	maxPipelined = 32
	// idle is how long a connection may stay silent (RFC 7766, 6.2.3).
	idle = 10 * time.Second
	// slow is how long an asker may take to read an answer over TCP.
	slow = 5 * time.Second
)

// serveUDP answers datagrams until ctx ends.
func (f *Forwarder) serveUDP(ctx context.Context, conn net.PacketConn) error {
	var asking sync.WaitGroup
	defer asking.Wait()
	if c, ok := conn.(*net.UDPConn); ok {
		// Room for a burst of about 1,000 questions, as far as rmem_max allows; a
		// dropped question costs its asker 5 s.
		_ = c.SetReadBuffer(1 << 20)
	}
	b := make([]byte, dns.MaxMsgSize)
	for broken := 0; ; {
		n, from, err := conn.ReadFrom(b)
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			// Linux reports some ICMP errors here; a socket that gives nothing
			// else is broken.
			if broken++; errors.Is(err, net.ErrClosed) || broken > 100 {
				return fmt.Errorf("reading DNS questions on %s: %w", conn.LocalAddr(), err)
			}
			time.Sleep(time.Millisecond)
			continue
		}
		broken = 0
		q, err := parse(append([]byte(nil), b[:n]...), false)
		f.answer(ctx, &asking, q, err, from, func(answer []byte) {
			if answer != nil {
				_, _ = conn.WriteTo(answer, from) // an asker that is gone does not matter
			}
		})
	}
}

// serveTCP accepts connections until ctx ends.
func (f *Forwarder) serveTCP(ctx context.Context, listener net.Listener) error {
	var serving sync.WaitGroup
	defer serving.Wait()
	room := make(chan struct{}, maxConns)
	for broken := 0; ; {
		conn, err := listener.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			// Out of descriptors is the usual reason, and passes.
			if broken++; errors.Is(err, net.ErrClosed) || broken > 100 {
				return fmt.Errorf("accepting DNS connections on %s: %w", listener.Addr(), err)
			}
			time.Sleep(10 * time.Millisecond)
			continue
		}
		broken = 0
		select {
		case room <- struct{}{}:
			serving.Go(func() {
				f.serveConn(ctx, conn)
				<-room
			})
		default:
			conn.Close()
		}
	}
}

// serveConn answers the questions of one connection, in any order.
func (f *Forwarder) serveConn(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	var asking sync.WaitGroup
	defer asking.Wait() // answers to a peer that has half-closed still go out
	var mu sync.Mutex   // one answer at a time
	room := make(chan struct{}, maxPipelined)
	for {
		_ = conn.SetReadDeadline(time.Now().Add(idle))
		raw, err := readTCP(conn)
		if err != nil {
			return
		}
		q, err := parse(raw, true)
		if errors.Is(err, errNotQuery) {
			return
		}
		room <- struct{}{}
		f.answer(ctx, &asking, q, err, conn.RemoteAddr(), func(answer []byte) {
			defer func() { <-room }()
			if answer == nil {
				return
			}
			b := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(answer)), uint16(len(answer)))
			mu.Lock()
			defer mu.Unlock()
			_ = conn.SetWriteDeadline(time.Now().Add(slow))
			if _, err := conn.Write(append(b, answer...)); err != nil {
				conn.Close()
			}
		})
	}
}

// answer finds an answer and gives it to write, exactly once: before it returns
// if nobody has to be asked, else from a goroutine of asking. The answer is nil
// when ctx ended.
func (f *Forwarder) answer(ctx context.Context, asking *sync.WaitGroup, q query, bad error, from net.Addr, write func([]byte)) {
	switch {
	case errors.Is(bad, errNotQuery):
		return
	case bad != nil && q.opcode == dns.OpcodeQuery:
		write(q.reply(dns.RcodeFormatError, ""))
		return
	case q.opcode != dns.OpcodeQuery: // NOTIFY and UPDATE go to a zone's own servers
		write(q.reply(dns.RcodeNotImplemented, ""))
		return
	case dns.TypeIXFR <= q.question.Qtype && q.question.Qtype <= dns.TypeMAILA:
		write(q.reply(dns.RcodeRefused, "")) // zones are not transferred
		return
	case f.loops.returned(q.name):
		write(q.reply(dns.RcodeNameError, ""))
		return
	}
	s := f.settings.Load()
	r := s.route(q.name, s.fromSibling(addrPort(from)))
	room := f.askingMachine
	switch r.to {
	case nowhere:
		write(q.reply(dns.RcodeNameError, ""))
		return
	case noData:
		write(q.reply(dns.RcodeSuccess, ""))
		return
	case refused:
		write(q.reply(dns.RcodeRefused, ""))
		return
	case toCluster:
		// ANY is an amplifier and of no use (RFC 8482); the cluster is in class IN.
		if q.question.Qtype == dns.TypeANY || q.question.Qclass != dns.ClassINET {
			write(q.reply(dns.RcodeRefused, ""))
			return
		}
		room = f.askingCluster
	}
	select {
	case room <- struct{}{}:
		asking.Go(func() {
			answer := f.ask(ctx, s, q, r)
			<-room
			if ctx.Err() != nil {
				answer = nil
			}
			write(answer)
		})
	default:
		write(q.reply(dns.RcodeServerFailure, "too many questions under way"))
	}
}

// ask has a question answered by the place that route found.
func (f *Forwarder) ask(ctx context.Context, s *settings, q query, r route) []byte {
	switch r.to {
	case toCluster:
		answer, err := f.askCluster(ctx, s, q, r.name)
		f.note(ctx, s.cluster, err, "cluster")
		if err != nil {
			// Never the machine's NXDOMAIN: the name may well exist.
			return q.reply(dns.RcodeServerFailure, "the cluster does not answer")
		}
		if r.fallback && s.machine != nil && int(answer[3]&0xf) == dns.RcodeNameError {
			return f.ask(ctx, s, q, route{to: toMachine})
		}
		return q.fit(answer)
	case toSibling:
		answer, err := r.sibling.exchange(ctx, q.raw, q.tcp)
		if err != nil {
			return q.reply(dns.RcodeServerFailure, "the other session does not answer")
		}
		return q.fit(answer)
	default:
		answer, err := s.machine.exchange(ctx, q.raw, q.tcp)
		f.note(ctx, s.machine, err, "machine")
		if err != nil {
			return q.reply(dns.RcodeServerFailure, "the machine's DNS servers do not answer")
		}
		return q.fit(answer)
	}
}

// askCluster asks the agent, for full in place of the question's name unless
// that is empty.
func (f *Forwarder) askCluster(ctx context.Context, s *settings, q query, full string) ([]byte, error) {
	if full == "" {
		return s.cluster.exchange(ctx, q.raw, q.tcp)
	}
	renamed, err := q.rename(full)
	if err != nil {
		return nil, err
	}
	answer, err := s.cluster.exchange(ctx, renamed, q.tcp)
	if err != nil {
		return nil, err
	}
	return q.restore(answer, full)
}

// note logs when a group of servers stops answering and when it is back.
func (f *Forwarder) note(ctx context.Context, u *upstream, err error, of string) {
	if ctx.Err() != nil || u.down.Swap(err != nil) == (err != nil) {
		return
	}
	if err != nil {
		f.log.Warn("DNS servers do not answer", "of", of, "servers", u.servers, "error", err)
	} else {
		f.log.Info("DNS servers answer again", "of", of)
	}
}
