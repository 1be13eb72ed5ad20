package netstack

import "gvisor.dev/gvisor/pkg/tcpip/stack"

// ring is a queue of packets that counts its bytes. Its slots grow with the
// number of packets and are kept: at most the byte limit divided by the
// smallest packet, each a pointer.
type ring struct {
	slots []*stack.PacketBuffer // length zero or a power of two
	head  int
	len   int
	bytes int
}

func (r *ring) push(p *stack.PacketBuffer) {
	if r.len == len(r.slots) {
		grown := make([]*stack.PacketBuffer, max(64, 2*len(r.slots)))
		for i := range r.len {
			grown[i] = r.slots[(r.head+i)&(len(r.slots)-1)]
		}
		r.slots, r.head = grown, 0
	}
	r.slots[(r.head+r.len)&(len(r.slots)-1)] = p
	r.len++
	r.bytes += p.Size()
}

// pop must not be called on an empty ring.
func (r *ring) pop() *stack.PacketBuffer {
	p := r.slots[r.head]
	r.slots[r.head] = nil
	r.head = (r.head + 1) & (len(r.slots) - 1)
	r.len--
	r.bytes -= p.Size()
	return p
}
