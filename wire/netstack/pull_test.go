package netstack

import (
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

// TestBulkSettles: a flow that turns into bulk waits for what it sent before, and
// goes on by itself.
func TestBulkSettles(t *testing.T) {
	e := New(Config{})
	defer e.Close()
	adm := &lanes{settle: 60 * time.Millisecond}
	bufs, sizes := buffers(16)
	write(e, packet(protoTCP, 14_000))
	if n, err := e.Pull(bufs, sizes, offset, adm); n != 1 || err != nil || adm.n[queue.Sparse] != 1 {
		t.Fatal(n, err, adm.n)
	}
	begun := time.Now()
	write(e, packet(protoTCP, 14_000))
	write(e, packet(protoTCP, 14_000))
	got := 0
	for got < 2 {
		n, err := e.Pull(bufs, sizes, offset, adm)
		if err != nil {
			t.Fatal(err)
		}
		got += n
	}
	if took := time.Since(begun); took < 30*time.Millisecond || took > time.Second || adm.n[queue.Bulk] != 2 {
		t.Fatalf("after %v, by lane: %v", took, adm.n)
	}
}

// TestManySmallPackets: their number is bounded, too.
func TestManySmallPackets(t *testing.T) {
	e := New(Config{})
	defer e.Close()
	for range queuePackets + 100 {
		write(e, packet(protoTCP, 1))
	}
	if e.Dropped() != 100 {
		t.Errorf("%d packets dropped of %d above the bound", e.Dropped(), 100)
	}
}
