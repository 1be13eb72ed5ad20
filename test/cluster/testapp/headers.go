package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"strings"
)

// headers is a flag that may stand several times: NAME:VALUE.
type headers [][2]string

func (h *headers) String() string { return fmt.Sprint(*h) }

func (h *headers) Set(text string) error {
	name, value, ok := strings.Cut(text, ":")
	if !ok {
		return fmt.Errorf("%q is not NAME:VALUE", text)
	}
	*h = append(*h, [2]string{name, strings.TrimSpace(value)})
	return nil
}

// header is h as net/http wants it; names in the case in which they were given.
func (h headers) header() http.Header {
	out := http.Header{}
	for _, kv := range h {
		out[kv[0]] = append(out[kv[0]], kv[1])
	}
	return out
}

// put sets them on a request. Host is not among net/http's headers.
func (h headers) put(r *http.Request) {
	for _, kv := range h {
		if strings.EqualFold(kv[0], "Host") {
			r.Host = kv[1]
		} else {
			r.Header[kv[0]] = append(r.Header[kv[0]], kv[1])
		}
	}
}

// newTransport dials as it is told. With http2 it knows that the server speaks it;
// else it is HTTP/1.1. Certificates of tests are nobody's.
func newTransport(dial func(ctx context.Context, network, addr string) (net.Conn, error), http2 bool) *http.Transport {
	var p http.Protocols
	p.SetHTTP1(!http2)
	p.SetHTTP2(http2)
	p.SetUnencryptedHTTP2(http2)
	return &http.Transport{
		DialContext: dial, Protocols: &p, DisableCompression: true,
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}
}
