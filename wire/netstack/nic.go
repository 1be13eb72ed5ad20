package netstack

import (
	"fmt"
	"net/netip"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// AddNIC gives a stack of NewStack another link, which takes packets for any
// address as the first one does, and to which the stack sends what is for ranges.
// RemoveNIC of the stack takes it away again.
func AddNIC(s *stack.Stack, id tcpip.NICID, ep *Endpoint, ranges []netip.Prefix) error {
	if err := s.CreateNIC(id, ep.Link()); err != nil {
		return fmt.Errorf("creating interface %d of the stack: %s", id, err)
	}
	if err := s.SetPromiscuousMode(id, true); err != nil {
		s.RemoveNIC(id)
		return fmt.Errorf("setting promiscuous mode: %s", err)
	}
	if err := s.SetSpoofing(id, true); err != nil {
		s.RemoveNIC(id)
		return fmt.Errorf("setting spoofing: %s", err)
	}
	var routes []tcpip.Route // the first that fits counts
	for _, p := range ranges {
		routes = append(routes, tcpip.Route{NIC: id, Destination: tcpip.AddressWithPrefix{
			Address: tcpip.AddrFromSlice(p.Addr().AsSlice()), PrefixLen: p.Bits(),
		}.Subnet()})
	}
	s.SetRouteTable(append(routes, s.GetRouteTable()...))
	return nil
}
