package netstack

import (
	"testing"

	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// TestReadAllocatesNothing: what the stack wrote comes out without an allocation
// of ours; those of the stack are its own.
func TestReadAllocatesNothing(t *testing.T) {
	e := New(Config{GSO: true})
	defer e.Close()
	bufs, sizes := buffers(batchSize)
	var l stack.PacketBufferList
	for _, size := range []int{0, 1000, 60000} {
		l.PushBack(packet(protoTCP, size))
	}
	if n := testing.AllocsPerRun(200, func() {
		if _, err := e.Link().WritePackets(l); err != nil {
			t.Fatal(err)
		}
		for got := 0; got < l.Len(); {
			n, err := e.Read(bufs, sizes, offset)
			if err != nil {
				t.Fatal(err)
			}
			got += n
		}
	}); n > 0 {
		t.Errorf("%v allocations per batch", n)
	}
}
