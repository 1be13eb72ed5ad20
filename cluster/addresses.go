package cluster

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"

	utilnet "k8s.io/apimachinery/pkg/util/net"
)

// Addresses are all addresses, of both families, at which the API server and a
// proxy in front of it may be dialled: what must never be routed into the
// tunnel. Names are resolved anew at each call. When a proxy resolves the API
// server's name, this machine need not be able to.
func (c *Cluster) Addresses(ctx context.Context) ([]netip.Addr, error) {
	proxy, err := c.proxyFor(c.server)
	if err != nil {
		return nil, translate("reading the proxy settings", err)
	}
	addrs, serverErr := lookup(ctx, c.server.Hostname())
	if proxy == nil {
		if serverErr != nil {
			return nil, translate("resolving the API server "+c.server.Hostname(), serverErr)
		}
		return addrs, nil
	}
	front, err := lookup(ctx, proxy.Hostname())
	if err != nil {
		return nil, translate("resolving the proxy "+proxy.Hostname()+" in front of the API server", err)
	}
	for _, a := range front {
		if !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	return addrs, nil
}

// lookup resolves a host name or reads an address, and unmaps what comes back.
func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a.Unmap().WithZone("")}, nil
	}
	// A resolver of its own: one that is shared answers all who ask for a name
	// with the one query under way, and that one may have been lost in a network
	// that was dead and is not any more.
	found, err := new(net.Resolver).LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, err
	}
	var addrs []netip.Addr
	for _, a := range found {
		if a = a.Unmap().WithZone(""); !slices.Contains(addrs, a) {
			addrs = append(addrs, a)
		}
	}
	if len(addrs) == 0 {
		return nil, fmt.Errorf("%s: %w", host, errNoAddress)
	}
	return addrs, nil
}

var errNoAddress = errors.New("no address")

// proxy is the kubeconfig's proxy-url, else HTTPS_PROXY and NO_PROXY with CIDRs,
// as client-go has it.
func (c *Cluster) proxy() func(*http.Request) (*url.URL, error) {
	if p := c.access.Load().config.Proxy; p != nil {
		return p
	}
	return utilnet.NewProxierWithNoProxyCIDR(http.ProxyFromEnvironment)
}
