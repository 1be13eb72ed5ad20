//go:build e2e

package e2e

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/culvert-dev/culvert/test/netlab"
)

// words splits what kubectl's jsonpath prints.
func words(t *testing.T, args ...string) []string {
	t.Helper()
	return strings.Fields(kubectl(t, args...))
}

// podIPs are all addresses of the echo pods, both families, both nodes.
func podIPs(t *testing.T) []string {
	return words(t, "-n", "demo", "get", "pods", "-l", "app=echo", "-o", "jsonpath={.items[*].status.podIPs[*].ip}")
}

func serviceIPs(t *testing.T) []string {
	return words(t, "-n", "demo", "get", "service", "echo", "-o", "jsonpath={.spec.clusterIPs[*]}")
}

// within dials from the laptop's namespace with the kernel's own routes.
func within(t *testing.T, network, addr string, timeout time.Duration) (net.Conn, error) {
	t.Helper()
	var c net.Conn
	err := lab.Inside(func() (err error) {
		c, err = net.DialTimeout(network, addr, timeout)
		return err
	})
	return c, err
}

func dial(t *testing.T, network, addr string) net.Conn {
	t.Helper()
	c, err := within(t, network, addr, 10*time.Second)
	if err != nil {
		t.Fatalf("dialling %s %s: %v", network, addr, err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// echo sends b and wants it back.
func echo(t *testing.T, c net.Conn, b []byte) {
	t.Helper()
	if err := tryEcho(c, b, 20*time.Second); err != nil {
		t.Fatalf("echo of %d bytes at %s: %v", len(b), c.RemoteAddr(), err)
	}
}

func tryEcho(c net.Conn, b []byte, timeout time.Duration) error {
	if err := c.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := c.Write(b); err != nil {
		return err
	}
	back := make([]byte, len(b))
	if _, err := io.ReadFull(c, back); err != nil {
		return err
	}
	if !bytes.Equal(b, back) {
		return errors.New("other bytes came back")
	}
	return nil
}

func TestReach(t *testing.T) {
	s := connect(t)
	pods, services := podIPs(t), serviceIPs(t)
	if len(pods) != 4 || len(services) != 2 {
		t.Fatalf("want dual-stack pods on both nodes and a dual-stack Service, have pods %v, Service %v", pods, services)
	}

	t.Run("TCP", func(t *testing.T) {
		for _, ip := range append(pods, services...) {
			echo(t, dial(t, "tcp", net.JoinHostPort(ip, "9000")), []byte("hello"))
		}
	})
	t.Run("UDP", func(t *testing.T) {
		for _, ip := range append(pods, services...) {
			c := dial(t, "udp", net.JoinHostPort(ip, "9001"))
			echo(t, c, []byte("hello"))
			big := make([]byte, 25<<10)
			rand.Read(big)
			echo(t, c, big)
		}
	})
	t.Run("ping", func(t *testing.T) {
		for _, ip := range pods {
			if r := lab.Run(netlab.Root, "ping", "-n", "-c", "2", "-W", "3", ip); r.Code != 0 {
				t.Errorf("ping %s: %v", ip, r)
			}
		}
		// An address where nobody is must not answer.
		if r := lab.Run(netlab.Root, "ping", "-n", "-c", "1", "-W", "2", "10.244.1.250"); r.Code == 0 {
			t.Errorf("a dead address answers pings: %v", r)
		}
	})
	t.Run("names", func(t *testing.T) {
		service, pod := services[0], ""
		web0 := words(t, "-n", "demo", "get", "pod", "web-0", "-o", "jsonpath={.status.podIP}")[0]
		for _, ip := range pods {
			if strings.HasPrefix(ip, "10.244.") {
				pod = ip
				break
			}
		}
		dev := words(t, "-n", "dev", "get", "service", "echo", "-o", "jsonpath={.spec.clusterIP}")[0]
		for name, want := range map[string]string{
			"echo":                               service,
			"echo.demo":                          service,
			"echo.demo.svc":                      service,
			"echo.demo.svc.cluster.local":        service,
			"echo.demo.svc.culvert-test.culvert": service,
			"echo.dev":                           dev,
			"echo-headless.demo":                 pod,
			"web-0.web":                          web0,
			"web-0.web.demo":                     web0,
			"web-0.web.demo.svc.cluster.local":   web0,
			"www.example.test":                   "198.51.100.80",
			// Namespaces "dev" and "default" are no reason to ask the cluster.
			"go.dev":            "198.51.100.80",
			"www.dev-corp.test": "198.51.100.80",
		} {
			got := sh(t, "getent ahostsv4 "+name+" | awk '{print $1}' | sort -u")
			if !strings.Contains(got+"\n", want+"\n") {
				t.Errorf("%s is %q, want %s", name, got, want)
			}
		}
		if got := sh(t, "getent ahostsv6 echo.demo.svc.cluster.local | awk '{print $1}' | sort -u"); got != services[1] {
			t.Errorf("AAAA of echo.demo is %q, want %s", got, services[1])
		}
		server := resolver(t)
		for _, q := range []struct{ question, want string }{
			{"SRV _http._tcp.echo.demo.svc.cluster.local", " 80 echo.demo.svc.cluster.local."},
			{"SRV _http._tcp.echo.demo", " 80 echo.demo.svc.cluster.local."},
			{"+tcp A echo.demo.svc.cluster.local", service},
			{"AAAA echo.demo", services[1]},
			{"-x " + service, "echo.demo.svc.cluster.local."},
		} {
			if got := sh(t, "dig +short +time=3 +tries=1 @"+server+" "+q.question); !strings.Contains(got, q.want) {
				t.Errorf("dig %s: %q, want %q in it", q.question, got, q.want)
			}
		}
		for question, want := range map[string]string{
			"A no-such.demo.svc.cluster.local": "NXDOMAIN",
			"TXT echo.demo.svc.cluster.local":  "NOERROR",
			"A no-such.example.test":           "NXDOMAIN",
			"A go.dev":                         "NOERROR",
			"A echo.demo.svc.cluster.local":    "NOERROR",
		} {
			if got := sh(t, "dig +time=3 +tries=1 @"+server+" "+question+" | grep -o 'status: [A-Z]*'"); got != "status: "+want {
				t.Errorf("dig %s: %s, want %s", question, got, want)
			}
		}
		if got := sh(t, "curl -sS --max-time 10 http://echo.demo/healthz -o /dev/null -w '%{http_code}'"); got != "200" {
			t.Errorf("curl http://echo.demo: %s", got)
		}
	})
	t.Run("refused", func(t *testing.T) {
		for _, ip := range pods {
			begun := time.Now()
			_, err := within(t, "tcp", net.JoinHostPort(ip, "4444"), 10*time.Second)
			if !errors.Is(err, syscall.ECONNREFUSED) || time.Since(begun) > 3*time.Second {
				t.Errorf("a closed port of %s: %v after %v, want connection refused at once", ip, err, time.Since(begun))
			}
		}
	})
	t.Run("dead address", func(t *testing.T) {
		// As on a node: nobody answers ARP, which the kernel reports as "no
		// route to host" after 3 s, or the dial times out; it never connects.
		_, err := within(t, "tcp", "10.244.1.250:80", 6*time.Second)
		var timeout net.Error
		if !(errors.As(err, &timeout) && timeout.Timeout()) && !errors.Is(err, syscall.EHOSTUNREACH) {
			t.Errorf("a dead address: %v, want a time-out or no route to host", err)
		}
	})
	t.Run("13 PUTs of 20 MiB", func(t *testing.T) { puts(t, services[0]) })
	t.Run("API server past the tunnel", func(t *testing.T) {
		for _, addr := range []string{"172.30.0.10", "192.168.50.9", "192.168.50.1"} {
			if got := sh(t, "ip route get "+addr); strings.Contains(got, s.Device) {
				t.Errorf("%s goes into the tunnel: %s", addr, got)
			}
		}
	})
	t.Run("the machine's own network", func(t *testing.T) {
		if got := sh(t, "getent ahostsv4 www.example.test | head -1 | awk '{print $1}'"); got != "198.51.100.80" {
			t.Errorf("www.example.test is %q", got)
		}
		root(t, "ping -c1 -W2 192.168.50.1")
	})
	t.Run("culvert ping", func(t *testing.T) {
		for _, target := range []string{"echo", "svc/echo", "echo.demo", pods[0], services[0] + ":9000", "pod/web-0"} {
			if r := lab.Culvert(netlab.Alice, "ping", "-c", "2", target); r.Code != 0 {
				t.Errorf("ping %s: %v", target, r)
			}
		}
		if r := lab.Culvert(netlab.Alice, "ping", "-c", "1", "10.244.1.250"); r.Code != 1 {
			t.Errorf("ping of a dead address: %v", r)
		}
	})
	t.Run("last address of a range", func(t *testing.T) { lastAddress(t, s.Agent.Node) })
}

// resolver is the first nameserver that programs on the laptop use.
func resolver(t *testing.T) string {
	t.Helper()
	return sh(t, "awk '/^nameserver/{print $2; exit}' /etc/resolv.conf")
}

// puts uploads 13 bodies at once and compares what the pod counted.
func puts(t *testing.T, service string) {
	const count, size = 13, 20 << 20
	var wg sync.WaitGroup
	for i := range count {
		wg.Add(1)
		go func() {
			defer wg.Done()
			body := make([]byte, size)
			rand.Read(body)
			sum := sha256.Sum256(body)
			var c net.Conn
			err := lab.Inside(func() (err error) {
				c, err = net.DialTimeout("tcp", net.JoinHostPort(service, "80"), 10*time.Second)
				return err
			})
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
			client := http.Client{Transport: &http.Transport{Dial: func(string, string) (net.Conn, error) { return c, nil }}}
			req, _ := http.NewRequest("PUT", "http://echo.demo/sha256", bytes.NewReader(body))
			resp, err := client.Do(req)
			if err != nil {
				t.Errorf("PUT %d: %v", i, err)
				return
			}
			defer resp.Body.Close()
			text, _ := io.ReadAll(resp.Body)
			if !strings.Contains(string(text), hex.EncodeToString(sum[:])) || !strings.Contains(string(text), fmt.Sprint(size)) {
				t.Errorf("PUT %d arrived otherwise: %s", i, text)
			}
		}()
	}
	wg.Wait()
}

// serveEcho answers TCP at addr on a machine of the cluster until the test ends.
func serveEcho(t *testing.T, machine, addr string) {
	t.Helper()
	var l net.Listener
	if err := netlab.In(machine, func() (err error) {
		l, err = net.Listen("tcp", addr)
		return err
	}); err != nil {
		t.Fatalf("listening at %s on %s: %v", addr, machine, err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
}

// lastAddress: 10.244.1.255 and the like are addresses as any other inside a
// routed range; a device with a routed subnet would treat them as broadcast. The
// pods of such a node do have one, so it is the node that the agent is not on.
func lastAddress(t *testing.T, agentNode string) {
	run := func(args ...string) {
		if r := lab.Cluster(args...); r.Code != 0 {
			t.Fatalf("%v: %v", args, r)
		}
	}
	node, prefix := "node1", "10.244.1."
	if agentNode == node {
		node, prefix = "node2", "10.244.2."
	}
	for _, ip := range []string{prefix + "255", prefix + "0"} {
		// The node itself answers there: host routes win over its bridge's subnet.
		run("exec", node, "--", "sh", "-c", "ip route del broadcast "+ip+" table local 2>/dev/null; ip addr add "+ip+"/32 dev lo")
		t.Cleanup(func() { lab.Cluster("exec", node, "--", "ip", "addr", "del", ip+"/32", "dev", "lo") })
		serveEcho(t, node, ip+":9000")
		var err error
		for range 20 {
			var c net.Conn
			if c, err = within(t, "tcp", ip+":9000", 2*time.Second); err == nil {
				err = tryEcho(c, []byte("edge"), 5*time.Second)
				c.Close()
				break
			}
			time.Sleep(200 * time.Millisecond)
		}
		if err != nil {
			t.Errorf("%s: %v", ip, err)
		}
	}
}
