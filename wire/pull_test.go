package wire

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/wire/queue"
)

// lanes admits all and counts by lane.
type lanes struct {
	settle time.Duration
	n      [queue.Lanes]int
}

func (l *lanes) Admit(lane queue.Lane, size int) bool { l.n[lane]++; return true }
func (l *lanes) Settle() time.Duration                { return l.settle }

// TestBulkSettles: the last fragments of a long datagram, which make its flow
// bulk, wait for the first ones and go on though nothing else is sent.
func TestBulkSettles(t *testing.T) {
	near := newNamespace(t)
	l := NewLocal(LocalConfig{TUN: near.device(t, nearAddrs, farAddrs), Tunnel: nearAddrs, MTU: testMTU, Split: split(true)})
	defer l.Close()
	near.do(t, func() error {
		c, err := net.Dial("udp", netip.AddrPortFrom(farAddrs[0], 9).String())
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = c.Write(make([]byte, 30_000))
		return err
	})
	bufs, sizes := make([][]byte, 128), make([]int, 128)
	for i := range bufs {
		bufs[i] = make([]byte, 65535)
	}
	adm := &lanes{settle: 60 * time.Millisecond}
	got := make(chan int)
	go func() {
		total := 0
		for total < 30_000 {
			n, err := l.Pull(bufs, sizes, 16, adm)
			if err != nil {
				break
			}
			for _, size := range sizes[:n] {
				total += max(size-20, 0)
			}
		}
		got <- total
	}()
	select {
	case n := <-got:
		if n != 30_008 || adm.n[queue.Sparse] == 0 || adm.n[queue.Bulk] == 0 {
			t.Errorf("%d bytes, by lane %v", n, adm.n)
		}
	case <-time.After(5 * time.Second):
		t.Fatalf("some fragments never left; by lane %v", adm.n)
	}
}
