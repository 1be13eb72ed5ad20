package carrier

import (
	"net"
	"time"

	"golang.zx2c4.com/wireguard/conn"

	"github.com/culvert-dev/culvert/wire/queue"
)

// Send implements conn.Bind. It blocks as long as the carrier pushes back, but
// not longer than the stream or the Bind lives. Packets without a stream are
// dropped after a while (see BindConfig.Hold), which is no error: IP promises no delivery.
func (b *Bind) Send(msgs [][]byte, ep conn.Endpoint) error {
	if e, ok := ep.(*endpoint); !ok || e != &b.ep {
		return conn.ErrWrongEndpointType
	}
	b.out.busy.Add(1)
	all := msgs
	defer func() {
		b.out.busy.Add(-1)
		b.out.leave(all)
	}()
	var risen <-chan struct{}
	if b.udp != nil {
		risen = *b.udp.risen.Load() // before the way is looked at
		rest, carried := b.udp.send(msgs)
		if len(rest) == 0 || carried && b.Stream() == nil {
			return nil // who waited for a stream would keep UDP waiting
		}
		msgs = rest
	}
	return b.sendByStreams(msgs, risen)
}

// sendByStreams sends each message by its lane, or by UDP where there is no stream
// and risen is closed meanwhile.
func (b *Bind) sendByStreams(msgs [][]byte, risen <-chan struct{}) error {
	var lanes [queue.Lanes][conn.IdealBatchSize][]byte
	var n [queue.Lanes]int
	for _, m := range msgs {
		l := b.out.laneOf(m)
		if n[l] == len(lanes[l]) {
			if err := b.sendOn(l, lanes[l][:n[l]], risen); err != nil {
				return err
			}
			n[l] = 0
		}
		lanes[l][n[l]] = m
		n[l]++
	}
	for l := range queue.Lanes {
		if n[l] > 0 {
			if err := b.sendOn(l, lanes[l][:n[l]], risen); err != nil {
				return err
			}
		}
	}
	return nil
}

func (b *Bind) sendOn(l queue.Lane, msgs [][]byte, risen <-chan struct{}) error {
	s, changed, closed := b.live(l)
	if closed == nil {
		return net.ErrClosed
	}
	if s == nil {
		limit := time.NewTimer(b.patience())
		defer limit.Stop()
		for waits := true; s == nil && waits; {
			select {
			case <-changed:
				s, changed, _ = b.live(l)
			case <-risen:
				if rest, carried := b.udp.send(msgs); !carried {
					b.dropped.Add(uint64(len(rest)))
				}
				return nil
			case <-closed:
				return net.ErrClosed
			case <-limit.C:
				waits = false
			}
		}
	}
	written := 0
	for s != nil && written < len(msgs) {
		n, err := s.write(msgs[written:])
		written += n
		if err != errMoved {
			break
		}
		s, _, _ = b.live(l) // Move put another one in its place before that
	}
	b.dropped.Add(uint64(len(msgs) - written))
	total := 0
	for _, m := range msgs[:written] {
		total += len(m)
	}
	b.sent.Add(uint64(total))
	b.sentPkts.Add(uint64(written))
	return nil
}

// patience is how long a batch waits for a stream from now on.
func (b *Bind) patience() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	wait := sendWait
	for _, l := range b.lanes {
		if l.cur != nil && l.cur.Err() != nil {
			wait = max(wait, b.hold-time.Since(l.cur.ended))
		}
	}
	return wait
}
