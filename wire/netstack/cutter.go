package netstack

import (
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/culvert-dev/culvert/tun"
)

// maxHeaders is the most that the stack's IP and TCP headers take.
const maxHeaders = 40 + 60

// cutter makes ordinary packets of the stack's super-packets, for a path that
// takes no longer ones. It belongs to the one goroutine in Endpoint.Read.
type cutter struct {
	packet []byte // being cut; nil before the first
	split  tun.Splitter
	active bool
}

// begin cuts p, which it copies, into packets of at most limit bytes.
func (c *cutter) begin(p *stack.PacketBuffer, limit int) {
	size := p.Size()
	if size > 65535 {
		return // nobody would take it
	}
	if c.packet == nil {
		c.packet = make([]byte, 65535)
	}
	copyPacket(c.packet, p)
	var err error
	if c.split, err = tun.Unfinished(c.packet[:size]); err == nil {
		c.split.Limit(limit)
		c.active = true
	}
}

// next writes as many packets as there are, or as there is room for.
func (c *cutter) next(bufs [][]byte, sizes []int, offset int) int {
	for n := range bufs {
		if !c.active {
			return n
		}
		size := c.split.Next(bufs[n][offset:])
		if size == 0 {
			c.active = false
			return n
		}
		sizes[n] = size
	}
	return len(bufs)
}

// joined is one packet for the stack, of several if they fit together.
type joined = tun.Joined

func join(dst []joined, bufs [][]byte, offset, mtu int) []joined {
	return tun.Join(dst, bufs, offset, mtu)
}
