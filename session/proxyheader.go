package session

import (
	"encoding/binary"
	"net/netip"
)

// proxySignature begins a header of the PROXY protocol, version 2: section 2.2 of
// https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt
const proxySignature = "\r\n\r\n\x00\r\nQUIT\n"

// What follows the signature there.
const (
	proxyLocal  = 0x20 // version 2, command LOCAL: nothing is known
	proxyRemote = 0x21 // version 2, command PROXY
	proxyTCP4   = 0x11 // AF_INET, STREAM
	proxyTCP6   = 0x21 // AF_INET6, STREAM
)

// proxyHeader tells a program who its client is, and which address he connected
// to. When one of the two is not known, neither is told.
func proxyHeader(client, server netip.AddrPort) []byte {
	b := []byte(proxySignature)
	if !client.IsValid() || !server.IsValid() {
		return append(b, proxyLocal, 0, 0, 0)
	}
	from, to := client.Addr().Unmap(), server.Addr().Unmap()
	if from.Is4() && to.Is4() {
		a, z := from.As4(), to.As4()
		b = append(b, proxyRemote, proxyTCP4, 0, 12)
		b = append(append(b, a[:]...), z[:]...)
	} else { // an IPv4 address among them goes as ::ffff:a.b.c.d
		a, z := from.As16(), to.As16()
		b = append(b, proxyRemote, proxyTCP6, 0, 36)
		b = append(append(b, a[:]...), z[:]...)
	}
	b = binary.BigEndian.AppendUint16(b, client.Port())
	return binary.BigEndian.AppendUint16(b, server.Port())
}
