//go:build e2e

package e2e

import (
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// balancer passes TCP connections on to the API server and cuts them, as load
// balancers do: those that were idle, and those that are old. It runs on the
// laptop's neighbour.
type balancer struct {
	idle, life time.Duration // 0: never
	servers    []string      // the API server if empty; in turn, those that answer
	opened     atomic.Int64
	cuts       atomic.Int64
}

// behind starts b and returns a kubeconfig that leads through it.
func (b *balancer) behind(t *testing.T) (config string) {
	t.Helper()
	const addr, server = "192.168.50.9:6443", "172.30.0.10:6443"
	if len(b.servers) == 0 {
		b.servers = []string{server}
	}
	var l net.Listener
	if err := netlab.In("lan", func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go b.serve(c.(*net.TCPConn))
		}
	}()
	return editKubeconfig(t, "developer", `"server": "https://`+server+`"`, `"server": "https://`+addr+`", "tls-server-name": "api.cluster.test"`)
}

func (b *balancer) serve(down *net.TCPConn) {
	turn := int(b.opened.Add(1))
	for i := range b.servers {
		var up net.Conn
		if err := netlab.In("cp", func() (err error) {
			up, err = net.DialTimeout("tcp", b.servers[(turn+i)%len(b.servers)], 5*time.Second)
			return err
		}); err == nil {
			b.pass(down, up.(*net.TCPConn))
			return
		}
	}
	down.Close()
}

func (b *balancer) pass(down, up *net.TCPConn) {
	cut := func() {
		b.cuts.Add(1)
		for _, c := range []*net.TCPConn{down, up} {
			c.SetLinger(0) // a reset, at once
			c.Close()
		}
	}
	var timers []*time.Timer
	var idle *time.Timer
	if b.life > 0 {
		timers = append(timers, time.AfterFunc(b.life, cut))
	}
	if b.idle > 0 {
		idle = time.AfterFunc(b.idle, cut)
		timers = append(timers, idle)
	}
	var both sync.WaitGroup
	for _, way := range [][2]*net.TCPConn{{down, up}, {up, down}} {
		both.Go(func() {
			buf := make([]byte, 64<<10)
			for {
				n, err := way[0].Read(buf)
				if n > 0 && idle != nil {
					idle.Reset(b.idle)
				}
				if _, werr := way[1].Write(buf[:n]); err != nil || werr != nil {
					if err == io.EOF {
						way[1].CloseWrite()
						return
					}
					way[0].Close()
					way[1].Close()
					return
				}
			}
		})
	}
	both.Wait()
	for _, timer := range timers {
		timer.Stop()
	}
	down.Close()
	up.Close()
}

// TestIdleBalancer: what cuts connections after 60 s without a byte (here 8 s)
// never finds one of ours.
func TestIdleBalancer(t *testing.T) {
	for _, pinned := range []string{"port-forward", "pods-proxy"} {
		t.Run(pinned, func(t *testing.T) {
			b := &balancer{idle: 8 * time.Second}
			connectWith(t, b.behind(t), "--carrier", pinned)
			alive := longLived(t)
			time.Sleep(time.Second)
			before, cuts, opened := waitState(t, netlab.Alice, api.Connected, 5*time.Second), b.cuts.Load(), b.opened.Load()
			time.Sleep(20 * time.Second)
			alive(time.Second)
			if now := status(t, netlab.Alice)[0]; now.Carrier.Redials != before.Carrier.Redials || b.cuts.Load() != cuts || b.opened.Load() != opened {
				t.Errorf("%d redials, %d connections cut, %d opened", now.Carrier.Redials-before.Carrier.Redials, b.cuts.Load()-cuts, b.opened.Load()-opened)
			}
		})
	}
}

// TestShortLives: behind something that cuts every connection after 10 s, what
// goes through the tunnel goes on.
func TestShortLives(t *testing.T) {
	b := &balancer{life: 10 * time.Second}
	connectWith(t, b.behind(t), "--debug")
	c := dial(t, "tcp", net.JoinHostPort(podIPs(t)[0], "9000"))
	var gaps []time.Duration
	for end := time.Now().Add(35 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		begun := time.Now()
		if err := tryEcho(c, []byte("still here"), 10*time.Second); err != nil {
			t.Fatalf("the open connection: %v\nlogs: %v", err, lab.Culvert(netlab.Alice, "logs"))
		}
		if took := time.Since(begun); took > 50*time.Millisecond {
			gaps = append(gaps, took.Round(time.Millisecond))
		}
	}
	now := waitState(t, netlab.Alice, api.Connected, 5*time.Second)
	t.Logf("%d connections cut, %d redials; answers that took longer than 50 ms: %v", b.cuts.Load(), now.Carrier.Redials, gaps)
	if now.Carrier.Redials < 2 {
		t.Errorf("%d redials in 35 s: was anything cut?", now.Carrier.Redials)
	}
	if len(gaps) > 0 && slices.Max(gaps) > time.Second {
		t.Errorf("a gap of %v\nlogs: %v", slices.Max(gaps), strings.TrimSpace(fmt.Sprint(lab.Culvert(netlab.Alice, "logs"))))
	}
}
