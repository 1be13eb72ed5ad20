package gate

import (
	"net/http"
	"net/netip"
	"strings"
)

// forwarding is what requests are told of their client.
type forwarding struct {
	address string // for X-Forwarded-For
	element string // of Forwarded (RFC 7239)
	proto   string // for X-Forwarded-Proto
}

func forwardingOf(client netip.AddrPort, secure bool) forwarding {
	f := forwarding{address: client.Addr().String(), proto: "http"}
	if secure {
		f.proto = "https"
	}
	f.element = "for=" + f.address + ";proto=" + f.proto
	if client.Addr().Is6() {
		f.element = `for="[` + f.address + `]";proto=` + f.proto
	}
	return f
}

// add appends the client to X-Forwarded-For, and to Forwarded where there is one; and
// X-Forwarded-Proto where there is none.
func (f forwarding) add(h http.Header) {
	h.Set("X-Forwarded-For", joined(h["X-Forwarded-For"], f.address))
	if h.Get("X-Forwarded-Proto") == "" {
		h.Set("X-Forwarded-Proto", f.proto)
	}
	if before, ok := h["Forwarded"]; ok {
		h.Set("Forwarded", joined(before, f.element))
	}
}

func joined(before []string, more string) string {
	if before := strings.Join(before, ", "); before != "" {
		return before + ", " + more
	}
	return more
}
