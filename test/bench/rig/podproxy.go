package rig

import (
	"bufio"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// proxyRole is to pods/proxy what `kubectl port-forward` is to port-forward: each
// connection to a local port becomes a stream of raw bytes to a pod, through an
// HTTP Upgrade of its own at the API server.
type proxyRole struct {
	Kubeconfig string
	Pod        string            // namespace/name
	Port       int               // of the pod's HTTP server
	Listen     map[string]string // local address -> path below /stream/ of testapp
}

func (r *proxyRole) start() (stop func(), err error) {
	config, err := clientcmd.BuildConfigFromFlags("", r.Kubeconfig)
	if err != nil {
		return nil, err
	}
	security, err := rest.TLSConfigFor(config)
	if err != nil {
		return nil, err
	}
	security.NextProtos = []string{"http/1.1"}
	for addr, service := range r.Listen {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return nil, err
		}
		go func() {
			for {
				in, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer in.Close()
					if out, err := r.dial(config, security, service); err == nil {
						join(in, out)
					}
				}()
			}
		}()
	}
	return func() {}, nil
}

// join copies both ways until one of them ends.
func join(a, b net.Conn) {
	defer a.Close()
	defer b.Close()
	done := make(chan struct{}, 2)
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		go func() {
			// Without the kernel's splice, which only some of the ways could use.
			_, _ = io.CopyBuffer(struct{ io.Writer }{way[0]}, struct{ io.Reader }{way[1]}, make([]byte, 256<<10))
			done <- struct{}{}
		}()
	}
	<-done
}

func (r *proxyRole) dial(config *rest.Config, security *tls.Config, service string) (net.Conn, error) {
	base, _, err := rest.DefaultServerUrlFor(config)
	if err != nil {
		return nil, err
	}
	namespace, name, _ := strings.Cut(r.Pod, "/")
	target := fmt.Sprintf("%s/api/v1/namespaces/%s/pods/%s:%d/proxy/stream/%s", base, namespace, name, r.Port, service)
	req, err := http.NewRequest(http.MethodGet, target, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "testapp")
	if config.BearerToken != "" {
		req.Header.Set("Authorization", "Bearer "+config.BearerToken)
	}
	conn, err := tls.Dial("tcp", base.Host, security)
	if err != nil {
		return nil, err
	}
	br := bufio.NewReader(conn)
	err = req.Write(conn)
	if err == nil {
		var resp *http.Response
		if resp, err = http.ReadResponse(br, req); err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
			err = errors.New(resp.Status)
		}
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &buffered{conn, io.MultiReader(io.LimitReader(br, int64(br.Buffered())), conn)}, nil
}

// buffered is a connection some bytes of which were read already.
type buffered struct {
	net.Conn
	r io.Reader
}

func (b *buffered) Read(p []byte) (int, error) { return b.r.Read(p) }

// StartPodProxy runs the relay on the laptop; the ports of testapp's echo, sink and
// source are offered at base+0, +2 and +3, as 9000, 9002 and 9003 are theirs.
func (n *Namespace) StartPodProxy(kubeconfig, pod string, base uint16) (*Process, error) {
	r := &proxyRole{Kubeconfig: kubeconfig, Pod: pod, Port: 8080, Listen: map[string]string{}}
	for i, service := range map[uint16]string{0: "echo", 2: "sink", 3: "source"} {
		r.Listen[netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), base+i).String()] = service
	}
	return n.start(role{Proxy: r}, "")
}
