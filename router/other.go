//go:build !linux

package router

import (
	"context"
	"errors"
	"net/netip"
)

var errUnsupported = errors.New("not supported on this system yet")

func (r *Router) Set(*Config) error { return errUnsupported }
func (r *Router) Close() error      { return nil }

func Watch(ctx context.Context, changed func(Change)) error { return errUnsupported }

func Congestion() string { return "" }

func Local() (*Facts, error)         { return nil, errUnsupported }
func (e Env) Local() (*Facts, error) { return nil, errUnsupported }

func AskNextHops([]netip.Addr) error { return nil }

type DNS struct{}

func NewDNS(mode string, env Env) (*DNS, error)                     { return nil, errUnsupported }
func (d *DNS) Mode() string                                         { return "" }
func (d *DNS) Why() string                                          { return "" }
func (d *DNS) Listen(slot int, tunnel []netip.Addr) netip.AddrPort  { return netip.AddrPort{} }
func (d *DNS) Spares() []netip.AddrPort                             { return nil }
func (d *DNS) Set(ctx context.Context, sessions []SessionDNS) error { return errUnsupported }
func (d *DNS) Close(ctx context.Context) error                      { return nil }

// MachineDNS returns the machine's own nameservers.
func (d *DNS) MachineDNS() []netip.AddrPort { return nil }

// Changes delivers when MachineDNS changed.
func (d *DNS) Changes() <-chan struct{} { return nil }

func Cleanup(ctx context.Context) (removed []string, err error)         { return nil, errUnsupported }
func (e Env) Cleanup(ctx context.Context) (removed []string, err error) { return nil, errUnsupported }
func Leftovers() []string                                               { return nil }
func (e Env) Leftovers() []string                                       { return nil }
func RestoreDNS(env Env) (restored bool, err error)                     { return false, errUnsupported }
