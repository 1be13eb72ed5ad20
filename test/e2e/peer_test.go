//go:build e2e

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/daemon/api"
	"github.com/culvert-dev/culvert/test/netlab"
)

// wireguardGo builds the program of the module that culvert is built with.
func wireguardGo(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "wireguard-go")
	cmd := exec.Command("go", "build", "-o", path, "golang.zx2c4.com/wireguard")
	cmd.Dir = lab.Repo
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("building wireguard-go: %v\n%s", err, out)
	}
	return path
}

// guest is a machine with wireguard-go, wg-quick and a resolvconf that writes
// what wg-quick gives it, as Debian's does.
func guest(t *testing.T, name string, number int, wireguard string) *netlab.Guest {
	t.Helper()
	g, err := lab.NewGuest(name, number)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	resolvconf := "#!/bin/sh\n[ \"$1\" = -a ] || exit 0\ncat > /etc/resolv.conf\n"
	if err := os.WriteFile(filepath.Join(g.Dir, "bin", "resolvconf"), []byte(resolvconf), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(wireguard, filepath.Join(g.Dir, "bin", "wireguard-go")); err != nil {
		t.Fatal(err)
	}
	return g
}

// join brings a guest's WireGuard up with a configuration as culvert printed it.
func join(t *testing.T, g *netlab.Guest, name, config string) {
	t.Helper()
	file := filepath.Join(g.Dir, name+".conf")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	on(t, g, "wg-quick up "+file)
}

// on runs a command on a guest and wants exit code 0.
func on(t *testing.T, g *netlab.Guest, command string) string {
	t.Helper()
	r := g.Run(command)
	if r.Code != 0 {
		t.Fatalf("%s: %v\n%s", command, r, g.Run("wg; ip address; ip route; cat /etc/resolv.conf").Stdout)
	}
	return strings.TrimSpace(r.Stdout)
}

// dialGuest opens a TCP connection from a guest.
func dialGuest(t *testing.T, g *netlab.Guest, addr string, timeout time.Duration) (net.Conn, error) {
	t.Helper()
	var c net.Conn
	err := g.Inside(func() (err error) {
		c, err = net.DialTimeout("tcp", addr, timeout)
		return err
	})
	if err == nil {
		t.Cleanup(func() { c.Close() })
	}
	return c, err
}

func peers(t *testing.T) map[string]api.Peer {
	t.Helper()
	r := lab.Culvert(netlab.Alice, "peer", "list", "-o", "json")
	var list []api.Peer
	if err := json.Unmarshal([]byte(r.Stdout), &list); r.Code != 0 || err != nil {
		t.Fatalf("peer list: %v, %v", r, err)
	}
	all := map[string]api.Peer{}
	for _, p := range list {
		all[p.Name] = p
	}
	return all
}

// peerConfig is what `peer add -o json` prints.
type peerConfig struct {
	api.PeerConfig
	Config string
}

func addPeer(t *testing.T, args ...string) (c peerConfig) {
	t.Helper()
	r := lab.Culvert(netlab.Alice, append([]string{"peer", "add", "-o", "json"}, args...)...)
	if err := json.Unmarshal([]byte(r.Stdout), &c); r.Code != 0 || err != nil {
		t.Fatalf("peer add %v: %v, %v\nlogs: %v", args, r, err, lab.Culvert(netlab.Alice, "logs"))
	}
	return c
}

// TestPeer: machines with nothing but stock WireGuard join by the agent's UDP
// port with the configuration as it is printed, reach what a session reaches, and
// neither each other nor the laptop.
func TestPeer(t *testing.T) {
	link(t, "--pods", "on")
	s := connect(t)
	wireguard := wireguardGo(t)
	phone, mac := guest(t, "phone", 20, wireguard), guest(t, "mac", 21, wireguard)

	added := lab.Culvert(netlab.Alice, "peer", "add", "phone", "--qr")
	if added.Code != 0 || !strings.Contains(added.Stderr, "█") {
		t.Fatalf("peer add --qr: %v", added)
	}
	join(t, phone, "phone", added.Stdout)
	file := filepath.Join(mac.Dir, "key")
	key := on(t, mac, "umask 077; wg genkey > "+file+"; wg pubkey < "+file)
	config := addPeer(t, "mac", "--public-key", key)
	if config.PrivateKey != "" || strings.Contains(config.Config, "\nPrivateKey") {
		t.Errorf("a private key for who has one: %+v", config)
	}
	join(t, mac, "mac", strings.Replace(config.Config, "[Interface]\n", "[Interface]\nPrivateKey = "+on(t, mac, "cat "+file)+"\n", 1))

	pods, services := podIPs(t), serviceIPs(t)
	t.Run("reach", func(t *testing.T) {
		for _, g := range []*netlab.Guest{phone, mac} {
			for _, ip := range append(pods, services...) {
				c, err := dialGuest(t, g, net.JoinHostPort(ip, "9000"), 10*time.Second)
				if err != nil {
					t.Errorf("%s: %v\n%s", ip, err, g.Run("wg; ip route get "+ip).Stdout)
					continue
				}
				echo(t, c, make([]byte, 1<<20))
			}
			for _, ip := range pods {
				on(t, g, "ping -n -c 2 -W 3 "+ip)
				if route := on(t, g, "ip route get "+ip); !strings.Contains(route, "dev phone") && !strings.Contains(route, "dev mac") {
					t.Errorf("%s is not reached by WireGuard: %s", ip, route)
				}
			}
			for _, name := range []string{"echo.demo", "echo.demo.svc.cluster.local", "www.example.test"} {
				if got := on(t, g, "getent ahostsv4 "+name+" | awk 'NR==1{print $1}'"); got == "" {
					t.Errorf("%s does not resolve", name)
				}
			}
			if got := on(t, g, "curl -sS --max-time 10 http://echo.demo/healthz"); got != "ok" {
				t.Errorf("curl by name: %s", got)
			}
		}
		speed := on(t, phone, "curl -sS --max-time 50 -o /dev/null -w '%{speed_download} %{size_download}' http://echo.demo/bytes?n=100000000")
		if !strings.HasSuffix(speed, " 100000000") {
			t.Errorf("a download of 100 MB: %s", speed)
		}
		t.Logf("download by one connection: bytes a second, bytes: %s", speed)
		if r := phone.Run("ping -n -c 1 -W 2 10.244.1.250"); r.Code == 0 {
			t.Error("a dead address answers pings")
		}
		if r := phone.Run("curl -sS --max-time 5 http://" + net.JoinHostPort(pods[0], "4444")); r.Code != 7 { // refused
			t.Errorf("a closed port: %v", r)
		}
	})
	t.Run("list", func(t *testing.T) {
		all := peers(t)
		for _, name := range []string{"phone", "mac"} {
			if p := all[name]; p.LastHandshake.IsZero() || p.Stale || p.Sent == 0 || p.Received == 0 || !strings.HasPrefix(p.From, "192.168.50.2") {
				t.Errorf("%s in the list: %+v", name, p)
			}
		}
		if all["mac"].PublicKey != key {
			t.Errorf("public key %s, want %s", all["mac"].PublicKey, key)
		}
		if r := lab.Culvert(netlab.Alice, "peer", "list"); strings.Count(r.Stdout, "connected") != 2 {
			t.Errorf("peer list: %v", r)
		}
	})
	t.Run("alone", func(t *testing.T) {
		all := peers(t)
		other := all["mac"].Addresses
		laptop := s.Addresses
		if len(other) != 2 || len(laptop) != 2 {
			t.Fatalf("addresses: %v, %v", other, laptop)
		}
		for i := range 2 {
			for who, addr := range map[string]string{"another peer": other[i].String(), "the laptop": laptop[i].Addr().String()} {
				on(t, phone, "ip route replace "+addr+" dev phone")
				// WireGuard itself shall not be what stops it.
				on(t, phone, "wg set phone peer $(wg show phone peers) allowed-ips 0.0.0.0/0,::/0")
				begun := time.Now()
				if c, err := dialGuest(t, phone, net.JoinHostPort(addr, "22"), 3*time.Second); err == nil {
					c.Close()
					t.Errorf("a peer reaches %s at %s", who, addr)
				} else if time.Since(begun) > 2*time.Second {
					t.Errorf("%s at %s: %v, want refused at once", who, addr, err)
				}
				if r := phone.Run("ping -n -c 1 -W 1 " + addr); r.Code == 0 {
					t.Errorf("a peer pings %s at %s", who, addr)
				}
			}
		}
		// On the way back nothing is open either: the session's routes know no peer.
		for _, a := range other {
			if route := root(t, "ip route get "+a.String()+" || true"); strings.Contains(route, s.Device) {
				t.Errorf("the laptop routes a peer's address: %s", route)
			}
		}
	})
	t.Run("refusals", func(t *testing.T) {
		for _, r := range []struct {
			args  []string
			code  int
			words string
		}{
			{[]string{"peer", "add", "phone"}, 1, `"phone" already`},
			{[]string{"peer", "add", "a b"}, 2, `"a b"`},
			{[]string{"peer", "add", "x", "--public-key", "nonsense"}, 2, `"nonsense"`},
			{[]string{"peer", "add", "x", "--public-key", key}, 1, `of peer "mac"`},
			{[]string{"peer", "add", "x", "--endpoint", "host:99999"}, 2, `host:99999`},
			{[]string{"peer", "add", "x", "--endpoint", "host:1", "--nodeport"}, 2, `host:1`},
			{[]string{"peer", "add", "x", "--context", "elsewhere"}, 1, "elsewhere"},
			{[]string{"peer", "remove", "nobody"}, 1, `"nobody"`},
		} {
			got := lab.Culvert(netlab.Alice, r.args...)
			if lines := strings.Split(strings.TrimSpace(got.Stderr), "\n"); got.Code != r.code || !strings.Contains(got.Stderr, r.words) || len(lines) < 2 {
				t.Errorf("%v: %v, want code %d, %q and a hint", r.args, got, r.code, r.words)
			}
		}
		if r := lab.Culvert(netlab.Bob, "peer", "list"); r.Code != 1 || !strings.Contains(r.Stderr, "no session") {
			t.Errorf("somebody else's: %v", r)
		}
	})

	open, err := dialGuest(t, phone, net.JoinHostPort(pods[0], "9000"), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Run("session restarts", func(t *testing.T) {
		pid := status(t, netlab.Alice)[0].PID
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		echo(t, open, []byte("meanwhile"))
		eventually(t, 30*time.Second, func() error {
			if now := status(t, netlab.Alice)[0]; now.State != api.Connected || now.PID == pid || now.PID == 0 {
				return fmt.Errorf("%+v", now)
			}
			return nil
		})
		echo(t, open, []byte("afterwards"))
		if all := peers(t); len(all) != 2 || all["phone"].Stale || all["mac"].Stale {
			t.Errorf("peers: %+v", all)
		}
	})
	t.Run("remove", func(t *testing.T) {
		if r := lab.Culvert(netlab.Alice, "peer", "remove", "phone"); r.Code != 0 {
			t.Fatal(r)
		}
		if err := tryEcho(open, []byte("too late"), 3*time.Second); err == nil {
			t.Error("an open connection outlives its peer")
		}
		if r := phone.Run("curl -sS --max-time 3 http://" + net.JoinHostPort(services[0], "80") + "/healthz"); r.Code == 0 {
			t.Errorf("a removed peer reaches the cluster: %v", r)
		}
		on(t, mac, "curl -sS --max-time 10 http://echo.demo/healthz")
	})
	t.Run("agent replaced", func(t *testing.T) {
		kubectl(t, "-n", s.Agent.Namespace, "delete", "pod", s.Agent.Pod, "--wait")
		eventually(t, 60*time.Second, func() error {
			if now := status(t, netlab.Alice)[0]; now.State != api.Connected || now.Agent.Pod == s.Agent.Pod {
				return fmt.Errorf("%+v", now)
			}
			return nil
		})
		if all := peers(t); len(all) != 1 || !all["mac"].Stale {
			t.Errorf("peers: %+v, want a stale one", all)
		}
		on(t, mac, "wg-quick down "+filepath.Join(mac.Dir, "mac.conf"))
		// The new one comes by a node port.
		config := addPeer(t, "mac", "--nodeport")
		if host, port, _ := net.SplitHostPort(config.Endpoint); !strings.HasPrefix(host, "172.30.0.") || port == "51820" {
			t.Errorf("endpoint %s is not a node's", config.Endpoint)
		}
		join(t, mac, "mac", config.Config)
		on(t, mac, "curl -sS --max-time 10 http://echo.demo/healthz")
		if all := peers(t); len(all) != 1 || all["mac"].Stale {
			t.Errorf("peers: %+v, want a live one", all)
		}
	})
}
