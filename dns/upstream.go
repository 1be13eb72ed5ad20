package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
)

const (
	// total bounds a transaction; a stub resolver asks again after 5 s.
	total = 5 * time.Second
	// maxRead bounds the buffer of one UDP attempt in octets, and with it the
	// memory of all: 2 groups × 1,024 questions × at most 3 attempts × 4 KiB =
	// 24 MiB if nothing answers. A longer datagram is asked for over TCP.
	maxRead = 4096
	// minAttempts over UDP, so that a lost packet is a delay and no error.
	minAttempts = 3
	// stick is how long the server that answered last is asked first, so that
	// one dead server does not delay every question.
	stick = 30 * time.Second
)

var (
	errSilent   = errors.New("no answer in time")
	errNoServer = errors.New("no server to ask")
)

// upstream is a group of servers that know the same names. Its methods may be
// called at the same time.
type upstream struct {
	servers  []netip.AddrPort
	local    netip.Addr    // to send from; the zero value leaves it to the kernel
	patience time.Duration // until the first answer
	stagger  time.Duration // between attempts

	preferred atomic.Pointer[preference]
	down      atomic.Bool // the last transaction had no answer
}

type preference struct {
	server int
	until  time.Time
}

// attempt is what came of asking one server.
type attempt struct {
	server int
	answer []byte
	err    error
}

// exchange passes a message on as it is and returns the first good answer, with
// the message's own id. A server that says SERVFAIL, NOTIMP or REFUSED, or does
// not answer, is followed by the next; if all are tried, the last such answer is
// returned. An answer that UDP cut off is asked for again over TCP.
func (u *upstream) exchange(ctx context.Context, message []byte, tcp bool) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, total)
	defer cancel()
	best, err := u.race(ctx, message, tcp)
	if err != nil {
		return nil, err
	}
	if !tcp && best.answer[2]&flagTC != 0 {
		if whole, err := u.ask(ctx, u.servers[best.server], message, true); err == nil {
			return whole, nil
		}
	}
	return best.answer, nil
}

// race asks the servers one after the other, each stagger later or as soon as
// the one before has refused, and takes the first good answer.
func (u *upstream) race(ctx context.Context, message []byte, tcp bool) (attempt, error) {
	order := u.order(tcp)
	results := make(chan attempt, len(order))
	var asking sync.WaitGroup
	defer asking.Wait()
	limit := u.patience
	if tcp {
		limit = total // ask bounds the dial by patience
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()

	failed := make(map[int]bool)
	last := attempt{err: errSilent}
	if len(u.servers) == 0 {
		last.err = errNoServer
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for len(failed) < len(u.servers) {
		select {
		case <-timer.C:
			for len(order) > 0 && failed[order[0]] {
				order = order[1:]
			}
			if len(order) == 0 {
				continue
			}
			server := order[0]
			order = order[1:]
			asking.Go(func() {
				answer, err := u.ask(ctx, u.servers[server], message, tcp)
				results <- attempt{server, answer, err}
			})
			timer.Reset(u.stagger)
		case r := <-results:
			if r.err == nil && !passOn(r.answer) {
				u.preferred.Store(&preference{r.server, time.Now().Add(stick)})
				return r, nil
			}
			if r.err == nil || last.answer == nil && !errors.Is(r.err, errSilent) {
				last = r
			}
			if !errors.Is(r.err, errSilent) || tcp {
				failed[r.server] = true
				timer.Reset(0)
			}
		case <-ctx.Done():
			return last, last.err
		}
	}
	return last, last.err
}

// order lists the servers' indices as they are to be asked.
func (u *upstream) order(tcp bool) []int {
	order := make([]int, 0, max(len(u.servers), minAttempts))
	if p := u.preferred.Load(); p != nil && time.Now().Before(p.until) {
		order = append(order, p.server)
	}
	for i := range u.servers {
		if !slices.Contains(order, i) {
			order = append(order, i)
		}
	}
	for i := 0; !tcp && len(order) > i && len(order) < minAttempts; i++ {
		order = append(order, order[i])
	}
	return order
}

// passOn tells whether an answer is a reason to ask the next server, as glibc's
// resolver does.
func passOn(answer []byte) bool {
	switch answer[3] & 0xf {
	case dns.RcodeServerFailure, dns.RcodeNotImplemented, dns.RcodeRefused:
		return true
	}
	return false
}

// ask sends the message to one server from a port of its own and under an id of
// its own, and waits for the answer until ctx ends.
func (u *upstream) ask(ctx context.Context, server netip.AddrPort, message []byte, tcp bool) ([]byte, error) {
	network := "udp"
	dialer := net.Dialer{}
	if tcp {
		network = "tcp"
		dialer.Timeout = u.patience
	}
	if u.local.IsValid() {
		dialer.LocalAddr = net.UDPAddrFromAddrPort(netip.AddrPortFrom(u.local, 0))
		if tcp {
			dialer.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(u.local, 0))
		}
	}
	conn, err := dialer.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, silent(ctx, fmt.Errorf("asking %s: %w", server, err))
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	var answer []byte
	asked := make([]byte, 2, 2+len(message)) // the length that TCP puts before a message
	binary.BigEndian.PutUint16(asked, uint16(len(message)))
	asked = append(asked, message...)
	binary.BigEndian.PutUint16(asked[2:], uint16(rand.Uint32()))
	if tcp {
		answer, err = askTCP(conn, asked)
	} else {
		answer, err = askUDP(conn, asked[2:])
	}
	if err != nil {
		return nil, silent(ctx, fmt.Errorf("asking %s: %w", server, err))
	}
	copy(answer[:2], message[:2])
	return answer, nil
}

func askUDP(conn net.Conn, asked []byte) ([]byte, error) {
	if _, err := conn.Write(asked); err != nil {
		return nil, err
	}
	b := make([]byte, maxRead+1)
	for {
		n, err := conn.Read(b)
		if err != nil {
			return nil, err
		}
		if !answers(b[:n], asked) {
			continue // late, or forged: the answer may still come
		}
		if n > maxRead {
			return cutOff(b, asked), nil
		}
		return b[:n], nil
	}
}

// cutOff keeps header and question of an answer that the kernel cut off
// somewhere in its records.
func cutOff(answer, asked []byte) []byte {
	end := headerLen
	if binary.BigEndian.Uint16(answer[4:]) > 0 {
		end = questionEnd(asked)
	}
	answer[2] |= flagTC
	clear(answer[6:headerLen])
	return answer[:end]
}

func askTCP(conn net.Conn, asked []byte) ([]byte, error) {
	if _, err := conn.Write(asked); err != nil {
		return nil, err
	}
	answer, err := readTCP(conn)
	if err != nil {
		return nil, err
	}
	if !answers(answer, asked[2:]) {
		return nil, errors.New("answer to another question")
	}
	return answer, nil
}

// readTCP reads one message with its length before it (RFC 1035, 4.2.2).
func readTCP(r io.Reader) ([]byte, error) {
	var length [2]byte
	if _, err := io.ReadFull(r, length[:]); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(r, b)
	return b, err
}

// silent tells an attempt that time ended from one that failed.
func silent(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errSilent
	}
	return err
}
