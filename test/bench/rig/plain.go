package rig

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"time"
)

// Plain is culvert's data path on a plain TCP stream: a laptop and a pod in
// namespaces of their own with a cable between them, a session's data path in the
// one, the agent and the test program in the other.
type Plain struct {
	Laptop, Pod    *Namespace
	Session, Agent *Process
	Targets        []netip.Addr // of the test program; the way there is the tunnel
	Direct         netip.Addr   // the same program, past the tunnel

	app *Process
}

// PlainConfig is what a Plain is made of.
type PlainConfig struct {
	Testapp  string // the test program's file
	Profiles string // directory for the CPU profiles of session and agent; empty: none
	UDP      bool   // packets go by UDP, not by the stream
}

const cableDevice = "cable0"

var (
	laptopAddr = netip.MustParsePrefix("10.76.0.1/24")
	podAddr    = netip.MustParsePrefix("10.76.0.2/24")
	targets    = netip.MustParsePrefix("10.77.0.0/24")
)

// plainTargets is how many addresses the test program has: new connections to
// one of them would soon run out of ports.
const plainTargets = 8

// NewPlain builds a Plain and starts its processes.
func NewPlain(c PlainConfig) (p *Plain, err error) {
	p = &Plain{Direct: podAddr.Addr()}
	defer func() {
		if err != nil {
			p.Close()
		}
	}()
	if p.Laptop, err = NewNamespace(); err != nil {
		return p, err
	}
	if p.Pod, err = NewNamespace(); err != nil {
		return p, err
	}
	if err := Cable(cableDevice, p.Laptop, p.Pod, laptopAddr, podAddr); err != nil {
		return p, err
	}
	a := targets.Addr()
	for range plainTargets {
		a = a.Next()
		p.Targets = append(p.Targets, a)
		if err := p.Pod.Address(cableDevice, netip.PrefixFrom(a, 32)); err != nil {
			return p, err
		}
	}
	for _, n := range []*Namespace{p.Laptop, p.Pod} {
		if err := n.Do(manyPorts); err != nil {
			return p, err
		}
	}
	if p.app, err = p.Pod.Serve(c.Testapp, "serve"); err != nil {
		return p, err
	}
	if p.Agent, err = p.Pod.start(role{Agent: &agentRole{Control: podAddr.Addr().String() + ":7531"}}, c.Profiles); err != nil {
		return p, err
	}
	session := role{Session: &sessionRole{Agent: podAddr.Addr().String() + ":7531", Routes: []netip.Prefix{targets}, UDP: c.UDP}}
	if p.Session, err = p.Laptop.start(session, c.Profiles); err != nil {
		return p, err
	}
	return p, p.Laptop.Await(netip.AddrPortFrom(p.Targets[0], 9000))
}

// manyPorts lets connections use nearly all ports, and agents send echo requests.
func manyPorts() error {
	for file, value := range map[string]string{"ip_local_port_range": "1024 65000", "ping_group_range": "0 2147483647"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/"+file, []byte(value), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// awaitTime is longer than WireGuard takes to repeat a handshake twice.
const awaitTime = 12 * time.Second

// Await waits until somebody accepts TCP connections at addr.
func (n *Namespace) Await(addr netip.AddrPort) error {
	var err error
	for end := time.Now().Add(awaitTime); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		err = n.Do(func() error {
			c, err := net.DialTimeout("tcp", addr.String(), time.Second)
			if err == nil {
				c.Close()
			}
			return err
		})
		if err == nil {
			return nil
		}
	}
	return fmt.Errorf("waiting for %s: %w", addr, err)
}

// Command prepares a program on the laptop.
func (p *Plain) Command(name string, args ...string) *exec.Cmd {
	return p.Laptop.Command(name, args...)
}

// Close ends everything.
func (p *Plain) Close() {
	p.Session.Close()
	p.Agent.Close()
	p.app.Close()
	for _, n := range []*Namespace{p.Laptop, p.Pod} {
		if n != nil {
			n.Close()
		}
	}
}
